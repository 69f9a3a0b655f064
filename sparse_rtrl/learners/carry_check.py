"""Comparison of carried gradients with backpropagation through the whole past, on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_rtrl.capture.verify import tolerance_of
from sparse_rtrl.errors import ContractError


class CarriesState(Protocol):
    """A :class:`~sparse_rtrl.Carry`."""

    module: nn.Module

    def __call__(self, state: Any) -> Any:
        """Close a segment and return the state for the next one."""


Step: TypeAlias = Callable[[Any, Any], Any]
"""One or more steps: an input and a state to the new state."""


def compare_with_bptt(carry: CarriesState, step: Step, xs: Sequence[Any], h: Any) -> dict[str, float]:
    """Error of the gradient of a random loss of every new state, against backpropagation through the whole past.

    Args:
        carry: a new one; the trainable parameters of its module are compared, their ``.grad`` is left as it was.
        step: see :data:`Step`; runs one segment.
        xs: its inputs, one per segment.
        h: the first state.

    Returns:
        ``‖g - g_ref‖ / max(‖g_ref‖, 1e-3 ‖g_ref of all parameters‖)`` by parameter.

    Raises:
        ContractError: naming the parameters whose error is more than rounding.
    """
    named = [(name, p) for name, p in carry.module.named_parameters() if p.requires_grad]
    kept = [p.grad for _, p in named]
    devices = [p.device for _, p in named if p.is_cuda]
    try:
        with torch.enable_grad():
            found: list[list[Tensor]] = []
            for end_segment in (_stay, carry):
                for _, p in named:
                    p.grad = None
                with torch.random.fork_rng(devices):  # both passes draw the same random numbers
                    _run(end_segment, step, xs, h)
                found.append([torch.zeros_like(p) if p.grad is None else p.grad for _, p in named])
    finally:
        for (_, p), grad in zip(named, kept, strict=True):
            p.grad = grad
    expected, carried = found
    if not any(bool(g.any()) for g in expected):
        raise ValueError("xs must lead to a loss that depends on the parameters, but every gradient is zero")
    whole = torch.stack([g.norm().double() for g in expected]).norm()
    errors = {
        name: float((mine - its).norm().double() / torch.maximum(its.norm().double(), 1e-3 * whole))
        for (name, _), mine, its in zip(named, carried, expected, strict=True)
    }
    dtypes = {p.dtype.to_real() if p.is_complex() else p.dtype for _, p in named}
    wrong = {name: error for name, error in errors.items() if not error <= max(map(tolerance_of, dtypes))}
    if wrong:
        listed = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        raise ContractError([f"the carried gradient differs from backpropagation through the whole past: {listed}"])
    return errors


def _stay(state: Any) -> Any:
    """What backpropagation through the whole past does between two segments."""
    return state


def _run(end_segment: Callable[[Any], Any], step: Step, xs: Sequence[Any], h: Any) -> None:
    """Run the segments with a random loss of every new state, and fill ``.grad``."""
    generator = torch.Generator().manual_seed(0)
    whole: Tensor | float = 0.0
    h = end_segment(h)
    for x in xs:
        h = step(x, h)
        parts = [part for part in pytree.tree_leaves(h) if isinstance(part, Tensor) and part.requires_grad]
        loss: Tensor | float = 0.0
        for part in parts:
            real = torch.view_as_real(part) if part.is_complex() else part
            loss = (
                loss
                + (
                    real * torch.randn(real.shape, device="cpu", generator=generator, dtype=torch.float64).to(real)
                ).sum()
            )
        h = end_segment(h)
        if end_segment is _stay:
            whole = whole + loss
        elif isinstance(loss, Tensor):
            loss.backward()
    if isinstance(whole, Tensor):
        whole.backward()
