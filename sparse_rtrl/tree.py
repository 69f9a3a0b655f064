"""A circular segment tree of block-sparse state Jacobians that answers suffix products."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse_rtrl import ops
from sparse_rtrl.reference import embed_node, pull_back, slot_entries, union_slots, widen


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
        backend: what composes it, see :func:`sparse_rtrl.ops.select`.
    """

    rows: Tensor
    cols: Tensor
    blocks: Tensor
    loss_row: Tensor
    num_slots: int
    slot_size: int
    backend: ops.Backend = "auto"

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

    def compose(self, older: Node) -> Node:
        """This map after an older one."""
        merge = ops.select(self.backend, self.blocks.device, self.blocks.dtype).tree_merge
        rows, cols, blocks, loss_row = merge(
            *(self.rows, self.cols, self.blocks, self.loss_row),
            *(older.rows, older.cols, older.blocks, older.loss_row),
            self.num_slots,
            self.slot_size,
        )
        return replace(self, rows=rows, cols=cols, blocks=blocks, loss_row=loss_row)

    def embed(self, rows: Tensor, cols: Tensor) -> Node:
        """The same map written over larger sets of rows ``(B, R')`` and columns ``(B, C')``."""
        blocks, loss_row = embed_node(
            self.rows, self.cols, self.blocks, self.loss_row, rows, cols, slot_size=self.slot_size
        )
        return replace(self, rows=rows, cols=cols, blocks=blocks, loss_row=loss_row)


def leaf(Jh: Tensor, write: Tensor, support: Tensor, loss_row: Tensor | None, num_slots: int, slot_size: int) -> Node:
    """The node of one segment: slots sorted, duplicated columns of the support summed.

    Args:
        Jh: ``(B, kw * D, ks * D)``.
        write: ``(B, kw)`` int64, distinct within a row and contained in ``support``.
        support: ``(B, ks)`` int64.
        loss_row: ``(B, ks * D)`` or None for no loss.
        num_slots: ``S``.
        slot_size: ``D``.
    """
    batch, num_rows = write.shape
    rows, order = write.sort(dim=1)
    cols = union_slots(support, support[:, :0], num_slots)
    blocks = Jh.view(batch, num_rows, slot_size, support.shape[1], slot_size)
    blocks = blocks.gather(1, order.view(batch, num_rows, 1, 1, 1).expand_as(blocks))
    summed = blocks.new_zeros(batch, num_rows, slot_size, cols.shape[1], slot_size)
    if support.shape[1] == 0:
        return Node(rows, cols, summed.flatten(3).flatten(1, 2), Jh.new_zeros(batch, 0), num_slots, slot_size)
    column = torch.searchsorted(cols, support.contiguous())
    summed.scatter_add_(3, column.view(batch, 1, 1, -1, 1).expand_as(blocks), blocks)
    u = Jh.new_zeros(batch, cols.shape[1], slot_size)
    if loss_row is not None:
        u.scatter_add_(
            1, column.unsqueeze(-1).expand(-1, -1, slot_size), loss_row.view(batch, support.shape[1], slot_size)
        )
    flat = summed.reshape(batch, num_rows * slot_size, cols.shape[1] * slot_size)
    return Node(rows, cols, flat, u.flatten(1), num_slots, slot_size)


class CircularTree:
    """The last ``capacity`` segment Jacobians of each stream, with products of aligned dyadic runs of them.

    Node ``i`` of level ``l`` is the product of the segments ``i * 2**l ... (i + 1) * 2**l - 1``, newest on the left. It
    is built once, when its last segment is appended, so an append costs less than one merge on average. Segments are
    numbered from the first append on and never renumbered: a product can thus never be taken in the wrong order where
    the ring wraps. A suffix of the window is covered by at most ``2 * log2(capacity)`` nodes.

    Args:
        capacity: number of segments ``L`` that are kept.
        batch_size: streams ``B``.
        num_slots: slots ``S``.
        slot_size: numbers per slot ``D``.
        dtype: dtype of the Jacobians.
        device: where they are kept.
        levels: highest level of products that is kept; None for all that fit the capacity, 0 for leaves only.
        backend: ``"auto"``, ``"reference"`` or ``"cpp"``, see :func:`sparse_rtrl.ops.select`.

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
        self._nodes: list[list[Node | None]] = [[None] * (capacity >> level) for level in range(self.levels + 1)]

    def append(self, Jh: Tensor, write: Tensor, support: Tensor, loss_row: Tensor | None = None) -> None:
        """Append the Jacobian of one segment.

        Args:
            Jh: ``dh[write] / dh_entry[support]``, ``(B, kw * D, ks * D)``.
            write: written slots ``(B, kw)`` int64, distinct within a row.
            support: slots the segment depends on, ``(B, ks)`` int64, containing ``write``; duplicates add up.
            loss_row: ``dL/dh_entry`` over the support, ``(B, ks * D)``; None for no loss.

        Raises:
            ValueError: on wrong shapes, dtype or device, or slots out of range.
        """
        self._check(Jh, write, support, loss_row)
        self.append_node(leaf(Jh, write, support, loss_row, self.num_slots, self.slot_size))

    def append_node(self, node: Node) -> None:
        """Append the node of one segment and build the products that it completes."""
        self._put(0, self.count, node if node.backend == self.backend else replace(node, backend=self.backend))
        self.count += 1
        for level in range(1, self.levels + 1):
            if self.count % (1 << level):
                break
            index = (self.count >> level) - 1
            if (2 * index) << (level - 1) < self.first:
                break
            self._put(level, index, self._get(level - 1, 2 * index + 1).compose(self._get(level - 1, 2 * index)))
            self.merges += 1

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
        distinct = sorted(set(starts))
        products = {s: self.product(s) for s in distinct}
        if len(distinct) == 1:
            return products[distinct[0]]
        wide = {s: self._widen(node) for s, node in products.items()}
        rows = torch.stack([wide[s].rows[b] for b, s in enumerate(starts)])
        cols = torch.stack([wide[s].cols[b] for b, s in enumerate(starts)])
        blocks = torch.stack([wide[s].blocks[b] for b, s in enumerate(starts)])
        loss_row = torch.stack([wide[s].loss_row[b] for b, s in enumerate(starts)])
        return Node(rows, cols, blocks, loss_row, self.num_slots, self.slot_size, self.backend)

    def product(self, start: int) -> Node:
        """Product of the segments ``start ... count - 1`` of every stream, without checking the streams' resets."""
        result: Node | None = None
        for level, index in self._cover(start):
            node = self._get(level, index)
            if result is None:
                result = node
            else:
                result = node.compose(result)
                self.query_merges += 1
        return self._identity() if result is None else result

    def segments(self, start: int) -> Iterator[tuple[int, Node]]:
        """The segments ``start ... count - 1`` as (number, node), oldest first."""
        for index in range(start, self.count):
            yield index, self._get(0, index)

    def suffixes(self, streams: Tensor, starts: Tensor) -> Node:
        """Products of everything since ``starts``, one per pair of a stream and a start, as a node of batch ``Q``.

        Args:
            streams: ``(Q,)`` int64.
            starts: ``(Q,)`` int64, before ``count``; not checked against the streams' resets.
        """
        covers = {start: list(self._cover(start)) for start in set(starts.tolist())}
        numbers = {name: n for n, name in enumerate({name for cover in covers.values() for name in cover})}
        nodes = [self._get(*name) for name in numbers]
        depth = max(map(len, covers.values()))
        padded = {s: [numbers[name] for name in c] + [-1] * (depth - len(c)) for s, c in covers.items()}
        paths = torch.tensor([padded[s] for s in starts.tolist()], device=starts.device)
        num_rows, num_cols = (
            min(self.num_slots, max(sum(size(nodes[n]) for n in path if n >= 0) for path in padded.values()))
            for size in (lambda node: node.rows.shape[1], lambda node: node.cols.shape[1])
        )
        self.query_merges += sum(len(covers[s]) - 1 for s in starts.tolist())
        new_rows, new_cols, blocks, loss_row = self._ops.suffix_product(
            *_parts(nodes), streams, paths, num_rows, num_cols, self.num_slots, self.slot_size
        )
        return Node(new_rows, new_cols, blocks, loss_row, self.num_slots, self.slot_size, self.backend)

    def replay_(self, P: Tensor, streams: Tensor, groups: Tensor, starts: Tensor) -> None:
        """Move influence matrices through every segment since their starts, in place.

        Args:
            P: ``(G, H + 1, N)``.
            streams: stream of each matrix, ``(M,)`` int64.
            groups: the matrices, ``(M,)`` int64, rows of ``P``, distinct.
            starts: ``(M,)`` int64; not checked against the streams' resets.
        """
        if not len(groups):
            return
        oldest = int(starts.min())
        nodes = [self._get(0, index) for index in range(oldest, self.count)]
        if nodes:
            self._ops.catch_up_(P, *_parts(nodes), streams, groups, starts - oldest, self.slot_size)

    def loss_rows(self, starts: Tensor, newest: Tensor) -> Tensor:
        """Loss row of many suffixes in one backward sweep: ``u(start) = sum_t u_t J_{t-1} ... J_start``.

        Args:
            starts: ``(B, E)`` int64, a start per stream and expert.
            newest: row vector that enters from the right of the newest segment, ``(B, H)``.

        Returns:
            ``(B, E, H)``: gradient of the losses since each start with respect to the state at that start.
        """
        oldest = int(starts.min())
        nodes = [self._get(0, index) for index in range(oldest, self.count)]
        out: Tensor = self._ops.suffix_loss_rows(*_parts(nodes), starts - oldest, newest, self.slot_size)
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
        self.begin = [count] * self.batch_size

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume bit for bit, as tensors, numbers and containers of them."""
        return {
            "count": self.count,
            "first": self.first,
            "merges": self.merges,
            "query_merges": self.query_merges,
            "begin": list(self.begin),
            "nodes": [
                [None if n is None else (n.rows, n.cols, n.blocks, n.loss_row) for n in level] for level in self._nodes
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: if it came from a tree of another capacity, depth or batch size.
        """
        sizes = [len(level) for level in state["nodes"]]
        if sizes != [len(level) for level in self._nodes] or len(state["begin"]) != self.batch_size:
            raise ValueError(
                f"state must come from a tree with capacity {self.capacity}, {self.levels + 1} levels and"
                f" {self.batch_size} streams, got levels of sizes {sizes} and {len(state['begin'])} streams"
            )
        self.count, self.first = state["count"], state["first"]
        self.merges, self.query_merges = state["merges"], state["query_merges"]
        self.begin = list(state["begin"])
        self._nodes = [
            [None if parts is None else self._restored(*parts) for parts in level] for level in state["nodes"]
        ]

    def _restored(self, rows: Tensor, cols: Tensor, blocks: Tensor, loss_row: Tensor) -> Node:
        rows, cols, blocks, loss_row = (part.to(self.device).clone() for part in (rows, cols, blocks, loss_row))
        return Node(rows, cols, blocks, loss_row, self.num_slots, self.slot_size, self.backend)

    def _cover(self, start: int) -> Iterator[tuple[int, int]]:
        """Aligned nodes (level, index) that cover the segments ``start ... count - 1``, oldest first."""
        position = start
        while position < self.count:
            level = 0
            while level < self.levels and position % (2 << level) == 0 and position + (2 << level) <= self.count:
                level += 1
            yield level, position >> level
            position += 1 << level

    def _put(self, level: int, index: int, node: Node) -> None:
        ring = self._nodes[level]
        ring[index % len(ring)] = node

    def _get(self, level: int, index: int) -> Node:
        ring = self._nodes[level]
        node = ring[index % len(ring)]
        if node is None:
            raise IndexError(f"node {index} of level {level} is not in the tree ({self.count} segments appended)")
        return node

    def _widen(self, node: Node) -> Node:
        """The same map written over ``S`` rows and columns, repeating the largest slot of each stream."""
        rows, cols, blocks, loss_row = widen(
            node.rows, node.cols, node.blocks, node.loss_row, self.num_slots, self.num_slots, self.slot_size
        )
        return replace(node, rows=rows, cols=cols, blocks=blocks, loss_row=loss_row)

    def _identity(self) -> Node:
        none = torch.zeros(self.batch_size, 0, dtype=torch.int64, device=self.device)
        blocks = torch.zeros(self.batch_size, 0, 0, dtype=self.dtype, device=self.device)
        return Node(none, none, blocks, blocks[:, 0:0].flatten(1), self.num_slots, self.slot_size, self.backend)

    def _check(self, Jh: Tensor, write: Tensor, support: Tensor, loss_row: Tensor | None) -> None:
        for name, slots in (("write", write), ("support", support)):
            if slots.dtype != torch.int64 or slots.dim() != 2 or slots.shape[0] != self.batch_size:
                raise ValueError(
                    f"{name} must be int64 of shape ({self.batch_size}, k), got {slots.dtype} {tuple(slots.shape)}"
                )
            if slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < self.num_slots:
                raise ValueError(f"{name} must hold slots in 0 ... {self.num_slots - 1}, got {slots.tolist()}")
        for stream, (w, s) in enumerate(zip(write.tolist(), support.tolist(), strict=True)):
            if len(set(w)) != len(w) or not set(w) <= set(s):
                raise ValueError(
                    f"write must be distinct and contained in support, got write {w}, support {s} in stream {stream}"
                )
        shape = (self.batch_size, write.shape[1] * self.slot_size, support.shape[1] * self.slot_size)
        if tuple(Jh.shape) != shape or Jh.dtype != self.dtype:
            raise ValueError(f"Jh must be {self.dtype} of shape {shape}, got {Jh.dtype} {tuple(Jh.shape)}")
        if loss_row is not None and tuple(loss_row.shape) != (shape[0], shape[2]):
            raise ValueError(f"loss_row must have shape {(shape[0], shape[2])}, got {tuple(loss_row.shape)}")


def _parts(nodes: list[Node]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Rows, columns, blocks and loss rows of some nodes."""
    return [n.rows for n in nodes], [n.cols for n in nodes], [n.blocks for n in nodes], [n.loss_row for n in nodes]
