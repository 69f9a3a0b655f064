"""Real-time recurrent learning for diagonal cells, with the interface of :class:`~sparse_rtrl.RTRL`."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor

from sparse_rtrl.capture.verify import Verifier, Verify
from sparse_rtrl.cells.diagonal_cell import DiagonalCell, State
from sparse_rtrl.learners.diagonal_engine import DiagonalEngine
from sparse_rtrl.learners.rtrl import RTRL, check_learning_input, register_learner
from sparse_rtrl.ops import dispatch


class DiagonalRTRL(RTRL):
    """What ``RTRL(cell, batch_size)`` makes for a :class:`~sparse_rtrl.DiagonalCell`.

    Influence is kept for the state entries that each parameter touches, about as many numbers as parameters. Nothing
    sleeps: ``.grad`` is complete when ``backward`` returns, and :meth:`flush` and :meth:`discard` have nothing to do.

    Args:
        cell: the cell to train.
        batch_size: streams ``B``.
        commit_every: steps between two updates of the influence; their derivatives are taken together. The gradient is
            exact whatever it is. With ``"auto"`` a loss of the newest segment updates the influence as well, in the
            pass that takes the gradient through the past; without losses up to 16 steps are collected, fewer where
            they would take memory. A number is the length of the window, in which losses may come in any order.
        backend: what computes: see :func:`sparse_rtrl.ops.dispatch.select`.
        verify: which segments are compared with an ordinary backward pass, see ``Verifier``.

    Raises:
        ContractError: if the cell breaks its contract.
        MemoryError: if the influence does not fit into memory, with the numbers.
        BackendError: if the backend is not there, with the remedy.
    """

    _engine: DiagonalEngine  # type: ignore[assignment]

    def __init__(
        self,
        cell: DiagonalCell,
        batch_size: int,
        buffer: int | Literal["auto"] = "auto",
        commit_every: int | Literal["auto"] = "auto",
        catch_up: str = "auto",
        backend: dispatch.Backend = "auto",
        cuda_graph: bool = False,
        verify: Verify = "sample",
        capture: str = "auto",
    ) -> None:
        for option, value, given in (("cuda_graph", cuda_graph, cuda_graph), ("capture", capture, capture != "auto")):
            if given:
                raise ValueError(f"{option}={value!r} is for slot cells, got a {type(cell).__name__}")
        if commit_every != "auto" and (not isinstance(commit_every, int) or commit_every < 1):
            raise ValueError(f"commit_every must be 'auto' or an int of at least 1, got {commit_every!r}")
        self._verifier = Verifier(verify)
        self._engine = DiagonalEngine(cell, batch_size, backend)
        self.commit_every = commit_every
        self._window = self._engine.influence.suggested_window()
        self._routings = []
        self._fixed = None
        self._fresh: Tensor | None = self._engine.checked_mask(None)
        """Streams that take their first step next, ``(B,)`` bool; None if there are none."""
        self._state: State = _map(Tensor.detach, cell.initial_state(batch_size))  # type: ignore[assignment]

    def __new__(cls, *args: Any, **kwargs: Any) -> DiagonalRTRL:
        """An object to fill, also from a pickle."""
        return object.__new__(cls)

    def __copy__(self) -> DiagonalRTRL:
        """A learner of the same cell that stands where this one does and goes its own way from here."""
        return copy.deepcopy(self, {id(module): module for module in self.cell.modules()})

    def __deepcopy__(self, memo: dict[int, Any]) -> DiagonalRTRL:
        """A learner of a copy of the cell that stands where this one does; nothing is attached to it."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    @property
    def cell(self) -> DiagonalCell:  # type: ignore[override]
        """The cell being trained."""
        return self._engine.cell

    @property
    def state(self) -> State:  # type: ignore[override]
        """A copy of the state that the next step starts from, ``(B, *state_shape)``, detached.

        With the previous input where the cell looks. That of a stream which has taken no step is the initial state, by
        the parameters as they are.
        """
        return _map(Tensor.clone, self._engine.entering(self._state, self._fresh))

    @property
    def entry_state(self) -> Tensor:
        """Not kept for a diagonal cell.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"entry_state is there for slot cells only, got a {type(self.cell).__name__}")

    @property
    def events(self) -> dict[str, int]:
        """Nothing sleeps, so there is nothing to count."""
        return {}

    def __call__(self, x: Tensor) -> Tensor:
        """Take one step: ``x (B, input_size)`` to the output ``(B, ...)``; see :meth:`RTRL.__call__`.

        A derivative that is not finite is reported late, see :class:`~sparse_rtrl.errors.NonFiniteError`.
        """
        return self._run_segment(x.unsqueeze(0) if isinstance(x, Tensor) else x)[0]

    def unroll(self, xs: Tensor) -> Tensor:
        """Take several steps as one segment: ``xs (n, B, input_size)`` to outputs ``(n, B, ...)``."""
        if not isinstance(xs, Tensor) or xs.dim() != 3 or xs.shape[0] < 1:
            got = tuple(xs.shape) if isinstance(xs, Tensor) else type(xs).__name__
            raise ValueError(f"xs must be a tensor (n, B, input_size) with n >= 1, got {got}")
        return self._run_segment(xs)

    def _run_segment(self, xs: Tensor) -> Tensor:
        engine = self._engine
        check_learning_input(xs, engine)
        if xs.shape[2:] != (self.cell.input_size,):
            raise ValueError(f"x must have shape (B, {self.cell.input_size}), got {tuple(xs.shape[1:])}")
        engine.influence.commit_at_loss = self.commit_every == "auto"
        engine.influence.commit_every = self._window if self.commit_every == "auto" else self.commit_every
        outputs, self._state = engine.run(xs, self._state, self._fresh, self._verifier)
        self._fresh = None
        return outputs

    def flush(self) -> None:
        """Nothing is owed: ``.grad`` is complete when ``backward`` returns.

        Raises:
            DisagreementError: on a CUDA device, if a segment disagreed with an ordinary backward pass, see ``verify``.
        """
        self._verifier.settle()

    def discard(self) -> None:
        """Nothing is owed, see :meth:`flush`."""

    def reset(self, streams: Tensor | None = None) -> None:
        """Start new sequences: initial state and zero influence.

        Args:
            streams: boolean mask ``(B,)`` of the streams that start anew; None for all.

        Raises:
            ValueError: if ``streams`` is not a boolean mask of shape ``(B,)``.
        """
        engine = self._engine
        mask = engine.checked_mask(streams)
        self._verifier.settle()
        engine.influence.reset(None if streams is None else mask)
        self._fresh = mask.clone() if self._fresh is None else mask | self._fresh

    def influence(self) -> dict[str, Tensor]:
        """Influence ``dh/dθ`` of every parameter that reaches the state, ``(B, *state_shape, *shape)``.

        Dense, for looking at: one backward pass per stream and state entry.
        """
        return self._engine.dense_influence()

    def evaluate(self) -> DiagonalEvaluation:  # type: ignore[override]
        """A copy that runs from the current state without learning; it shares the parameters."""
        return DiagonalEvaluation(self.cell, self.state)

    def state_dict(self) -> dict[str, Any]:
        """State, influence and window; with it and the cell's own, training resumes bit for bit."""
        return {
            "version": 1,
            "diagonal": self._engine.influence.state_dict(),
            "state": _map(Tensor.clone, self._state),
            "fresh": None if self._fresh is None else self._fresh.clone(),
            "steps": self._engine.steps,
            "commit_every": self.commit_every,
            "verifier": self._verifier.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, for the same cell and options.

        Raises:
            ValueError: if it does not fit this learner; nothing is changed then.
        """
        if state.get("version") != 1:
            raise ValueError(f"state must be of version 1, got {state.get('version')!r}")
        missing = {"diagonal", "state", "steps", "commit_every"} - set(state)
        if missing:
            raise ValueError(f"state lacks {sorted(missing)}")
        saved, own = (
            [(tensor.dtype, tuple(tensor.shape)) for tensor in ((each,) if isinstance(each, Tensor) else each)]
            for each in (state["state"], self._state)
        )
        if saved != own:
            raise ValueError(
                f"state is of another cell, dtype or batch size: its tensors are {saved}, those here {own}"
            )
        self._engine.influence.load_state_dict(state["diagonal"])
        self._state = _map(lambda saved, own: saved.to(own).clone(), state["state"], self._state)
        fresh = state.get("fresh")  # older versions saved neither this nor what verifies
        self._fresh = None if fresh is None else fresh.to(self._engine.device, copy=True)
        if "verifier" in state:
            self._verifier.load_state_dict(state["verifier"])
        self._engine.steps = state["steps"]
        self.commit_every = state["commit_every"]


register_learner(DiagonalCell, DiagonalRTRL)


class DiagonalEvaluation:
    """Runs a diagonal cell on streams without learning, from :meth:`DiagonalRTRL.evaluate`.

    Args:
        cell: the cell.
        state: state to start from.
    """

    def __init__(self, cell: DiagonalCell, state: State) -> None:
        self.cell = cell
        self.state = state

    def __call__(self, x: Tensor) -> Tensor:
        """Take one step: ``x (B, input_size)`` to the output ``(B, ...)``."""
        return self.unroll(x.unsqueeze(0))[0]

    @torch.no_grad()
    def unroll(self, xs: Tensor) -> Tensor:
        """Take several steps: ``xs (n, B, input_size)`` to outputs ``(n, B, ...)``."""
        outputs, self.state = self.cell.unroll(xs, self.state)
        return outputs


def _map(function: Any, *states: Any) -> Any:
    """Apply a function to the tensors of states."""
    if isinstance(states[0], Tensor):
        return function(*states)
    return tuple(function(*tensors) for tensors in zip(*states, strict=True))
