"""One training loop for every way of getting the gradient, and the accuracy of what it trained."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from sparse_rtrl.diagonal_cell import DiagonalCell
from sparse_rtrl.slot_cell import SlotCell
from sparse_rtrl.tasks import IGNORE, Batch, Task


class RecurrentModel(Protocol):
    """A slot cell, called once per step, a diagonal cell, or a module that takes a whole chunk of steps."""

    def initial_state(self, batch_size: int) -> Any:
        """State that streams start from: a tensor, or a tuple of them."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained."""

    def __call__(self, *args: Any) -> Any:
        """Run a step or a chunk."""


def unroll(model: RecurrentModel, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Run a recurrent model over a chunk of steps with plain autograd.

    Args:
        model: the model to run.
        x: inputs ``(n, B, input_size)``.
        state: state that enters the first step.

    Returns:
        Outputs ``(n, B, output_size)`` and the state after the last step.
    """
    if isinstance(model, DiagonalCell):
        return model.unroll(x, state)
    if not isinstance(model, SlotCell):
        outputs, state = model(x, state)
        return outputs, state
    steps = []
    # Parametrized weights are constant within the chunk: evaluate them once, not at every step.
    with parametrize.cached():
        for x_t in x:
            output, _, state = model(x_t, state)
            steps.append(output)
    return torch.stack(steps), state


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
        target: classes ``(n, B)``, :data:`~sparse_rtrl.tasks.IGNORE` where nothing is asked.

    Returns:
        The sum and its tally.
    """
    asked = target != IGNORE
    logits, classes = outputs[asked], target[asked]
    loss = functional.cross_entropy(logits, classes, reduction="sum")
    correct = int((logits.argmax(-1) == classes).sum())
    return loss, Tally(float(loss.detach()), correct, classes.numel())


class GradientMethod(ABC):
    """A way of adding the gradient of a batch's loss to ``.grad``.

    The loss of a batch is the mean cross entropy over its asked answers. A subclass implements :meth:`segments`; the
    training loop around it, :class:`Trainer`, is the same for all.

    Attributes:
        model: what is trained.
    """

    model: RecurrentModel

    @abstractmethod
    def segments(self, batch: Batch, mean_per_segment: bool = False) -> Iterator[Tally]:
        """Run over the batch from the initial state, yielding after each segment, its loss backpropagated.

        Args:
            batch: sequences to run over.
            mean_per_segment: divide each segment's loss by its own number of answers, for a learner that steps after
                every segment and cannot know how many answers are still to come.

        Yields:
            The tally of each segment.
        """

    def attach(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027 - nothing to do is a fine default
        """Tell the method which optimizer will step its parameters."""

    def complete_gradient(self) -> None:  # noqa: B027 - nothing to do is a fine default
        """Add to ``.grad`` whatever the method still owes; called before clipping."""


def split_batch(batch: Batch, length: int, mean_per_segment: bool) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Cut a batch into segments.

    Args:
        batch: the batch to cut.
        length: steps per segment; the last segment may be shorter.
        mean_per_segment: see :meth:`GradientMethod.segments`.

    Yields:
        Inputs ``(n, B, input_size)``, targets ``(n, B)`` and the number of answers to divide the loss by, which is 0
        where the segment asks nothing.
    """
    asked_in_batch = int((batch.target != IGNORE).sum())
    for x, target in zip(batch.x.split(length), batch.target.split(length), strict=True):
        asked = int((target != IGNORE).sum())
        yield x, target, (asked if mean_per_segment else asked_in_batch) if asked else 0


class SparseRTRL(GradientMethod):
    """The exact sparse engine, fed with segments; equal gradient to BPTT at memory that does not grow with length.

    Args:
        cell: the cell to train.
        batch_size: streams.
        segment: steps per segment.
        buffer: segments that the circular tree keeps.
        commit_every: see :class:`~sparse_rtrl.RTRL`; None for ``segment``, so that nothing longer is ever kept.
        catch_up: see :class:`~sparse_rtrl.RTRL`.
    """

    def __init__(
        self,
        cell: SlotCell | DiagonalCell,
        batch_size: int,
        segment: int = 8,
        buffer: int = 64,
        commit_every: int | Literal["auto"] | None = None,
        catch_up: Literal["auto", "eager", "replay", "product"] = "auto",
    ) -> None:
        from sparse_rtrl.learner import RTRL

        if segment < 1:
            raise ValueError(f"segment must be at least 1, got {segment}")
        self.model = cell
        self.segment = segment
        self.learner = RTRL(
            cell,
            batch_size=batch_size,
            buffer=buffer,
            commit_every=segment if commit_every is None else commit_every,
            catch_up=catch_up,
        )

    def segments(self, batch: Batch, mean_per_segment: bool = False) -> Iterator[Tally]:
        """See :meth:`GradientMethod.segments`."""
        self.learner.reset()
        for x, target, divisor in split_batch(batch, self.segment, mean_per_segment):
            outputs = self.learner.unroll(x)
            tally = Tally()
            if divisor:
                loss, tally = answer_loss(outputs, target)
                (loss / divisor).backward()
            yield tally

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """See :meth:`GradientMethod.attach`."""
        self.learner.attach(optimizer)

    def complete_gradient(self) -> None:
        """Pay what dormant experts are owed."""
        self.learner.flush()


class Trainer:
    """Steps an optimizer with the gradient of any :class:`GradientMethod`.

    Args:
        method: where the gradient comes from.
        learning_rate: of Adam.
        final_learning_rate: learning rate at the last of ``updates``, reached linearly; None to keep it constant.
        clip_norm: largest norm of the gradient; None for no clipping.
        step_per_segment: step after every segment that asks something, instead of once per batch.
    """

    def __init__(
        self,
        method: GradientMethod,
        learning_rate: float = 3e-3,
        final_learning_rate: float | None = None,
        clip_norm: float | None = 1.0,
        step_per_segment: bool = False,
    ) -> None:
        self.method = method
        self.learning_rate = learning_rate
        self.final_learning_rate = learning_rate if final_learning_rate is None else final_learning_rate
        self.clip_norm = clip_norm
        self.step_per_segment = step_per_segment
        self.parameters = [p for p in method.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate)
        method.attach(self.optimizer)

    def set_progress(self, progress: float) -> None:
        """Set the learning rate for a point of the training, from 0 at the first update to 1 at the last."""
        rate = self.learning_rate + (self.final_learning_rate - self.learning_rate) * progress
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _step(self) -> None:
        self.method.complete_gradient()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train_batch(self, batch: Batch) -> Tally:
        """Train on one batch of sequences.

        Raises:
            FloatingPointError: if the loss is not finite; the parameters were not stepped with it.
        """
        total = Tally()
        for tally in self.method.segments(batch, mean_per_segment=self.step_per_segment):
            total += tally
            if not math.isfinite(tally.loss):
                raise FloatingPointError(f"the loss is {tally.loss}; lower learning_rate, got {self.learning_rate}")
            if self.step_per_segment and tally.asked:
                self._step()
        if not self.step_per_segment:
            self._step()
        return total

    def evaluate(self, task: Task, num_sequences: int) -> Accuracy:
        """Accuracy of the model as it is now; see :func:`evaluate`."""
        return evaluate(self.method.model, task, num_sequences)


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on fresh sequences.

    Attributes:
        correct: asked answers that were right.
        asked: asked answers.
        sequences: sequences they came from.
    """

    correct: int
    asked: int
    sequences: int

    @property
    def value(self) -> float:
        """Share of right answers."""
        return self.correct / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of Wilson with sequences, not answers, as trials: answers of one sequence are dependent."""
        return wilson_interval(self.value, self.sequences)


def wilson_interval(share: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a binomial share, ``(p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)``.

    Args:
        share: observed share of successes ``p``.
        trials: number of trials ``n``.
        z: quantile of the normal distribution; the default gives 95 %.

    Returns:
        Lower and upper end.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    centre = share + z * z / (2 * trials)
    radius = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - radius) / scale), min(1.0, (centre + radius) / scale)


@torch.no_grad()
def evaluate(model: RecurrentModel, task: Task, num_sequences: int) -> Accuracy:
    """Accuracy of a model on the next ``num_sequences`` sequences of a task, run with the plain forward pass.

    Args:
        model: what answers.
        task: where the sequences come from; give it another seed than the training task.
        num_sequences: how many sequences to answer.

    Returns:
        Counts and their interval.
    """
    if num_sequences < 1:
        raise ValueError(f"num_sequences must be at least 1, got {num_sequences}")
    total, done = Tally(), 0
    while done < num_sequences:
        batch = task.sample()
        take = min(task.batch_size, num_sequences - done)
        outputs, _ = unroll(model, batch.x[:, :take], model.initial_state(take))
        total += answer_loss(outputs, batch.target[:, :take])[1]
        done += take
    return Accuracy(total.correct, total.asked, done)


@dataclass(frozen=True)
class Progress:
    """Where a training stands after an update.

    Attributes:
        update: updates done.
        length: steps per sequence of the last update.
        tally: loss and hits of the last update.
        tokens: tokens seen so far; a step of one stream is a token.
        seconds: wall-clock time since the training began.
    """

    update: int
    length: int
    tally: Tally
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Mean rate since the training began."""
        return self.tokens / self.seconds if self.seconds else math.nan


def train(
    trainer: Trainer, stream: Iterable[Batch], updates: int, max_seconds: float | None = None
) -> Iterator[Progress]:
    """Train on the next ``updates`` batches of a stream, yielding after each.

    Args:
        trainer: what learns.
        stream: a task or curriculum.
        updates: batches to train on.
        max_seconds: stop after the first update that ends later than this; the caller sees it from ``update``.

    Yields:
        The state of the training after each update.
    """
    start, tokens = time.perf_counter(), 0
    for update, batch in zip(range(updates), stream, strict=False):
        trainer.set_progress(update / max(updates - 1, 1))
        tally = trainer.train_batch(batch)
        length, streams = batch.target.shape
        tokens += length * streams
        seconds = time.perf_counter() - start
        yield Progress(update + 1, length, tally, tokens, seconds)
        if max_seconds is not None and seconds > max_seconds:
            return
