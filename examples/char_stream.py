"""Real text without a download: the bytes of the source files of the running Python's standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

BYTES = 128
"""Size of the alphabet; bytes beyond ASCII are taken modulo it."""


def text(size: int) -> Tensor:
    """The first bytes of the library's modules in alphabetical order, ``(size,)`` int64 below ``BYTES``."""
    data = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        data += path.read_bytes()
        if len(data) >= size:
            return torch.frombuffer(data, dtype=torch.uint8)[:size].long() % BYTES
    raise ValueError(f"size must be at most the {len(data)} bytes of the standard library's modules, got {size}")


def segments(size: int, batch: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Parallel streams through the text, cut into segments: inputs and next bytes, ``(length, B)`` each."""
    streams = text(size)[: size // batch * batch].view(batch, -1).T
    for start in range(0, len(streams) - length, length):
        yield streams[start : start + length], streams[start + 1 : start + length + 1]
