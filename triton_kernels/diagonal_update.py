"""Diagonal recurrences: ``P <- decay ⊙ P + δ z`` and the gradient that ``P`` carries, in one pass over ``P``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_rtrl.triton_kernels import launch

TILE_BYTES = 4096
"""Bytes of influence of one stream that a program holds: several numbers per thread."""

MAX_BLOCK_J = 256
"""Columns of a tile, at most."""


@triton.jit
def diagonal_update_kernel(  # noqa: C901 - branches on constants, which the compiler removes
    P_ptr,  # (B, R, J), complex numbers as pairs: (B, R, J, 2), and so on
    decay_ptr,  # (B, R)
    delta_ptr,  # (B, R, τ)
    z_ptr,  # (B, τ, J), real
    g_ptr,  # (R, J)
    u_ptr,  # (B, R)
    rows,
    columns,
    tau,
    streams,
    tiles_r,
    tiles_j,
    COMPLEX: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program takes a tile of rows and columns through some streams one after the other."""
    SIZE: tl.constexpr = 2 if COMPLEX else 1
    pid = tl.program_id(0)
    first = (pid // tiles_j // tiles_r).to(tl.int64) * streams
    tile_r, tile_j = (pid // tiles_j % tiles_r).to(tl.int64), (pid % tiles_j).to(tl.int64)
    offs_r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_j = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
    offs_n = tile_j * BLOCK_J * SIZE + tl.arange(0, BLOCK_J * SIZE)  # numbers of a row
    mask_r, mask_j = offs_r < rows, offs_j < columns
    mask_n = mask_r[:, None] & (offs_n < columns * SIZE)[None, :]
    within = offs_r[:, None] * columns * SIZE + offs_n[None, :]
    gain_re = tl.zeros((BLOCK_R, BLOCK_J), dtype=P_ptr.dtype.element_ty)
    gain_im = gain_re
    for i in range(0, streams):
        b = first + i
        row = b * rows + offs_r
        entry = b * rows * columns * SIZE + within
        numbers = tl.load(P_ptr + entry, mask=mask_n, other=0.0)
        if COMPLEX:
            re, im = tl.split(tl.reshape(numbers, (BLOCK_R, BLOCK_J, 2)))
        else:
            re, im = numbers, numbers
        if HAS_LOSS:
            u = tl.load(u_ptr + row * SIZE, mask=mask_r, other=0.0)[:, None]
            gain_re += u * re
            if COMPLEX:  # times the conjugate of P
                u_im = tl.load(u_ptr + row * 2 + 1, mask=mask_r, other=0.0)[:, None]
                gain_re += u_im * im
                gain_im += u_im * re - u * im
        if HAS_UPDATE:
            decay = tl.load(decay_ptr + row * SIZE, mask=mask_r, other=0.0)[:, None]
            new_re = decay * re
            new_im = decay * im
            if COMPLEX:
                decay_im = tl.load(decay_ptr + row * 2 + 1, mask=mask_r, other=0.0)[:, None]
                new_re -= decay_im * im
                new_im += decay_im * re
            for t in range(0, tau):
                z = tl.load(z_ptr + (b * tau + t) * columns + offs_j, mask=mask_j, other=0.0)[None, :]
                step = (row * tau + t) * SIZE
                new_re += tl.load(delta_ptr + step, mask=mask_r, other=0.0)[:, None] * z
                if COMPLEX:
                    new_im += tl.load(delta_ptr + step + 1, mask=mask_r, other=0.0)[:, None] * z
            if COMPLEX:
                new = tl.reshape(tl.join(new_re, new_im), (BLOCK_R, BLOCK_J * 2))
            else:
                new = new_re
            tl.debug_barrier()  # no thread stores before all have read
            tl.store(P_ptr + entry, new, mask=mask_n)
    if HAS_LOSS:
        if COMPLEX:
            gain = tl.reshape(tl.join(gain_re, gain_im), (BLOCK_R, BLOCK_J * 2))
        else:
            gain = gain_re
        total = tl.load(g_ptr + within, mask=mask_n, other=0.0) + gain
        tl.debug_barrier()
        tl.store(g_ptr + within, total, mask=mask_n)


def diagonal_update_(
    P: Tensor, decay: Tensor, delta: Tensor, z: Tensor, g: Tensor | None = None, u: Tensor | None = None
) -> None:
    """Influence of a diagonal recurrence through one segment, in place: ``P <- decay ⊙ P + δ z``, loss row first.

    See :func:`sparse_rtrl.ops.reference.diagonal_update_`. Bytes of influence moved: ``2 * itemsize * B * R * J``; with
    ``g`` as many more as if there were one more stream.

    Args:
        P: influence ``(B, R, J)``, contiguous; float32, float64, complex64 or complex128.
        decay: ``(B, R)`` of the dtype of ``P``.
        delta: ``(B, R, τ)`` of the dtype of ``P``.
        z: ``(B, τ, J)`` of the real dtype of ``P``.
        g: gradient ``(R, J)`` of the dtype of ``P``, contiguous, or None.
        u: ``(B, R)`` of the dtype of ``P``, or None.

    Raises:
        BackendError: if the device does not fit.
        TypeError: on a wrong dtype.
        ValueError: on a wrong shape, layout or device, or if only one of ``g`` and ``u`` is given.
    """
    batch, rows, columns = _check_diagonal(P)
    decay = launch.check("decay", decay, P.dtype, (batch, rows), P.device)
    delta = launch.check("delta", delta, P.dtype, (batch, rows, None), P.device)
    z = launch.check("z", z, P.dtype.to_real(), (batch, delta.shape[2], columns), P.device)
    if (g is None) != (u is None):
        given = "u without g" if g is None else "g without u"
        raise ValueError(f"g and u must be given together or not at all, got {given}")
    _launch(P, decay, delta, z, g, u)


def diagonal_loss_(g: Tensor, P: Tensor, u: Tensor) -> None:
    """Gradient that the influence of a diagonal recurrence carries, in place: ``g[r, j] += sum_b u[b, r] P̄[b, r, j]``.

    See :func:`sparse_rtrl.ops.reference.diagonal_loss_`. Bytes moved: ``itemsize * R * J * (B + 2)``.

    Args:
        g: ``(R, J)`` of the dtype of ``P``, contiguous.
        P: influence ``(B, R, J)``, contiguous; float32, float64, complex64 or complex128.
        u: ``(B, R)`` of the dtype of ``P``.

    Raises:
        BackendError: if the device does not fit.
        TypeError: on a wrong dtype.
        ValueError: on a wrong shape, layout or device.
    """
    _check_diagonal(P)
    _launch(P, None, None, None, g, u)


def _check_diagonal(P: Tensor) -> tuple[int, int, int]:
    launch.check_device(P)
    if P.dtype not in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        raise TypeError(f"P must be float32, float64, complex64 or complex128, got {P.dtype}")
    if P.dim() != 3 or not P.is_contiguous():
        raise ValueError(
            f"P must have shape (B, R, J) and be contiguous, got {tuple(P.shape)} with strides {P.stride()}"
        )
    batch, rows, columns = P.shape
    return batch, rows, columns


def _numbers(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _launch(
    P: Tensor, decay: Tensor | None, delta: Tensor | None, z: Tensor | None, g: Tensor | None, u: Tensor | None
) -> None:
    batch, rows, columns = P.shape
    if g is not None and u is not None:
        launch.check("g", g, P.dtype, (rows, columns), P.device)
        if not g.is_contiguous():
            raise ValueError(f"g must be contiguous, got strides {g.stride()}")
        u = launch.check("u", u, P.dtype, (batch, rows), P.device)
    if P.numel() == 0:
        return
    block_j = min(MAX_BLOCK_J, triton.next_power_of_2(columns))
    block_r = max(1, TILE_BYTES // (block_j * P.element_size()))
    tiles_r, tiles_j = triton.cdiv(rows, block_r), triton.cdiv(columns, block_j)
    # The sum over the streams is that of one program; without it each stream has programs of its own.
    streams = 1 if g is None else batch
    numbers = [_numbers(P if t is None else t) for t in (P, decay, delta, z, g, u)]
    launch.run(
        diagonal_update_kernel,
        batch // streams * tiles_r * tiles_j,
        (*numbers, rows, columns, 0 if delta is None else delta.shape[2], streams, tiles_r, tiles_j),
        COMPLEX=P.is_complex(),
        HAS_UPDATE=decay is not None,
        HAS_LOSS=g is not None,
        BLOCK_R=block_r,
        BLOCK_J=block_j,
        num_warps=4,
    )
