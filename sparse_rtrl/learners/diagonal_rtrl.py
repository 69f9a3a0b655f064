"""Real-time recurrent learning for diagonal cells, with the interface of :class:`~sparse_rtrl.RTRL`."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from sparse_rtrl.capture.verify import Verifier, Verify
from sparse_rtrl.cells.diagonal_cell import DiagonalCell, State
from sparse_rtrl.influence.plan import CatchUp
from sparse_rtrl.learners.diagonal_engine import DiagonalEngine
from sparse_rtrl.learners.engine import Capture
from sparse_rtrl.learners.rtrl import RTRL, check_learning_input, check_saved, register_learner
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

    _engine: DiagonalEngine

    def __init__(
        self,
        cell: DiagonalCell,
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
        for option, value, given in (("cuda_graph", cuda_graph, cuda_graph), ("capture", capture, capture != "auto")):
            if given:
                raise ValueError(f"{option}={value!r} is for slot cells, got a {type(cell).__name__}")
        self._verifier = Verifier(verify)
        self._engine = DiagonalEngine(cell, batch_size, backend)
        self._window = self._engine.influence.suggested_window()
        self._fresh: Tensor | None = self._engine.checked_mask(None)
        """Streams that take their first step next, ``(B,)`` bool; None if there are none."""
        self._state: State = _map(Tensor.detach, cell.initial_state(batch_size))

    @property
    def cell(self) -> DiagonalCell:
        """The cell being trained."""
        return self._engine.cell

    @property
    def state(self) -> State:
        """A copy of the state that the next step starts from, ``(B, *state_shape)``, detached.

        With the previous input where the cell looks. That of a stream which has taken no step is the initial state, by
        the parameters as they are.
        """
        return _map(Tensor.clone, self._engine.entering(self._state, self._fresh))

    @property
    def entry_state(self) -> Tensor:
        """Not kept for a diagonal cell, see :attr:`RTRL.entry_state`.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"entry_state is there for slot cells only, got a {type(self.cell).__name__}")

    def __call__(self, x: Tensor) -> Tensor:
        """Take one step: ``x (B, input_size)`` to the output ``(B, ...)``; see :meth:`RTRL.__call__`.

        A derivative that is not finite is reported late, see :class:`~sparse_rtrl.errors.NonFiniteError`.
        """
        return super().__call__(x)

    def _run(self, xs: Tensor) -> Tensor:
        """Outputs of the steps, ``(n, B, ...)``."""
        engine = self._engine
        check_learning_input(xs, engine)
        if xs.shape[2:] != (self.cell.input_size,):
            raise ValueError(f"x must have shape (B, {self.cell.input_size}), got {tuple(xs.shape[1:])}")
        engine.influence.commit_at_loss = self.commit_every == "auto"
        engine.influence.commit_every = self._window if self.commit_every == "auto" else self.commit_every
        outputs, self._state = engine.run(xs, self._state, self._fresh, self._verifier)
        self._fresh = None
        return outputs

    def _settle(self) -> None:
        """Report a disagreement that was found on a CUDA device."""
        self._verifier.settle()

    def flush(self) -> None:
        """Nothing is deferred: ``.grad`` is complete when ``backward`` returns; see :meth:`RTRL.flush`."""
        self._settle()

    def discard(self) -> None:
        """Nothing is deferred, see :meth:`flush`."""

    def reset(self, streams: Tensor | None = None) -> None:
        """See :meth:`RTRL.reset`."""
        engine = self._engine
        mask = engine.checked_mask(streams)
        self._settle()
        engine.influence.reset(None if streams is None else mask)
        self._fresh = mask.clone() if self._fresh is None else mask | self._fresh

    def influence(self) -> dict[str, Tensor]:
        """Influence ``dh/dθ`` of every parameter that reaches the state, ``(B, *state_shape, *shape)``.

        Dense, for looking at: one backward pass per stream and state entry.
        """
        return self._engine.dense_influence()

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`RTRL.state_dict`."""
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
        """See :meth:`RTRL.load_state_dict`."""
        check_saved(state, 1, {"diagonal", "state", "steps", "commit_every"})
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


def _map(function: Any, *states: Any) -> Any:
    """Apply a function to the tensors of states."""
    if isinstance(states[0], Tensor):
        return function(*states)
    return tuple(function(*tensors) for tensors in zip(*states, strict=True))
