"""Gradients by plain autograd, and the loops that compare a learner with them."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_rtrl import RTRL, SlotCell
from sparse_rtrl.cells.slot_cell import Routing


def inputs(steps: int, batch: int, features: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random inputs ``(T, B, features + 1)``, the last one the step number."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, batch, features + 1, generator=generator, dtype=torch.float64)
    x[..., -1] = torch.arange(steps).unsqueeze(1)
    return x.to(dtype)


def cotangents(steps: int, batch: int, outputs: int = 2, seed: int = 1, density: float = 0.4) -> Tensor:
    """``dL/doutput (T, B, outputs)``, different everywhere and zero at random steps; never zero at the last."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(steps, batch, outputs, generator=generator, dtype=torch.float64)
    keep = torch.rand(steps, 1, 1, generator=generator) < density
    keep[-1] = True
    return c * keep


def gradients_of(cell: SlotCell) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in cell.named_parameters()}


def bptt(
    cell: SlotCell,
    x: Tensor,
    c: Tensor,
    resets: dict[int, Tensor] | None = None,
    routings: list[Routing] | None = None,
    truncate: int | None = None,
) -> dict[str, Tensor]:
    """Gradient of ``sum_t <output_t, c_t>`` by backpropagation through the whole past.

    Args:
        cell: the cell.
        x: inputs ``(T, B, ...)``.
        c: cotangents ``(T, B, outputs)``.
        resets: mask ``(B,)`` of the streams that start anew before a step.
        routings: recorded routing to replay.
        truncate: cut the graph every so many steps (a wrong gradient, for showing that a comparison is alive).
    """
    cell.zero_grad(set_to_none=True)
    initial = state = cell.initial_state(x.shape[1])
    loss = torch.zeros((), dtype=c.dtype)
    for t in range(len(x)):
        if resets and t in resets:
            state = torch.where(resets[t].view(-1, 1, 1), initial, state)
        if truncate and t % truncate == 0:
            state = state.detach()
        output, _, state = cell(x[t], state, None if routings is None else routings[t])
        loss = loss + (output * c[t].to(output)).sum()
    loss.backward()
    found = gradients_of(cell)
    cell.zero_grad(set_to_none=True)
    return found


def online(
    learner: RTRL,
    x: Tensor,
    c: Tensor,
    segment: int = 1,
    resets: dict[int, Tensor] | None = None,
    every_step: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """The same gradient from a learner: segments of ``segment`` steps, cut short before resets."""
    cell, t = learner.cell, 0
    cell.zero_grad(set_to_none=True)
    while t < len(x):
        if resets and t in resets:
            learner.reset(resets[t])
        stop = min([t + segment, len(x), *(r for r in (resets or {}) if r > t)])
        outputs = learner.unroll(x[t:stop]) if stop > t + 1 else learner(x[t]).unsqueeze(0)
        if bool(c[t:stop].any()):
            (outputs * c[t:stop].to(outputs)).sum().backward()
        t = stop
        if every_step is not None:
            every_step(t)
    learner.flush()
    return gradients_of(cell)


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest of ``‖g − g_ref‖ / max(‖g_ref‖, 1e-3 · ‖g_ref over all parameters‖)`` over the parameters."""
    whole = torch.stack([g.double().norm() for g in expected.values()]).norm()
    assert whole > 0
    return max(
        float((found[n].double() - g.double()).norm() / torch.maximum(g.double().norm(), 1e-3 * whole))
        for n, g in expected.items()
    )
