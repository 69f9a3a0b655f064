"""Real-time recurrent learning: the influence of every parameter on every state entry."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_rtrl.estimate import MAX_WINDOW_STEPS, check_memory
from sparse_rtrl.influence import Influence
from sparse_rtrl.jacobian import Factors, StepJacobian
from sparse_rtrl.methods.past import Past, too_late
from sparse_rtrl.parameter_uses import SegmentGraph
from sparse_rtrl.parameters import ParameterGroups, RecurrentParameter
from sparse_rtrl.slot_cell import Routing


class Exact(Past):
    """The influence matrix itself, ``P <- J P + F`` (Williams & Zipser 1989), by segments (Schmidhuber 1992).

    Keeps ``B (H + 1) |θ|`` numbers. A segment of ``n`` steps costs ``(2 H + H^2 / n) |θ|`` multiply-adds per step and
    stream.
    """

    name: ClassVar[str] = "exact"
    _groups: ParameterGroups | None = None
    _influence: Influence | None = None
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
        self._groups, self._influence = groups, influence

    def _close(self, end: Tensor, entry: Tensor, graph: SegmentGraph) -> None:
        assert self._influence is not None
        J, factors = self._jacobians(end, entry, graph)
        steps = max((term.tau for term in factors.terms), default=1)
        if self._window_is_full(end.shape[1]):
            self._influence.commit()
            self._window_steps = 0
        none = torch.zeros(end.shape[0], 0, dtype=torch.int64, device=end.device)
        whole = torch.zeros(end.shape[0], 1, dtype=torch.int64, device=end.device)
        empty = Factors(J.new_zeros(end.shape[0], 0, end.shape[1], 0), ())
        self._influence.record([StepJacobian(J, Routing(none, whole, none), factors, empty)])
        self._window_steps += steps

    def _window_is_full(self, hidden_size: int) -> bool:
        assert self._influence is not None
        if self.commit_every == "auto":
            return self._window_steps >= min(hidden_size, MAX_WINDOW_STEPS)
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
        self._groups = self._influence = None
        self._window_steps = 0

    def _save(self) -> Any:
        assert self._influence is not None
        return self._influence.state_dict()

    def _load(self, kept: Any) -> None:
        assert self._influence is not None
        self._influence.load_state_dict(kept)
