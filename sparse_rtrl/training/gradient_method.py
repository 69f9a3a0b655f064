"""Ways of adding the gradient of a loss along streams to ``.grad``, behind one interface; the exact sparse engine."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_rtrl.cells.diagonal_cell import DiagonalCell
from sparse_rtrl.cells.slot_cell import SlotCell
from sparse_rtrl.errors import NonFiniteLossError
from sparse_rtrl.training.lyapunov import LyapunovRegularizer
from sparse_rtrl.training.routing_usage import RoutingUsage
from sparse_rtrl.training.tasks import IGNORE, Batch


class RecurrentModel(Protocol):
    """A slot cell, called once per step, a diagonal cell, or a module that takes a whole chunk of steps."""

    def initial_state(self, batch_size: int) -> Any:
        """State that streams start from: a tensor, or a tuple of them."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained."""

    def state_dict(self) -> dict[str, Any]:
        """Its parameters and buffers."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Restore what :meth:`state_dict` returned."""

    def __call__(self, *args: Any) -> Any:
        """Run a step or a chunk."""


def unroll(model: RecurrentModel, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Run a recurrent model over a chunk of steps with plain autograd; without gradient in the fused pass, if it can.

    Args:
        model: the model to run.
        x: inputs ``(n, B, input_size)``.
        state: state that enters the first step.

    Returns:
        Outputs ``(n, B, output_size)`` and the state after the last step.
    """
    if isinstance(model, (DiagonalCell, SlotCell)):
        return model.unroll(x, state)
    outputs, state = model(x, state)
    return outputs, state


@dataclass(frozen=True)
class Tally:
    """Loss and hits over some steps.

    Attributes:
        loss: cross entropy summed over the asked answers.
        correct: asked answers that were right.
        asked: asked answers.
    """

    loss: float = 0.0
    correct: int = 0
    asked: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.loss + other.loss, self.correct + other.correct, self.asked + other.asked)

    @property
    def mean_loss(self) -> float:
        """Cross entropy per asked answer; NaN if nothing was asked."""
        return self.loss / self.asked if self.asked else math.nan

    @property
    def accuracy(self) -> float:
        """Share of asked answers that were right; NaN if nothing was asked."""
        return self.correct / self.asked if self.asked else math.nan


def answer_loss(outputs: Tensor, target: Tensor) -> tuple[Tensor, Tally]:
    """Cross entropy summed over the asked answers, as a differentiable scalar and as a :class:`Tally`.

    Args:
        outputs: logits ``(n, B, output_size)``.
        target: classes ``(n, B)``, :data:`~sparse_rtrl.training.tasks.IGNORE` where nothing is asked.

    Returns:
        The sum, a number, and its tally.
    """
    asked = target != IGNORE
    logits, classes = outputs[asked], target[asked]
    loss = functional.cross_entropy(logits, classes, reduction="sum")
    correct = int((logits.argmax(-1) == classes).sum())
    return loss, Tally(float(loss.detach()), correct, classes.numel())


class GradientMethod(ABC):
    """A way of adding the gradient of a loss to ``.grad``, segment by segment along streams.

    The loss of a batch is the mean cross entropy over its asked answers. A subclass implements :meth:`reset`,
    :meth:`learn` and the state; the training loop around it, :class:`Trainer`, is the same for all.

    Attributes:
        model: what is trained.
        segment: steps per segment; None for a whole batch.
        lyapunov: watches the Lyapunov exponent, and adds its loss to that of every segment; None for neither.
    """

    model: RecurrentModel
    segment: int | None = None
    lyapunov: LyapunovRegularizer | None = None

    @abstractmethod
    def reset(self, streams: Tensor | None = None) -> None:
        """Start new sequences in the streams of a mask ``(B,)``, in all if None."""

    @abstractmethod
    def learn(self, x: Tensor, target: Tensor, divisor: int) -> Tally:
        """Run one segment from where the last one ended, and backpropagate its loss.

        Args:
            x: inputs ``(n, B, input_size)``.
            target: classes ``(n, B)``.
            divisor: answers to divide the summed loss by; 0 if the segment asks nothing.

        Raises:
            FloatingPointError: if the loss is not finite; it was not backpropagated.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What is carried from segment to segment, without the parameters."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""

    def segments(self, batch: Batch, mean_per_segment: bool = False) -> Iterator[Tally]:
        """Run over a batch, yielding after each segment, its loss backpropagated.

        Args:
            batch: sequences to run over.
            mean_per_segment: divide each segment's loss by its own number of answers, for a learner that steps after
                every segment and cannot know how many answers are still to come.

        Yields:
            The tally of each segment.
        """
        self.reset(batch.reset)
        for x, target, divisor in split_batch(batch, self.segment, mean_per_segment):
            yield self.learn(x, target, divisor)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027 - nothing to do is a fine default
        """Tell the method which optimizer will step its parameters."""

    def complete_gradient(self) -> None:  # noqa: B027 - nothing to do is a fine default
        """Add gradients that the method has deferred to ``.grad``; called before clipping."""

    def metrics(self) -> dict[str, Any]:
        """What the method measured since the last call, by names of ``METRICS``."""
        return {}

    def events(self) -> list[dict[str, Any]]:
        """What happened since the last call, see :data:`~sparse_rtrl.training.runlog.EVENTS`."""
        return []


def split_batch(
    batch: Batch, length: int | None, mean_per_segment: bool, start: int = 0
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Cut a batch into segments.

    Args:
        batch: the batch to cut.
        length: steps per segment, of which the last may be shorter; None for one segment.
        mean_per_segment: see :meth:`GradientMethod.segments`.
        start: step to begin at, a multiple of ``length``.

    Yields:
        Inputs ``(n, B, input_size)``, targets ``(n, B)`` and the number of answers to divide the loss by, which is 0
        where the segment asks nothing.
    """
    length = length or len(batch.x)
    asked_in_batch = int((batch.target != IGNORE).sum())
    for x, target in zip(batch.x[start:].split(length), batch.target[start:].split(length), strict=True):
        asked = int((target != IGNORE).sum())
        yield x, target, (asked if mean_per_segment else asked_in_batch) if asked else 0


def backpropagate(outputs: Tensor, target: Tensor, divisor: int, penalty: Tensor | None = None) -> Tally:
    """Backpropagate the loss of a segment, if it has one.

    Args:
        outputs: logits ``(n, B, output_size)``.
        target: classes ``(n, B)``.
        divisor: what the summed loss is divided by; 0 if the segment asks nothing.
        penalty: a number added to the loss; it does not count in the tally.

    Raises:
        NonFiniteLossError: if the loss is not finite, with the first step where it is not.
    """
    if penalty is not None and not penalty.requires_grad:
        penalty = None  # the exponent is only watched
    if not divisor:
        if penalty is not None:
            penalty.backward()
        return Tally()
    loss, tally = answer_loss(outputs, target)
    if not math.isfinite(tally.loss):
        per_answer = functional.cross_entropy(
            outputs.detach().flatten(0, 1), target.flatten(), ignore_index=IGNORE, reduction="none"
        )
        bad = ~torch.isfinite(per_answer).view_as(target).all(1)
        raise NonFiniteLossError(tally.loss, int(bad.nonzero()[0]) if bool(bad.any()) else 0)
    mean = loss / divisor
    (mean if penalty is None else mean + penalty).backward()
    return tally


def lyapunov_metrics(lyapunov: LyapunovRegularizer | None) -> dict[str, Any]:
    """The exponent since the last call, if it is watched."""
    return {} if lyapunov is None else {"lyapunov": lyapunov.take_exponent()}


class SparseRTRL(GradientMethod):
    """The exact sparse engine, fed with segments; equal gradient to BPTT at memory that does not grow with length.

    Args:
        cell: the cell to train.
        batch_size: streams.
        segment: steps per segment.
        buffer: segments that the circular tree keeps.
        commit_every: see :class:`~sparse_rtrl.RTRL`; None for ``segment``, so that nothing longer is ever kept.
        catch_up: see :class:`~sparse_rtrl.RTRL`.
        influence_cap: largest Frobenius norm of the influence of a stream and group, see
            :meth:`~sparse_rtrl.RTRL.cap_influence`; None for no limit.
        lyapunov: see :class:`GradientMethod`.
    """

    def __init__(
        self,
        cell: SlotCell | DiagonalCell,
        batch_size: int,
        segment: int = 8,
        buffer: int = 64,
        commit_every: int | Literal["auto"] | None = None,
        catch_up: Literal["auto", "eager", "replay", "product"] = "auto",
        influence_cap: float | None = None,
        lyapunov: LyapunovRegularizer | None = None,
    ) -> None:
        from sparse_rtrl.learners.rtrl import RTRL

        if segment < 1:
            raise ValueError(f"segment must be at least 1, got {segment}")
        if influence_cap is not None and not influence_cap > 0:
            raise ValueError(f"influence_cap must be positive or None, got {influence_cap}")
        if lyapunov is not None and not isinstance(cell, SlotCell):
            raise ValueError(f"lyapunov is for slot cells, got a {type(cell).__name__}")
        self.model = cell
        self.segment = segment
        self.influence_cap = influence_cap
        self.lyapunov = lyapunov
        self.learner = RTRL(
            cell,
            batch_size=batch_size,
            buffer=buffer,
            commit_every=segment if commit_every is None else commit_every,
            catch_up=catch_up,
        )
        self._usage = RoutingUsage(batch_size, cell.num_slots, cell.num_experts) if isinstance(cell, SlotCell) else None
        self._capped, self._largest_norm = 0, 0.0

    def reset(self, streams: Tensor | None = None) -> None:
        """See :meth:`GradientMethod.reset`."""
        self.learner.reset(streams)
        if self.lyapunov is not None:
            self.lyapunov.reset(streams)

    def learn(self, x: Tensor, target: Tensor, divisor: int) -> Tally:
        """See :meth:`GradientMethod.learn`."""
        outputs = self.learner.unroll(x)
        penalty = None if self.lyapunov is None else self.lyapunov.loss(x, self.learner.entry_state)
        tally = backpropagate(outputs, target, divisor, penalty)
        if self._usage is not None:
            self._usage.count(self.learner.routings)
        if self.influence_cap is not None:
            capped, norm = self.learner.cap_influence(self.influence_cap)
            self._capped += capped
            self._largest_norm = max(self._largest_norm, norm)
        return tally

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """See :meth:`GradientMethod.attach`."""
        self.learner.attach(optimizer)

    def complete_gradient(self) -> None:
        """Add the deferred gradients of dormant experts."""
        self.learner.flush()

    def metrics(self) -> dict[str, Any]:
        """Influence norms, expert load, slot use and sleep lengths."""
        core, experts = (norms.square().mean(0).sqrt() for norms in self.learner.influence_norms())
        norms = {"influence_norm_core": float(core), "influence_norm_experts": experts.tolist()}
        usage = {} if self._usage is None else self._usage.metrics()
        return norms | usage | lyapunov_metrics(self.lyapunov)

    def events(self) -> list[dict[str, Any]]:
        """Whether the influence was capped."""
        if not self._capped:
            return []
        event = {
            "event": "influence_capped",
            "cap": self.influence_cap,
            "times": self._capped,
            "norm": self._largest_norm,
        }
        self._capped, self._largest_norm = 0, 0.0
        return [event]

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`GradientMethod.state_dict`."""
        return {
            "learner": self.learner.state_dict(),
            "usage": None if self._usage is None else self._usage.state_dict(),
            "capped": (self._capped, self._largest_norm),
            "lyapunov": None if self.lyapunov is None else self.lyapunov.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`GradientMethod.load_state_dict`."""
        self.learner.load_state_dict(state["learner"])
        if self._usage is not None:
            self._usage.load_state_dict(state["usage"])
        self._capped, self._largest_norm = state["capped"]
        if self.lyapunov is not None:
            self.lyapunov.load_state_dict(state["lyapunov"])
