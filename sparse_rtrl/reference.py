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
"""

from __future__ import annotations

from collections.abc import Sequence

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


def suffix_product(
    rows: Sequence[Tensor],
    cols: Sequence[Tensor],
    blocks: Sequence[Tensor],
    loss_rows: Sequence[Tensor],
    streams: Tensor,
    paths: Tensor,
    num_rows: int,
    num_cols: int,
    num_slots: int,
    slot_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of nodes along paths, one per pair of a stream and a path.

    Args:
        rows: per node ``(B, R)`` sorted.
        cols: per node ``(B, C)`` sorted.
        blocks: per node ``(B, R * D, C * D)``.
        loss_rows: per node ``(B, C * D)``.
        streams: stream of each product, ``(Q,)`` int64.
        paths: numbers of the nodes of each product, oldest first, -1 behind them, ``(Q, depth)`` int64.
        num_rows: row slots of the results, at least as many as any product has.
        num_cols: column slots of the results, likewise.
        num_slots: ``S``.
        slot_size: ``D``.

    Returns:
        Rows ``(Q, num_rows)``, columns ``(Q, num_cols)``, blocks and loss rows of the products.
    """
    out = []
    for stream, path in zip(streams.tolist(), paths.tolist(), strict=True):
        parts = [[part[n][stream : stream + 1] for part in (rows, cols, blocks, loss_rows)] for n in path if n >= 0]
        r, c, b, u = parts[0]
        for r2, c2, b2, u2 in parts[1:]:
            r, c, b, u = tree_merge(r2, c2, b2, u2, r, c, b, u, num_slots, slot_size)
        out.append(widen(r, c, b, u, num_rows, num_cols, slot_size))
    if not out:
        like, height, width = blocks[0], num_rows * slot_size, num_cols * slot_size
        return (
            streams.new_empty(0, num_rows),
            streams.new_empty(0, num_cols),
            like.new_empty(0, height, width),
            like.new_empty(0, width),
        )
    r0, c0, b0, u0 = (torch.cat(part) for part in zip(*out, strict=True))
    return r0, c0, b0, u0


def widen(
    rows: Tensor, cols: Tensor, blocks: Tensor, loss_row: Tensor, num_rows: int, num_cols: int, slot_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same map written over ``num_rows`` and ``num_cols`` slots, repeating the largest slot of each stream."""
    new_cols = cols if cols.shape[1] or not num_cols else cols.new_zeros(len(cols), 1)
    new_rows = rows if rows.shape[1] or not num_rows else new_cols[:, -1:]
    new_rows = torch.cat((new_rows, new_rows[:, -1:].expand(-1, num_rows - new_rows.shape[1])), dim=1)
    new_cols = torch.cat((new_cols, new_cols[:, -1:].expand(-1, num_cols - new_cols.shape[1])), dim=1)
    # Slots may repeat up to a width beyond the room; what is cut off are repetitions.
    new_rows, new_cols = new_rows[:, :num_rows].contiguous(), new_cols[:, :num_cols].contiguous()
    return new_rows, new_cols, *embed_node(rows, cols, blocks, loss_row, new_rows, new_cols, slot_size)


def catch_up_(
    P: Tensor,
    rows: Sequence[Tensor],
    cols: Sequence[Tensor],
    blocks: Sequence[Tensor],
    loss_rows: Sequence[Tensor],
    streams: Tensor,
    groups: Tensor,
    first: Tensor,
    slot_size: int,
) -> None:
    """Move influence matrices through consecutive nodes, in place, loss row included.

    Args:
        P: influence matrices ``(G, H + 1, N)``.
        rows: per node ``(B, R)`` sorted, oldest node first.
        cols: per node ``(B, C)`` sorted.
        blocks: per node ``(B, R * D, C * D)``.
        loss_rows: per node ``(B, C * D)``.
        streams: stream of each matrix that moves, ``(M,)`` int64.
        groups: the matrices that move, ``(M,)`` int64, rows of ``P``, distinct.
        first: number of the node that each matrix starts from, ``(M,)`` int64; it moves through all from there on.
        slot_size: ``D``.
    """
    for n in range(len(rows)):
        moving = (first <= n).nonzero().flatten()
        influence_update_(P, blocks[n], rows[n], cols[n], loss_rows[n], streams[moving], groups[moving], [], [], [])


def suffix_loss_rows(
    rows: Sequence[Tensor],
    cols: Sequence[Tensor],
    blocks: Sequence[Tensor],
    loss_rows: Sequence[Tensor],
    starts: Tensor,
    newest: Tensor,
    slot_size: int,
) -> Tensor:
    """Loss rows of many suffixes in one backward sweep: ``u(start) = sum_t u_t J_{t-1} ... J_start``.

    Args:
        rows: per node ``(B, R)`` sorted, oldest node first.
        cols: per node ``(B, C)`` sorted.
        blocks: per node ``(B, R * D, C * D)``.
        loss_rows: per node ``(B, C * D)``.
        starts: number of the node that each suffix starts from, ``(B, E)`` int64; the number of nodes for none.
        newest: row vector that enters behind the newest node, ``(B, H)``.
        slot_size: ``D``.

    Returns:
        ``(B, E, H)``: gradient of the losses of the suffix with respect to the state at its start.
    """
    v = newest
    out = v.unsqueeze(1).expand(-1, starts.shape[1], -1).clone()
    for n in range(len(rows) - 1, -1, -1):
        v = pull_back(rows[n], cols[n], blocks[n], loss_rows[n], v, slot_size)
        out = torch.where((starts <= n).unsqueeze(-1), v.unsqueeze(1), out)
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
