"""Tile shapes, and the table that tells each column tile which immediate Jacobians it holds."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import triton
from torch import Tensor

from sparse_rtrl.triton_kernels.launch import check

MAX_BLOCK_W = 128
"""Written rows that one program can hold; beyond it the update goes through scratch."""

MAX_BLOCK_H = 256
"""State entries of a column that stays on chip while it catches up; beyond it segments pass one launch at a time."""


@dataclass(frozen=True)
class Tile:
    """Shape of a tile.

    Attributes:
        BLOCK_W: rows.
        BLOCK_N: columns.
        BLOCK_K: support rows that are multiplied at a time.
        BLOCK_T: columns of the factors that are multiplied at a time.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline over the support rows.
    """

    BLOCK_W: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_T: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int]:
        """The shape as the keyword arguments of a launch."""
        return asdict(self)


def choose_tile(w: int, dtype: torch.dtype, precision: str) -> Tile:
    """Tile of the step-wise update.

    Args:
        w: written rows, at most ``MAX_BLOCK_W``.
        dtype: of the arithmetic, float32 or float64.
        precision: of the products.
    """
    block_w = max(16, triton.next_power_of_2(w))
    num_warps = 8 if block_w == 128 else 4
    if dtype == torch.float64:
        return Tile(block_w, 16 if block_w == 128 else 32, 16, 16, num_warps, 3)
    if precision == "ieee":
        return Tile(block_w, 64, 16, 16, num_warps, 3)
    return Tile(block_w, 64, 32, 16, 8 if block_w >= 64 else 4, 3)


def choose_segment_tile(dtype: torch.dtype, precision: str) -> Tile:
    """Tile of the segment update, a large matrix product."""
    if dtype == torch.float64:
        return Tile(64, 32, 16, 16, 4, 3)
    if precision == "ieee":
        return Tile(64, 64, 16, 16, 4, 3)
    return Tile(128, 64, 32, 16, 8, 3)


@dataclass(frozen=True)
class Column:
    """Shape of the columns that catch up on chip; ``tests/compile_kernels.py`` compiles some of them for their spills.

    Attributes:
        BLOCK_H: state entries, all of them.
        BLOCK_N: columns.
        BLOCK_R: written rows of a segment.
        BLOCK_W: written rows of the current step.
        BLOCK_K: support rows that are multiplied at a time.
        BLOCK_T: columns of the factors that are multiplied at a time.
        BLOCK_S: written slots.
        num_warps: warps of a program.
        maxnreg: registers of a thread, at most; said explicitly, so that the assembler spills none of them in order to
            run more programs at a time.
    """

    BLOCK_H: int
    BLOCK_N: int
    BLOCK_R: int
    BLOCK_W: int
    BLOCK_K: int
    BLOCK_T: int
    BLOCK_S: int
    num_warps: int
    maxnreg: int

    def constants(self) -> dict[str, int]:
        """The shape as the keyword arguments of a launch."""
        return asdict(self)


def choose_column(
    hidden: int, node_w: int, w: int, slot_size: int, dtype: torch.dtype, precision: str
) -> Column | None:
    """Columns of ``P`` that fit on chip, or None if they are too long for that.

    Args:
        hidden: ``H``.
        node_w: written rows of a segment.
        w: written rows of the current step.
        slot_size: ``D``.
        dtype: of the arithmetic, float32 or float64.
        precision: of the products.
    """
    block_h, block_r, block_w = (max(16, triton.next_power_of_2(n)) for n in (hidden, node_w, max(w, slot_size)))
    if block_h > MAX_BLOCK_H or max(block_r, block_w) > MAX_BLOCK_W:
        return None
    # The column stays in registers beside the products; the matrix units and float64 leave less room for it.
    block_n = 16 if block_h == MAX_BLOCK_H and (precision != "ieee" or dtype == torch.float64) else 32
    block_s = max(2, triton.next_power_of_2(max(node_w, w) // slot_size))
    return Column(block_h, block_n, block_r, block_w, 16, 16, block_s, num_warps=8, maxnreg=255)


@dataclass(frozen=True)
class Terms:
    """Factors of the immediate Jacobians of all captured parameters, packed for one launch.

    Attributes:
        delta: ``(M, sum of w * τ * m)``, each term laid out ``(w, τ, m)``.
        z: ``(M, sum of τ * j)``, each term laid out ``(τ, j)``.
        spans: first entry of each column tile in ``entries``, ``(tiles + 1,)`` int64.
        entries: ``(offset, m, j, τ, start in delta, start in z)`` of every term of every tile, int64.
    """

    delta: Tensor
    z: Tensor
    spans: Tensor
    entries: Tensor


def pack_terms(
    deltas: Sequence[Tensor],
    zs: Sequence[Tensor],
    offsets: Sequence[int],
    count: int,
    w: int,
    columns: int,
    block_n: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Terms | None:
    """Check and pack the factors of the immediate Jacobians; None if there are none.

    Args:
        deltas: per captured parameter ``(M, w, τ, m)``.
        zs: per captured parameter ``(M, τ, j)``.
        offsets: first column of each.
        count: ``M``.
        w: written rows.
        columns: ``N``.
        block_n: columns of a tile.
        dtype: of the factors.
        device: where they are.

    Raises:
        TypeError: on another dtype.
        ValueError: on wrong shapes, or a parameter that does not fit into the columns.
    """
    if not len(deltas) == len(zs) == len(offsets):
        raise ValueError(
            f"deltas, zs and offsets must have one entry per parameter, got {len(deltas)}, {len(zs)} and {len(offsets)}"
        )
    sizes = []
    left, right = [], []
    for n, (delta, z, offset) in enumerate(zip(deltas, zs, offsets, strict=True)):
        delta = check(f"deltas[{n}]", delta, dtype, (count, w, None, None), device)
        tau, m = delta.shape[2:]
        z = check(f"zs[{n}]", z, dtype, (count, tau, None), device)
        size = m * z.shape[2]
        if not 0 <= offset <= columns - size:
            raise ValueError(f"offsets[{n}] must leave room for {size} columns in N = {columns}, got {offset}")
        if tau and size:
            sizes.append((offset, m, z.shape[2], tau))
            left.append(delta.view(count, -1))
            right.append(z.view(count, -1))
    if not sizes:
        return None
    spans, entries = _tile_table(tuple(sizes), w, columns, block_n, device)
    return Terms(torch.cat(left, 1), torch.cat(right, 1), spans, entries)


@functools.cache  # captured CUDA graphs hold the addresses of the tensors in this cache
def _tile_table(
    sizes: tuple[tuple[int, int, int, int], ...], w: int, columns: int, block_n: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Terms of each column tile, as ``spans`` and ``entries`` of :class:`Terms`; made once for the same sizes."""
    starts = []
    delta_start = z_start = 0
    for _, m, j, tau in sizes:
        starts.append((delta_start, z_start))
        delta_start += w * tau * m
        z_start += tau * j
    spans, entries = [0], []
    for first in range(0, columns, block_n):
        for (offset, m, j, tau), start in zip(sizes, starts, strict=True):
            if offset < first + block_n and offset + m * j > first:
                entries.append((offset, m, j, tau, *start))
        spans.append(len(entries))
    return torch.tensor(spans, device=device), torch.tensor(entries, device=device).view(-1, 6)
