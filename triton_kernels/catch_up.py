"""Sleeping experts catch up: pending segments, then the current step, applied to column tiles of ``P`` on chip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_rtrl.triton_kernels import launch
from sparse_rtrl.triton_kernels.influence_update import check_update, influence_update_
from sparse_rtrl.triton_kernels.product import load_influence, multiply_terms, store_influence
from sparse_rtrl.triton_kernels.tiles import choose_column, pack_terms


@triton.jit
def multiply_column(
    p,  # (BLOCK_H, BLOCK_N)
    acc,  # (BLOCK_W, BLOCK_N)
    cols_ptr,  # (C,)
    blocks_ptr,  # (w, r)
    u_ptr,  # (r,)
    w,
    r,
    slot_size,
    HAS_LOSS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add ``J p[cols]`` to a tile, and return it with ``u p[cols]``, ``(BLOCK_N,)``."""
    offs_w = tl.arange(0, acc.shape[0])
    gain = tl.zeros((acc.shape[1],), dtype=acc.dtype)
    for start in tl.range(0, r, BLOCK_K, num_stages=1):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < r
        slots = tl.load(cols_ptr + offs_k // slot_size, mask=mask_k, other=0).to(tl.int32)
        rows = slots * slot_size + offs_k % slot_size
        old = tl.gather(p, tl.broadcast_to(rows[:, None], (BLOCK_K, acc.shape[1])), 0)
        old = tl.where(mask_k[:, None], old, 0.0)
        mask = (offs_w < w)[:, None] & mask_k[None, :]
        a = tl.load(blocks_ptr + offs_w[:, None] * r + offs_k[None, :], mask=mask, other=0.0)
        acc = tl.dot(a, old, acc, input_precision=PRECISION, out_dtype=acc.dtype)
        if HAS_LOSS:
            gain += tl.sum(tl.load(u_ptr + offs_k, mask=mask_k, other=0.0)[:, None] * old, 0)
    return acc, gain


@triton.jit
def replace_rows(
    p,  # (BLOCK_H, BLOCK_N)
    new,  # (BLOCK_W, BLOCK_N)
    rows_ptr,  # (R,)
    num_rows,
    slot_size,
    BLOCK_S: tl.constexpr,
):
    """The tile with the rows of some slots replaced; a slot that is listed twice takes its last rows."""
    offs_h = tl.arange(0, p.shape[0])
    offs_s = tl.arange(0, BLOCK_S)
    written = tl.load(rows_ptr + offs_s, mask=offs_s < num_rows, other=-1).to(tl.int32)
    listed = tl.max(tl.where((offs_h // slot_size)[:, None] == written[None, :], offs_s[None, :], -1), 1)
    source = tl.maximum(listed, 0) * slot_size + offs_h % slot_size
    replaced = tl.gather(new, tl.broadcast_to(source[:, None], p.shape), 0)
    return tl.where((listed >= 0)[:, None], replaced, p)


@triton.jit
def catch_up_kernel(
    P_ptr,  # (G, H + 1, N)
    rows_ptr,  # (L, B, R)
    cols_ptr,  # (L, B, C)
    blocks_ptr,  # (L, B, R * D, C * D)
    loss_rows_ptr,  # (L, B, C * D)
    count_ptr,  # ()
    streams_ptr,  # (M,)
    groups_ptr,  # (M,)
    starts_ptr,  # (M,)
    Jh_ptr,  # (B, w, r)
    write_ptr,  # (B, kw)
    support_ptr,  # (B, ks)
    u_ptr,  # (B, r)
    delta_ptr,  # (M, delta_size)
    z_ptr,  # (M, z_size)
    spans_ptr,  # (tiles + 1,)
    entries_ptr,  # (*, 6)
    seed_ptr,  # ()
    hidden,
    loss_start,
    columns,
    capacity,
    batch,
    num_rows,
    num_cols,
    w,
    r,
    slot_size,
    delta_size,
    z_size,
    tiles,
    stride_pg,
    stride_ph,
    HAS_UPDATE: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    HAS_TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program owns one column tile of one influence matrix, every row of it, from its first load to its store."""
    moved = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    group = tl.load(groups_ptr + moved)
    first = tl.load(starts_ptr + moved)
    count = tl.load(count_ptr)
    if group < 0:
        return
    if not HAS_UPDATE:
        if first >= count:
            return
    stream = tl.load(streams_ptr + moved)
    offs_h = tl.arange(0, BLOCK_H)
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < columns
    mask = (offs_h < hidden)[:, None] & mask_n[None, :]
    entry = group * stride_pg + offs_h.to(tl.int64)[:, None] * stride_ph + offs_n[None, :]
    loss_entry = group * stride_pg + loss_start + offs_n
    p = load_influence(P_ptr + entry, mask)
    loss = load_influence(P_ptr + loss_entry, mask_n)
    node_w = num_rows * slot_size
    node_r = num_cols * slot_size
    for t in tl.range(first, count, num_stages=1):
        node = (t % capacity) * batch + stream
        new, gain = multiply_column(
            p,
            tl.zeros((BLOCK_R, BLOCK_N), dtype=p.dtype),
            cols_ptr + node * num_cols,
            blocks_ptr + node * node_w * node_r,
            loss_rows_ptr + node * node_r,
            node_w,
            node_r,
            slot_size,
            True,
            PRECISION,
            BLOCK_K,
        )
        p = replace_rows(p, new, rows_ptr + node * num_rows, num_rows, slot_size, BLOCK_S)
        loss += gain
    if HAS_UPDATE:
        new, gain = multiply_column(
            p,
            tl.zeros((BLOCK_W, BLOCK_N), dtype=p.dtype),
            support_ptr + stream * (r // slot_size),
            Jh_ptr + stream * w * r,
            u_ptr + stream * r,
            w,
            r,
            slot_size,
            HAS_LOSS,
            PRECISION,
            BLOCK_K,
        )
        if HAS_TERMS:
            new = multiply_terms(
                new,
                delta_ptr + moved * delta_size,
                z_ptr + moved * z_size,
                spans_ptr,
                entries_ptr,
                tile,
                tl.arange(0, BLOCK_W),
                offs_n,
                w,
                PRECISION,
                BLOCK_T,
            )
        p = replace_rows(p, new, write_ptr + stream * (w // slot_size), w // slot_size, slot_size, BLOCK_S)
        loss += gain
    # Small tiles are held by several warps each: all of them have loaded before any of them stores.
    tl.debug_barrier()
    seed = tl.load(seed_ptr)
    store_influence(P_ptr + entry, p, mask, entry, seed)
    store_influence(P_ptr + loss_entry, loss, mask_n, loss_entry, seed)


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
    precision: str = "ieee",
    seed: Tensor | None = None,
) -> None:
    """Move influence matrices through the segments ``start ... count - 1``, in place, loss row included.

    The number of segments is read on the device, for each matrix. A column tile of ``P`` is read once, stays on chip
    while the segments pass over it, and is written once; where the state is too large for that, the segments of the
    ring pass over ``P`` one launch after the other. Bytes of influence moved: ``2 * itemsize * M * N * (H + 1)``;
    operations: ``2 * M * N * gap * C * D * (R * D + 1)``.

    Args:
        P: influence matrices ``(G, H + 1, N)``, float32, float64 or bfloat16; columns of stride 1.
        rows: written slots of the segments, segment ``t`` at place ``t % L``, sorted; a repeated slot is a copy,
            ``(L, B, R)`` int64.
        cols: slots they depend on, sorted; a repeated slot holds zeros, ``(L, B, C)`` int64.
        blocks: ``(L, B, R * D, C * D)``, of the dtype of ``P``; float32 for bfloat16.
        loss_rows: ``(L, B, C * D)``.
        count: segments so far, ``()`` int64 on the device.
        streams: stream of each matrix, ``(M,)`` int64.
        groups: the matrices, ``(M,)`` int64, distinct, or negative for none.
        starts: first segment of each matrix, ``(M,)`` int64, at least ``count - L``; from ``count`` on it stays.
        slot_size: ``D``.
        precision: of the products: ``"ieee"`` (float32 arithmetic), ``"tf32x3"`` or ``"tf32"``.
        seed: key of the stochastic rounding into bfloat16, ``()`` int64 on the device; advanced.

    Raises:
        BackendError: if the device does not fit.
        TypeError: on a wrong dtype.
        ValueError: on a wrong shape, layout, device or precision.
    """
    ring = (rows, cols, blocks, loss_rows)
    _catch_up(P, ring, count, streams, groups, starts, slot_size, None, precision, seed)


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
    precision: str = "ieee",
    seed: Tensor | None = None,
) -> None:
    """:func:`catch_up_`, then :func:`influence_update_` of the same matrices, with ``P`` read and written once.

    Args:
        P: as in :func:`catch_up_`, like all arguments up to ``slot_size``.
        rows: ``(L, B, R)`` int64.
        cols: ``(L, B, C)`` int64.
        blocks: ``(L, B, R * D, C * D)``.
        loss_rows: ``(L, B, C * D)``.
        count: ``()`` int64.
        streams: ``(M,)`` int64.
        groups: ``(M,)`` int64.
        starts: ``(M,)`` int64; a matrix with a start from ``count`` on takes the update only.
        slot_size: ``D``.
        Jh: as in :func:`influence_update_`, like all that follow: ``(B, kw * D, ks * D)``.
        write: ``(B, kw)`` int64.
        support: ``(B, ks)`` int64.
        loss_row: ``(B, ks * D)`` or None.
        deltas: per captured parameter ``(M, kw * D, τ, m)``.
        zs: per captured parameter ``(M, τ, j)``.
        offsets: first column of each captured parameter.
        precision: of the products.
        seed: of the stochastic rounding; rounding happens once.

    Raises:
        BackendError: if the device does not fit.
        TypeError: on a wrong dtype.
        ValueError: on a wrong shape, layout, device or precision.
    """
    ring = (rows, cols, blocks, loss_rows)
    update = (Jh, write, support, loss_row, deltas, zs, offsets) if support.numel() else None
    _catch_up(P, ring, count, streams, groups, starts, slot_size, update, precision, seed)


def _catch_up(
    P: Tensor,
    ring: tuple[Tensor, Tensor, Tensor, Tensor],
    count: Tensor,
    streams: Tensor,
    groups: Tensor,
    starts: Tensor,
    slot_size: int,
    update: tuple[Tensor, Tensor, Tensor, Tensor | None, Sequence[Tensor], Sequence[Tensor], Sequence[int]] | None,
    precision: str,
    seed: Tensor | None,
) -> None:
    dtype = launch.check_influence(P, precision, seed)
    device, hidden, columns, moved = P.device, P.shape[1] - 1, P.shape[2], groups.numel()
    if slot_size < 1 or hidden % slot_size:
        raise ValueError(f"slot_size must be a divisor of H = {hidden}, got {slot_size}")
    rows, cols, blocks, loss_rows = _checked_ring(ring, slot_size, dtype, device)
    capacity, batch, num_rows = rows.shape
    num_cols = cols.shape[2]
    count = launch.check("count", count, torch.int64, (), device)
    streams = launch.check("streams", streams, torch.int64, (moved,), device)
    groups = launch.check("groups", groups, torch.int64, (moved,), device)
    starts = launch.check("starts", starts, torch.int64, (moved,), device)
    if not moved or not columns or not capacity:
        return
    if update is None:
        Jh, write, support, u = blocks[0], rows[0], cols[0], None
    else:
        given, deltas, zs, offsets = update[:4], *update[4:]
        Jh, write, support, u, same = check_update(*given, dtype, device, hidden)
        if same != slot_size or len(Jh) != batch:
            expected = f"({batch}, kw * D, ks * D) with D = {slot_size}"
            raise ValueError(f"Jh must have shape {expected}, got {tuple(Jh.shape)} for {support.shape[1]} slots")
    column = choose_column(hidden, num_rows * slot_size, Jh.shape[1], slot_size, dtype, precision)
    if column is None:
        _catch_up_ring(P, (rows, cols, blocks, loss_rows), count, streams, groups, starts, precision, seed)
        if update is not None:
            influence_update_(P, Jh, write, support, u, streams, groups, deltas, zs, offsets, precision, seed)
        return
    terms = None
    if update is not None:
        terms = pack_terms(deltas, zs, offsets, moved, Jh.shape[1], columns, column.BLOCK_N, dtype, device)
    tiles = triton.cdiv(columns, column.BLOCK_N)
    launch.run(
        catch_up_kernel,
        moved * tiles,
        (
            launch.stored(P),
            rows,
            cols,
            blocks,
            loss_rows,
            count,
            streams,
            groups,
            starts,
            Jh,
            write,
            support,
            Jh if u is None else u,
            Jh if terms is None else terms.delta,
            Jh if terms is None else terms.z,
            groups if terms is None else terms.spans,
            groups if terms is None else terms.entries,
            groups if seed is None else seed,
            hidden,
            hidden * P.stride(1),
            columns,
            capacity,
            batch,
            num_rows,
            num_cols,
            Jh.shape[1],
            Jh.shape[2],
            slot_size,
            0 if terms is None else terms.delta.shape[1],
            0 if terms is None else terms.z.shape[1],
            tiles,
            P.stride(0),
            P.stride(1),
        ),
        HAS_UPDATE=update is not None,
        HAS_LOSS=u is not None,
        HAS_TERMS=terms is not None,
        PRECISION=precision,
        **column.constants(),
    )
    launch.next_seed(seed)


def _checked_ring(
    ring: tuple[Tensor, Tensor, Tensor, Tensor], slot_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, columns, blocks and loss rows of the segments, contiguous.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on a wrong shape or device.
    """
    rows = launch.check("rows", ring[0], torch.int64, (None, None, None), device)
    capacity, batch, num_rows = rows.shape
    cols = launch.check("cols", ring[1], torch.int64, (capacity, batch, None), device)
    width = cols.shape[2] * slot_size
    blocks = launch.check("blocks", ring[2], dtype, (capacity, batch, num_rows * slot_size, width), device)
    loss_rows = launch.check("loss_rows", ring[3], dtype, (capacity, batch, width), device)
    return rows, cols, blocks, loss_rows


def _catch_up_ring(
    P: Tensor,
    ring: tuple[Tensor, Tensor, Tensor, Tensor],
    count: Tensor,
    streams: Tensor,
    groups: Tensor,
    starts: Tensor,
    precision: str,
    seed: Tensor | None,
) -> None:
    """Every segment of the ring passes over ``P``, oldest first; matrices that it does not concern are masked."""
    capacity = len(ring[0])
    for back in range(capacity, 0, -1):
        t = count - back
        rows, cols, blocks, u = (part.index_select(0, (t % capacity).view(1))[0] for part in ring)
        moving = torch.where(starts <= t, groups, -1)
        influence_update_(P, blocks, rows, cols, u, streams, moving, [], [], [], precision, seed)
