"""Real-time recurrent learning: the influence of every parameter on every state entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparse_rtrl.capture.calls import Call, Calls, Chain, NoChain
from sparse_rtrl.capture.parameter_uses import SegmentGraph, walk, without_hooks
from sparse_rtrl.capture.parameters import ParameterGroups, RecurrentParameter
from sparse_rtrl.capture.recurrent_layers import single_steps
from sparse_rtrl.capture.segment import Factors, StepJacobian
from sparse_rtrl.capture.tape_capture import NotTaped, TapeCapture
from sparse_rtrl.capture.taped import TapedSteps
from sparse_rtrl.capture.verify import PROBE_SCALE, tolerance_of
from sparse_rtrl.cells.slot_cell import Routing
from sparse_rtrl.influence.estimate import MAX_WINDOW_STEPS, check_memory
from sparse_rtrl.influence.sparse import Influence, check_finite
from sparse_rtrl.learners.methods.past import Past, too_late

COMMIT_SECONDS, PULL_BACK_SECONDS, FLOPS = 5e-4, 2e-5, 1e11
"""What ``commit_every="auto"`` assumes of commits and of steps of a pull-back, beside arithmetic at that rate."""


NOT_TRACED = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.jit.ScriptModule)
"""Wrappers whose calls talk to other processes or devices, or are no Python code. What they wrap may be traced."""


class Exact(Past):
    """The influence matrix itself, ``P <- J P + F`` (Williams & Zipser 1989), by segments (Schmidhuber 1992).

    Keeps ``B (H + 1) |θ|`` numbers. A segment of ``n`` steps costs ``(2 H + H^2 / n) |θ|`` multiply-adds per step and
    stream.
    """

    name: ClassVar[str] = "exact"
    _groups: ParameterGroups | None = None
    _influence: Influence | None = None
    _traced: tuple[tuple[Calls, TapeCapture], ...] = ()
    """Notes the calls of a module and captures them: of the whole, and of each module in it."""
    _chosen: int | None = None
    """Which of these captured the last segment; None while all of them listen."""
    _noted: tuple[dict[int, list[Call]], list[Tensor]] | None = None
    """The calls of the segment that is closed next, and the tensors of the state behind it."""
    _failed = 0
    """Segments in a row that none of them could capture."""
    _silent = 0
    """Segments for which none of them listens, since it was in vain."""
    _window_steps = 0

    def trace(
        self,
        module: nn.Module,
        batch_dim: int,
        flat: Callable[[list[Any]], Tensor],
        unflat: Callable[[Tensor, list[Any]], list[Any]],
    ) -> None:
        """Capture by the row tape of the module's calls where that is possible; see :class:`TapeCapture`."""
        modules = [m for m in module.modules() if not isinstance(m, NOT_TRACED)]
        # Of a module that torch.compile wrapped, its own code is traced: a trace must not compile anything.
        codes = [getattr(m, "_orig_mod", m) for m in modules]
        self._traced = tuple(
            (Calls(m), TapeCapture(code, batch_dim, flat, unflat)) for m, code in zip(modules, codes, strict=True)
        )
        for _, tape in self._traced:
            tape.carry(self.parameters)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what notes calls: a copy of the module has none of its hooks."""
        return {**vars(self), "_traced": (), "_noted": None, "_chosen": None}

    def listen(self, entry: list[Tensor]) -> None:
        """Note the calls of the module that follow.

        Args:
            entry: the tensors of the state that the next segment begins with, as the caller gets them, ``(B, ...)``.
        """
        if self._silent:
            self._silent -= 1
            return
        for number, (calls, _) in enumerate(self._traced):
            if self._chosen in (None, number):
                calls.begin(entry)

    def hear(self, end: list[Tensor]) -> None:
        """Note no more calls.

        Args:
            end: the tensors of the state that the segment ended with, as the caller gave them, ``(B, ...)``.
        """
        noted = {number: calls.end() for number, (calls, _) in enumerate(self._traced) if calls.listening}
        self._noted = (noted, end) if noted else None

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
        for _, tape in self._traced:
            tape.carry(parameters)

    def _close(self, end: Tensor, entry: Tensor | None, graph: SegmentGraph) -> None:
        self._noted = None
        if entry is None or self._window_is_full(end.shape[1]):
            self._commit()
        captured = self._captured(end, entry, graph)
        self._record(captured, _applications(captured))
        if entry is None:  # no loss can reach anything before it
            self._commit()

    def _record(self, captured: TapedSteps | StepJacobian, steps: int) -> None:
        assert self._influence is not None
        window = self._influence.window
        if window and type(window[0]) is not type(captured):
            self._commit()  # a window holds pieces of one class
        self._influence.record([captured])
        self._window_steps += steps

    def _commit(self) -> None:
        assert self._influence is not None
        self._influence.commit()
        self._window_steps = 0
        for _, tape in self._traced:
            tape.begin_window()

    def _captured(self, end: Tensor, entry: Tensor | None, graph: SegmentGraph) -> StepJacobian:
        """The Jacobians of the segment as one map, from its graph."""
        none = torch.zeros(end.shape[0], 0, dtype=torch.int64, device=end.device)
        whole = torch.zeros(end.shape[0], 1, dtype=torch.int64, device=end.device)
        routing = Routing(none, whole, none)
        J, factors = self._jacobians(end, entry, graph)
        return StepJacobian(J, routing, factors, Factors(J.new_zeros(end.shape[0], 0, end.shape[1], 0), ()))

    def close_by_tape(
        self,
        end: Tensor,
        entry: Tensor,
        selected: list[RecurrentParameter],
        check: Callable[[list[Any]], None],
    ) -> bool:
        """Capture a segment from the module's calls; False, with nothing recorded, if its graph has to serve.

        Args:
            end: state that left it, ``(B, H)``, with its graph.
            entry: state that entered it, ``(B, H)``.
            selected: parameters that may be carried.
            check: refuses a segment by nodes of its graph.

        Raises:
            ContractError, MemoryError, NonFiniteError: as :meth:`close`.
        """
        if self._noted is None or end.device.type != "cpu" or not len(end):
            return False
        (noted, state), self._noted = self._noted, None
        reasons: dict[int, str] = {}
        # The finest steps first: a module that is called at every step rather than one that loops over them.
        for number in sorted(noted, key=lambda n: (-len(noted[n]), -n)):
            calls, tape = self._traced[number]
            try:
                chain = single_steps(calls.module, calls.chain(noted[number], state))
                # The graph behind a chain is that of the module: there is nothing else in it to look for.
                check([t.grad_fn for tensors in chain.states[1:] for t in tensors])
                steps = self._taped(tape, chain, end, entry, selected)
            except (NoChain, NotTaped) as reason:
                reasons[number] = str(reason)
                continue
            self._chosen, self._failed = number, 0
            self._record(steps, steps.count)
            self.segments += 1
            return True
        self._left_to_graph(reasons)
        return False

    def _left_to_graph(self, reasons: dict[int, str]) -> None:
        """Tell why, and let all modules listen again; more and more rarely if that is in vain."""
        number, reason = min(reasons.items())  # what the whole module said, if it was called
        self._traced[number][1].note(reason)
        self._chosen = None
        self._failed += 1
        self._silent = min(2 ** max(0, self._failed - 4), 1024) - 1

    def _taped(
        self, tape: TapeCapture, chain: Chain, end: Tensor, entry: Tensor, selected: list[RecurrentParameter]
    ) -> TapedSteps:
        """The steps of a chain of calls, after checking them.

        Raises:
            NotTaped: if they cannot be traced.
        """
        self._make_room(tape.reached(chain, end, selected), end, selected)
        if self._window_is_full(end.shape[1]):
            self._commit()
        steps = tape.segment(chain, end)
        self._check_steps(tape, steps, end, entry)
        return steps

    def _check_steps(self, tape: TapeCapture, steps: TapedSteps, end: Tensor, entry: Tensor) -> None:
        """Refuse what is not finite, and compare with autograd where that is due.

        Raises:
            NotTaped: if a kind of step that is new disagrees.
            DisagreementError: if a known kind does.
        """
        assert self._groups is not None and tape.kind is not None
        check_finite(self.segments, {"the state": end, "a Jacobian of the segment": steps.total().expand(len(end), 1)})
        kind, hooked, due = tape.kind, self.verifier.hooked, self.verifier.due()
        if hooked or not kind.certain:
            agrees, certain = self._agrees(steps, end, entry)
            if not agrees and not hooked:  # hooks may be gone in the next segment
                tape.refuse("its tape disagrees with an ordinary backward pass")
            if not agrees:
                raise NotTaped("its tape disagrees with an ordinary backward pass")
            kind.certain |= certain
        if due:
            graph = walk(end, entry.grad_fn)
            stream, c = self.verifier.cotangent(end)
            direct, none = self._groups.zero_gradients(c)
            u = TapedSteps.pull_back([steps], c, direct, none)
            self._verify(end, entry, graph, stream, c, u, direct)

    def _agrees(self, steps: TapedSteps, end: Tensor, entry: Tensor) -> tuple[bool, bool]:
        """Whether a random row vector pulled back by the tape agrees with autograd, and whether that shows much.

        It does not where a gradient is zero, as that of a weight that multiplies a state of zeros. Half of the streams
        have no cotangent, and must get none: no stream may reach another one.
        """
        assert self._groups is not None
        generator = torch.Generator(device="cpu").manual_seed(0)
        c = torch.randn(end.shape, device="cpu", generator=generator, dtype=torch.float64).to(end)
        silent = torch.randperm(len(end), device="cpu", generator=generator)[: len(end) // 2]
        c[silent] = 0
        tensors = [p.tensor for p in self.parameters]
        wanted = [t for t in (entry, *tensors) if t.requires_grad]
        # Larger than gradients are, so that a hook that clips them shows; a power of two scales exactly.
        with without_hooks(tensors):
            seen = torch.autograd.grad(end, wanted, PROBE_SCALE * c, retain_graph=True, allow_unused=True)
        by_input = {id(t): g for t, g in zip(wanted, seen, strict=True)}
        if by_input[id(entry)] is not None and bool(by_input[id(entry)][silent].any()):
            return False, False
        core, none = self._groups.zero_gradients(c)
        v = TapedSteps.pull_back([steps], c, core, none)
        found = [v, *self._groups.split(core, none)]
        pairs = [(mine, by_input[id(t)]) for mine, t in zip(found, (entry, *tensors), strict=True) if id(t) in by_input]
        errors = torch.stack([(mine if its is None else mine - its / PROBE_SCALE).abs().amax() for mine, its in pairs])
        sizes = torch.stack([mine.abs().amax() for mine, _ in pairs])
        # What is not finite is not judged here; the caller refuses the segment.
        agrees = not bool((errors > tolerance_of(end.dtype) * torch.maximum(sizes, 1e-2 * sizes.amax())).any())
        return agrees, bool((sizes > 0).all() & torch.isfinite(errors).all())

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
            for _, tape in self._traced:
                tape.begin_window()

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
        self._commit()
        return self._influence.state_dict()

    def _load(self, kept: Any) -> None:
        assert self._influence is not None
        device = self._influence.core.device
        self._influence.load_state_dict(kept, lambda state: StepJacobian.from_state_dict(state, device))


def _applications(captured: StepJacobian) -> int:
    """Steps of a segment that was captured as one map: how often it applied the map it used most."""
    return max((term.tau for term in captured.core.terms), default=1)
