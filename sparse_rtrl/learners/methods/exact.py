"""Real-time recurrent learning: the influence of every parameter on every state entry."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_rtrl.capture.chain_capture import ChainCapture
from sparse_rtrl.capture.parameter_uses import SegmentGraph
from sparse_rtrl.capture.parameters import ParameterGroups, RecurrentParameter
from sparse_rtrl.capture.segment import Factors, StepJacobian
from sparse_rtrl.capture.step_chain import StepChain, pull_back
from sparse_rtrl.cells.slot_cell import Routing
from sparse_rtrl.influence.estimate import MAX_WINDOW_STEPS, check_memory
from sparse_rtrl.influence.sparse import Influence, check_finite
from sparse_rtrl.learners.methods.past import Past, too_late

COMMIT_SECONDS, PULL_BACK_SECONDS, FLOPS = 5e-4, 2e-5, 1e11
"""What ``commit_every="auto"`` assumes of commits and of steps of a pull-back, beside arithmetic at that rate."""


class Exact(Past):
    """The influence matrix itself, ``P <- J P + F`` (Williams & Zipser 1989), by segments (Schmidhuber 1992).

    Keeps ``B (H + 1) |θ|`` numbers. A segment of ``n`` steps costs ``(2 H + H^2 / n) |θ|`` multiply-adds per step and
    stream.
    """

    name: ClassVar[str] = "exact"
    _groups: ParameterGroups | None = None
    _influence: Influence | None = None
    _chain_capture: ChainCapture | None = None
    _window_steps = 0

    def _allocate(self, parameters: list[RecurrentParameter], end: Tensor) -> None:
        groups = ParameterGroups(parameters, [], 0)
        batch, hidden = end.shape
        remedy = "Use fewer streams or a smaller state, exclude parameters, or take an approximate method"
        check_memory(groups, hidden, batch, end, remedy)
        influence = Influence(groups, batch, 1, hidden, 1, "eager", end.dtype, end.device)
        if self._influence is not None:
            influence.adopt(self._influence)
            self._window_steps = 0
        self._groups, self._influence, self._chain_capture = groups, influence, ChainCapture(groups)

    def _close(self, end: Tensor, entry: Tensor | None, graph: SegmentGraph) -> None:
        assert self._influence is not None
        if entry is None or self._window_is_full(end.shape[1]):
            self._influence.commit()
            self._window_steps = 0
        captured = self._captured(end, entry, graph)
        steps = captured.count if isinstance(captured, StepChain) else _applications(captured)
        window = self._influence.window
        if window and type(window[0]) is not type(captured):  # a window holds pieces of one class
            window[:] = [_as_step(piece) for piece in window]
            captured = _as_step(captured)
        self._influence.record([captured])
        if entry is None:  # no loss can reach anything before it
            self._influence.commit()
            return
        self._window_steps += steps

    def _captured(self, end: Tensor, entry: Tensor | None, graph: SegmentGraph) -> StepChain | StepJacobian:
        """The Jacobians of the segment, step by step if it is a chain of simple steps, else as one map."""
        assert self._chain_capture is not None
        none = torch.zeros(end.shape[0], 0, dtype=torch.int64, device=end.device)
        whole = torch.zeros(end.shape[0], 1, dtype=torch.int64, device=end.device)
        routing = Routing(none, whole, none)
        chain = None
        if entry is not None and not self.dense:
            chain = self._chain_capture.segment(end, entry, [p.tensor for p in self.parameters], routing)
        if chain is not None:
            total = chain.total().expand(len(end), 1)
            check_finite(self.segments, {"the state": end, "a Jacobian of the segment": total})
            if self.verifier.due():
                assert self._groups is not None
                stream, c = self.verifier.cotangent(end)
                direct, _ = self._groups.zero_gradients(c)
                u = pull_back([chain], c, direct)
                self._verify(end, entry, graph, stream, c, u, direct)
            return chain
        J, factors = self._jacobians(end, entry, graph)
        return StepJacobian(J, routing, factors, Factors(J.new_zeros(end.shape[0], 0, end.shape[1], 0), ()))

    def _window_is_full(self, hidden_size: int) -> bool:
        assert self._influence is not None
        if self.commit_every == "auto":
            batch, rows, columns = self._influence.core.shape
            steps = max(self._window_steps, 1)
            if steps >= min(hidden_size, MAX_WINDOW_STEPS):
                return True
            # A longer window shares the cost of a commit; in return every loss goes back through more of its steps.
            segments = len(self._influence.window)
            commit = COMMIT_SECONDS + 2.0 * batch * rows**2 * columns / FLOPS
            return segments * steps >= 2.0 * commit / PULL_BACK_SECONDS
        return len(self._influence.window) >= int(self.commit_every)

    def gradients(self, index: int, u: Tensor) -> dict[str, Tensor]:
        """See :meth:`Past.gradients`."""
        if self._influence is None or self._groups is None:
            return {}
        position = index - (self.segments - len(self._influence.window))
        if position < 0:
            raise too_late()
        parts = self._groups.split(*self._influence.loss_gradient(position, u, index))
        return {p.name: g for p, g in zip(self._groups.core, parts, strict=True)}

    def reset(self, streams: Tensor) -> None:
        """See :meth:`Past.reset`."""
        if self._influence is not None:
            self._influence.reset(streams)
            self._window_steps = 0

    def influence(self) -> dict[str, Tensor]:
        """See :meth:`Past.influence`."""
        return {} if self._influence is None else self._influence.matrices()

    def kept_bytes(self) -> int:
        """See :meth:`Past.kept_bytes`."""
        core = None if self._influence is None else self._influence.core
        return 0 if core is None else core.numel() * core.element_size()

    def _forget(self) -> None:
        self._groups = self._influence = self._chain_capture = None
        self._window_steps = 0

    def _save(self) -> Any:
        assert self._influence is not None
        self._influence.commit()
        return self._influence.state_dict()

    def _load(self, kept: Any) -> None:
        assert self._influence is not None
        device = self._influence.core.device
        self._influence.load_state_dict(kept, lambda state: StepJacobian.from_state_dict(state, device))


def _applications(captured: StepJacobian) -> int:
    """Steps of a segment that was captured as one map: how often it applied the map it used most."""
    return max((term.tau for term in captured.core.terms), default=1)


def _as_step(captured: Any) -> StepJacobian:
    """A segment as one step with dense factors."""
    return captured.as_step if isinstance(captured, StepChain) else captured
