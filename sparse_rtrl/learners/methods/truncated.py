"""Truncated backpropagation through time: no past at all."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from sparse_rtrl.capture.parameter_uses import SegmentGraph
from sparse_rtrl.capture.parameters import RecurrentParameter
from sparse_rtrl.learners.methods.past import Past


class Truncated(Past):
    """The gradient ends at the segment, as with ``h = h.detach()`` (Williams & Peng 1990). Keeps and costs nothing."""

    name: ClassVar[str] = "truncated"

    def _allocate(self, parameters: list[RecurrentParameter], end: Tensor) -> None:
        pass

    def _forget(self) -> None:
        pass

    def _close(self, end: Tensor, entry: Tensor | None, graph: SegmentGraph) -> None:
        pass

    def gradients(self, index: int, u: Tensor) -> dict[str, Tensor]:
        """No gradients, see :meth:`Past.gradients`."""
        return {}

    def reset(self, streams: Tensor) -> None:
        """Nothing to forget, see :meth:`Past.reset`."""

    def influence(self) -> dict[str, Tensor]:
        """No influence, see :meth:`Past.influence`."""
        return {}

    def kept_bytes(self) -> int:
        """Nothing is kept."""
        return 0

    def _save(self) -> Any:
        return None

    def _load(self, kept: Any) -> None:
        pass
