"""The influence update ``P[write] <- Jh P[support] + F`` in place, with the loss row, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_rtrl.triton_kernels import launch
from sparse_rtrl.triton_kernels.product import (
    load_influence,
    multiply_state,
    multiply_terms,
    slot_rows,
    store_influence,
)
from sparse_rtrl.triton_kernels.segment_update import segment_update_
from sparse_rtrl.triton_kernels.tiles import MAX_BLOCK_W, choose_tile, pack_terms


@triton.jit
def influence_update_kernel(
    P_ptr,  # (G, H + 1, N)
    Jh_ptr,  # (B, w, r)
    write_ptr,  # (B, kw)
    support_ptr,  # (B, ks)
    u_ptr,  # (B, r)
    streams_ptr,  # (M,)
    groups_ptr,  # (M,)
    delta_ptr,  # (M, delta_size)
    z_ptr,  # (M, z_size)
    spans_ptr,  # (tiles + 1,)
    entries_ptr,  # (*, 6)
    seed_ptr,  # ()
    loss_start,
    columns,
    w,
    r,
    slot_size,
    delta_size,
    z_size,
    tiles,
    stride_pg,
    stride_ph,
    HAS_LOSS: tl.constexpr,
    HAS_TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program owns one column tile of one influence matrix, and all written rows of it."""
    moved = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    group = tl.load(groups_ptr + moved)
    if group < 0:
        return
    stream = tl.load(streams_ptr + moved)
    offs_w = tl.arange(0, BLOCK_W)
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_w = offs_w < w
    mask_n = offs_n < columns
    acc, gain = multiply_state(
        tl.zeros((BLOCK_W, BLOCK_N), dtype=Jh_ptr.dtype.element_ty),
        P_ptr + group * stride_pg,
        Jh_ptr + stream * w * r,
        u_ptr + stream * r,
        support_ptr + stream * (r // slot_size),
        offs_w,
        offs_n,
        w,
        r,
        columns,
        slot_size,
        stride_ph,
        HAS_LOSS,
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
    # Written rows are support rows too: every warp has read its part of them before any warp writes.
    tl.debug_barrier()
    seed = tl.load(seed_ptr)
    rows = slot_rows(write_ptr + stream * (w // slot_size), offs_w, slot_size, mask_w)
    entry = group * stride_pg + rows[:, None] * stride_ph + offs_n[None, :]
    store_influence(P_ptr + entry, acc, mask_w[:, None] & mask_n[None, :], entry, seed)
    if HAS_LOSS:
        entry = group * stride_pg + loss_start + offs_n
        store_influence(P_ptr + entry, load_influence(P_ptr + entry, mask_n) + gain, mask_n, entry, seed)


def check_update(
    Jh: Tensor,
    write: Tensor,
    support: Tensor,
    loss_row: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    hidden: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    """Contiguous versions of the map of an update, and its slot size, after checking their dtypes and shapes.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on a wrong shape or device.
    """
    Jh = launch.check("Jh", Jh, dtype, (None, None, None), device)
    batch, w, r = Jh.shape
    support = launch.check("support", support, torch.int64, (batch, None), device)
    slot_size = launch.check_slot_size("Jh", Jh, support, hidden)
    if w % slot_size:
        raise ValueError(f"Jh must have kw * D rows with D = {slot_size}, got {w}")
    write = launch.check("write", write, torch.int64, (batch, w // slot_size), device)
    if loss_row is not None:
        loss_row = launch.check("loss_row", loss_row, dtype, (batch, r), device)
    return Jh, write, support, loss_row, slot_size


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
    precision: str = "ieee",
    seed: Tensor | None = None,
) -> None:
    """Move influence matrices through one map, in place, as :func:`sparse_rtrl.ops.reference.influence_update_` does.

    Bytes of influence moved: ``itemsize * M * N * (r + w + 2)``; operations: ``2 * M * N * (r * (w + 1) + w * τ)``.
    Indices are read on the device and not checked. A matrix whose group is negative does not move.

    Args:
        P: influence matrices ``(G, H + 1, N)``, float32, float64 or bfloat16; columns of stride 1.
        Jh: state Jacobian of each stream, ``(B, kw * D, ks * D)``, of the dtype of ``P``; float32 for bfloat16.
        write: written slots ``(B, kw)`` int64.
        support: slots the written content depends on, ``(B, ks)`` int64; duplicates add up.
        loss_row: ``u`` over the support, ``(B, ks * D)``, or None to leave the loss rows alone.
        streams: stream of each matrix that moves, ``(M,)`` int64.
        groups: the matrices that move, ``(M,)`` int64, distinct, or negative for none.
        deltas: per captured parameter ``(M, kw * D, τ, m)``.
        zs: per captured parameter ``(M, τ, j)``.
        offsets: first column of each captured parameter.
        precision: of the products: ``"ieee"`` (float32 arithmetic), ``"tf32x3"`` or ``"tf32"``.
        seed: key of the stochastic rounding into bfloat16, ``()`` int64 on the device; advanced by one.

    Raises:
        BackendError: if the device does not fit.
        TypeError: on a wrong dtype.
        ValueError: on a wrong shape, layout, device or precision.
    """
    dtype = launch.check_influence(P, precision, seed)
    device, hidden, columns = P.device, P.shape[1] - 1, P.shape[2]
    count = groups.numel()
    if count == 0 or support.numel() == 0 or columns == 0:
        return
    Jh, write, support, loss_row, slot_size = check_update(Jh, write, support, loss_row, dtype, device, hidden)
    _, w, r = Jh.shape
    streams = launch.check("streams", streams, torch.int64, (count,), device)
    groups = launch.check("groups", groups, torch.int64, (count,), device)
    if w > MAX_BLOCK_W:
        segment_update_(
            P, Jh, write, support, loss_row, streams, groups, deltas, zs, offsets, slot_size, precision, seed
        )
        return
    tile = choose_tile(w, dtype, precision)
    terms = pack_terms(deltas, zs, offsets, count, w, columns, tile.BLOCK_N, dtype, device)
    tiles = triton.cdiv(columns, tile.BLOCK_N)
    launch.run(
        influence_update_kernel,
        count * tiles,
        (
            launch.stored(P),
            Jh,
            write,
            support,
            Jh if loss_row is None else loss_row,
            streams,
            groups,
            Jh if terms is None else terms.delta,
            Jh if terms is None else terms.z,
            groups if terms is None else terms.spans,
            groups if terms is None else terms.entries,
            groups if seed is None else seed,
            hidden * P.stride(1),
            columns,
            w,
            r,
            slot_size,
            0 if terms is None else terms.delta.shape[1],
            0 if terms is None else terms.z.shape[1],
            tiles,
            P.stride(0),
            P.stride(1),
        ),
        HAS_LOSS=loss_row is not None,
        HAS_TERMS=terms is not None,
        PRECISION=precision,
        **tile.constants(),
    )
    launch.next_seed(seed)
