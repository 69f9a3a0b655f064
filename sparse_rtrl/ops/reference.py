"""The definition of correct: every operation of the engine in plain PyTorch, any dtype, any device.

Real-time recurrent learning carries the influence matrix ``P_t = dh_t / dθ`` of each parameter group forward,

    P_t = J_t P_{t-1} + F_t ,

with the state Jacobian ``J_t = dh_t / dh_{t-1}`` and the immediate Jacobian ``F_t`` (the derivative of ``h_t`` with
respect to the parameters at fixed ``h_{t-1}``) (Williams & Zipser 1989). A step that writes the slots ``write`` and
depends on the slots ``support`` changes only the written rows:

    P[write] <- Jh P[support] + F,       Jh = dh_t[write] / dh_{t-1}[support] .

``F`` is kept as factors, ``F[i, (m, j)] = sum_τ delta[i, τ, m] z[τ, j]``. One extra row of ``P``, the loss row, is the
gradient of the accumulated loss: with ``u = dL/dh_{t-1}`` it grows by ``u P``, as if the loss were one more state entry
that only accumulates. The augmented map of a segment is therefore the pair ``(J, u)``, and two maps compose as

    (J2, u2) ∘ (J1, u1) = (J2 J1, u1 + u2 J1),       the newer map on the left.

Layouts: ``P`` is ``(G, H + 1, N)`` with one row of ``G`` per influence matrix, the loss row last, and the columns of
all parameters of the group side by side. A *node* is a block-sparse map: slots ``rows (B, R)`` that it writes, slots
``cols (B, C)`` that it depends on, ``blocks (B, R*D, C*D)`` and ``loss_row (B, C*D)``; every other row is the identity.
A *ring* holds the last nodes of one level of a tree, one more dimension in front: node ``i`` at place ``i % length``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def slot_entries(slots: Tensor, slot_size: int) -> Tensor:
    """State entries that belong to slots: ``(B, k)`` slot indices to ``(B, k * slot_size)`` entry indices."""
    offsets = torch.arange(slot_size, device=slots.device)
    return (slots.unsqueeze(-1) * slot_size + offsets).flatten(1)


def influence_update_(
    P: Tensor,
    Jh: Tensor,
    write: Tensor,
    support: Tensor,
    loss_row: Tensor | None,
    streams: Tensor,
    groups: Tensor,
    deltas: Sequence[Tensor],
    zs: Sequence[Tensor],
    offsets: Sequence[int],
) -> None:
    """Move influence matrices through one map, in place: ``P[write] <- Jh P[support] + F``, loss row ``+= u P``.

    All reads precede all writes. Duplicated slots of the support add up; duplicated slots of ``write`` must carry equal
    rows.

    Args:
        P: influence matrices ``(G, H + 1, N)``.
        Jh: state Jacobian of each stream, ``(B, kw * D, ks * D)``.
        write: written slots ``(B, kw)`` int64.
        support: slots the written content depends on, ``(B, ks)`` int64.
        loss_row: ``u`` over the support, ``(B, ks * D)``, or None to leave the loss rows alone.
        streams: stream of each matrix that moves, ``(M,)`` int64, rows of ``Jh``.
        groups: the matrices that move, ``(M,)`` int64, rows of ``P``, distinct.
        deltas: per captured parameter ``(M, kw * D, τ, m)``.
        zs: per captured parameter ``(M, τ, j)``; column ``(m, j)`` of ``F`` stands at ``offset + m * J + j``.
        offsets: first column of each captured parameter.
    """
    rows_per_matrix, columns = P.shape[1:]
    if groups.numel() == 0 or support.numel() == 0:
        return
    slot_size = Jh.shape[2] // support.shape[1]
    flat = P.view(-1, columns)
    base = groups.unsqueeze(1) * rows_per_matrix
    read_rows = (base + slot_entries(support, slot_size).index_select(0, streams)).flatten()
    old = flat.index_select(0, read_rows).view(len(groups), -1, columns)
    new = torch.bmm(Jh.index_select(0, streams), old)
    for delta, z, offset in zip(deltas, zs, offsets, strict=True):
        count, w, tau, m = delta.shape
        immediate = torch.bmm(delta.transpose(2, 3).reshape(count, w * m, tau), z)
        size = m * z.shape[2]
        new[:, :, offset : offset + size] += immediate.view(count, w, size)
    if loss_row is not None:
        gain = torch.bmm(loss_row.index_select(0, streams).unsqueeze(1), old).squeeze(1)
        flat.index_add_(0, base.flatten() + rows_per_matrix - 1, gain)
    write_rows = (base + slot_entries(write, slot_size).index_select(0, streams)).flatten()
    flat.index_copy_(0, write_rows, new.flatten(0, 1))


def loss_row_(P: Tensor, u: Tensor, groups: Tensor) -> None:
    """Add to the loss row of some influence matrices, in place: ``P[g, H] += u P[g, :H]``.

    An implementation may leave rows of ``P`` unread whose ``u`` is zero: most losses touch few slots. NaN or infinity
    in such a row then does not reach the loss row, as it does here.

    Args:
        P: influence matrices ``(G, H + 1, N)``.
        u: one row vector per matrix, ``(M, H)``.
        groups: the matrices, ``(M,)`` int64, rows of ``P``, distinct.
    """
    if groups.numel() == 0:
        return
    gain = torch.bmm(u.unsqueeze(1), P.index_select(0, groups)[:, :-1]).squeeze(1)
    P[:, -1].index_add_(0, groups, gain)


def union_slots(first: Tensor, second: Tensor, num_slots: int) -> Tensor:
    """Sorted union of two slot sets per stream, ``(B, min(S, k1 + k2))`` int64.

    Sets of different streams may differ in size; the shorter ones repeat their largest slot at the end. A node treats a
    repeated row as a copy, and a repeated column as zero.
    """
    merged = torch.cat((first, second), dim=1).sort(dim=1).values
    size = min(num_slots, merged.shape[1])
    if size == 0:
        return merged
    repeated = torch.zeros_like(merged, dtype=torch.bool)
    repeated[:, 1:] = merged[:, 1:] == merged[:, :-1]
    packed = merged.masked_fill(repeated, num_slots).sort(dim=1).values[:, :size]
    return torch.where(packed == num_slots, merged[:, -1:], packed)


def embed_node(
    rows: Tensor, cols: Tensor, blocks: Tensor, loss_row: Tensor, new_rows: Tensor, new_cols: Tensor, slot_size: int
) -> tuple[Tensor, Tensor]:
    """Write a node over larger sorted sets of rows and columns; rows it did not have become rows of the identity.

    Args:
        rows: ``(B, R)`` sorted.
        cols: ``(B, C)`` sorted.
        blocks: ``(B, R * D, C * D)``.
        loss_row: ``(B, C * D)``.
        new_rows: ``(B, R')``, a superset of ``rows`` and a subset of ``new_cols``.
        new_cols: ``(B, C')``, a superset of ``cols``.
        slot_size: ``D``.

    Returns:
        Blocks ``(B, R' * D, C' * D)`` and loss row ``(B, C' * D)``.
    """
    batch, num_rows = new_rows.shape
    num_cols = new_cols.shape[1]
    first_col = torch.ones_like(new_cols, dtype=torch.bool)  # repeated columns hold zeros
    first_col[:, 1:] = new_cols[:, 1:] != new_cols[:, :-1]
    same = (new_rows.unsqueeze(2) == new_cols.unsqueeze(1)) & first_col.unsqueeze(1)  # (B, R', C')
    eye = torch.eye(slot_size, dtype=blocks.dtype, device=blocks.device)
    identity = same.to(blocks.dtype).view(batch, num_rows, 1, num_cols, 1) * eye.view(1, 1, slot_size, 1, slot_size)
    row_size = cols.shape[1]
    if row_size == 0:
        return identity.reshape(batch, num_rows * slot_size, num_cols * slot_size), loss_row.new_zeros(
            batch, num_cols * slot_size
        )
    col_at = torch.searchsorted(cols, new_cols).clamp_(max=row_size - 1)
    col_found = (cols.gather(1, col_at) == new_cols) & first_col  # (B, C')
    u = loss_row.view(batch, row_size, slot_size).gather(1, col_at.unsqueeze(-1).expand(-1, -1, slot_size))
    u = (u * col_found.unsqueeze(-1)).flatten(1)
    if rows.shape[1] == 0:
        return identity.reshape(batch, num_rows * slot_size, num_cols * slot_size), u
    row_at = torch.searchsorted(rows, new_rows).clamp_(max=rows.shape[1] - 1)
    row_found = rows.gather(1, row_at) == new_rows  # (B, R')
    old = blocks.view(batch, rows.shape[1], slot_size, row_size, slot_size)
    old = old.gather(1, row_at.view(batch, num_rows, 1, 1, 1).expand(-1, -1, *old.shape[2:]))
    old = old.gather(3, col_at.view(batch, 1, 1, num_cols, 1).expand(-1, num_rows, slot_size, -1, slot_size))
    old = old * col_found.view(batch, 1, 1, num_cols, 1)
    out = torch.where(row_found.view(batch, num_rows, 1, 1, 1), old, identity)
    return out.reshape(batch, num_rows * slot_size, num_cols * slot_size), u


def tree_merge(
    newer_rows: Tensor,
    newer_cols: Tensor,
    newer_blocks: Tensor,
    newer_loss_row: Tensor,
    older_rows: Tensor,
    older_cols: Tensor,
    older_blocks: Tensor,
    older_loss_row: Tensor,
    num_slots: int,
    slot_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compose two nodes, the newer on the left: ``(Φ2, u2) ∘ (Φ1, u1) = (Φ2 Φ1, u1 + u2 Φ1)``.

    Args:
        newer_rows: ``(B, R2)`` sorted, a subset of ``newer_cols``.
        newer_cols: ``(B, C2)`` sorted.
        newer_blocks: ``(B, R2 * D, C2 * D)``.
        newer_loss_row: ``(B, C2 * D)``.
        older_rows: ``(B, R1)`` sorted, a subset of ``older_cols``.
        older_cols: ``(B, C1)`` sorted.
        older_blocks: ``(B, R1 * D, C1 * D)``.
        older_loss_row: ``(B, C1 * D)``.
        num_slots: ``S``.
        slot_size: ``D``.

    Returns:
        Rows, columns, blocks and loss row of the product, at most ``S`` slots a side.
    """
    rows = union_slots(newer_rows, older_rows, num_slots)
    cols = union_slots(newer_cols, older_cols, num_slots)
    # Written over all columns of the product, the older map is a square matrix that the newer one multiplies.
    older, older_u = embed_node(older_rows, older_cols, older_blocks, older_loss_row, cols, cols, slot_size)
    newer, newer_u = embed_node(newer_rows, newer_cols, newer_blocks, newer_loss_row, rows, cols, slot_size)
    loss_row = older_u + torch.bmm(newer_u.unsqueeze(1), older).squeeze(1)
    return rows, cols, torch.bmm(newer, older), loss_row


def leaf(
    Jh: Tensor, write: Tensor, support: Tensor, loss_row: Tensor | None, num_slots: int, slot_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The node of one segment: slots sorted, duplicated columns of the support summed.

    Args:
        Jh: ``(B, kw * D, ks * D)``.
        write: ``(B, kw)`` int64, contained in ``support``; the blocks of a repeated slot must be equal.
        support: ``(B, ks)`` int64.
        loss_row: ``(B, H)``, zero outside the support; None for no loss.
        num_slots: ``S``.
        slot_size: ``D``.

    Returns:
        Rows ``(B, min(S, kw))``, columns ``(B, min(S, ks))``, blocks and loss row.
    """
    batch, num_support = support.shape
    rows, cols = (union_slots(slots, slots[:, :0], num_slots) for slots in (write, support))
    blocks = Jh.view(batch, write.shape[1], slot_size, num_support, slot_size)
    if rows.shape[1]:
        at = (write.unsqueeze(1) == rows.unsqueeze(2)).to(torch.int64).argmax(2)  # (B, R)
        blocks = blocks.gather(1, at.view(batch, -1, 1, 1, 1).expand(-1, -1, *blocks.shape[2:]))
    summed = blocks.new_zeros(batch, rows.shape[1], slot_size, cols.shape[1], slot_size)
    u = Jh.new_zeros(batch, cols.shape[1] * slot_size)
    if num_support:
        column = torch.searchsorted(cols, support.contiguous())
        summed.scatter_add_(3, column.view(batch, 1, 1, -1, 1).expand_as(blocks), blocks)
        if loss_row is not None:
            held = first_occurrence(cols).repeat_interleave(slot_size, 1)
            u = loss_row.gather(1, slot_entries(cols, slot_size)) * held
    return rows, cols, summed.flatten(3).flatten(1, 2), u


def completed_levels(count: int, first: int, levels: int) -> int:
    """Number of nodes that the append of segment ``count - 1`` completes above the leaf, of levels 1, 2, ...

    Args:
        count: segments appended.
        first: number of the first segment that was ever appended.
        levels: highest level that is kept.
    """
    level = 0
    while level < levels and count % (2 << level) == 0 and count - (2 << level) >= first:
        level += 1
    return level


def dyadic_cover(start: int, count: int, levels: int) -> Iterator[tuple[int, int]]:
    """Aligned nodes (level, index) that cover the segments ``start ... count - 1``, oldest first.

    Node ``i`` of level ``l`` is the product of the segments ``i * 2**l ... (i + 1) * 2**l - 1``.
    """
    position = start
    while position < count:
        level = 0
        while level < levels and position % (2 << level) == 0 and position + (2 << level) <= count:
            level += 1
        yield level, position >> level
        position += 1 << level


def tree_append_(
    rows: Sequence[Tensor],
    cols: Sequence[Tensor],
    blocks: Sequence[Tensor],
    loss_rows: Sequence[Tensor],
    count: Tensor,
    Jh: Tensor,
    write: Tensor,
    support: Tensor,
    loss_row: Tensor | None,
    first: int,
    num_slots: int,
    slot_size: int,
) -> None:
    """Append one segment to the rings of a circular tree, in place, and build every product that it completes.

    Node ``i`` of level ``l`` stands at place ``i % (L >> l)`` of the ring of its level. Slot sets are sorted and filled
    up with their largest slot; a leaf without rows gets a row of the identity.

    Args:
        rows: per level ``(L >> l, B, R_l)`` int64, with ``R_l = min(S, 2 R_{l-1})`` and ``R_0 >= min(S, kw)``.
        cols: per level ``(L >> l, B, C_l)`` int64, with ``C_l = min(S, 2 C_{l-1})`` and ``C_0 >= min(S, ks)``.
        blocks: per level ``(L >> l, B, R_l * D, C_l * D)``.
        loss_rows: per level ``(L >> l, B, C_l * D)``.
        count: segments appended before, 0-dim int64; grows by one.
        Jh: ``dh[write] / dh_entry[support]``, ``(B, kw * D, ks * D)``.
        write: ``(B, kw)`` int64, contained in ``support``; the blocks of a repeated slot must be equal.
        support: ``(B, ks)`` int64; duplicates add up.
        loss_row: ``dL/dh_entry``, ``(B, H)``, zero outside the support; None for no loss.
        first: number of the first segment that was ever appended.
        num_slots: ``S``.
        slot_size: ``D``.
    """
    now = int(count)
    rings = list(zip(rows, cols, blocks, loss_rows, strict=True))
    node = leaf(Jh, write, support, loss_row, num_slots, slot_size)
    _store(rings[0], now, widen(*node, rows[0].shape[2], cols[0].shape[2], slot_size))
    for level in range(1, completed_levels(now + 1, first, len(rings) - 1) + 1):
        index = ((now + 1) >> level) - 1
        newer, older = (_ring_node(rings[level - 1], i) for i in (2 * index + 1, 2 * index))
        _store(rings[level], index, tree_merge(*newer, *older, num_slots, slot_size))
    count.add_(1)


def _ring_node(ring: Sequence[Tensor], index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, cols, blocks, loss_rows = (part[index % len(part)] for part in ring)
    return rows, cols, blocks, loss_rows


def _store(rings: Sequence[Tensor], index: int, node: Sequence[Tensor]) -> None:
    for ring, part in zip(rings, node, strict=True):
        ring[index % len(ring)] = part


def suffix_product(
    rows: Sequence[Tensor],
    cols: Sequence[Tensor],
    blocks: Sequence[Tensor],
    loss_rows: Sequence[Tensor],
    count: Tensor,
    streams: Tensor,
    starts: Tensor,
    num_rows: int,
    num_cols: int,
    num_slots: int,
    slot_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of the segments ``start ... count - 1``, newest on the left, one per pair of a stream and a start.

    Args:
        rows: per level ``(L >> l, B, R_l)`` int64, see :func:`tree_append_`.
        cols: per level ``(L >> l, B, C_l)`` int64.
        blocks: per level ``(L >> l, B, R_l * D, C_l * D)``.
        loss_rows: per level ``(L >> l, B, C_l * D)``.
        count: segments appended, 0-dim int64.
        streams: stream of each product, ``(Q,)`` int64.
        starts: ``(Q,)`` int64, at least ``count - L``; from ``count`` on it is the identity.
        num_rows: row slots of the results, at least as many as any product has: ``min(S, gap * R_0)`` are enough.
        num_cols: column slots of the results, likewise ``min(S, gap * C_0)``.
        num_slots: ``S``.
        slot_size: ``D``.

    Returns:
        Rows ``(Q, num_rows)``, columns ``(Q, num_cols)``, blocks and loss rows of the products.
    """
    now = int(count)
    rings = list(zip(rows, cols, blocks, loss_rows, strict=True))
    _check_window(starts, now, len(rows[0]))
    height, width = num_rows * slot_size, num_cols * slot_size
    out = (
        streams.new_zeros(len(streams), num_rows),
        streams.new_zeros(len(streams), num_cols),
        blocks[0].new_zeros(len(streams), height, width),
        blocks[0].new_zeros(len(streams), width),
    )
    for q, (stream, start) in enumerate(zip(streams.tolist(), starts.tolist(), strict=True)):
        one, none = slice(stream, stream + 1), streams.new_zeros(1, 0)
        product = (none, none, blocks[0].new_zeros(1, 0, 0), blocks[0].new_zeros(1, 0))
        for level, index in dyadic_cover(start, now, len(rings) - 1):
            r, c, b, u = _ring_node(rings[level], index)
            product = tree_merge(r[one], c[one], b[one], u[one], *product, num_slots, slot_size)
        for result, part in zip(out, widen(*product, num_rows, num_cols, slot_size), strict=True):
            result[q] = part[0]
    return out


def _check_window(starts: Tensor, count: int, capacity: int) -> None:
    if starts.numel() and int(starts.min()) < count - capacity:
        raise IndexError(f"starts must be at least count - L = {count - capacity}, got {int(starts.min())}")


def widen(
    rows: Tensor, cols: Tensor, blocks: Tensor, loss_row: Tensor, num_rows: int, num_cols: int, slot_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same map ``(Q, ...)`` over ``num_rows`` and ``num_cols`` slots, repeating the largest slot of each stream."""
    new_cols = cols if cols.shape[1] or not num_cols else cols.new_zeros(len(cols), 1)
    new_rows = rows if rows.shape[1] or not num_rows else new_cols[:, -1:]
    new_rows = torch.cat((new_rows, new_rows[:, -1:].expand(-1, num_rows - new_rows.shape[1])), dim=1)
    new_cols = torch.cat((new_cols, new_cols[:, -1:].expand(-1, num_cols - new_cols.shape[1])), dim=1)
    # Slots may repeat up to a width beyond the room; what is cut off are repetitions.
    new_rows, new_cols = new_rows[:, :num_rows].contiguous(), new_cols[:, :num_cols].contiguous()
    return new_rows, new_cols, *embed_node(rows, cols, blocks, loss_row, new_rows, new_cols, slot_size)


def catch_up_(
    P: Tensor,
    rows: Tensor,
    cols: Tensor,
    blocks: Tensor,
    loss_rows: Tensor,
    count: Tensor,
    streams: Tensor,
    groups: Tensor,
    starts: Tensor,
    slot_size: int,
) -> None:
    """Move influence matrices through the segments ``start ... count - 1``, in place, loss row included.

    Args:
        P: influence matrices ``(G, H + 1, N)``.
        rows: ring of the segments, segment ``t`` at place ``t % L``: ``(L, B, R)`` int64, see :func:`tree_append_`.
        cols: ``(L, B, C)`` int64.
        blocks: ``(L, B, R * D, C * D)``.
        loss_rows: ``(L, B, C * D)``.
        count: segments appended, 0-dim int64.
        streams: stream of each matrix that moves, ``(M,)`` int64.
        groups: the matrices that move, ``(M,)`` int64, rows of ``P``, distinct.
        starts: first segment that each matrix goes through, ``(M,)`` int64, at least ``count - L``; a matrix with a
            start from ``count`` on stays.
        slot_size: ``D``.
    """
    now, capacity = int(count), len(rows)
    _check_window(starts, now, capacity)
    for t in range(min(starts.tolist(), default=now), now):
        moving, at = (starts <= t).nonzero().flatten(), t % capacity
        influence_update_(P, blocks[at], rows[at], cols[at], loss_rows[at], streams[moving], groups[moving], [], [], [])


def catch_up_update_(
    P: Tensor,
    rows: Tensor,
    cols: Tensor,
    blocks: Tensor,
    loss_rows: Tensor,
    count: Tensor,
    streams: Tensor,
    groups: Tensor,
    starts: Tensor,
    slot_size: int,
    Jh: Tensor,
    write: Tensor,
    support: Tensor,
    loss_row: Tensor | None,
    deltas: Sequence[Tensor],
    zs: Sequence[Tensor],
    offsets: Sequence[int],
) -> None:
    """:func:`catch_up_`, then :func:`influence_update_` of the same matrices, in place.

    Args:
        P: influence matrices ``(G, H + 1, N)``; this and all up to ``slot_size`` as in :func:`catch_up_`.
        rows: ``(L, B, R)`` int64.
        cols: ``(L, B, C)`` int64.
        blocks: ``(L, B, R * D, C * D)``.
        loss_rows: ``(L, B, C * D)``.
        count: 0-dim int64.
        streams: ``(M,)`` int64.
        groups: ``(M,)`` int64.
        starts: ``(M,)`` int64.
        slot_size: ``D``.
        Jh: ``(B, kw * D, ks * D)``; this and all that follow as in :func:`influence_update_`.
        write: ``(B, kw)`` int64.
        support: ``(B, ks)`` int64.
        loss_row: ``(B, ks * D)`` or None.
        deltas: per captured parameter ``(M, kw * D, τ, m)``.
        zs: per captured parameter ``(M, τ, j)``.
        offsets: first column of each captured parameter.
    """
    catch_up_(P, rows, cols, blocks, loss_rows, count, streams, groups, starts, slot_size)
    influence_update_(P, Jh, write, support, loss_row, streams, groups, deltas, zs, offsets)


def suffix_loss_rows(
    rows: Tensor,
    cols: Tensor,
    blocks: Tensor,
    loss_rows: Tensor,
    count: Tensor,
    starts: Tensor,
    newest: Tensor,
    slot_size: int,
) -> Tensor:
    """Loss rows of many suffixes in one backward sweep: ``u(start) = sum_t u_t J_{t-1} ... J_start``.

    Args:
        rows: ring of the segments, ``(L, B, R)`` int64, see :func:`catch_up_`.
        cols: ``(L, B, C)`` int64.
        blocks: ``(L, B, R * D, C * D)``.
        loss_rows: ``(L, B, C * D)``.
        count: segments appended, 0-dim int64.
        starts: first segment of each suffix, ``(B, E)`` int64, at least ``count - L``; from ``count`` on it is empty.
        newest: row vector that enters behind the newest segment, ``(B, H)``.
        slot_size: ``D``.

    Returns:
        ``(B, E, H)``: gradient of the losses of the suffix with respect to the state at its start.
    """
    now, capacity = int(count), len(rows)
    _check_window(starts, now, capacity)
    v = newest
    out = v.unsqueeze(1).expand(-1, starts.shape[1], -1).clone()
    for t in range(now - 1, min(starts.flatten().tolist(), default=now) - 1, -1):
        at = t % capacity
        v = pull_back(rows[at], cols[at], blocks[at], loss_rows[at], v, slot_size)
        out = torch.where((starts <= t).unsqueeze(-1), v.unsqueeze(1), out)
    return out


def pull_back(rows: Tensor, cols: Tensor, blocks: Tensor, loss_row: Tensor, v: Tensor, slot_size: int) -> Tensor:
    """Row vector through the augmented map of a node: ``u + v Φ``, for ``v (B, H)``."""
    entries = slot_entries(rows, slot_size)
    written = v.gather(1, entries) * first_occurrence(rows).repeat_interleave(slot_size, 1)
    gain = torch.bmm(written.unsqueeze(1), blocks).squeeze(1) + loss_row
    return v.scatter(1, entries, 0.0).scatter_add_(1, slot_entries(cols, slot_size), gain)


def first_occurrence(slots: Tensor) -> Tensor:
    """Whether each entry of sorted slot sets ``(B, k)`` is the first of its value."""
    first = torch.ones_like(slots, dtype=torch.bool)
    first[:, 1:] = slots[:, 1:] != slots[:, :-1]
    return first


def diagonal_update_(
    P: Tensor, decay: Tensor, delta: Tensor, z: Tensor, g: Tensor | None = None, u: Tensor | None = None
) -> None:
    """Influence of a diagonal recurrence through one segment, in place: ``P <- decay ⊙ P + F``, loss row first.

    Where the state Jacobian is diagonal, each row of a weight influences one state entry, and ``P`` is as large as the
    weight. For a segment that maps the state entry ``r`` of stream ``b`` as ``h <- decay h + ...``,

        P[b, r, j] <- decay[b, r] P[b, r, j] + sum_τ delta[b, r, τ] z[b, τ, j],      τ over the steps of the segment;

    with ``g`` and ``u`` the gradient takes ``P`` as it is before, in the same pass: see :func:`diagonal_loss_`. A
    complex ``z`` is given as real pairs, ``δ z = δ Re(z) + (iδ) Im(z)``: twice as many τ. An element-wise parameter has
    ``J = 1``. Bytes of influence moved: ``2 * itemsize * B * R * J``.

    Args:
        P: influence ``(B, R, J)``, real or complex.
        decay: derivative of the state after the segment by the state before, ``(B, R)`` of the dtype of ``P``.
        delta: derivative of the state after the segment by the sum that the weight's row adds to in step τ,
            ``(B, R, τ)`` of the dtype of ``P``; without steps only ``decay`` acts.
        z: what the weight multiplies in each step, ``(B, τ, J)`` of the real dtype of ``P``.
        g: gradient ``(R, J)`` of the dtype of ``P`` that is added to, or None; together with ``u``.
        u: gradient of the loss by the state before the segment, ``(B, R)`` of the dtype of ``P``.

    Raises:
        ValueError: if only one of ``g`` and ``u`` is given.
    """
    if (g is None) != (u is None):
        raise ValueError(
            f"g and u must be given together or not at all, got {'g' if u is None else 'u'} without"
            f" {'u' if u is None else 'g'}"
        )
    if g is not None and u is not None:
        diagonal_loss_(g, P, u)
    P.mul_(decay.unsqueeze(2)).baddbmm_(delta, z.to(P.dtype))


def diagonal_loss_(g: Tensor, P: Tensor, u: Tensor) -> None:
    """Gradient that the influence of a diagonal recurrence carries, in place: ``g[r, j] += sum_b u[b, r] P̄[b, r, j]``.

    ``P̄`` is the complex conjugate. With torch's gradient of a real loss by a complex number, ``∂L/∂Re + i ∂L/∂Im``,
    ``g`` is that of a complex parameter on which the state depends holomorphically, ``P = dh/dθ``: ``dL = Re(ū dh)``
    and ``dh = P dθ`` make ``dL = Re(conj(u P̄) dθ)``. The gradient of a real parameter is the real part of ``g``.

    Args:
        g: ``(R, J)`` of the dtype of ``P``.
        P: influence ``(B, R, J)``, real or complex.
        u: gradient of the loss by the state, ``(B, R)`` of the dtype of ``P``.
    """
    g.add_(torch.einsum("br,brj->rj", u, P.conj()))


def rows_back_(
    v: Tensor,
    deltas: Tensor,
    program: Tensor,
    index: Sequence[Tensor],
    numbers: Sequence[Tensor],
    cotangents: Tensor | None,
    taps: Sequence[int],
    steps: int,
    batch: int,
    stream: int,
    rows: int,
    before: int,
) -> None:
    """Take rows of some streams back through steps by their tape, newest step first, in place.

    Args:
        v: rows behind the last step, ``(G, w, H)``; afterwards those before the first one.
        deltas: receives for each tap, one after the other and flat, its ``delta (steps, G, τ, m, w)``.
        program: instructions ``(I, 8)`` int64, :meth:`sparse_rtrl.capture.tape.RowTape.program`.
        index: places, int32: ``(1, E)``, the same for every step and stream, ``(steps, E)``, or ``(steps * B, E)``.
        numbers: coefficients ``(..., E)`` and matrices ``(..., k, j, m)``, alike.
        cotangents: ``dL/dh`` behind each step, added to the first row there, ``(steps, B, H)``.
        taps: first entry, ``τ`` and ``m`` of every immediate Jacobian, one after the other.
        steps: how many.
        batch: streams ``B`` that the steps were taken by.
        stream: the first of the ``G`` streams that go back.
        rows: entries of the workspace.
        before: entry at which the row before a step stands.
    """
    count, width, hidden = v.shape
    streams = slice(stream, stream + count)
    sizes = [(taps[i], taps[i + 1], taps[i + 2]) for i in range(0, len(taps), 3)]
    parts = deltas.split([steps * count * tau * m * width for _, tau, m in sizes])
    out = [part.view(steps, count, tau, m, width) for part, (_, tau, m) in zip(parts, sizes, strict=True)]
    work = v.new_zeros(count, rows, width)
    current = v.transpose(1, 2).clone()
    for step in reversed(range(steps)):
        if cotangents is not None:
            current[:, :, 0] += cotangents[step, streams]
        work[:, :hidden] = current
        places = [_of_step(t, step, steps, batch)[streams] for t in index]
        values = [_of_step(t, step, steps, batch)[streams] for t in numbers]
        for line in program.tolist():
            if line[0] == 0:
                _combine(work, line, places, values)
            else:
                _multiply(work, line, values)
        for (row, tau, m), delta in zip(sizes, out, strict=True):
            delta[step] = work[:, row : row + tau * m].unflatten(1, (tau, m))
        current = work[:, before : before + hidden].clone()
    v.copy_(current.transpose(1, 2))


def _of_step(operand: Tensor, step: int, steps: int, batch: int) -> Tensor:
    """What an operand ``(1, ...)``, ``(steps, ...)`` or ``(steps * B, ...)`` holds for a step, ``(B, ...)``."""
    if len(operand) in (1, steps):
        return operand[min(step, len(operand) - 1)].expand(batch, *operand.shape[1:])
    return operand[step * batch : (step + 1) * batch]


def _combine(work: Tensor, line: list[int], index: list[Tensor], numbers: list[Tensor]) -> None:
    """``out[dst[e]] += coefficient[e] * entry[src[e]]`` for entries ``(G, rows, w)``."""
    _, out, rows, _, dst, src, coefficient, _ = line
    count, _, width = work.shape
    taken = work.gather(1, index[src].long().unsqueeze(-1).expand(-1, -1, width))
    if coefficient >= 0:
        taken = taken * numbers[coefficient].unsqueeze(-1)
    to = index[dst].long().unsqueeze(-1).expand_as(taken)
    work[:, out : out + rows] = work.new_zeros(count, rows, width).scatter_add_(1, to, taken)


def _multiply(work: Tensor, line: list[int], numbers: list[Tensor]) -> None:
    """``out[p, m] = sum_j entry[p, j] matrix[., j, m]`` for entries ``(G, rows, w)``."""
    _, out, source, positions, matrices, inner, outer, matrix = line
    count, _, width = work.shape
    rows = work[:, source : source + positions * inner].view(count, matrices, -1, inner, width)
    A = numbers[matrix].reshape(count, matrices, inner, outer)
    work[:, out : out + positions * outer] = torch.einsum("bkjm,bkpjw->bkpmw", A, rows).reshape(count, -1, width)
