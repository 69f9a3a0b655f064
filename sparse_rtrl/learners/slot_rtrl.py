"""Real-time recurrent learning for slot cells."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_rtrl.capture.verify import Verify
from sparse_rtrl.cells.slot_cell import SlotCell
from sparse_rtrl.influence.plan import CatchUp
from sparse_rtrl.learners.cuda_graph import CannotRecord, FixedSteps
from sparse_rtrl.learners.engine import Capture, Engine
from sparse_rtrl.learners.entry import EnterSegment, SegmentEntry
from sparse_rtrl.learners.rtrl import RTRL, check_learning_input, check_saved, register_learner
from sparse_rtrl.ops import dispatch


class SlotRTRL(RTRL):
    """What ``RTRL(cell, batch_size)`` makes for a :class:`~sparse_rtrl.SlotCell`; arguments as there."""

    _engine: Engine
    _starting: Tensor | None = None
    """Streams ``(B,)`` bool that take their first step from the initial state next; None if there are none."""

    def __init__(
        self,
        cell: SlotCell,
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
        super().__init__(cell, batch_size, commit_every=commit_every)
        if cuda_graph and catch_up not in ("auto", "eager"):
            raise ValueError(f"catch_up must be 'eager' or 'auto' with cuda_graph=True, got {catch_up!r}")
        path: CatchUp = "eager" if cuda_graph else catch_up
        self._engine = Engine(cell, batch_size, buffer, path, backend, capture, verify)
        if cuda_graph and self._engine.device.type != "cuda":
            raise ValueError(f"cuda_graph=True needs a cell on a CUDA device, got one on {self._engine.device}")
        self._state, self._starting = self._initial(
            torch.ones(batch_size, dtype=torch.bool, device=self._engine.device)
        )
        self._last: tuple[SegmentEntry, Tensor, list[Tensor]] | None = None
        """Entry of the last segment, the state that entered it, and the recurrent tensors that it used."""
        self._weights: list[Tensor] = []
        """Copies of the experts' tensors at the last call, where an optimizer that is not attached may change them."""
        self._flushed = False
        """Whether deferred gradients were added or dropped since the last call."""
        self._fixed = FixedSteps(self._engine, self._state) if cuda_graph else None

    def __getstate__(self) -> dict[str, Any]:
        """Everything except what belongs to this process: graphs, recordings, and attached optimizers."""
        self._settle()
        kept = {**super().__getstate__(), "_last": None}
        if self._fixed is not None:
            kept |= {"_fixed": None, "_recorded": True, "_state": self._fixed.state}
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The cell may still be incomplete here, if it holds its own learner: do not look at it.
        recorded = state.pop("_recorded", False)
        vars(self).update(state)
        if recorded:
            self._fixed = FixedSteps(self._engine, self._state)

    @property
    def cell(self) -> SlotCell:
        """The cell being trained."""
        return self._engine.cell

    @property
    def state(self) -> Tensor:
        """A copy of the state after the last step, ``(B, S, D)``."""
        self._begin()
        return (self._state if self._fixed is None else self._fixed.state).clone()

    @property
    def entry_state(self) -> Tensor:
        """See :attr:`RTRL.entry_state`."""
        if self._last is None:
            raise RuntimeError("entry_state is there after a step, but the learner has not taken one")
        entry, state, tensors = self._last
        entry = copy.copy(entry)  # it answers a single gradient; here several add up
        entry.used = False
        return EnterSegment.apply(entry, state, *tensors)

    @property
    def events(self) -> dict[str, int]:
        """See :attr:`RTRL.events`."""
        return dict(self._engine.influence.events)

    def _run(self, xs: Tensor) -> Tensor | list[Tensor]:
        """Outputs of the steps, ``(n, B, ...)`` or one by one."""
        engine = self._engine
        check_learning_input(xs, engine)
        if self._fixed is not None and (fixed := self._run_fixed(self._fixed, xs)) is not None:
            return fixed
        with parametrize.cached():
            tensors = engine.checked_tensors()
            self._check_flushed(tensors)
            self._begin()
            if self.commit_every == "auto":
                self.commit_every = engine.choose_commit_every(xs[0], self._state)
            engine.influence.commit_every = self.commit_every
            entry = SegmentEntry(engine)
            state = EnterSegment.apply(entry, self._state, *tensors)
            outputs, captured, new_state, routings = engine.run(xs, state, tensors)
        engine.influence.make_room(captured[0])
        entry.settle()
        self._last = (entry, self._state, tensors)
        engine.influence.record(captured)
        engine.steps += len(xs)
        self._state, self._starting = new_state.detach(), None
        self._routings = routings
        return outputs

    def _run_fixed(self, fixed: FixedSteps, xs: Tensor) -> Tensor | None:
        """Replay a segment; None if it cannot be recorded, and later ones are then not recorded either."""
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

        What it drew at random stays the same; everything else may still change, for example when weights are loaded.
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

    def _check_flushed(self, tensors: list[Tensor]) -> None:
        """Notice an optimizer that stepped without the deferred gradients of sleeping experts.

        Raises:
            RuntimeError: once for each time.
        """
        engine, deferred = self._engine, self._deferred()
        for attachment in self._attachments:
            attachment.watch(self._watched())  # some may have been unfrozen
        if engine.influence.tree is None or any(attached.flushes(deferred) for attached in self._attachments):
            self._weights = []
            return
        now = [t.detach() for t, p in zip(tensors, engine.groups.all, strict=True) if p.expert]
        same = len(now) == len(self._weights) and all(map(torch.equal, now, self._weights))
        if same:
            self._flushed = False
            return
        first, self._weights = not self._weights, [t.clone() for t in now]
        flushed, self._flushed = self._flushed, False
        if not first and not flushed and engine.influence.defers():
            raise RuntimeError(
                "parameters of experts changed while gradients of sleeping experts were deferred: an optimizer"
                " stepped without these. Call learner.attach(optimizer) once, or learner.flush() before each step;"
                " learner.discard() drops them. The learner is as it was, and the next call goes on"
            )

    def _watched(self) -> list[nn.Parameter]:
        """See :meth:`RTRL._watched`: all that train, since clipping may change some gradients and not others."""
        return [p for p in self.cell.parameters() if p.requires_grad] if self._deferred() else []

    def _deferred(self) -> list[nn.Parameter]:
        """Parameters whose gradients can be deferred."""
        if self._engine.catch_up == "eager":
            return []
        return [source for p in self._engine.groups.expert for source in p.sources]

    def _settle(self) -> None:
        """Let recorded steps commit what they still hold, and report what was not finite or disagrees."""
        self._engine.verifier.settle()
        if self._fixed is not None:
            self._fixed.finish()
            self._fixed.check()

    def _defers(self) -> bool:
        return self._fixed is None and self._engine.influence.defers()

    def flush(self) -> None:
        """See :meth:`RTRL.flush`."""
        self._flushed = True
        if self._fixed is None:  # else no expert sleeps
            self._engine.flush()

    def discard(self) -> None:
        """See :meth:`RTRL.discard`."""
        self._flushed = True
        self._engine.influence.discard()

    def reset(self, streams: Tensor | None = None) -> None:
        """See :meth:`RTRL.reset`."""
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

    def influence(self) -> dict[str, Tensor]:
        """See :meth:`RTRL.influence`; ``(B, H, *shape)``."""
        self._settle()
        self._begin()
        return self._engine.influence.matrices()

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`RTRL.state_dict`."""
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
        """See :meth:`RTRL.load_state_dict`."""
        check_saved(state, 2, {"influence", "capture", "state", "steps", "commit_every"})
        self._settle()
        self._engine.load_influence(state["influence"])
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
        self._weights, self._flushed, self._last = [], False, None


register_learner(SlotCell, SlotRTRL)
