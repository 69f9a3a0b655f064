"""SnAp-1: the influence of a parameter on the state entries it reaches within one step."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sparse_rtrl.capture.parameter_uses import SegmentGraph
from sparse_rtrl.learners.methods.pattern import PatternPast


class SnAp1(PatternPast):
    """Sparse n-step approximation with n = 1: ``P <- M ⊙ (J P + F)`` (Menick et al. 2021, section 3).

    ``M`` is the pattern of the immediate Jacobian of one segment, see :class:`PatternPast`. With segments of one step
    it is the original; longer segments make the pattern, the memory and the agreement with the exact gradient grow
    together. Keeps ``B q |θ|`` numbers and costs ``q^2 |θ|`` multiply-adds per segment and stream on top of the
    capture.
    """

    name: ClassVar[str] = "snap1"

    def _kept_part(self, J: Tensor, end: Tensor, entry: Tensor, graph: SegmentGraph) -> Tensor:
        return J
