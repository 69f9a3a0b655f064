"""How far the gradient of sparse RTRL is from that of BPTT, parameter by parameter."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparse_rtrl.cells.diagonal_cell import DiagonalCell
from sparse_rtrl.cells.slot_cell import Routing, SlotCell
from sparse_rtrl.training.baselines import BPTT
from sparse_rtrl.training.gradient_method import GradientMethod, SparseRTRL
from sparse_rtrl.training.tasks import Batch

EXACT_TOLERANCE = 1e-12
"""Largest error of a float64 gradient."""
RATIO_TOLERANCE = 2.0
"""Largest error of the float32 RTRL gradient, as a multiple of that of float32 BPTT."""


@dataclass(frozen=True)
class GradientError:
    """One parameter at one length and precision.

    Attributes:
        length: steps of the sequences.
        dtype: ``float64`` or ``float32``.
        parameter: its name.
        error: relative error against float64 BPTT; see :func:`relative_error`.
        bptt_error: the same for BPTT in this dtype.
        cosine: cosine between the two gradients; 1 if both are zero.
    """

    length: int
    dtype: str
    parameter: str
    error: float
    bptt_error: float
    cosine: float

    def allowed(self) -> float:
        """Largest error that passes: absolute in float64, relative to BPTT's own plus one rounding in float32."""
        if self.dtype == "float64":
            return EXACT_TOLERANCE
        return RATIO_TOLERANCE * self.bptt_error + torch.finfo(torch.float32).eps

    @property
    def passed(self) -> bool:
        """Whether the error is within its tolerance."""
        return self.error <= self.allowed()


class _Recorded:
    """Stands in for ``cell.route`` and replays recorded indices, since rounding can flip a top-k.

    A step is recognised by where its input lies in memory: a learner may ask for the same step more than once.
    """

    def __init__(self, x: Tensor, routings: list[Routing]) -> None:
        self.inputs = x  # keeps the memory alive
        self.routings = {x_t.data_ptr(): routing for x_t, routing in zip(x, routings, strict=True)}

    def __call__(self, x: Tensor, state: Tensor) -> Routing:
        return self.routings[x.data_ptr()]


def _gradients(method: GradientMethod, cell: nn.Module, batch: Batch) -> dict[str, Tensor]:
    cell.zero_grad(set_to_none=True)
    for _ in method.segments(batch):
        pass
    method.complete_gradient()
    return {
        name: torch.zeros_like(p, dtype=torch.float64) if p.grad is None else p.grad.double()
        for name, p in cell.named_parameters()
    }


def _record(cell: SlotCell, batch: Batch) -> list[Routing]:
    routings: list[Routing] = []
    state = cell.initial_state(batch.x.shape[1])
    with torch.no_grad():
        for x in batch.x:
            routings.append(cell.route(x, state))
            _, _, state = cell(x, state, routings[-1])
    return routings


def relative_error(gradient: Tensor, reference: Tensor, scale: Tensor) -> float:
    """``‖g − g_ref‖ / max(‖g_ref‖, 1e-3 · scale)``; some gradients are exactly zero, hence the second term.

    Args:
        gradient: of one parameter, any shape.
        reference: its true value, in equal shape.
        scale: a number, the norm of the reference over all parameters.
    """
    return float((gradient - reference).norm() / torch.maximum(reference.norm(), 1e-3 * scale))


def gradient_errors(
    cell: SlotCell | DiagonalCell,
    batch: Batch,
    segment: int = 1,
    dtypes: Iterable[torch.dtype] = (torch.float64, torch.float32),
    buffer: int = 64,
    commit_every: int | Literal["auto"] | None = None,
    catch_up: Literal["auto", "eager", "replay", "product"] = "auto",
) -> list[GradientError]:
    """Compare sparse RTRL with float64 BPTT on one batch, both following the routing of the float64 run.

    Args:
        cell: the cell; it is copied, not changed.
        batch: sequences ``(T, B, ...)``.
        segment: steps per segment of RTRL.
        dtypes: precisions to run in.
        buffer: see :class:`~sparse_rtrl.RTRL`.
        commit_every: see :class:`~sparse_rtrl.RTRL`.
        catch_up: see :class:`~sparse_rtrl.RTRL`.

    Returns:
        One entry per dtype and parameter.
    """
    length, batch_size = batch.target.shape
    exact_cell = copy.deepcopy(cell).double()
    routings = _record(exact_cell, Batch(batch.x.double(), batch.target)) if isinstance(exact_cell, SlotCell) else []

    def run(dtype: torch.dtype, rtrl: bool) -> dict[str, Tensor]:
        copied = copy.deepcopy(exact_cell).to(dtype)
        method: GradientMethod = (
            SparseRTRL(copied, batch_size, segment, buffer, commit_every, catch_up) if rtrl else BPTT(copied)
        )
        x = batch.x.to(dtype)
        if isinstance(copied, SlotCell):
            copied.route = _Recorded(x, routings)  # type: ignore[method-assign]
        return _gradients(method, copied, Batch(x, batch.target))

    reference = run(torch.float64, rtrl=False)
    scale = torch.stack([g.norm() for g in reference.values()]).norm()
    errors = []
    for dtype in dtypes:
        bptt = reference if dtype == torch.float64 else run(dtype, rtrl=False)
        for name, gradient in run(dtype, rtrl=True).items():
            expected = reference[name]
            both = gradient.norm() * expected.norm()
            cosine = (
                float((gradient * expected).sum() / both) if both > 0 else float(gradient.norm() == expected.norm())
            )
            errors.append(
                GradientError(
                    length,
                    str(dtype).removeprefix("torch."),
                    name,
                    relative_error(gradient, expected, scale),
                    relative_error(bptt[name], expected, scale),
                    cosine,
                )
            )
    return errors
