"""What a cell with compiled operations of its own offers: whole segments forward, and rows of Jacobians backward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sparse_rtrl.ops import dispatch


class Kept(NamedTuple):
    """What calls of :meth:`FusedPass.forward` kept for their backward pass, a list entry per call, oldest first.

    Attributes:
        inputs: ``(n, B, input_size)`` each.
        saved: ``(n, B, ...)`` each.
        indices: slots read, slots written and experts of every step, ``(n, B, kr + kw + k)`` int64 each.
        weights: those of :meth:`FusedPass.weights`, call after call.
        columns: first column of each parameter of :attr:`FusedPass.core` and :attr:`FusedPass.expert` in its group.
    """

    inputs: list[Tensor]
    saved: list[Tensor]
    indices: list[Tensor]
    weights: list[Tensor]
    columns: list[int]


class FusedPass(ABC):
    """Compiled operations that run whole segments of one cell, from ``SlotCell.fused_pass``.

    The general capture runs a cell's Python code for every step and again for its Jacobians. Here one call runs all
    steps of a segment and keeps what their backward pass reads; whatever is asked of the segment later is rows sent
    back through it: one row per stream for a loss, one row per written state entry for a commit.

    Args:
        cell: the cell.
    """

    core: ClassVar[tuple[str, ...]]
    """The cell's core parameters, in the order of their columns."""
    expert: ClassVar[tuple[str, ...]]
    """The parameters of its experts, likewise."""
    size_names: ClassVar[tuple[str, ...]]
    """The cell's attributes in :attr:`sizes`; the last three are slots read, slots written and experts of a step."""

    def available(self, backend: dispatch.Backend, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a backend has the operations for a device and dtype."""
        return dispatch.fused(backend, device, dtype)

    options: tuple[str, ...] = ()
    """Further choices that the backward pass depends on; fixed when the pass begins, and saved with steps."""

    def __init__(self, cell: Any) -> None:
        self.cell = cell

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the cell now, which saved steps must agree in."""
        return tuple(getattr(self.cell, name) for name in self.size_names)

    @abstractmethod
    def as_written(self) -> bool:
        """Whether the cell computes now what the operations compute: nothing replaced, no hooks, no autocast."""

    @abstractmethod
    def weights(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        """Those of the recurrent tensors, own shapes, that the backward pass reads, in the order of the operations."""

    @abstractmethod
    def forward(self, xs: Tensor, state: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run a segment, without gradient.

        Args:
            xs: inputs ``(n, B, input_size)``.
            state: state that enters the first step, ``(B, S, D)``.
            tensors: the recurrent tensors by name, in their own shapes, detached.

        Returns:
            The new state ``(B, S, D)``; the slots that the outputs look at (old content of the read ones, new content
            of the written ones), ``(n, B, kr + kw, D)``; what the backward pass reads, ``(n, B, ...)``; and slots read,
            slots written and experts, ``(n, B, kr + kw + k)`` int64.
        """

    @abstractmethod
    def outputs(self, xs: Tensor, slots: Tensor, index: Tensor) -> Tensor:
        """Outputs ``(n, B, ...)`` of a segment from what :meth:`forward` took and returned, with gradient."""

    @abstractmethod
    def evaluate(self, xs: Tensor, state: Tensor) -> tuple[Tensor, Tensor] | None:
        """Outputs ``(n, B, ...)`` and the new state, without gradient; None if the cell must run by itself."""

    @abstractmethod
    def pull_back_(self, v: Tensor, core: Tensor, experts: Tensor, cotangent: Tensor | None, kept: Kept) -> None:
        """Row vectors ``v (B, H)`` behind the last step back to before the first one, in place.

        Args:
            v: ``dL/dh`` behind the last step, ``(B, H)``.
            core: gradient of the core parameters at fixed entry state, ``(N_core,)``, added to.
            experts: that of the experts, ``(E, N_expert)``, added to.
            cotangent: ``dL/d slots`` of every step, ``(n, B, kr + kw, D)``, or None.
            kept: the steps.
        """

    @abstractmethod
    def transfer_(self, phi: Tensor, kept: Kept) -> None:
        """Rows ``phi (B, R, H)`` behind the last step back to before the first one, in place."""

    @abstractmethod
    def add_immediate_(self, core: Tensor, experts: Tensor, phi: Tensor, rows: Tensor, kept: Kept) -> None:
        """Add the immediate Jacobians of the steps to the influence behind them, in place.

        Args:
            core: ``(B, H + 1, N_core)``.
            experts: ``(B * E, H + 1, N_expert)``.
            phi: rows of the identity, ``(B, R, H)``; overwritten.
            rows: state entries that the steps write, ``(B, R)``.
            kept: the steps.
        """
