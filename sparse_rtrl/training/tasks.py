"""Synthetic sequence tasks as endless streams of batches, and a length curriculum over them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

IGNORE = -100
"""Target of a step at which no answer is asked; the default ``ignore_index`` of PyTorch's cross entropy."""


@dataclass(frozen=True)
class Batch:
    """One batch of sequences.

    Attributes:
        x: one-hot inputs ``(T, B, input_size)`` float.
        target: class asked for at each step ``(T, B)`` int64, :data:`IGNORE` where no answer is asked.
        reset: mask ``(B,)`` of the streams that start a new sequence at the first step, the others going on where the
            batch before ended; None if all start anew.
    """

    x: Tensor
    target: Tensor
    reset: Tensor | None = None


class Stream(Protocol):
    """An endless source of batches that can say where it is and go on from there: a task, a curriculum, a corpus."""

    @property
    def input_size(self) -> int:
        """Width of the inputs."""

    @property
    def output_size(self) -> int:
        """Number of classes; 256 means that the targets are bytes."""

    @property
    def batch_size(self) -> int:
        """Streams ``B``."""

    @property
    def chance(self) -> float:
        """Accuracy of the best answer that ignores the input."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the current position on; the position moves with each."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as tensors, numbers and containers of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position that :meth:`state_dict` returned."""


def _require(condition: bool, argument: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{argument} must be {expected}, got {value}")


class Task(ABC):
    """An endless stream of batches of sequences that all have the current ``length``.

    Iterating never ends; every batch is drawn anew from the task's own random generator, so two tasks with equal
    arguments yield equal batches and no other use of random numbers disturbs them. ``length`` may be set between two
    batches, which is how :class:`Curriculum` works.

    Args:
        length: steps per sequence ``T``.
        batch_size: sequences per batch ``B``.
        seed: seed of the task's generator, at most 32 bits, or a CPU generator to draw from.

    Attributes:
        input_size: width of the one-hot inputs.
        output_size: number of classes of an answer.
        chance: accuracy of the best answer that ignores the input.
        options: options of the command line beside the length, and the arguments they stand for.
    """

    input_size: int
    output_size: int
    options: ClassVar[dict[str, str]] = {}

    def __init__(self, length: int, batch_size: int, seed: int | torch.Generator) -> None:
        _require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        self.batch_size = batch_size
        if not isinstance(seed, torch.Generator):
            # The CPU generator drops higher bits without a word, so that two such seeds could give the same batches.
            _require(0 <= seed < 2**32, "seed", seed, "between 0 and 2**32 - 1")
            seed = torch.Generator().manual_seed(seed)
        self.generator = seed
        self.length = length

    @property
    def length(self) -> int:
        """Steps per sequence ``T``."""
        return self._length

    @length.setter
    def length(self, length: int) -> None:
        least = self.min_length
        _require(length >= least, "length", length, f"at least {least} for this {type(self).__name__}")
        self._length = length

    @property
    @abstractmethod
    def min_length(self) -> int:
        """Smallest ``length`` the other arguments allow."""

    @property
    def chance(self) -> float:
        """Accuracy of the best answer that ignores the input."""
        return 1.0 / self.output_size

    @abstractmethod
    def _draw(self) -> tuple[Tensor, Tensor]:
        """Draw ``tokens (B, T)`` and ``target (B, T)``, both int64."""

    def begin(self) -> dict[str, Tensor]:
        """Draw what a batch of sequences is about, ``(B, ...)``, for :meth:`part` to write it out piece by piece."""
        tokens, target = self._draw()
        return {"tokens": tokens, "target": target}

    def part(self, begun: dict[str, Tensor], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Steps ``start`` to ``stop`` of begun sequences: ``tokens`` and ``target``, both ``(B, stop - start)`` int64.

        Parts are taken from the first step to the last, each once: what is drawn along the way is not kept.
        """
        return begun["tokens"][:, start:stop], begun["target"][:, start:stop]

    def sample(self) -> Batch:
        """Draw the next batch."""
        tokens, target = self._draw()
        x = functional.one_hot(tokens.t().contiguous(), self.input_size).to(torch.get_default_dtype())
        return Batch(x, target.t().contiguous())

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.sample()

    def state_dict(self) -> dict[str, Any]:
        """Where the task is: the state of its generator and the current length."""
        return {"generator": self.generator.get_state(), "length": self.length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.length = state["length"]
        self.generator.set_state(state["generator"])

    def _integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def _permutations(self, rows: int, size: int) -> Tensor:
        """Independent uniform permutations of ``range(size)``, ``(rows, size)``."""
        return torch.rand(rows, size, generator=self.generator).argsort(dim=1)


TASKS: dict[str, type[Task]] = {}
"""Tasks by the name they have on the command line."""

Kind = TypeVar("Kind", bound=type[Task])


def register_task(name: str) -> Callable[[Kind], Kind]:
    """Register a class of tasks, made as ``kind(length, batch_size, seed=seed, **options)``, under a name."""

    def register(kind: Kind) -> Kind:
        TASKS[name] = kind
        return kind

    return register


@register_task("haystack")
class Haystack(Task):
    """Recall one marked value among fillers that look like it.

    A sequence is ``BOS f ... f KEY v SEP f ... f Q``: fillers ``f`` are drawn uniformly from the values, the triple
    ``KEY v SEP`` stands at a uniformly random place, and the class of ``v`` is asked for at ``Q``, the last step.

    Args:
        length: steps per sequence, at least 5.
        batch_size: sequences per batch.
        num_values: number of values, and of classes.
        min_distance: least number of steps from ``KEY`` to ``Q``; at most ``length - 2``.
        seed: seed of the task's generator, or a generator.
    """

    BOS, KEY, SEP, Q = range(4)

    options: ClassVar[dict[str, str]] = {"min_distance": "min_distance"}

    def __init__(
        self,
        length: int,
        batch_size: int,
        num_values: int = 4,
        min_distance: int = 0,
        seed: int | torch.Generator = 0,
    ) -> None:
        _require(num_values >= 2, "num_values", num_values, "at least 2")
        _require(min_distance >= 0, "min_distance", min_distance, "at least 0")
        self.input_size = 4 + num_values
        self.output_size = num_values
        self.min_distance = min_distance
        super().__init__(length, batch_size, seed)

    @property
    def min_length(self) -> int:
        """Smallest length: 5, or what ``min_distance`` needs."""
        return max(5, self.min_distance + 2)

    def _draw(self) -> tuple[Tensor, Tensor]:
        batch, length = self.batch_size, self.length
        tokens = 4 + self._integers(self.output_size, batch, length)
        # KEY lies between step 1 (after BOS) and the last step that keeps the distance to Q, which is never below 3.
        key = 1 + self._integers(length - 1 - max(self.min_distance, 3), batch, 1)
        answer = tokens.gather(1, key + 1)
        tokens.scatter_(1, key, self.KEY).scatter_(1, key + 2, self.SEP)
        tokens[:, 0] = self.BOS
        tokens[:, -1] = self.Q
        target = torch.full((batch, length), IGNORE)
        target[:, -1:] = answer - 4
        return tokens, target

    def begin(self) -> dict[str, Tensor]:
        """Draw key and value, ``(B,)`` each; fillers come with the parts: memory does not grow with the length."""
        key = 1 + self._integers(self.length - 1 - max(self.min_distance, 3), self.batch_size)
        return {"key": key, "value": self._integers(self.output_size, self.batch_size)}

    def part(self, begun: dict[str, Tensor], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Task.part`."""
        batch, last = self.batch_size, self.length - 1
        tokens = 4 + self._integers(self.output_size, batch, stop - start)
        key, value = begun["key"], begun["value"]
        ends, first, final = torch.full_like(key, last), torch.zeros_like(key), value + 4
        for place, token in ((key, self.KEY), (key + 1, final), (key + 2, self.SEP), (first, self.BOS), (ends, self.Q)):
            here = ((place >= start) & (place < stop)).nonzero().flatten()
            tokens[here, place[here] - start] = token if isinstance(token, int) else token[here]
        target = torch.full_like(tokens, IGNORE)
        if stop > last:
            target[:, last - start] = value
        return tokens, target


@register_task("copy")
class Copy(Task):
    """Repeat a pattern of symbols after a pause.

    A sequence is the pattern, blanks, ``GO`` and blanks to the end; the pattern is asked for symbol by symbol during
    the last ``pattern_length`` steps, of which ``GO`` is the first.

    Args:
        length: steps per sequence, at least ``2 * pattern_length``.
        batch_size: sequences per batch.
        num_symbols: number of symbols, and of classes.
        pattern_length: symbols to remember; None for half the length, whatever the length is.
        seed: seed of the task's generator, or a generator.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        num_symbols: int = 4,
        pattern_length: int | None = None,
        seed: int | torch.Generator = 0,
    ) -> None:
        _require(num_symbols >= 2, "num_symbols", num_symbols, "at least 2")
        _require(pattern_length is None or pattern_length >= 1, "pattern_length", pattern_length, "at least 1 or None")
        self.input_size = num_symbols + 2
        self.output_size = num_symbols
        self.pattern_length = pattern_length
        super().__init__(length, batch_size, seed)

    @property
    def min_length(self) -> int:
        """Smallest length: the pattern twice."""
        return 2 * (self.pattern_length or 1)

    def _draw(self) -> tuple[Tensor, Tensor]:
        n = self.pattern_length or self.length // 2
        blank, go = self.output_size, self.output_size + 1
        pattern = self._integers(self.output_size, self.batch_size, n)
        tokens = torch.full((self.batch_size, self.length), blank)
        tokens[:, :n] = pattern
        tokens[:, self.length - n] = go
        target = torch.full_like(tokens, IGNORE)
        target[:, self.length - n :] = pattern
        return tokens, target

    def begin(self) -> dict[str, Tensor]:
        """Draw the pattern ``(B, n)``; blanks come with the parts."""
        n = self.pattern_length or self.length // 2
        return {"pattern": self._integers(self.output_size, self.batch_size, n)}

    def part(self, begun: dict[str, Tensor], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Task.part`."""
        pattern = begun["pattern"]
        n, blank = pattern.shape[1], self.output_size
        go = self.length - n
        tokens = torch.full((self.batch_size, stop - start), blank)
        target = torch.full_like(tokens, IGNORE)
        shown, asked = range(start, min(stop, n)), range(max(start, go), stop)
        if shown:
            tokens[:, : len(shown)] = pattern[:, shown.start : shown.stop]
        if start <= go < stop:
            tokens[:, go - start] = blank + 1
        if asked:
            target[:, asked.start - start :] = pattern[:, asked.start - go : asked.stop - go]
        return tokens, target


@register_task("anbn")
class AnBn(Task):
    """Predict the next symbol of ``a^n b^n`` wherever it is determined.

    A sequence is ``a^n b^n END ... END`` with ``n`` uniform in ``1 .. length // 2``. From the first ``b`` on the word
    is determined, so at each ``b`` the answer is class 0 (another ``b`` follows) or, at the last one, class 1 (the
    word ends). Nothing is asked elsewhere. ``chance`` counts always giving the more frequent answer, which on long
    words is high.

    Args:
        length: steps per sequence, at least 2.
        batch_size: sequences per batch.
        seed: seed of the task's generator, or a generator.
    """

    A, B, END = range(3)
    input_size = 3
    output_size = 2

    def __init__(self, length: int, batch_size: int, seed: int | torch.Generator = 0) -> None:
        super().__init__(length, batch_size, seed)

    @property
    def min_length(self) -> int:
        """Smallest length: the word ``ab``."""
        return 2

    @property
    def chance(self) -> float:
        """Share of the more frequent answer: a word of ``n`` has ``n - 1`` answers of class 0 and one of class 1."""
        longest = self.length // 2
        return max(longest - 1, 2) / (longest + 1)

    def _draw(self) -> tuple[Tensor, Tensor]:
        n = 1 + self._integers(self.length // 2, self.batch_size, 1)
        step = torch.arange(self.length)
        tokens = torch.full((self.batch_size, self.length), self.END)
        tokens[step < 2 * n] = self.B
        tokens[step < n] = self.A
        target = torch.full_like(tokens, IGNORE)
        target[tokens == self.B] = 0
        target.scatter_(1, 2 * n - 1, 1)
        return tokens, target


@register_task("recall")
class MultiQueryRecall(Task):
    """Recall the values of several keys (multi-query associative recall).

    A sequence has two parts. In the first, ``num_pairs`` pairs ``key value`` with distinct keys stand at random places
    among distractors, which are drawn uniformly from the values. The second is ``Q key`` for ``num_queries`` of these
    keys, distinct and in random order; the class of the value is asked for at each of these keys. With
    ``min_distance``, distractors alone stand between the last value and the first ``Q``.

    Args:
        length: steps per sequence, at least ``2 * (num_pairs + num_queries) + min_distance``; the rest are distractors.
        batch_size: sequences per batch.
        num_pairs: pairs to remember.
        num_queries: keys asked for, at most ``num_pairs``; None for all of them.
        num_keys: size of the key vocabulary, at least ``num_pairs``; None for ``2 * num_pairs``.
        num_values: number of values, and of classes.
        min_distance: number of steps between the parts that hold no pair; every value is asked for more than this many
            steps after it was shown.
        seed: seed of the task's generator, or a generator.
    """

    options: ClassVar[dict[str, str]] = {"min_distance": "min_distance", "pairs": "num_pairs"}

    def __init__(
        self,
        length: int,
        batch_size: int,
        num_pairs: int = 4,
        num_queries: int | None = None,
        num_keys: int | None = None,
        num_values: int = 4,
        min_distance: int = 0,
        seed: int | torch.Generator = 0,
    ) -> None:
        _require(num_pairs >= 1, "num_pairs", num_pairs, "at least 1")
        _require(num_values >= 2, "num_values", num_values, "at least 2")
        _require(min_distance >= 0, "min_distance", min_distance, "at least 0")
        num_queries = num_pairs if num_queries is None else num_queries
        num_keys = 2 * num_pairs if num_keys is None else num_keys
        _require(1 <= num_queries <= num_pairs, "num_queries", num_queries, f"between 1 and num_pairs ({num_pairs})")
        _require(num_keys >= num_pairs, "num_keys", num_keys, f"at least num_pairs ({num_pairs})")
        self.num_pairs = num_pairs
        self.num_queries = num_queries
        self.num_keys = num_keys
        self.min_distance = min_distance
        # Tokens: values first, then keys, then Q, so that a value's token is its class.
        self.input_size = num_values + num_keys + 1
        self.output_size = num_values
        super().__init__(length, batch_size, seed)

    @property
    def min_length(self) -> int:
        """Smallest length: pairs and queries, and the distractors between them."""
        return 2 * (self.num_pairs + self.num_queries) + self.min_distance

    def _draw(self) -> tuple[Tensor, Tensor]:
        batch, pairs, queries = self.batch_size, self.num_pairs, self.num_queries
        first_query = self.length - 2 * queries
        keys = self.output_size + self._permutations(batch, self.num_keys)[:, :pairs]
        values = self._integers(self.output_size, batch, pairs)

        tokens = self._integers(self.output_size, batch, self.length)
        # An item is a pair (two steps) or a distractor (one step): each earlier pair shifts an item by one step.
        items = first_query - self.min_distance - pairs
        place = self._permutations(batch, items)[:, :pairs].sort(dim=1).values + torch.arange(pairs)
        tokens.scatter_(1, place, keys).scatter_(1, place + 1, values)

        asked = self._permutations(batch, pairs)[:, :queries]
        tokens[:, first_query::2] = self.input_size - 1
        tokens[:, first_query + 1 :: 2] = keys.gather(1, asked)
        target = torch.full_like(tokens, IGNORE)
        target[:, first_query + 1 :: 2] = values.gather(1, asked)
        return tokens, target


class Curriculum:
    """A task whose length grows while it is iterated.

    Update ``i`` (counted from 0) has the length ``start + (stop - start) * i / (updates - 1)``, rounded, and every
    update from the ``updates``-th on has the length ``stop``. All sequences of one batch have the same length. With
    ``shape="geometric"`` the length grows by a constant factor instead of a constant amount, which spends more
    updates on short sequences.

    Args:
        task: the task to draw from; its ``length`` is set before each batch.
        start: length of the first update.
        stop: length that is reached.
        updates: number of updates from ``start`` to ``stop``, both included.
        shape: ``"linear"`` or ``"geometric"``.
    """

    def __init__(self, task: Task, start: int, stop: int, updates: int, shape: str = "linear") -> None:
        _require(updates >= 1, "updates", updates, "at least 1")
        for argument, value in (("start", start), ("stop", stop)):
            _require(value >= task.min_length, argument, value, f"at least {task.min_length} for this task")
        _require(shape in ("linear", "geometric"), "shape", repr(shape), "'linear' or 'geometric'")
        self.task = task
        self.start = start
        self.stop = stop
        self.updates = updates
        self.shape = shape
        self.update = 0
        """Batches drawn so far."""

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
        """Sequences per batch of the task."""
        return self.task.batch_size

    @property
    def chance(self) -> float:
        """Accuracy of guessing at the task's current length."""
        return self.task.chance

    def length_at(self, update: int) -> int:
        """Length of the sequences of one update, counted from 0."""
        if update >= self.updates - 1:
            return self.stop
        progress = update / (self.updates - 1)
        if self.shape == "geometric":
            return round(self.start * (self.stop / self.start) ** progress)
        return round(self.start + (self.stop - self.start) * progress)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.task.length = self.length_at(self.update)
            self.update += 1
            yield self.task.sample()

    def state_dict(self) -> dict[str, Any]:
        """Where the curriculum is, and where its task is."""
        return {"update": self.update, "task": self.task.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.update = state["update"]
        self.task.load_state_dict(state["task"])
