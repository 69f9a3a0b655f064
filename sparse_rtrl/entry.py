"""Where a segment's graph begins: its entry state, through which a backward pass reaches the past."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Entry(Protocol):
    """Answers the gradient of a loss with respect to the entry state of a segment."""

    def gradients(self, u: Tensor) -> Sequence[Tensor | None]:
        """Gradients through the past, one per tensor given to :class:`EnterSegment`, for ``u = dL/dh_entry``."""


class EnterSegment(torch.autograd.Function):
    """Identity on the entry state whose backward pass gives the parameters their gradient through the past.

    ``EnterSegment.apply(entry, state, *tensors)`` returns the state; ``tensors`` are the parameters.
    """

    @staticmethod
    def forward(ctx: Any, entry: Entry, state: Tensor, *tensors: Tensor) -> Tensor:
        """Return the state as a new tensor."""
        ctx.entry = entry
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:  # type: ignore[override]
        """Ask the entry for the gradients of the parameters."""
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True is not supported: the influence is not differentiable")
        wanted = ctx.needs_input_grad[2:]
        gradients = ctx.entry.gradients(u)
        return None, None, *(g if want else None for g, want in zip(gradients, wanted, strict=True))
