"""Methods that keep one captured segment back until its loss has gone backwards."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Generic, TypeVar

from torch import Tensor

from sparse_rtrl.influence.sparse import check_finite
from sparse_rtrl.learners.methods.past import Past, too_late
from sparse_rtrl.ops.precision import full_precision

Captured = TypeVar("Captured")


class PendingPast(Past, Generic[Captured]):
    """A past that is brought up to date with a segment when the next one is closed.

    The loss of a segment needs the influence on the state that entered it, so the update waits until then.
    """

    _pending: Captured | None = None

    def gradients(self, index: int, u: Tensor) -> dict[str, Tensor]:
        """See :meth:`Past.gradients`."""
        check_finite(index, {"the gradient of the loss": u})
        if index >= self.segments:
            self._settle()
        elif index < self.segments - (self._pending is not None):
            raise too_late()
        return self._product(u) if self.parameters else {}

    def reset(self, streams: Tensor) -> None:
        """See :meth:`Past.reset`."""
        self._settle()
        self._clear(streams)

    @full_precision
    def _settle(self) -> None:
        """Bring the influence up to date with the segment that was kept back."""
        if self._pending is not None:
            self._advance(self._pending)
            self._pending = None

    def _admit(self, *arguments: Any) -> None:
        self._settle()
        super()._admit(*arguments)

    def _forget(self) -> None:
        self._pending = None

    @abstractmethod
    def _advance(self, captured: Captured) -> None:
        """Move the influence through a segment."""

    @abstractmethod
    def _clear(self, streams: Tensor) -> None:
        """Set the influence of the streams in ``streams (B,)`` bool to zero."""

    @abstractmethod
    def _product(self, u: Tensor) -> dict[str, Tensor]:
        """``u`` times the influence, summed over the streams, by name and in the parameters' shapes."""
