"""The planner in Python: the same numbers as ``csrc/planner.h``, which takes its place where it was built.

How the influence of sleeping experts is kept: moved at every segment (eager), or caught up later by replay or by merged
products, and then how many segments and how deep a tree to keep. All costs are seconds per stream and segment, of the
work on experts that a segment does not use; what is done for the active experts is the same either way and left out.
The model is deterministic: rates are arguments, nothing is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

PATHS = ("replay", "product", "auto")
"""Ways to catch up: segment by segment, by one product at every wake-up, or by the cheaper of both at each gap."""
LONGEST = 4096
"""At most this many segments are kept unless the buffer is given."""


@dataclass(frozen=True)
class Option:
    """One row of the cost table.

    Attributes:
        path: ``"eager"`` or one of :data:`PATHS`.
        buffer: segments kept.
        levels: highest level of the tree.
        wake: catching up, expiries included.
        append: leaves and merges.
        flush: loss rows of sleepers.
        overhead: bookkeeping.
        tree_bytes: of one stream.
    """

    path: str
    buffer: int = 0
    levels: int = 0
    wake: float = 0.0
    append: float = 0.0
    flush: float = 0.0
    overhead: float = 0.0
    tree_bytes: float = 0.0

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.wake + self.append + self.flush + self.overhead


class Planner:
    """The cost model for given sizes and rates, with the arguments of :func:`plan`."""

    def __init__(
        self,
        *,
        num_slots: int,
        slot_size: int,
        read_slots: int,
        write_slots: int,
        num_experts: int,
        top_k: int,
        expert_columns: int,
        batch_size: int,
        commit_every: int,
        flush_every: float,
        buffer: int,
        itemsize: int,
        flops: float = 80e9,
        bytes: float = 8e9,
        lazy_seconds: float = 4e-4,
        query_seconds: float = 3e-5,
        margin: float = 0.8,
    ) -> None:
        for name, value, least in (
            ("num_slots", num_slots, 1),
            ("slot_size", slot_size, 1),
            ("read_slots", read_slots, 0),
            ("write_slots", write_slots, 0),
            ("num_experts", num_experts, 0),
            ("top_k", top_k, 0),
            ("expert_columns", expert_columns, 0),
            ("batch_size", batch_size, 1),
            ("commit_every", commit_every, 1),
            ("buffer", buffer, 0),
            ("itemsize", itemsize, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.num_slots, self.num_experts, self.batch_size = float(num_slots), float(num_experts), float(batch_size)
        self.size, self.columns, self.steps = float(slot_size), float(expert_columns), float(commit_every)
        self.flush_every, self.buffer, self.itemsize = max(flush_every, 1.0), buffer, float(itemsize)
        self.bytes, self.lazy_seconds, self.query_seconds, self.margin = bytes, lazy_seconds, query_seconds, margin
        self.hidden = self.num_slots * self.size
        # Slots of a segment, the chance that it uses a given expert, and the speed in the dtype.
        self.rows = min(self.num_slots, self.steps * write_slots)
        self.cols = min(self.num_slots, self.steps * (read_slots + write_slots))
        self.use = 1.0
        if num_experts:
            self.use = 1.0 - math.pow(1.0 - min(1.0, top_k / self.num_experts), self.steps)
        self.flops = flops * (0.5 if itemsize > 4 else 1.0)
        # Many options ask for the same gaps.
        self.replay_seconds = cache(self._replay_seconds)
        self.product_seconds = cache(self._product_seconds)
        self.merge_seconds = cache(self._merge_seconds)

    def filled(self, slots: float) -> float:
        """Most slots that this many draws can fill."""
        return min(self.num_slots, slots)

    def apply_seconds(self, rows: float, cols: float) -> float:
        """One pass of an expert's influence through a map of this many rows and columns, in slots."""
        return max(
            2.0 * (rows * self.size + 1.0) * cols * self.size * self.columns / self.flops,
            self.itemsize * (rows + cols) * self.size * self.columns / self.bytes,
        )

    def _replay_seconds(self, gap: int) -> float:
        """Catching up through this many segments, one after the other."""
        one = 2.0 * (self.rows * self.size + 1.0) * self.cols * self.size * self.columns / self.flops
        return max(gap * one, 2.0 * self.itemsize * self.hidden * self.columns / self.bytes)

    def _product_seconds(self, gap: int, levels: int) -> float:
        """Catching up by one product; ``levels`` bounds the nodes that it is merged from."""
        nodes, level = float(gap), 0
        while level < levels and nodes > 2.0:
            nodes, level = nodes / 2.0 + 0.5, level + 1
        nodes = max(nodes, min(gap, 1.0 + 0.75 * math.log2(max(gap, 1.0))))
        whole = self.apply_seconds(self.filled(gap * self.rows), self.filled(gap * self.cols))
        return (nodes - 1.0) * self.merge_seconds(gap) + whole

    def _merge_seconds(self, segments: int) -> float:
        """Merge of two nodes whose product covers this many segments."""
        D = self.size
        rows, cols = self.filled(segments * self.rows / 2.0), self.filled(segments * self.cols / 2.0)
        work = 2.0 * (rows * D + 1.0) * rows * D * cols * D / (0.6 * self.flops)
        rows, cols = self.filled(segments * self.rows), self.filled(segments * self.cols)
        return work + 2.0 * self.itemsize * rows * cols * D * D / self.bytes + 2e-6

    def tree_bytes(self, buffer: int, levels: int) -> float:
        """Bytes of the nodes of one stream."""
        total = 0.0
        for level in range(levels + 1):
            width = 1 << level
            total += (buffer >> level) * self.filled(width * self.rows) * self.filled(width * self.cols)
        return total * self.itemsize * self.size * self.size

    def eager(self) -> Option:
        """Moving every expert at every segment."""
        return Option("eager", wake=self.num_experts * (1.0 - self.use) * self.apply_seconds(self.rows, self.cols))

    def seconds_of(self, path: str, levels: int) -> Callable[[int], float]:
        """What catching up through a gap costs on a path."""
        if path == "replay":
            return self.replay_seconds
        if path == "product":
            return lambda gap: self.product_seconds(gap, levels)
        return lambda gap: min(self.replay_seconds(gap), self.product_seconds(gap, levels))

    def lazy(self, path: str, buffer: int, levels: int) -> Option:
        """Keeping experts asleep for up to ``buffer`` segments."""
        use, seconds = self.use, self.seconds_of(path, levels)
        # Sleeps start E use (1 - use) times a segment; their length is geometric. One longer than the buffer is cut.
        sleeps = self.num_experts * use * (1.0 - use)
        wake, wakes, stay, gap = 0.0, 0.0, 1.0, 1
        while gap < buffer and stay > 1e-9:
            wake += sleeps * stay * use * seconds(gap)
            wakes += sleeps * stay * use
            stay *= 1.0 - use
            gap += 1
        cut = max(1.0 - math.pow(1.0 - use, buffer), 1e-9)
        wake += sleeps * stay / cut * seconds(buffer)
        wakes += sleeps * stay / cut
        append = 0.0
        for level in range(1, levels + 1):
            append += self.merge_seconds(1 << level) / (1 << level)
        sweep = buffer * (8.0 * self.rows * self.size * self.cols * self.size / self.flops + 1e-6)
        paid = self.num_experts * (1.0 - use) * self.itemsize * self.hidden * self.columns / self.bytes
        flush = self.steps / self.flush_every * (paid + sweep)
        overhead = self.lazy_seconds / self.batch_size + wakes * self.query_seconds
        return Option(path, buffer, levels, wake, append, flush, overhead, self.tree_bytes(buffer, levels))

    def best(self, path: str) -> Option:
        """The cheapest option of a path whose tree takes at most half the memory of the influence."""
        room = 0.5 * self.itemsize * (self.hidden + 1.0) * self.columns * self.num_experts
        buffers = [self.buffer] if self.buffer else [1 << i for i in range(3, LONGEST.bit_length())]
        options = [
            self.lazy(path, buffer, levels)
            for buffer in buffers
            for levels in range(1 if path == "replay" else buffer.bit_length())
            if len(buffers) == 1 or buffer == buffers[0] or self.tree_bytes(buffer, levels) <= room
        ]
        return min(options, key=lambda option: option.total)

    def plan(self) -> dict[str, Any]:
        """The decision, see :func:`plan`."""
        eager = self.eager()
        table, best = [eager], eager
        if self.use < 1.0:
            table += [self.best(path) for path in PATHS]
            best = min(table[1:], key=lambda option: option.total)
        stays_eager = best is eager or best.total > self.margin * eager.total
        product_from = 0
        if not stays_eager and best.path != "replay":
            product_from = next(
                (
                    gap
                    for gap in range(2, best.buffer + 1)
                    if best.path == "product" or self.product_seconds(gap, best.levels) < self.replay_seconds(gap)
                ),
                0,
            )
        return {
            "eager": stays_eager,
            "buffer": max(1, self.buffer) if stays_eager else best.buffer,
            "levels": 0 if stays_eager else best.levels,
            "product_from": product_from,
            "table": [{**vars(option), "total": option.total} for option in table],
        }


def plan(**sizes_and_rates: Any) -> dict[str, Any]:
    """Decide how sleeping experts are kept; what the compiled planner is called with, and what it returns.

    Args:
        **sizes_and_rates: the arguments and rates of ``plan``; ``buffer`` is 0 to choose.

    Raises:
        ValueError: on sizes out of range.
    """
    return Planner(**sizes_and_rates).plan()
