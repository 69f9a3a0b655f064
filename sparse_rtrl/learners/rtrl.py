"""The front end of online learning for cells: one class for users, and a learner for each kind of cell behind it."""

from __future__ import annotations

import copy
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sparse_rtrl.capture.verify import Verify
from sparse_rtrl.cells.slot_cell import Routing
from sparse_rtrl.errors import ContractError
from sparse_rtrl.influence.plan import CatchUp
from sparse_rtrl.learners.attachment import Attachment
from sparse_rtrl.learners.engine import Capture, described
from sparse_rtrl.ops import dispatch

_LEARNERS: list[tuple[type[nn.Module], type[RTRL]]] = []


def register_learner(cell: type[nn.Module], learner: type[RTRL]) -> None:
    """Have ``RTRL(cell, ...)`` make a learner of this class for cells of that class.

    Args:
        cell: the class of the cells.
        learner: a subclass of :class:`RTRL`, which takes the same arguments.
    """
    _LEARNERS.append((cell, learner))


class LearningEngine(Protocol):
    """What every learner needs of its engine."""

    batch_size: int
    device: torch.device
    cell: Any

    @property
    def influence(self) -> Any:
        """Has ``norms()`` and ``cap_(largest)``."""


class RTRL:
    """Online learner with the exact gradient through the whole past, in memory that does not grow with its length.

    The state lives in the learner. ``out = learner(x)`` takes one step, ``learner.unroll(xs)`` takes several as one
    segment; ``backward`` on a loss of the outputs fills ``.grad`` with the gradient through every step since the last
    reset, for parameters that did not change on the way; after an online update it is that of the path taken
    (Williams & Zipser 1989). Gradients of experts that sleep are deferred; :meth:`flush`, which :meth:`attach` hooks
    into the optimizer's step, adds them.

    ``RTRL(cell, ...)`` is the learner that was registered for the kind of cell: a
    :class:`~sparse_rtrl.learners.slot_rtrl.SlotRTRL` or a :class:`~sparse_rtrl.DiagonalRTRL`.

    Args:
        cell: the cell to train: a :class:`~sparse_rtrl.SlotCell` or a :class:`~sparse_rtrl.DiagonalCell`.
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

    _engine: LearningEngine
    _attachments: tuple[Attachment, ...] = ()

    def __new__(cls, cell: nn.Module | None = None, *args: Any, **kwargs: Any) -> RTRL:
        """A learner of the kind that the cell needs."""
        if cls is not RTRL or cell is None:  # the kind is known, or it is copied or unpickled
            return super().__new__(cls)
        for kind, learner in reversed(_LEARNERS):
            if isinstance(cell, kind):
                return super().__new__(learner)
        raise TypeError(
            f"cell must be a SlotCell or a DiagonalCell, got {type(cell).__name__}; for another module take"
            " Carry(module), for a stack Carry(stack) or the approximate PerLayerApproximation(stack, batch_size)"
        )

    def __init__(
        self,
        cell: nn.Module,
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
        self.commit_every: int | Literal["auto"] = commit_every
        self._routings: list[Routing] = []

    def __getstate__(self) -> dict[str, Any]:
        """Everything except what belongs to this process, such as attached optimizers."""
        return {**vars(self), "_attachments": ()}

    def __copy__(self) -> RTRL:
        """An independent learner of the same cell, which goes on from where this one stands."""
        cell = self.cell
        shared = [*cell.modules(), *cell.parameters(), *cell.buffers()]
        return copy.deepcopy(self, {id(each): each for each in shared})

    @property
    def cell(self) -> Any:
        """The cell being trained."""
        return self._engine.cell

    @property
    def batch_size(self) -> int:
        """Streams ``B``."""
        return self._engine.batch_size

    @property
    def state(self) -> Any:
        """A copy of the state that the next step starts from, detached: of a slot cell ``(B, S, D)``."""
        raise NotImplementedError

    @property
    def entry_state(self) -> Tensor:
        """State that entered the last segment, ``(B, S, D)``, from which a backward pass reaches the past.

        A loss may depend on it beside the outputs: its gradient goes through the whole past. Add it to the loss of the
        outputs before their one backward pass.

        Raises:
            RuntimeError: before the first step, and always for a diagonal cell, where it is not kept.
        """
        raise NotImplementedError

    @property
    def events(self) -> dict[str, int]:
        """How often sleeping experts woke, expired, caught up (replays, products), and got deferred gradients."""
        return {}

    @property
    def routings(self) -> list[Routing]:
        """What the steps of the last call touched; empty for a cell without slots."""
        return self._routings

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
            raise ValueError(f"xs must be a tensor (n, B, ...) with n >= 1, got {described(xs)}")
        outputs = self._run(xs)
        return outputs if isinstance(outputs, Tensor) else torch.stack(outputs)

    def _run(self, xs: Tensor) -> Tensor | list[Tensor]:
        """Outputs of the steps, ``(n, B, ...)`` or one by one."""
        raise NotImplementedError

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Call :meth:`flush` before every step of an optimizer.

        The step raises a ``RuntimeError`` instead if ``.grad`` was changed since the backward pass, by clipping or
        unscaling, while any gradient is deferred.

        Returns:
            A handle with ``remove()``.

        Raises:
            ValueError: for an optimizer that evaluates the loss several times in a step, such as LBFGS.
        """
        attachment = Attachment(optimizer, self.flush, self._defers, self._watched())
        self._attachments = (*self._attachments, attachment)
        return attachment

    def _defers(self) -> bool:
        """Whether any gradient is deferred now."""
        return False

    def _watched(self) -> list[nn.Parameter]:
        """Parameters whose gradients must stay as they are while any gradient is deferred."""
        return []

    def flush(self) -> None:
        """Add the deferred gradients of sleeping experts to ``.grad``; calling it again adds nothing.

        :meth:`attach` calls it before each optimizer step. Call it yourself before you clip or unscale gradients.

        Raises:
            DisagreementError: on a CUDA device, if a segment disagreed with an ordinary backward pass, see ``verify``.
        """
        raise NotImplementedError

    def discard(self) -> None:
        """Drop the gradients that are deferred, as ``zero_grad`` drops those in ``.grad``."""
        raise NotImplementedError

    def reset(self, streams: Tensor | None = None) -> None:
        """Start new sequences: initial state and zero influence. Deferred gradients of the streams are formed first.

        Args:
            streams: boolean mask ``(B,)`` of the streams that start anew; None for all.

        Raises:
            ValueError: if ``streams`` is not a boolean mask of shape ``(B,)``.
        """
        raise NotImplementedError

    def _settle(self) -> None:
        """Report errors that were noticed late, before the influence is read."""
        raise NotImplementedError

    def influence_norms(self) -> tuple[Tensor, Tensor]:
        """Frobenius norms of the influence, core ``(B,)`` and experts ``(B, E)``, in one pass over it.

        They are those of the last commit, and for a sleeping expert those of its last update.
        """
        self._settle()
        norms: tuple[Tensor, Tensor] = self._engine.influence.norms()
        return norms

    def cap_influence(self, largest: float) -> tuple[int, float]:
        """Scale the influence of every stream and group whose norm exceeds ``largest`` down to it.

        A brake for recurrences that have become unstable: the part of the gradient that goes through the past shrinks
        by the same factor, and is no longer exact.

        Args:
            largest: Frobenius norm that none may exceed, positive.

        Returns:
            How many were scaled, and the largest norm there was.
        """
        if not largest > 0:
            raise ValueError(f"largest must be positive, got {largest}")
        self._settle()
        scaled: tuple[int, float] = self._engine.influence.cap_(largest)
        return scaled

    def influence(self) -> dict[str, Tensor]:
        """Influence ``dh/dθ`` of every recurrent parameter, brought up to date: of a slot cell ``(B, H, *shape)``."""
        raise NotImplementedError

    def evaluate(self) -> Evaluation:
        """A copy that runs from the current state without learning; it shares the parameters."""
        return Evaluation(self.cell, self.state)

    def state_dict(self) -> dict[str, Any]:
        """State, influence, tree and window; with it and the cell's own, training resumes bit for bit.

        Taking it changes nothing, so a run that saves takes the same path as one that does not.
        """
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, for the same cell and options.

        Raises:
            ValueError: if it does not fit this learner; nothing is changed then.
        """
        raise NotImplementedError


class Evaluation:
    """Runs a cell on streams without learning, from :meth:`RTRL.evaluate`.

    Args:
        cell: the cell.
        state: state to start from, of a slot cell ``(B, S, D)``.
    """

    def __init__(self, cell: Any, state: Any) -> None:
        self.cell = cell
        self.state = state

    def __call__(self, x: Tensor) -> Tensor:
        """Take one step: ``x (B, ...)`` to the output ``(B, ...)``."""
        return self.unroll(x.unsqueeze(0))[0]

    @torch.no_grad()
    def unroll(self, xs: Tensor) -> Tensor:
        """Take several steps: ``xs (n, B, ...)`` to outputs ``(n, B, ...)``."""
        outputs: Tensor
        outputs, self.state = self.cell.unroll(xs, self.state)
        return outputs


def check_saved(state: dict[str, Any], version: int, needed: set[str]) -> None:
    """Refuse a saved state of another version, or one that lacks keys.

    Raises:
        ValueError: saying what is wrong.
    """
    if state.get("version") != version:
        raise ValueError(f"state must be of version {version}, got {state.get('version')!r}")
    if missing := needed - set(state):
        raise ValueError(f"state lacks {sorted(missing)}")


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
        raise ValueError(f"x must be a tensor (B, ...), got {described(xs[0] if isinstance(xs, Tensor) else xs)}")
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
