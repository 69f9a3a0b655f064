"""Tiles of influence matrices on chip: addresses, number formats, and the product that every kernel shares."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_influence(pointers, mask):
    """Load entries of an influence matrix for arithmetic: bfloat16, stored as int16, becomes float32."""
    value = tl.load(pointers, mask=mask, other=0)
    if value.dtype == tl.int16:
        return (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value


@triton.jit
def store_influence(pointers, value, mask, entry, seed):
    """Store entries of an influence matrix; into bfloat16, stored as int16, they are rounded stochastically.

    Of the two neighbours of a number the nearer one is the likelier, so that the expected result is the number itself.
    ``entry`` numbers the entries of the whole tensor: it is the counter of the Philox generator whose key is ``seed``.
    """
    if pointers.dtype.element_ty == tl.int16:
        bits = value.to(tl.int32, bitcast=True)
        # 16 random bits below the mantissa that is kept; the sum carries with the probability of the part cut off.
        rounded = (bits + (tl.randint(seed, entry) & 0xFFFF)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)  # a carry could turn NaN into a number
        tl.store(pointers, rounded.to(tl.int16), mask=mask)
    else:
        tl.store(pointers, value, mask=mask)


@triton.jit
def slot_rows(slots_ptr, entries, slot_size, mask):
    """Rows of the influence matrix that belong to entries of a list of slots, int64."""
    slots = tl.load(slots_ptr + entries // slot_size, mask=mask, other=0)
    return slots * slot_size + entries % slot_size


@triton.jit
def multiply_state(
    acc,  # (BLOCK_W, BLOCK_N)
    P_ptr,  # one influence matrix, (H + 1, N)
    Jh_ptr,  # one state Jacobian, (w, r)
    u_ptr,  # (r,)
    support_ptr,  # (ks,)
    offs_w,
    offs_n,
    w,
    r,
    columns,
    slot_size,
    stride_p,
    HAS_LOSS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add ``Jh P[support]`` to a tile, and return it with ``u P[support]``, ``(BLOCK_N,)``."""
    mask_w = offs_w < w
    mask_n = offs_n < columns
    partial = tl.zeros((BLOCK_K, acc.shape[1]), dtype=acc.dtype)
    for start in range(0, r, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < r
        rows = slot_rows(support_ptr, offs_k, slot_size, mask_k)
        p = load_influence(P_ptr + rows[:, None] * stride_p + offs_n[None, :], mask_k[:, None] & mask_n[None, :])
        a = tl.load(Jh_ptr + offs_w[:, None] * r + offs_k[None, :], mask=mask_w[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(a, p, acc, input_precision=PRECISION, out_dtype=acc.dtype)
        if HAS_LOSS:
            u = tl.load(u_ptr + offs_k, mask=mask_k, other=0.0)
            partial += u[:, None] * p
    return acc, tl.sum(partial, 0)


@triton.jit
def multiply_terms(
    acc,  # (BLOCK_W, BLOCK_N)
    delta_ptr,  # the deltas of one influence matrix, each (w, τ, m)
    z_ptr,  # its zs, each (τ, j)
    spans_ptr,  # (tiles + 1,)
    entries_ptr,  # (*, 6)
    tile,
    offs_w,
    offs_n,
    w,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Add the immediate Jacobians ``F[i, (m, j)] = sum_τ delta[i, τ, m] z[τ, j]`` of a column tile to it.

    A tile may hold several ``m`` of a term: each gets its own columns of the left factor, and the right factor is zero
    where column and ``m`` do not belong together, so that this too is a matrix product.
    """
    mask_w = offs_w < w
    first_column = tl.min(offs_n)
    last_column = tl.max(offs_n)
    for index in tl.range(tl.load(spans_ptr + tile), tl.load(spans_ptr + tile + 1), num_stages=1):
        offset = tl.load(entries_ptr + index * 6).to(tl.int32)
        m = tl.load(entries_ptr + index * 6 + 1).to(tl.int32)
        width = tl.load(entries_ptr + index * 6 + 2).to(tl.int32)
        tau = tl.load(entries_ptr + index * 6 + 3).to(tl.int32)
        delta_start = tl.load(entries_ptr + index * 6 + 4)
        z_start = tl.load(entries_ptr + index * 6 + 5)
        local = offs_n - offset
        inside = (local >= 0) & (local < m * width)
        m_first = tl.maximum(first_column - offset, 0) // width
        m_last = tl.minimum(last_column - offset, m * width - 1) // width
        depth = (m_last - m_first + 1) * tau
        for start in tl.range(0, depth, BLOCK_T, num_stages=1):
            offs_t = start + tl.arange(0, BLOCK_T)
            mask_t = offs_t < depth
            step = offs_t % tau
            at_m = m_first + offs_t // tau
            d = tl.load(
                delta_ptr + delta_start + (offs_w[:, None] * tau + step[None, :]) * m + at_m[None, :],
                mask=mask_w[:, None] & mask_t[None, :],
                other=0.0,
            )
            z = tl.load(
                z_ptr + z_start + step[:, None] * width + (local % width)[None, :],
                mask=mask_t[:, None] & inside[None, :] & ((local // width)[None, :] == at_m[:, None]),
                other=0.0,
            )
            acc = tl.dot(d, z, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc
