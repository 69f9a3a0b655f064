"""Endless parallel streams of batches through a corpus or a task, that know where they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sparse_rtrl.training.corpora import Corpus
from sparse_rtrl.training.tasks import IGNORE, Batch, Stream, Task


def _require_at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _one_hot(tokens: Tensor, target: Tensor, size: int, reset: Tensor) -> Batch:
    """A batch of ``tokens (B, n)`` and ``target (B, n)``; tokens below 0 become rows of zeros."""
    x = functional.one_hot(tokens.t() + 1, size + 1)[..., 1:].to(torch.get_default_dtype())
    return Batch(x, target.t().contiguous(), reset)


class CorpusStream:
    """Predict the next symbol of a corpus, in parallel streams cut into batches of ``length`` steps.

    Stream ``b`` of ``B`` starts at symbol ``b * len(corpus) // B`` and goes round: after the last symbol of the corpus
    comes its first, so every stream sees the whole corpus. All streams start anew at the first batch.

    By default a corpus is one ring: records (files, FASTA sequences) follow one another as if they were one, the last
    symbol of a record asks for the first of the next, and no stream is ever reset. With ``reset_at_borders`` every
    record is a sequence of its own: its last symbol asks for nothing, and the next record starts at the first step of
    the next batch, with the stream's bit set in ``reset``. What is left of the batch at the end of a record is filled
    with zeros that ask for nothing; the reset that follows makes sure that they influence nothing. Records of one
    symbol have nothing to ask for and are passed over.

    Args:
        corpus: where the symbols come from.
        batch_size: streams ``B``.
        length: steps per batch.
        reset_at_borders: start a new sequence with every record.

    Attributes:
        positions: symbol that each stream reads next, ``(B,)`` int64.

    Raises:
        ValueError: if the corpus has fewer symbols than there are streams, or no record of two symbols.
    """

    def __init__(self, corpus: Corpus, batch_size: int, length: int, reset_at_borders: bool = False) -> None:
        _require_at_least_one(batch_size=batch_size, length=length)
        if len(corpus) < max(2, batch_size):
            raise ValueError(
                f"batch_size must be at most the number of symbols of the corpus, and that at least 2; got {batch_size}"
                f" streams and {len(corpus)} symbols"
            )
        if reset_at_borders and int(np.diff(corpus.borders).max()) < 2:
            raise ValueError("reset_at_borders needs a record of at least 2 symbols, but none of the corpus has them")
        self.corpus = corpus
        self.batch_size = batch_size
        self.length = length
        self.reset_at_borders = reset_at_borders
        self.positions = torch.arange(batch_size) * len(corpus) // batch_size
        self._reset = torch.ones(batch_size, dtype=torch.bool)

    @property
    def input_size(self) -> int:
        """Width of the one-hot inputs: the number of symbols."""
        return self.corpus.input_size

    @property
    def output_size(self) -> int:
        """Number of classes: the symbols that are asked for."""
        return self.corpus.output_size

    @property
    def chance(self) -> float:
        """Share of the most frequent answer among the first million symbols of the corpus."""
        counts = np.bincount(self.corpus.read(0, min(len(self.corpus), 10**6)))[: self.output_size]
        return float(counts.max() / max(counts.sum(), 1))

    def sample(self) -> Batch:
        """Take the next batch."""
        tokens = torch.full((self.batch_size, self.length), -1)
        target = torch.full_like(tokens, IGNORE)
        reset, ended = self._reset, torch.zeros_like(self._reset)
        for stream, position in enumerate(self.positions.tolist()):
            count = self.length
            if self.reset_at_borders:
                position = self._in_long_record(position)
                count = min(count, self.corpus.record_of(position)[1] - position - 1)
            symbols = torch.from_numpy(self.corpus.read(position, count + 1)).long()
            tokens[stream, :count] = symbols[:-1]
            target[stream, :count] = symbols[1:].masked_fill(symbols[1:] >= self.output_size, IGNORE)
            position += count
            if self.reset_at_borders and position + 1 == self.corpus.record_of(position)[1]:
                ended[stream] = True
                position += 1
            self.positions[stream] = position % len(self.corpus)
        self._reset = ended
        return _one_hot(tokens, target, self.input_size, reset)

    def _in_long_record(self, position: int) -> int:
        """The position, or the start of the next record that has a symbol to ask for."""
        while self.corpus.record_of(position)[1] - position < 2:
            position = self.corpus.record_of(position)[1] % len(self.corpus)
        return position

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.sample()

    def state_dict(self) -> dict[str, Any]:
        """Where the streams are; from there they go on bit for bit, even with another ``length``."""
        return {
            "corpus": self.corpus.fingerprint,
            "positions": self.positions.clone(),
            "reset": self._reset.clone(),
            "reset_at_borders": self.reset_at_borders,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: if it is of another corpus, another number of streams or another ``reset_at_borders``; nothing
                is changed then.
        """
        if state["corpus"] != self.corpus.fingerprint:
            raise ValueError("state must be of this corpus, but its files had other names, sizes or contents")
        if len(state["positions"]) != self.batch_size:
            raise ValueError(f"state must be of {self.batch_size} streams, got {len(state['positions'])}")
        if state["reset_at_borders"] != self.reset_at_borders:
            raise ValueError(f"state must have reset_at_borders={self.reset_at_borders}, as this stream has")
        self.positions = state["positions"].clone()
        self._reset = state["reset"].clone()


class TaskStream:
    """Sequences of a task of any length, cut into batches of ``length`` steps.

    A ``Task`` yields whole sequences; here a sequence of the haystack of a million steps never
    exists as a whole, nor does one of the copy task beyond its pattern. All streams start a new sequence together,
    when the one before has ended; the last batch of a sequence is as short as it has to be.

    Args:
        task: its ``length`` is the length of the sequences.
        length: most steps per batch.
    """

    def __init__(self, task: Task, length: int) -> None:
        _require_at_least_one(length=length)
        self.task = task
        self.length = length
        self._step = 0
        self._begun: dict[str, Tensor] = {}

    @property
    def input_size(self) -> int:
        """Width of the one-hot inputs of the task."""
        return self.task.input_size

    @property
    def output_size(self) -> int:
        """Number of classes of the task."""
        return self.task.output_size

    @property
    def batch_size(self) -> int:
        """Streams ``B``."""
        return self.task.batch_size

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return self.task.chance

    def sample(self) -> Batch:
        """Take the next batch."""
        start = self._step
        if start == 0:
            self._begun = self.task.begin()
        stop = min(start + self.length, self.task.length)
        tokens, target = self.task.part(self._begun, start, stop)
        self._step = 0 if stop == self.task.length else stop
        reset = torch.full((self.batch_size,), start == 0)
        return _one_hot(tokens, target, self.input_size, reset)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.sample()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, in a sequence and in its random numbers."""
        return {
            "step": self._step,
            "begun": {name: value.clone() for name, value in self._begun.items()},
            "generator": self.task.generator.get_state(),
            "length": self.task.length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.task.length = state["length"]
        self.task.generator.set_state(state["generator"])
        self._step = state["step"]
        self._begun = {name: value.clone() for name, value in state["begun"].items()}


class TokenShift:
    """A stream whose inputs hold the input before as well, ``[x_t, x_{t-1}]``; zeros before the start of a sequence.

    A cell then sees at one step what followed what, such as a value and its key. What is shifted has no parameters, so
    nothing changes for a gradient.

    Args:
        stream: a task, a curriculum or a corpus.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._last: Tensor | None = None
        """Inputs of the last step of the last batch, ``(B, input_size)``."""

    @property
    def input_size(self) -> int:
        """Twice that of the stream."""
        return 2 * self.stream.input_size

    @property
    def output_size(self) -> int:
        """That of the stream."""
        return self.stream.output_size

    @property
    def batch_size(self) -> int:
        """That of the stream."""
        return self.stream.batch_size

    @property
    def chance(self) -> float:
        """That of the stream."""
        return self.stream.chance

    def sample(self) -> Batch:
        """Draw the next batch."""
        batch = next(iter(self.stream))
        if self._last is None or batch.reset is None:
            first = torch.zeros_like(batch.x[0])
        else:
            first = self._last.masked_fill(batch.reset.unsqueeze(1), 0.0)
        self._last = batch.x[-1]
        before = torch.cat((first.unsqueeze(0), batch.x[:-1]))
        return Batch(torch.cat((batch.x, before), -1), batch.target, batch.reset)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.sample()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, and its last inputs."""
        return {"stream": self.stream.state_dict(), "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.stream.load_state_dict(state["stream"])
        self._last = state["last"]
