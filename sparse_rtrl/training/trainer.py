"""The optimizer's steps and the loop over batches, which can stop after any segment and go on bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn

from sparse_rtrl.errors import DivergenceError, NonFiniteError, NonFiniteLossError
from sparse_rtrl.training.gradient_method import GradientMethod, Tally, split_batch
from sparse_rtrl.training.tasks import Batch, Stream


class Trainer:
    """Steps an optimizer with the gradient of any :class:`GradientMethod`.

    Args:
        method: where the gradient comes from.
        learning_rate: of AdamW.
        final_learning_rate: learning rate at the last of ``updates``, reached linearly; None to keep it constant.
        clip_norm: largest norm of the gradient; None for no clipping.
        step_per_segment: step after every segment that asks something, instead of once per batch.
        weight_decay: of AdamW, decoupled from the gradient (Loshchilov & Hutter 2019); 0 is Adam.

    Attributes:
        gradient_norm: norm of the whole gradient at the last step, before clipping; NaN before the first.
    """

    def __init__(
        self,
        method: GradientMethod,
        learning_rate: float = 3e-3,
        final_learning_rate: float | None = None,
        clip_norm: float | None = 1.0,
        step_per_segment: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
        self.method = method
        self.learning_rate = learning_rate
        self.final_learning_rate = learning_rate if final_learning_rate is None else final_learning_rate
        self.clip_norm = clip_norm
        self.step_per_segment = step_per_segment
        self.weight_decay = weight_decay
        self.parameters = [p for p in method.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=weight_decay)
        self.gradient_norm = math.nan
        method.attach(self.optimizer)

    def set_progress(self, progress: float) -> None:
        """Set the learning rate for a point of the training, from 0 at the first update to 1 at the last."""
        rate = self.learning_rate + (self.final_learning_rate - self.learning_rate) * progress
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _step(self) -> None:
        self.method.complete_gradient()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self.gradient_norm = float(norm)
        if not math.isfinite(self.gradient_norm):
            raise FloatingPointError(f"the norm of the gradient is {self.gradient_norm}; no parameter was stepped")
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def segments(self, batch: Batch, start: int = 0) -> Iterator[tuple[int, Tally]]:
        """Train on a batch, yielding after each segment; the optimizer steps before the yield.

        Args:
            batch: sequences to train on.
            start: step of the batch to go on from; 0 to begin it, which starts its new sequences.

        Yields:
            Steps of the batch that are done, and the tally of the segment.

        Raises:
            FloatingPointError: if the loss, the gradient, the state or the influence is not finite; the parameters
                were not stepped with it.
        """
        if start == 0:
            self.method.reset(batch.reset)
        for x, target, divisor in split_batch(batch, self.method.segment, self.step_per_segment, start):
            tally = self.method.learn(x, target, divisor)
            start += len(x)
            due = tally.asked > 0 if self.step_per_segment else start == len(batch.x)
            if due:
                self._step()
            yield start, tally

    def train_batch(self, batch: Batch) -> Tally:
        """Train on one batch of sequences.

        Raises:
            FloatingPointError: see :meth:`segments`.
        """
        return sum((tally for _, tally in self.segments(batch)), Tally())

    def state_dict(self) -> dict[str, Any]:
        """Parameters, their gradients so far, the optimizer, and what the method carries."""
        return {
            "model": self.method.model.state_dict(),
            "gradients": [None if p.grad is None else p.grad.clone() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "gradient_norm": self.gradient_norm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; learning rate and weight decay stay those of this trainer."""
        self.method.model.load_state_dict(state["model"])
        for parameter, gradient in zip(self.parameters, state["gradients"], strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.weight_decay
        self.method.load_state_dict(state["method"])
        self.gradient_norm = state["gradient_norm"]


@dataclass(frozen=True)
class Progress:
    """Where a training stands after a segment.

    Attributes:
        update: updates done; a batch is an update.
        complete: whether the segment was the last of its batch.
        length: steps of the batch.
        tally: loss and hits of the batch so far.
        tokens: tokens seen so far; a step of one stream is a token.
        seconds: wall-clock time of the training so far, that before an interruption included.
    """

    update: int
    complete: bool
    length: int
    tally: Tally
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Mean rate since the training began."""
        return self.tokens / self.seconds if self.seconds else math.nan


class Training:
    """A training on a stream; its state can be saved between any two segments.

    Taking its :meth:`state_dict` changes nothing; a training that loads it takes the same path from there on, bit for
    bit on the same machine with the same versions and number of threads.

    Args:
        trainer: what learns.
        stream: where the batches come from.
        updates: batches to train on.

    Attributes:
        update: updates done.
        step: steps done, of all streams together; the ``T`` of every batch counts.
        tokens: steps times streams.
        seconds: wall-clock time so far.
    """

    def __init__(self, trainer: Trainer, stream: Stream, updates: int) -> None:
        self.trainer = trainer
        self.stream = stream
        self.updates = updates
        self.update = 0
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self._done = 0  # steps of the current batch that are done; 0 between two batches
        self._before_batch: Any = None  # position of the stream before the current batch
        self._tally = Tally()

    def segments(self) -> Iterator[Progress]:
        """Train until all updates are done or the stream ends, yielding after every segment.

        Raises:
            DivergenceError: with the first step at which a loss, gradient, state or influence was not finite.
        """
        began = time.perf_counter() - self.seconds
        batches = iter(self.stream)
        while self.update < self.updates:
            if not self._done:
                self._before_batch = self.stream.state_dict()
            batch = next(batches, None)
            if batch is None:
                return
            length, streams = batch.target.shape
            self.trainer.set_progress(self.update / max(self.updates - 1, 1))
            segments = self.trainer.segments(batch, self._done)
            complete = False
            while not complete:
                try:
                    done, tally = next(segments)
                except FloatingPointError as error:
                    raise self._divergence(error, length) from error
                complete = done == length
                self.step += done - self._done
                self.tokens += (done - self._done) * streams
                self.update += complete
                self.seconds = time.perf_counter() - began
                tally += self._tally
                self._done, self._tally = (0, Tally()) if complete else (done, tally)
                yield Progress(self.update, complete, length, tally, self.tokens, self.seconds)

    def _divergence(self, error: FloatingPointError, length: int) -> DivergenceError:
        if isinstance(error, NonFiniteError):
            step = error.step
        elif isinstance(error, NonFiniteLossError):
            step = self.step + error.step
        else:  # found at the end of the segment
            segment = self.trainer.method.segment or length
            step = self.step + min(segment, length - self._done) - 1
        return DivergenceError(self.update + 1, step, str(error))

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the training goes on, as tensors, numbers and containers of them."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return {
            "update": self.update,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "done": self._done,
            "tally": astuple(self._tally),
            "stream": self._before_batch if self._done else self.stream.state_dict(),
            "trainer": self.trainer.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, for a trainer and a stream built with the same arguments."""
        self.trainer.load_state_dict(state["trainer"])
        self.stream.load_state_dict(state["stream"])
        self._before_batch = state["stream"]
        self.update, self.step = state["update"], state["step"]
        self.tokens, self.seconds = state["tokens"], state["seconds"]
        self._done, self._tally = state["done"], Tally(*state["tally"])
        torch.set_rng_state(state["random"]["cpu"])
        if state["random"]["cuda"]:
            torch.cuda.set_rng_state_all(state["random"]["cuda"])


def train(trainer: Trainer, stream: Stream, updates: int, max_seconds: float | None = None) -> Iterator[Progress]:
    """Train on the next ``updates`` batches of a stream, yielding after each.

    Args:
        trainer: what learns.
        stream: a task, a curriculum or a corpus.
        updates: batches to train on.
        max_seconds: stop after the first update that ends later than this; the caller sees it from ``update``.

    Yields:
        The state of the training after each update.
    """
    for progress in Training(trainer, stream, updates).segments():
        if progress.complete:
            yield progress
            if max_seconds is not None and progress.seconds > max_seconds:
                return
