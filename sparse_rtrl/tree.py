"""A circular segment tree of block-sparse state Jacobians that answers suffix products."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sparse_rtrl import ops
from sparse_rtrl.reference import completed_levels, dyadic_cover, pull_back, slot_entries, widen

Rings: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
"""Rows, columns, blocks and loss rows of the nodes, one ring per level."""


@dataclass(frozen=True)
class Node:
    """A block-sparse map of the augmented state, per stream: some rows, some columns, the identity elsewhere.

    Attributes:
        rows: slots it writes, ``(B, R)`` int64 sorted, a subset of ``cols``; a repeated slot is a copy.
        cols: slots it depends on, ``(B, C)`` int64 sorted; the blocks of a repeated slot are zero.
        blocks: ``(B, R * D, C * D)``.
        loss_row: gradient of the loss of its steps with respect to the state that entered it, ``(B, C * D)``.
        num_slots: ``S``.
        slot_size: ``D``.
    """

    rows: Tensor
    cols: Tensor
    blocks: Tensor
    loss_row: Tensor
    num_slots: int
    slot_size: int

    def dense(self) -> Tensor:
        """The whole map as a matrix, ``(B, H, H)``."""
        hidden = self.num_slots * self.slot_size
        batch = self.rows.shape[0]
        out = torch.eye(hidden, dtype=self.blocks.dtype, device=self.blocks.device).repeat(batch, 1, 1)
        col_entries = slot_entries(self.cols, self.slot_size)
        wide = self.blocks.new_zeros(batch, self.blocks.shape[1], hidden)
        wide.scatter_add_(2, col_entries.unsqueeze(1).expand_as(self.blocks), self.blocks)
        row_entries = slot_entries(self.rows, self.slot_size)
        return out.scatter_(1, row_entries.unsqueeze(2).expand_as(wide), wide)

    def dense_loss_row(self) -> Tensor:
        """The loss row over all state entries, ``(B, H)``."""
        out = self.loss_row.new_zeros(self.rows.shape[0], self.num_slots * self.slot_size)
        return out.scatter_add_(1, slot_entries(self.cols, self.slot_size), self.loss_row)

    def pull_back(self, v: Tensor) -> Tensor:
        """Row vector through the augmented map: ``u + v Φ``, for ``v (B, H)``."""
        return pull_back(self.rows, self.cols, self.blocks, self.loss_row, v, self.slot_size)


def ring_widths(
    levels: int, capacity: int, num_slots: int, write_slots: int, support_slots: int
) -> list[tuple[int, int, int]]:
    """Length ``L >> l``, row slots ``min(S, 2**l kw)`` and column slots ``min(S, 2**l ks)`` of every level's ring."""
    return [
        (capacity >> level, min(num_slots, write_slots << level), min(num_slots, support_slots << level))
        for level in range(levels + 1)
    ]


def ring_bytes(widths: list[tuple[int, int, int]], batch_size: int, slot_size: int, itemsize: int) -> int:
    """Bytes of the rings of a tree: slots, blocks and loss rows of every node."""
    numbers = sum(n * (r * slot_size + 1) * c * slot_size for n, r, c in widths)
    slots = sum(n * (r + c) for n, r, c in widths)
    return batch_size * (itemsize * numbers + 8 * slots)


class CircularTree:
    """The last ``capacity`` segment Jacobians of each stream, with products of aligned dyadic runs of them.

    Node ``i`` of level ``l`` is the product of the segments ``i * 2**l ... (i + 1) * 2**l - 1``, newest on the left. It
    is built once, when its last segment is appended, so an append costs less than one merge on average. Segments are
    numbered from the first append on and never renumbered: a product can thus never be taken in the wrong order where
    the ring wraps. A suffix of the window is covered by at most ``2 * log2(capacity)`` nodes.

    The nodes of a level stand in one preallocated ring, as wide as the widest segment so far makes them; a wider one
    makes all rings grow. The number of segments is kept on the device too, where the operations read it: with the CUDA
    operations an append (:meth:`append_segment`), a query (:meth:`suffixes`) and a replay need no synchronisation and
    can be captured in a CUDA graph, as long as no ring grows.

    Args:
        capacity: number of segments ``L`` that are kept.
        batch_size: streams ``B``.
        num_slots: slots ``S``.
        slot_size: numbers per slot ``D``.
        dtype: dtype of the Jacobians.
        device: where they are kept.
        levels: highest level of products that is kept; None for all that fit the capacity, 0 for leaves only.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"cuda"``, see :func:`sparse_rtrl.ops.select`.

    Raises:
        BackendError: if the backend is not there, with the remedy.
    """

    def __init__(
        self,
        capacity: int,
        batch_size: int,
        num_slots: int,
        slot_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        levels: int | None = None,
        backend: ops.Backend = "auto",
    ) -> None:
        for name, value in (
            ("capacity", capacity),
            ("batch_size", batch_size),
            ("num_slots", num_slots),
            ("slot_size", slot_size),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.capacity = capacity
        self.batch_size = batch_size
        self.num_slots = num_slots
        self.slot_size = slot_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.backend = backend
        self._ops = ops.select(backend, self.device, dtype)
        highest = capacity.bit_length() - 1
        self.levels = highest if levels is None else min(levels, highest)
        self.count = 0
        """Segments appended so far."""
        self.merges = 0
        """Merges done by appends."""
        self.query_merges = 0
        """Merges done by queries."""
        self.first = 0
        """Number of the first segment that was ever appended."""
        self.begin = [0] * batch_size
        """First segment of each stream's window; earlier ones were before its reset."""
        self._count = torch.zeros((), dtype=torch.int64, device=self.device)
        self._rings: Rings = ([], [], [], [])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_ops"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._ops = ops.select(self.backend, self.device, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the nodes; zero before the first append."""
        return sum(ring.numel() * ring.element_size() for part in self._rings for ring in part)

    def append(self, Jh: Tensor, write: Tensor, support: Tensor, loss_row: Tensor | None = None) -> None:
        """Append the Jacobian of one segment.

        Args:
            Jh: ``dh[write] / dh_entry[support]``, ``(B, kw * D, ks * D)``.
            write: written slots ``(B, kw)`` int64, distinct within a row.
            support: slots the segment depends on, ``(B, ks)`` int64, containing ``write``; duplicates add up.
            loss_row: ``dL/dh_entry`` over the support, ``(B, ks * D)``; None for no loss.

        Raises:
            ValueError: on wrong shapes, dtype or device, or slots out of range; on a GPU the slots are not read.
        """
        self._check(Jh, write, support, loss_row)
        if loss_row is not None:
            u = loss_row.new_zeros(self.batch_size, self.num_slots * self.slot_size)
            loss_row = u.scatter_add_(1, slot_entries(support, self.slot_size), loss_row)
        self.append_segment(Jh, write, support, loss_row)

    def append_segment(self, Jh: Tensor, write: Tensor, support: Tensor, loss_row: Tensor | None) -> None:
        """As :meth:`append`, with the loss row over the whole state, and slots that the caller answers for.

        Args:
            Jh: ``dh[write] / dh_entry[support]``, ``(B, kw * D, ks * D)``.
            write: written slots ``(B, kw)`` int64, contained in ``support``; the blocks of a repeated slot are equal.
            support: ``(B, ks)`` int64; duplicates add up.
            loss_row: ``dL/dh_entry``, ``(B, S * D)``, zero outside the support; None for no loss.
        """
        self._reserve(write.shape[1], support.shape[1])
        sizes = (self.first, self.num_slots, self.slot_size)
        self._ops.tree_append_(*self._rings, self._count, Jh, write, support, loss_row, *sizes)
        self.count += 1
        self.merges += completed_levels(self.count, self.first, self.levels)

    def _reserve(self, num_rows: int, num_cols: int) -> None:
        """Make the nodes wide enough for segments with so many rows and columns, keeping what is there."""
        rows, cols = self._rings[:2]
        # A leaf without rows holds one row of the identity.
        own_rows, own_cols = (rows[0].shape[2], cols[0].shape[2]) if rows else (1, 1)
        num_rows, num_cols = (
            max(own_rows, min(num_rows, self.num_slots)),
            max(own_cols, min(num_cols, self.num_slots)),
        )
        if rows and (num_rows, num_cols) == (own_rows, own_cols):
            return
        grown: Rings = ([], [], [], [])
        for level, (n, r, c) in enumerate(ring_widths(self.levels, self.capacity, self.num_slots, num_rows, num_cols)):
            height, width = r * self.slot_size, c * self.slot_size
            if rows:
                old_rows, old_cols, old_blocks, old_loss_rows = (part[level].flatten(0, 1) for part in self._rings)
                wide = widen(old_rows, old_cols, old_blocks, old_loss_rows, r, c, self.slot_size)
                new = [part.unflatten(0, (n, self.batch_size)) for part in wide]
            else:
                slots = [torch.zeros(n, self.batch_size, k, dtype=torch.int64, device=self.device) for k in (r, c)]
                shapes = ((n, self.batch_size, height, width), (n, self.batch_size, width))
                new = slots + [torch.zeros(shape, dtype=self.dtype, device=self.device) for shape in shapes]
            for rings, ring in zip(grown, new, strict=True):
                rings.append(ring.contiguous())
        self._rings = grown

    def suffix(self, start: int | Tensor) -> Node:
        """Product of everything appended since ``count`` was ``start``, newest on the left.

        Args:
            start: an int, or one per stream ``(B,)``.

        Returns:
            The product as a block-sparse node; the identity for ``start == count``.

        Raises:
            IndexError: if a start lies before the window, before that stream's reset, or after the last append.
        """
        starts = (
            [int(s) for s in start.tolist()] if isinstance(start, Tensor) else [operator.index(start)] * self.batch_size
        )
        if len(starts) != self.batch_size:
            raise ValueError(
                f"start must be an int or hold one start per stream ({self.batch_size}), got {len(starts)}"
            )
        for stream, s in enumerate(starts):
            oldest = max(self.begin[stream], self.count - self.capacity)
            if not oldest <= s <= self.count:
                raise IndexError(
                    f"start must lie between {oldest} and {self.count} for stream {stream}, got {s}:"
                    " earlier segments left the window or were before the stream's reset"
                )
        self.query_merges += sum(self._merges_of(s) for s in set(starts))
        every = torch.arange(self.batch_size, device=self.device)
        return self._product(every, torch.tensor(starts, device=self.device), min(starts))

    def segments(self, start: int) -> Iterator[tuple[int, Node]]:
        """The segments ``start ... count - 1`` as (number, node), oldest first; views, good until they expire."""
        for index in range(start, self.count):
            yield index, self._node(0, index)

    def suffixes(self, streams: Tensor, starts: Tensor) -> Node:
        """Products of everything since ``starts``, one per pair of a stream and a start, as a node of batch ``Q``.

        On a GPU the starts stay on the device: the result then has room for a suffix of the whole window, and
        ``query_merges`` does not count.

        Args:
            streams: ``(Q,)`` int64.
            starts: ``(Q,)`` int64, at most ``count``; not checked against the streams' resets.
        """
        oldest = self.count - self.capacity
        if self.device.type == "cpu":
            values = starts.tolist()
            oldest = min(values, default=self.count)
            self.query_merges += sum(map(self._merges_of, values))
        return self._product(streams, starts, oldest)

    def _product(self, streams: Tensor, starts: Tensor, oldest: int) -> Node:
        """Products of the segments from each start on, none of them before ``oldest``."""
        self._reserve(1, 1)
        room = [min(self.num_slots, (self.count - oldest) * part[0].shape[2]) for part in self._rings[:2]]
        new_rows, new_cols, blocks, loss_row = self._ops.suffix_product(
            *self._rings, self._count, streams, starts, *room, self.num_slots, self.slot_size
        )
        return Node(new_rows, new_cols, blocks, loss_row, self.num_slots, self.slot_size)

    def _merges_of(self, start: int) -> int:
        return max(0, sum(1 for _ in dyadic_cover(start, self.count, self.levels)) - 1)

    def replay_(self, P: Tensor, streams: Tensor, groups: Tensor, starts: Tensor) -> None:
        """Move influence matrices through every segment since their starts, in place.

        Args:
            P: ``(G, H + 1, N)``.
            streams: stream of each matrix, ``(M,)`` int64.
            groups: the matrices, ``(M,)`` int64, rows of ``P``, distinct.
            starts: ``(M,)`` int64; not checked against the streams' resets.
        """
        if self._rings[0]:
            ring = (part[0] for part in self._rings)
            self._ops.catch_up_(P, *ring, self._count, streams, groups, starts, self.slot_size)

    def loss_rows(self, starts: Tensor, newest: Tensor) -> Tensor:
        """Loss row of many suffixes in one backward sweep: ``u(start) = sum_t u_t J_{t-1} ... J_start``.

        Args:
            starts: ``(B, E)`` int64, a start per stream and expert.
            newest: row vector that enters from the right of the newest segment, ``(B, H)``.

        Returns:
            ``(B, E, H)``: gradient of the losses since each start with respect to the state at that start.
        """
        if not self._rings[0]:
            return newest.unsqueeze(1).repeat(1, starts.shape[1], 1)
        ring = (part[0] for part in self._rings)
        out: Tensor = self._ops.suffix_loss_rows(*ring, self._count, starts, newest, self.slot_size)
        return out

    def reset(self, streams: Tensor | None = None) -> None:
        """Empty the windows of some streams.

        Args:
            streams: boolean mask ``(B,)``; None for all.

        Raises:
            ValueError: if ``streams`` is no such mask.
        """
        if streams is not None and (streams.dtype != torch.bool or tuple(streams.shape) != (self.batch_size,)):
            got = f"{streams.dtype} {tuple(streams.shape)}"
            raise ValueError(f"streams must be a bool mask of shape ({self.batch_size},), got {got}")
        mask = [True] * self.batch_size if streams is None else streams.tolist()
        self.begin = [self.count if m else b for m, b in zip(mask, self.begin, strict=True)]

    def begin_at(self, count: int) -> None:
        """Number the first segment of an empty tree ``count``."""
        if self.count != self.first:
            raise ValueError(f"begin_at needs an empty tree, {self.count - self.first} segments were appended")
        self.count = self.first = count
        self._count.fill_(count)
        self.begin = [count] * self.batch_size

    def refresh_count(self) -> None:
        """Read ``count`` back from the device, after appends that the replay of a CUDA graph made."""
        self.count = int(self._count)
        # Every aligned run of segments since the first one was merged once.
        runs = ((self.count >> level) - -(-self.first >> level) for level in range(1, self.levels + 1))
        self.merges = sum(max(0, n) for n in runs)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume bit for bit, as tensors, numbers and containers of them."""
        return {
            "count": self.count,
            "first": self.first,
            "merges": self.merges,
            "query_merges": self.query_merges,
            "begin": list(self.begin),
            "capacity": self.capacity,
            "levels": self.levels,
            "rings": [[ring.clone() for ring in part] for part in self._rings],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: if it came from a tree of another capacity, depth or batch size.
        """
        own = (self.capacity, self.levels, self.batch_size)
        given = (state["capacity"], state["levels"], len(state["begin"]))
        if own != given:
            raise ValueError(
                f"state must come from a tree with capacity {own[0]}, levels up to {own[1]} and {own[2]} streams,"
                f" got capacity {given[0]}, levels up to {given[1]} and {given[2]} streams"
            )
        self.count, self.first = state["count"], state["first"]
        self._count.fill_(self.count)
        self.merges, self.query_merges = state["merges"], state["query_merges"]
        self.begin = list(state["begin"])
        rows, cols, blocks, loss_rows = ([ring.to(self.device).clone() for ring in part] for part in state["rings"])
        self._rings = (rows, cols, blocks, loss_rows)

    def _node(self, level: int, index: int) -> Node:
        rows, cols, blocks, loss_row = (part[level][index % (self.capacity >> level)] for part in self._rings)
        return Node(rows, cols, blocks, loss_row, self.num_slots, self.slot_size)

    def _check(self, Jh: Tensor, write: Tensor, support: Tensor, loss_row: Tensor | None) -> None:
        for name, slots in (("write", write), ("support", support)):
            if slots.dtype != torch.int64 or slots.dim() != 2 or slots.shape[0] != self.batch_size:
                raise ValueError(
                    f"{name} must be int64 of shape ({self.batch_size}, k), got {slots.dtype} {tuple(slots.shape)}"
                )
        if self.device.type == "cpu":
            self._check_slots(write, support)
        shape = (self.batch_size, write.shape[1] * self.slot_size, support.shape[1] * self.slot_size)
        if tuple(Jh.shape) != shape or Jh.dtype != self.dtype:
            raise ValueError(f"Jh must be {self.dtype} of shape {shape}, got {Jh.dtype} {tuple(Jh.shape)}")
        if loss_row is not None and tuple(loss_row.shape) != (shape[0], shape[2]):
            raise ValueError(f"loss_row must have shape {(shape[0], shape[2])}, got {tuple(loss_row.shape)}")

    def _check_slots(self, write: Tensor, support: Tensor) -> None:
        for name, slots in (("write", write.tolist()), ("support", support.tolist())):
            if any(not 0 <= slot < self.num_slots for row in slots for slot in row):
                raise ValueError(f"{name} must hold slots in 0 ... {self.num_slots - 1}, got {slots}")
        for stream, (w, s) in enumerate(zip(write.tolist(), support.tolist(), strict=True)):
            if len(set(w)) != len(w) or not set(w) <= set(s):
                raise ValueError(
                    f"write must be distinct and contained in support, got write {w}, support {s} in stream {stream}"
                )
