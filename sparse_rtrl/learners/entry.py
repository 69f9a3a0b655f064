"""Where a segment's graph begins: its entry state, through which a backward pass reaches the past."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Entry(Protocol):
    """Answers the gradient of a loss with respect to the entry state of a segment."""

    def gradients(self, u: Tensor) -> Sequence[Tensor | None]:
        """Gradients through the past, one in its own shape per tensor of :class:`EnterSegment`, for ``u (B, ...)``."""


class SegmentEngine(Protocol):
    """What an entry needs of the engine that runs its segment."""

    steps: int

    @property
    def influence(self) -> Any:
        """Holds the captured steps in ``window``, whose identity is ``window_key``."""

    def past_gradients(self, position: int, u: Tensor, number: int) -> Sequence[Tensor | None]:
        """Gradients, in their own shapes, through the past before a segment, for ``u (B, ...)`` at its entry."""


class EnterSegment(torch.autograd.Function):
    """Identity on the entry state whose backward pass gives the parameters their gradient through the past.

    ``EnterSegment.apply(entry, state, *tensors)`` returns the state; ``tensors`` are the parameters.
    """

    @staticmethod
    def forward(ctx: Any, entry: Entry, state: Tensor, *tensors: Tensor) -> Tensor:
        """Return the state ``(B, ...)`` as a new tensor."""
        ctx.entry = entry
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:  # type: ignore[override]
        """Ask the entry for the gradients of the parameters, for ``u = dL/dh_entry (B, ...)``."""
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True is not supported: the influence is not differentiable")
        wanted = ctx.needs_input_grad[2:]
        gradients = ctx.entry.gradients(u)
        return None, None, *(g if want else None for g, want in zip(gradients, wanted, strict=True))


def graph_is_kept() -> bool:
    """Whether the backward pass that is running leaves its graph for another one (``retain_graph=True``)."""
    return torch._C._current_graph_task_id() >= 0 and torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]


class SegmentEntry:
    """The entry of a segment: receives ``dL/dh_entry`` in the backward pass and answers with gradients."""

    def __init__(self, engine: SegmentEngine) -> None:
        self.engine = engine
        self.step = engine.steps
        self.used = False
        self.position = 0
        self.window_key: object = None

    def settle(self) -> None:
        """Note the window, and the place in it, that the segment is about to take."""
        self.position = len(self.engine.influence.window)
        self.window_key = self.engine.influence.window_key

    def gradients(self, u: Tensor) -> Sequence[Tensor | None]:
        """Gradients through the past, one in its own shape per tensor of :class:`EnterSegment`, for ``u (B, ...)``."""
        if self.used:
            raise RuntimeError(
                "backward was called twice for the same output of the learner; add the losses up and call it once"
            )
        if self.window_key is not self.engine.influence.window_key:
            raise RuntimeError(
                "backward came too late: the influence has moved past this step. Call backward before the next step or"
                " reset, or take several steps as one segment with unroll; a larger commit_every only moves the point"
            )
        gradients = self.engine.past_gradients(self.position, u, self.step)
        self.used = True
        return gradients
