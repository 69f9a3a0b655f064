"""Row vectors through influence matrices: ``P[g, H] += u P[g, support]``, any number of matrices in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_rtrl.triton_kernels import launch
from sparse_rtrl.triton_kernels.product import load_influence, slot_rows, store_influence

BLOCK_N, BLOCK_K = 128, 16


@triton.jit
def loss_row_kernel(
    P_ptr,  # (G, H + 1, N)
    u_ptr,  # (M, r), or (B, r) with a support
    support_ptr,  # (B, ks), if there is a support
    streams_ptr,  # (M,), if there is a support
    groups_ptr,  # (M,)
    seed_ptr,  # ()
    loss_start,
    columns,
    r,
    slot_size,
    tiles,
    stride_pg,
    stride_ph,
    HAS_SUPPORT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program adds to the loss row of one column tile of one influence matrix."""
    moved = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    group = tl.load(groups_ptr + moved)
    if group < 0:
        return
    row = moved
    if HAS_SUPPORT:
        row = tl.load(streams_ptr + moved)
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < columns
    partial = tl.zeros((BLOCK_K, BLOCK_N), dtype=u_ptr.dtype.element_ty)
    for start in range(0, r, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < r
        if HAS_SUPPORT:
            rows = slot_rows(support_ptr + row * (r // slot_size), offs_k, slot_size, mask_k)
        else:
            rows = offs_k.to(tl.int64)
        entry = group * stride_pg + rows[:, None] * stride_ph + offs_n[None, :]
        p = load_influence(P_ptr + entry, mask_k[:, None] & mask_n[None, :])
        partial += tl.load(u_ptr + row * r + offs_k, mask=mask_k, other=0.0)[:, None] * p
    entry = group * stride_pg + loss_start + offs_n
    total = load_influence(P_ptr + entry, mask_n) + tl.sum(partial, 0)
    store_influence(P_ptr + entry, total, mask_n, entry, tl.load(seed_ptr))


def loss_row_(P: Tensor, u: Tensor, groups: Tensor, seed: Tensor | None = None) -> None:
    """Add to the loss row of some influence matrices, in place: ``P[g, H] += u P[g, :H]``.

    The deferred gradient of sleeping experts is one such call for all (stream, expert) pairs. Pairs without one have a
    negative group: which those are is known on the device alone. Bytes of influence moved:
    ``itemsize * M * N * (H + 2)``.

    Args:
        P: influence matrices ``(G, H + 1, N)``, float32, float64 or bfloat16; columns of stride 1.
        u: one row vector per matrix, ``(M, H)``, of the dtype of ``P``; float32 for bfloat16.
        groups: the matrices, ``(M,)`` int64, distinct, or negative for none; not checked.
        seed: key of the stochastic rounding into bfloat16, ``()`` int64 on the device; advanced by one.

    Raises:
        BackendError: if the device does not fit.
        TypeError: on a wrong dtype.
        ValueError: on a wrong shape, layout or device.
    """
    dtype = launch.check_influence(P, "ieee", seed)
    groups = launch.check("groups", groups, torch.int64, (None,), P.device)
    u = launch.check("u", u, dtype, (groups.numel(), P.shape[1] - 1), P.device)
    _launch(P, u, None, None, groups, 1, seed)


def support_loss_row_(
    P: Tensor, u: Tensor, support: Tensor, streams: Tensor, groups: Tensor, seed: Tensor | None = None
) -> None:
    """As :func:`loss_row_`, over a declared support: ``P[g, H] += u[b] P[g, support[b]]`` for ``b = streams[g]``.

    Bytes of influence moved: ``itemsize * M * N * (r + 2)``.

    Args:
        P: influence matrices ``(G, H + 1, N)``.
        u: row vector of each stream over its support, ``(B, ks * D)``.
        support: slots ``(B, ks)`` int64; duplicates add up.
        streams: stream of each matrix, ``(M,)`` int64.
        groups: the matrices, ``(M,)`` int64, distinct, or negative for none.
        seed: key of the stochastic rounding into bfloat16, ``()`` int64 on the device; advanced by one.

    Raises:
        BackendError: if the device does not fit.
        TypeError: on a wrong dtype.
        ValueError: on a wrong shape, layout or device.
    """
    dtype = launch.check_influence(P, "ieee", seed)
    groups = launch.check("groups", groups, torch.int64, (None,), P.device)
    streams = launch.check("streams", streams, torch.int64, (groups.numel(),), P.device)
    support = launch.check("support", support, torch.int64, (None, None), P.device)
    if support.numel() == 0:
        return
    u = launch.check("u", u, dtype, (support.shape[0], None), P.device)
    slot_size = launch.check_slot_size("u", u, support, P.shape[1] - 1)
    _launch(P, u, support, streams, groups, slot_size, seed)


def _launch(
    P: Tensor,
    u: Tensor,
    support: Tensor | None,
    streams: Tensor | None,
    groups: Tensor,
    slot_size: int,
    seed: Tensor | None,
) -> None:
    columns = P.shape[2]
    tiles = triton.cdiv(columns, BLOCK_N)
    launch.run(
        loss_row_kernel,
        groups.numel() * tiles,
        (
            launch.stored(P),
            u,
            groups if support is None else support,
            groups if streams is None else streams,
            groups,
            groups if seed is None else seed,
            (P.shape[1] - 1) * P.stride(1),
            columns,
            u.shape[1],
            slot_size,
            tiles,
            P.stride(0),
            P.stride(1),
        ),
        HAS_SUPPORT=support is not None,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=4,
        num_stages=3,
    )
    launch.next_seed(seed)
