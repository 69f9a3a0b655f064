"""A training that is logged, saved and stopped on request: the part of ``sparse-rtrl train`` that takes long."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import astuple
from types import FrameType, TracebackType
from typing import Any

import psutil
import torch

from sparse_rtrl.errors import DivergenceError
from sparse_rtrl.training.checkpoint import CheckpointFolder
from sparse_rtrl.training.gradient_method import Tally
from sparse_rtrl.training.runlog import BYTE_CLASSES, RunLog
from sparse_rtrl.training.trainer import Progress, Training


class StopSignals:
    """While entered, SIGTERM and SIGINT only note that a stop was asked for; a second one acts as usual.

    Attributes:
        name: name of the signal that arrived; None before.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()


class _Interval:
    """What is averaged from one line of metrics to the next."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.tokens = 0
        self.seconds = 0.0

    def take_row(self, training: Training, progress: Progress) -> dict[str, Any]:
        """The line of metrics that ends here; the next interval begins."""
        trainer, tally = training.trainer, self.tally
        seconds = progress.seconds - self.seconds
        row = {
            "update": progress.update,
            "tokens": progress.tokens,
            "length": progress.length,
            "seconds": progress.seconds,
            "loss": tally.mean_loss,
            "accuracy": tally.accuracy,
            "tokens_per_second": (progress.tokens - self.tokens) / seconds if seconds else math.nan,
            "learning_rate": trainer.optimizer.param_groups[0]["lr"],
            "gradient_norm": trainer.gradient_norm,
            "memory_bytes": psutil.Process().memory_info().rss,
            **trainer.method.metrics(),
        }
        if training.stream.output_size == BYTE_CLASSES:
            row["bits_per_byte"] = tally.mean_loss / math.log(2)
        if torch.cuda.is_initialized():
            row["gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
        self.tally, self.tokens, self.seconds = Tally(), progress.tokens, progress.seconds
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"tally": astuple(self.tally), "tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tally = Tally(*state["tally"])
        self.tokens, self.seconds = state["tokens"], state["seconds"]


class Run:
    """A training with its log and its checkpoints.

    Args:
        training: the training.
        log: where metrics and events go.
        checkpoints: where it is saved: at the beginning, regularly, on SIGTERM and SIGINT, and at the end.
        description: saved with every checkpoint: whatever it takes to build the training again.
        checkpoint_seconds: wall-clock time between two checkpoints.
        checkpoint_every: updates between two checkpoints besides; None for none.
        log_every: updates between two lines of metrics.
    """

    def __init__(
        self,
        training: Training,
        log: RunLog,
        checkpoints: CheckpointFolder,
        description: dict[str, Any],
        checkpoint_seconds: float = 300.0,
        checkpoint_every: int | None = None,
        log_every: int = 1,
    ) -> None:
        self.training = training
        self.log = log
        self.checkpoints = checkpoints
        self.description = description
        self.checkpoint_seconds = checkpoint_seconds
        self.checkpoint_every = checkpoint_every
        self.log_every = log_every
        self._interval = _Interval()
        self._saved_at_step = -1

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the content of a checkpoint of a run."""
        self.training.load_state_dict(state["training"])
        self._interval.load_state_dict(state["interval"])
        self._saved_at_step = self.training.step

    def save(self) -> None:
        """Write a checkpoint, unless the last one is of this step.

        Raises:
            DivergenceError: if a parameter is not finite; nothing is written then.
            CheckpointError: if it cannot be written; the earlier ones are as they were.
        """
        training, began = self.training, time.perf_counter()
        if training.step == self._saved_at_step:
            return
        for parameter in training.trainer.parameters:
            if not bool(torch.isfinite(parameter.detach()).all()):
                cause = f"a parameter of shape {tuple(parameter.shape)} is not finite"
                raise DivergenceError(training.update, training.step, cause)
        state = {
            "description": self.description,
            "training": training.state_dict(),
            "interval": self._interval.state_dict(),
        }
        path, size = self.checkpoints.save(state, training.update, training.step)
        self._saved_at_step = training.step
        self._event("checkpoint", checkpoint=path.name, bytes=size, save_seconds=time.perf_counter() - began)

    def _event(self, event: str, **details: Any) -> None:
        self.log.event(event, self.training.update, self.training.tokens, **details)

    def carry_out(self, on_metrics: Callable[[dict[str, Any]], None] = lambda row: None) -> str | None:
        """Train until all updates are done or a signal asks to stop, and save.

        Args:
            on_metrics: called with each line of metrics.

        Returns:
            Name of the signal that stopped it; None if all updates are done.

        Raises:
            DivergenceError: with the first bad step and the checkpoint from before it.
            CheckpointError: if a checkpoint cannot be written; the earlier ones are as they were.
        """
        with StopSignals() as stop:
            try:
                return self._carry_out(stop, on_metrics)
            except DivergenceError as error:
                before = [str(path) for path in self.checkpoints.paths()]
                self._event("diverged", error=str(error), step=error.step, checkpoints=before)
                error.args = (f"{error}. Checkpoints from before it, oldest first: {', '.join(before)}",)
                raise

    def _carry_out(self, stop: StopSignals, on_metrics: Callable[[dict[str, Any]], None]) -> str | None:
        training = self.training
        if not self.checkpoints.paths():
            self.save()
        saved_at = time.perf_counter()
        for progress in training.segments():
            due = False
            if progress.complete:
                self._after_update(progress, on_metrics)
                due = self.checkpoint_every is not None and progress.update % self.checkpoint_every == 0
            if stop.name is not None:
                self.save()
                self._event("interrupted", signal=stop.name)
                return stop.name
            if due or time.perf_counter() - saved_at >= self.checkpoint_seconds:
                self.save()
                saved_at = time.perf_counter()
        self.save()
        self._event("finished")
        return None

    def _after_update(self, progress: Progress, on_metrics: Callable[[dict[str, Any]], None]) -> None:
        self._interval.tally += progress.tally
        for event in self.training.trainer.method.events():
            self._event(**event)
        if progress.update % self.log_every == 0 or progress.update == self.training.updates:
            row = self._interval.take_row(self.training, progress)
            self.log.metrics(row)
            on_metrics(row)
