"""Real-time recurrent learning for slot cells, as a drop-in for the forward call of a training loop."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_rtrl.capture.jacobian import StepJacobian
from sparse_rtrl.capture.slot_moe_pass import FusedSegment, FusedSteps, run_without_learning, runs_fused
from sparse_rtrl.capture.verify import Verify
from sparse_rtrl.cells.diagonal_cell import DiagonalCell
from sparse_rtrl.cells.slot_cell import Routing, SlotCell, gather_slots, scatter_slots
from sparse_rtrl.errors import ContractError
from sparse_rtrl.influence.estimate import MAX_COMMIT_EVERY, MAX_FUSED_COMMIT_EVERY, choose_commit_every
from sparse_rtrl.influence.plan import CatchUp
from sparse_rtrl.learners.attachment import Attachment
from sparse_rtrl.learners.cuda_graph import CannotRecord, FixedSteps
from sparse_rtrl.learners.engine import Capture, Engine
from sparse_rtrl.learners.entry import EnterSegment, SegmentEntry
from sparse_rtrl.ops import dispatch

_KINDS: list[tuple[type[nn.Module], type[RTRL]]] = []


def register_learner(cell: type[nn.Module], learner: type[RTRL]) -> None:
    """Have ``RTRL(cell, ...)`` make a learner of another class for cells of a class."""
    _KINDS.append((cell, learner))


class RTRL:
    """Online learner with the exact gradient through the whole past, in memory that does not grow with its length.

    The state lives in the learner. ``out = learner(x)`` takes one step, ``learner.unroll(xs)`` takes several as one
    segment; ``backward`` on a loss of the outputs fills ``.grad`` with the gradient through every step since the last
    reset, for parameters that did not change on the way; after an online update it is that of the path taken
    (Williams & Zipser 1989). Gradients of experts that sleep are deferred; :meth:`flush`, which :meth:`attach` hooks
    into the optimizer's step, adds them.

    Args:
        cell: the cell to train: a :class:`~sparse_rtrl.SlotCell`, or a :class:`~sparse_rtrl.DiagonalCell`, which gives
            a :class:`~sparse_rtrl.learners.diagonal_rtrl.DiagonalRTRL`.
        batch_size: streams ``B``.
        buffer: segments kept for sleeping experts; one that sleeps longer is brought up to date before its Jacobians
            leave the buffer. ``"auto"`` lets the planner choose at the first step.
        commit_every: steps between two influence updates. The gradient at every step is exact whatever it is; more
            steps cost less per step and need the captured factors of that many steps. ``"auto"`` takes the cheapest by
            the cost model of :func:`~sparse_rtrl.influence.estimate`, found at the first step; 1 is the textbook.
        catch_up: how sleeping experts catch up: ``"auto"``, ``"eager"``, ``"replay"`` or ``"product"``.
        backend: what computes the influence: see :func:`sparse_rtrl.ops.dispatch.select`.
        cuda_graph: record each call as CUDA graphs and replay them, see ``cuda_graph``. Every call is
            then one segment, committed by its backward or by the next call, whatever ``commit_every`` says, and all
            experts move at every commit (``catch_up="eager"``). NaN and infinity raise at the next :meth:`reset` or
            :meth:`state_dict`, not at once. A cell that cannot be recorded runs without, with a warning that says why.
            Recorded steps run no backward pass of their own, so ``verify`` does not see them; that what was captured is
            what ran, and that rows do not influence each other, is read one call late.
        capture: ``"auto"`` captures Jacobians as factors, in a compiled pass where the cell has one; ``"dense"`` takes
            each of them by ordinary backward passes, one per stream and written state entry: slow, and right even
            where a :class:`~sparse_rtrl.errors.DisagreementError` says that the others are not.
        verify: which calls are compared with an ordinary backward pass: ``"sample"`` (a random one in
            ``SAMPLE``), ``"always"``, ``"never"``, or an int for one in so many. A fault that
            shows in every call goes unnoticed for ``k`` calls with probability ``(1 - 1/n)^k``. On a CUDA device the
            verdict is read by :meth:`flush`, :meth:`reset` and :meth:`state_dict`.

    Raises:
        ContractError: if the cell couples the rows of a batch or draws random numbers.
        MemoryError: if the influence does not fit into memory, with the numbers.
        BackendError: if the backend is not there, with the remedy.
    """

    _attachments: tuple[Attachment, ...] = ()
    _starting: Tensor | None = None
    """Streams ``(B,)`` bool that take their first step from the initial state next; None if there are none."""

    def __new__(cls, cell: nn.Module | None = None, *args: Any, **kwargs: Any) -> RTRL:
        """A learner of the kind that the cell needs."""
        if cell is None:  # copied or unpickled
            return super().__new__(cls)
        kinds = [learner for kind, learner in _KINDS if isinstance(cell, kind)]
        if kinds and cls is RTRL:
            return super().__new__(kinds[-1])
        if not kinds and not isinstance(cell, SlotCell):
            raise TypeError(
                f"cell must be a SlotCell or a DiagonalCell, got {type(cell).__name__}; for another module take"
                " Carry(module), for a stack Carry(stack) or the approximate PerLayerApproximation(stack, batch_size)"
            )
        return super().__new__(cls)

    def __init__(
        self,
        cell: SlotCell | DiagonalCell,
        batch_size: int,
        buffer: int | Literal["auto"] = "auto",
        commit_every: int | Literal["auto"] = "auto",
        catch_up: CatchUp = "auto",
        backend: dispatch.Backend = "auto",
        cuda_graph: bool = False,
        *,
        capture: Capture = "auto",
        verify: Verify = "sample",
    ) -> None:
        if commit_every != "auto" and (not isinstance(commit_every, int) or commit_every < 1):
            raise ValueError(f"commit_every must be 'auto' or an int of at least 1, got {commit_every!r}")
        if cuda_graph and catch_up not in ("auto", "eager"):
            raise ValueError(f"catch_up must be 'eager' or 'auto' with cuda_graph=True, got {catch_up!r}")
        path: CatchUp = "eager" if cuda_graph else catch_up
        self._engine = Engine(cell, batch_size, buffer, path, backend, capture, verify)  # type: ignore[arg-type]
        if cuda_graph and self._engine.device.type != "cuda":
            raise ValueError(f"cuda_graph=True needs a cell on a CUDA device, got one on {self._engine.device}")
        self.commit_every: int | Literal["auto"] = commit_every
        self._state, self._starting = self._initial(
            torch.ones(batch_size, dtype=torch.bool, device=self._engine.device)
        )
        self._last: tuple[SegmentEntry, Tensor, list[Tensor]] | None = None
        """Entry of the last segment, the state that entered it, and the recurrent tensors that it used."""
        self._routings: list[Routing] = []
        self._weights: list[Tensor] = []
        """Copies of the experts' tensors at the last call, where an optimizer that is not attached may change them."""
        self._paid = False
        """Whether owed gradients were paid or dropped since the last call."""
        self._fixed = FixedSteps(self._engine, self._state) if cuda_graph else None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what belongs to one process: graphs, recordings, and optimizers attached."""
        self._settle()
        kept = {**vars(self), "_last": None, "_attachments": ()}
        if self._fixed is not None:
            kept |= {"_fixed": None, "_recorded": True, "_state": self._fixed.state}
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The cell may itself be incomplete still, as when it holds its learner: it is not looked at.
        recorded = state.pop("_recorded", False)
        vars(self).update(state)
        if recorded:
            self._fixed = FixedSteps(self._engine, self._state)

    def __copy__(self) -> RTRL:
        """A learner of the same cell that stands where this one does, and goes its own way."""
        cell = self.cell
        shared = [*cell.modules(), *cell.parameters(), *cell.buffers()]
        return copy.deepcopy(self, {id(each): each for each in shared})

    @property
    def cell(self) -> SlotCell:
        """The cell being trained."""
        return self._engine.cell

    @property
    def batch_size(self) -> int:
        """Streams ``B``."""
        return self._engine.batch_size

    @property
    def state(self) -> Tensor:
        """A copy of the state after the last step, ``(B, S, D)``."""
        self._begin()
        return (self._state if self._fixed is None else self._fixed.state).clone()

    @property
    def entry_state(self) -> Tensor:
        """State that entered the last segment, ``(B, S, D)``, from which a backward pass reaches the past.

        A loss may depend on it beside the outputs: its gradient goes through the whole past. Add it to the loss of the
        outputs before their one backward pass.

        Raises:
            RuntimeError: before the first step.
        """
        if self._last is None:
            raise RuntimeError("entry_state is there after a step, but the learner has not taken one")
        entry, state, tensors = self._last
        entry = copy.copy(entry)  # it answers one gradient; those of several add up
        entry.used = False
        return EnterSegment.apply(entry, state, *tensors)

    @property
    def events(self) -> dict[str, int]:
        """How often sleeping experts woke, expired, were replayed or multiplied, and were paid."""
        return dict(self._engine.influence.events)

    def __call__(self, x: Tensor) -> Tensor:
        """Take one step.

        Args:
            x: input ``(B, ...)``.

        Returns:
            Output ``(B, ...)``; call ``backward`` on a loss of it before the window it belongs to is committed.

        Raises:
            RuntimeError: under ``no_grad``, or after a parameter changed its shape, dtype or device.
            ContractError: if the cell breaks its contract.
            NonFiniteError: if the new state or a Jacobian is not finite; the learner is then unchanged.
        """
        return self._run(x.unsqueeze(0) if isinstance(x, Tensor) else x)[0]

    def unroll(self, xs: Tensor) -> Tensor:
        """Take several steps as one segment: backpropagation inside it, influence across it.

        Args:
            xs: inputs ``(n, B, ...)``.

        Returns:
            Outputs ``(n, B, ...)``; call ``backward`` on a loss of them at most once.

        Raises:
            RuntimeError, ContractError, NonFiniteError: as :meth:`__call__`.
        """
        if not isinstance(xs, Tensor) or xs.dim() < 2 or xs.shape[0] < 1:
            raise ValueError(f"xs must be a tensor (n, B, ...) with n >= 1, got {_kind(xs)}")
        outputs = self._run(xs)
        return outputs if isinstance(outputs, Tensor) else torch.stack(outputs)

    def _run(self, xs: Tensor) -> Tensor | list[Tensor]:
        """Outputs of the steps, ``(n, B, ...)`` or one by one."""
        engine = self._engine
        check_learning_input(xs, engine)
        if self._fixed is not None and (fixed := self._run_fixed(self._fixed, xs)) is not None:
            return fixed
        with parametrize.cached():
            tensors = engine.checked_tensors()
            self._check_paid(tensors)
            self._begin()
            if self.commit_every == "auto":
                with torch.no_grad():
                    routing = engine.cell.route(xs[0], self._state)
                most = MAX_COMMIT_EVERY if engine.fused is None else MAX_FUSED_COMMIT_EVERY
                self.commit_every = choose_commit_every(engine.cell, engine.groups, routing, most)
            engine.influence.commit_every = self.commit_every
            entry = SegmentEntry(engine)
            state = EnterSegment.apply(entry, self._state, *tensors)
            run = self._run_fused if engine.fused is not None and engine.fused.usable(tensors) else self._run_captured
            outputs, captured, new_state, routings = run(xs, state, tensors)
        engine.influence.make_room(captured[0])
        entry.settle()
        self._last = (entry, self._state, tensors)
        engine.influence.record(captured)
        engine.steps += len(xs)
        self._state, self._starting = new_state.detach(), None
        self._routings = routings
        return outputs

    def _run_fixed(self, fixed: FixedSteps, xs: Tensor) -> Tensor | None:
        """Replay a segment; None if it cannot be recorded, and from then on nothing is."""
        fixed.finish()
        fixed.check_agreement()
        self._begin()
        try:
            outputs = fixed.run(xs, self._engine.checked_tensors(look=False))
        except CannotRecord as reason:
            warnings.warn(f"the steps run without CUDA graphs, as they cannot be recorded: {reason}", stacklevel=4)
            self._state, self._fixed = fixed.state, None
            return None
        self._engine.steps += len(xs)
        self._state, self._starting = fixed.state, None
        return outputs

    def _initial(self, streams: Tensor) -> tuple[Tensor, Tensor | None]:
        """The initial state, and which of the streams ``(B,)`` bool take that of their first step instead.

        What was drawn at random stays; all else may still change, as weights that are loaded now do.
        """
        before = torch.get_rng_state()
        initial = self._engine.initial_state()
        drawn = not torch.equal(before, torch.get_rng_state())
        return initial.detach(), None if drawn and not initial.requires_grad else streams

    def _begin(self) -> None:
        """Give streams that take their first step next the initial state of now, and its influence."""
        if self._starting is None:
            return
        initial = self._engine.begin(self._starting)
        self._set_state(torch.where(self._starting.view(-1, 1, 1), initial, self._state))

    def _check_paid(self, tensors: list[Tensor]) -> None:
        """Notice an optimizer that stepped without what sleeping experts are owed.

        Raises:
            RuntimeError: once for each time.
        """
        engine, deferred = self._engine, self._deferred()
        for attachment in self._attachments:
            attachment.watch(deferred)  # experts may have been unfrozen
        if engine.influence.tree is None or any(attached.pays(deferred) for attached in self._attachments):
            self._weights = []
            return
        now = [t.detach() for t, p in zip(tensors, engine.groups.all, strict=True) if p.expert]
        same = len(now) == len(self._weights) and all(map(torch.equal, now, self._weights))
        if same:
            self._paid = False
            return
        first, self._weights = not self._weights, [t.clone() for t in now]
        paid, self._paid = self._paid, False
        if not first and not paid and engine.influence.owes():
            raise RuntimeError(
                "parameters of experts changed while gradients of sleeping experts were owed to them: an optimizer"
                " stepped without these. Call learner.attach(optimizer) once, or learner.flush() before each step;"
                " learner.discard() drops them. The learner is as it was, and the next call goes on"
            )

    def _deferred(self) -> list[nn.Parameter]:
        """Parameters that gradients can be owed to."""
        if not isinstance(self._engine, Engine) or self._engine.catch_up == "eager":
            return []
        return [source for p in self._engine.groups.expert for source in p.sources]

    def _settle(self) -> None:
        """Let recorded steps commit what they still hold, and report what was not finite or disagrees."""
        if isinstance(self._engine, Engine):
            self._engine.verifier.settle()
        if self._fixed is not None:
            self._fixed.finish()
            self._fixed.check()

    def _run_captured(
        self, xs: Tensor, state: Tensor, tensors: list[Tensor]
    ) -> tuple[list[Tensor], list[StepJacobian], Tensor, list[Routing]]:
        """Run the cell's own code step by step, and capture the Jacobians of the steps."""
        engine = self._engine
        outputs, entered, routings, ran = [], [], [], []
        for number, x in enumerate(xs, engine.steps):
            before = state._version
            with torch.no_grad():
                routing = engine.checked_routing(engine.cell.route(x, state))
            if state._version != before:
                raise ContractError(["route must not change the state, which it did in place; let it work on a copy"])
            entered.append(state.detach())
            routings.append(routing)
            h_write_new, output = engine.cell.update(
                x, gather_slots(state, routing.read), gather_slots(state, routing.write), routing
            )
            self._check_update(h_write_new, output, routing)
            ran.append(h_write_new.detach())
            state = scatter_slots(state, routing.write, h_write_new.to(state.dtype))
            engine.check_new_state(state, routing, tensors, number)
            outputs.append(output)
        return outputs, engine.steps_of(xs, entered, routings, tensors, ran, engine.steps), state, routings

    def _run_fused(
        self, xs: Tensor, state: Tensor, tensors: list[Tensor]
    ) -> tuple[Tensor, list[FusedSteps], Tensor, list[Routing]]:
        """Run all steps in one compiled call."""
        engine = self._engine
        assert engine.fused is not None
        steps, slots, new_state = engine.fused.run(xs, state, tensors)
        engine.check_fused(steps, new_state, tensors)
        if engine.verifier.due():
            engine.fused.compare(steps, slots, self._state, new_state, tensors, engine.verifier, engine.steps)
        slots = FusedSegment.apply(steps, slots, state, *tensors)
        return engine.fused.outputs(steps, slots), [steps], new_state, steps.routings

    def _check_update(self, h_write_new: Tensor, output: Tensor, routing: Routing) -> None:
        expected = (self.batch_size, routing.write.shape[1], self.cell.slot_size)
        if tuple(h_write_new.shape) != expected:
            raise ContractError(
                [f"update must return the written slots first, shape {expected}, got {tuple(h_write_new.shape)}"]
            )
        if not isinstance(output, Tensor) or output.shape[:1] != (self.batch_size,):
            raise ContractError([f"update must return an output (B, ...) second, got {_kind(output)}"])

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Call :meth:`flush` before every step of an optimizer.

        The step raises a ``RuntimeError`` instead if ``.grad`` was changed since the backward pass, by clipping or
        unscaling, while anything is owed.

        Returns:
            A handle with ``remove()``.

        Raises:
            ValueError: for an optimizer that evaluates the loss several times in a step, such as LBFGS.
        """
        attachment = Attachment(optimizer, self.flush, self._owes, self._deferred())
        self._attachments = (*self._attachments, attachment)
        return attachment

    def _owes(self) -> bool:
        return self._fixed is None and self._engine.influence.owes()

    def flush(self) -> None:
        """Add to ``.grad`` what sleeping experts are owed; calling it again adds nothing.

        :meth:`attach` calls it before each optimizer step. Call it yourself before you clip or unscale gradients.
        """
        self._paid = True
        if self._fixed is None:  # else no expert sleeps
            self._engine.flush()

    def discard(self) -> None:
        """Drop the gradients that are owed, as ``zero_grad`` drops those in ``.grad``."""
        self._paid = True
        self._engine.influence.discard()

    def reset(self, streams: Tensor | None = None) -> None:
        """Start new sequences: initial state and zero influence. What the streams' sleepers are owed is paid first.

        Args:
            streams: boolean mask ``(B,)`` of the streams that start anew; None for all.

        Raises:
            ValueError: if ``streams`` is not a boolean mask of shape ``(B,)``.
        """
        engine = self._engine
        streams = engine.checked_mask(streams)
        self._settle()
        engine.influence.reset(streams)
        initial, starting = self._initial(streams)
        self._set_state(torch.where(streams.view(-1, 1, 1), initial, self._state))
        if self._starting is not None:
            starting = self._starting & ~streams if starting is None else self._starting | starting
        self._starting = starting

    def _set_state(self, state: Tensor) -> None:
        self._state = state if self._fixed is None else self._fixed.state.copy_(state)

    @property
    def routings(self) -> list[Routing]:
        """What the steps of the last call touched."""
        return self._routings

    def influence_norms(self) -> tuple[Tensor, Tensor]:
        """Frobenius norms of the influence, core ``(B,)`` and experts ``(B, E)``, in one pass over it.

        They are those of the last commit, and for a sleeping expert those of its last update.
        """
        self._settle()
        return self._engine.influence.norms()

    def cap_influence(self, largest: float) -> tuple[int, float]:
        """Scale the influence of every stream and group whose norm exceeds ``largest`` down to it.

        A brake for recurrences that have become unstable: the part of the gradient that goes through the past is then
        too small by as much, and no longer exact.

        Args:
            largest: Frobenius norm that none may exceed, positive.

        Returns:
            How many were scaled, and the largest norm there was.
        """
        if not largest > 0:
            raise ValueError(f"largest must be positive, got {largest}")
        self._settle()
        return self._engine.influence.cap_(largest)

    def influence(self) -> dict[str, Tensor]:
        """Influence ``dh/dθ`` of every recurrent parameter, ``(B, H, *shape)``, brought up to date."""
        self._settle()
        self._begin()
        return self._engine.influence.matrices()

    def evaluate(self) -> Evaluation:
        """A copy that runs from the current state without learning; it shares the parameters."""
        return Evaluation(self.cell, self.state.clone())

    def state_dict(self) -> dict[str, Any]:
        """State, influence, tree and window; with it and the cell's own, training resumes bit for bit.

        Taking it changes nothing, so a run that saves takes the same path as one that does not.
        """
        self._settle()
        return {
            "version": 2,
            "influence": self._engine.influence.state_dict(),
            "capture": self._engine.capture.state_dict(),
            "state": self._state.clone(),
            "steps": self._engine.steps,
            "commit_every": self.commit_every,
            "starting": None if self._starting is None else self._starting.clone(),
            "verifier": self._engine.verifier.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, for the same cell and options.

        Raises:
            ValueError: if it does not fit this learner; nothing is changed then.
        """
        if state.get("version") != 2:
            raise ValueError(f"state must be of version 2, got {state.get('version')!r}")
        missing = {"influence", "capture", "state", "steps", "commit_every"} - set(state)
        if missing:
            raise ValueError(f"state lacks {sorted(missing)}")
        self._settle()
        self._engine.influence.load_state_dict(state["influence"])
        self._engine.capture.load_state_dict(state["capture"])
        self._set_state(state["state"].to(self._engine.device, self._engine.dtype).clone())
        if self._fixed is not None:
            self._engine.influence.commit()  # recorded steps keep no window
        self._engine.steps = state["steps"]
        self.commit_every = state["commit_every"]
        starting = state.get("starting")
        self._starting = None if starting is None else starting.to(self._engine.device)
        if "verifier" in state:
            self._engine.verifier.load_state_dict(state["verifier"])
        self._weights, self._paid, self._last = [], False, None


class LearningEngine(Protocol):
    """What inputs are checked against."""

    batch_size: int
    device: torch.device
    cell: Any


_CALL_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Hooks that run when a module is called."""


def check_learning_input(xs: Tensor, engine: LearningEngine) -> None:
    """Refuse inputs ``(n, B, ...)`` and modes that a learning step cannot run with.

    Raises:
        RuntimeError: under ``no_grad``.
        ContractError: if the cell has hooks that only a call of it would run.
        ValueError: on anything else.
    """
    if any(getattr(engine.cell, name) for name in _CALL_HOOKS):
        raise ContractError(
            [
                "the cell has hooks of its own (as weight_norm, spectral_norm or prune of torch.nn.utils make), but a"
                " learner runs its parts and never calls it: put them on a submodule, or take a parametrization"
            ]
        )
    if not isinstance(xs, Tensor) or xs.dim() < 2:
        raise ValueError(f"x must be a tensor (B, ...), got {_kind(xs[0] if isinstance(xs, Tensor) else xs)}")
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "a learning step needs gradients, but they are disabled (no_grad or inference_mode): use"
            " learner.evaluate() to run the cell without learning"
        )
    if xs.shape[1] != engine.batch_size:
        raise ValueError(f"x must have batch size {engine.batch_size}, got shape {tuple(xs.shape[1:])}")
    if xs.requires_grad:
        raise ValueError(
            "x must not require a gradient: parameters before the cell would influence later states without being"
            " carried. Make them part of the cell, or detach x"
        )
    if xs.device != engine.device:
        raise ValueError(f"x must be on {engine.device}, where the learner was built, got {xs.device}")


class Evaluation:
    """Runs a cell on streams without learning, from :meth:`RTRL.evaluate`.

    Args:
        cell: the cell.
        state: state to start from, ``(B, S, D)``.
    """

    def __init__(self, cell: SlotCell, state: Tensor) -> None:
        self.cell = cell
        self.state = state

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Take one step: ``x (B, ...)`` to the output ``(B, ...)``."""
        output, _, self.state = self.cell(x, self.state)
        return output

    def unroll(self, xs: Tensor) -> Tensor:
        """Take several steps: ``xs (n, B, ...)`` to outputs ``(n, B, ...)``."""
        if runs_fused(self.cell, self.state):
            outputs, self.state = run_without_learning(self.cell, xs, self.state)
            return outputs
        return torch.stack([self(x) for x in xs])


def _kind(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
