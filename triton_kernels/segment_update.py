"""The influence update for segments that write many rows: a large matrix product, out of place through scratch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_rtrl.triton_kernels import launch
from sparse_rtrl.triton_kernels.loss_row import support_loss_row_
from sparse_rtrl.triton_kernels.product import multiply_state, multiply_terms, slot_rows, store_influence
from sparse_rtrl.triton_kernels.tiles import choose_segment_tile, pack_terms

SCRATCH_BYTES = 64 * 2**20
"""Bytes of scratch that one call takes at most; columns that do not fit are done in parts, one after the other."""


@triton.jit
def segment_product_kernel(
    P_ptr,  # (G, H + 1, N)
    scratch_ptr,  # (items, w, BLOCK_N)
    Jh_ptr,  # (B, w, r)
    support_ptr,  # (B, ks)
    streams_ptr,  # (M,)
    groups_ptr,  # (M,)
    delta_ptr,  # (M, delta_size)
    z_ptr,  # (M, z_size)
    spans_ptr,  # (tiles + 1,)
    entries_ptr,  # (*, 6)
    first_item,
    columns,
    w,
    r,
    slot_size,
    delta_size,
    z_size,
    tiles,
    row_blocks,
    stride_pg,
    stride_ph,
    HAS_TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program computes a block of new rows of an item, a column tile of one influence matrix, into scratch."""
    local_item = tl.program_id(0) // row_blocks
    moved = ((first_item + local_item) // tiles).to(tl.int64)
    tile = (first_item + local_item) % tiles
    group = tl.load(groups_ptr + moved)
    if group < 0:
        return
    stream = tl.load(streams_ptr + moved)
    offs_w = tl.program_id(0) % row_blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    acc, _ = multiply_state(
        tl.zeros((BLOCK_W, BLOCK_N), dtype=Jh_ptr.dtype.element_ty),
        P_ptr + group * stride_pg,
        Jh_ptr + stream * w * r,
        Jh_ptr,
        support_ptr + stream * (r // slot_size),
        offs_w,
        offs_n,
        w,
        r,
        columns,
        slot_size,
        stride_ph,
        False,
        PRECISION,
        BLOCK_K,
    )
    if HAS_TERMS:
        acc = multiply_terms(
            acc,
            delta_ptr + moved * delta_size,
            z_ptr + moved * z_size,
            spans_ptr,
            entries_ptr,
            tile,
            offs_w,
            offs_n,
            w,
            PRECISION,
            BLOCK_T,
        )
    at = (local_item.to(tl.int64) * w + offs_w)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(scratch_ptr + at, acc, mask=(offs_w < w)[:, None])


@triton.jit
def segment_write_kernel(
    P_ptr,  # (G, H + 1, N)
    scratch_ptr,  # (items, w, BLOCK_N)
    write_ptr,  # (B, kw)
    streams_ptr,  # (M,)
    groups_ptr,  # (M,)
    seed_ptr,  # ()
    first_item,
    columns,
    w,
    slot_size,
    tiles,
    row_blocks,
    stride_pg,
    stride_ph,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program moves a block of new rows of an item from scratch into the influence matrix."""
    local_item = tl.program_id(0) // row_blocks
    moved = ((first_item + local_item) // tiles).to(tl.int64)
    tile = (first_item + local_item) % tiles
    group = tl.load(groups_ptr + moved)
    if group < 0:
        return
    stream = tl.load(streams_ptr + moved)
    offs_w = tl.program_id(0) % row_blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_w = offs_w < w
    at = (local_item.to(tl.int64) * w + offs_w)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    new = tl.load(scratch_ptr + at, mask=mask_w[:, None], other=0.0)
    rows = slot_rows(write_ptr + stream * (w // slot_size), offs_w, slot_size, mask_w)
    entry = group * stride_pg + rows[:, None] * stride_ph + offs_n[None, :]
    store_influence(P_ptr + entry, new, mask_w[:, None] & (offs_n < columns)[None, :], entry, tl.load(seed_ptr))


def segment_update_(
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
    slot_size: int,
    precision: str,
    seed: Tensor | None,
) -> None:
    """The update of :func:`influence_update_` for more written rows than one program can hold; arguments are checked.

    New rows go to scratch, at most ``SCRATCH_BYTES`` of it, and from there into ``P`` by a second launch, which starts
    when every program of the first has read the old ones. Matrices and column tiles are independent of each other, so
    as many of them as the scratch holds are done at a time. Operations: ``2 * M * N * w * (r + τ)``.
    """
    columns, dtype, count = P.shape[2], Jh.dtype, groups.numel()
    _, w, r = Jh.shape
    tile = choose_segment_tile(dtype, precision)
    terms = pack_terms(deltas, zs, offsets, count, w, columns, tile.BLOCK_N, dtype, P.device)
    if loss_row is not None:
        support_loss_row_(P, loss_row, support, streams, groups, seed)
    tiles, row_blocks = triton.cdiv(columns, tile.BLOCK_N), triton.cdiv(w, tile.BLOCK_W)
    items = count * tiles
    at_a_time = min(items, max(1, SCRATCH_BYTES // (w * tile.BLOCK_N * Jh.element_size())))
    scratch = torch.empty(at_a_time, w, tile.BLOCK_N, dtype=dtype, device=P.device)
    for first in range(0, items, at_a_time):
        programs = min(at_a_time, items - first) * row_blocks
        launch.run(
            segment_product_kernel,
            programs,
            (
                launch.stored(P),
                scratch,
                Jh,
                support,
                streams,
                groups,
                Jh if terms is None else terms.delta,
                Jh if terms is None else terms.z,
                groups if terms is None else terms.spans,
                groups if terms is None else terms.entries,
                first,
                columns,
                w,
                r,
                slot_size,
                0 if terms is None else terms.delta.shape[1],
                0 if terms is None else terms.z.shape[1],
                tiles,
                row_blocks,
                P.stride(0),
                P.stride(1),
            ),
            HAS_TERMS=terms is not None,
            PRECISION=precision,
            **tile.constants(),
        )
        launch.run(
            segment_write_kernel,
            programs,
            (
                launch.stored(P),
                scratch,
                write,
                streams,
                groups,
                groups if seed is None else seed,
                first,
                columns,
                w,
                slot_size,
                tiles,
                row_blocks,
                P.stride(0),
                P.stride(1),
            ),
            BLOCK_W=tile.BLOCK_W,
            BLOCK_N=tile.BLOCK_N,
            num_warps=tile.num_warps,
        )
    launch.next_seed(seed)
