"""Checkpoints on disk: written whole or not at all, checked when read, read without executing code from the file.

A file is a header of :data:`HEADER` and the payload that ``torch.save`` writes:

| bytes | content |
|---|---|
| 16 | :data:`MAGIC` |
| 4 | format version, unsigned |
| 8 | length of the payload, unsigned |
| 32 | SHA-256 of version, length and payload |

Integers are little-endian. The payload holds tensors, numbers, strings and containers of them and is read with
``torch.load(weights_only=True)``, which constructs nothing else. Tensors keep their strides, so that what is computed
with them afterwards takes the same path through the kernels.

A checkpoint is written to a new file in the same folder, synchronised to the disk and then renamed, so that a crash at
any moment leaves the earlier ones as they were.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch

MAGIC = b"sparse_rtrl.ckpt"
FORMAT_VERSION = 1
HEADER = struct.Struct("<16sIQ32s")
SUFFIX = ".ckpt"
_CHUNK = 2**20


class CheckpointError(ValueError):
    """A file is not a checkpoint that can be read, or a checkpoint could not be written."""


class _HashingWriter:
    """Passes bytes on to a file and hashes them.

    After a write has failed it swallows the rest and keeps the error: ``torch.save`` writes from C++, through which an
    exception does not travel well.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.length = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        self.digest.update(data)
        self.length += size
        return size

    def flush(self) -> None:
        pass


def _checksum(version: int, length: int, payload_digest: bytes) -> bytes:
    return hashlib.sha256(struct.pack("<IQ", version, length) + payload_digest).digest()


def _check_plain(value: Any, where: str) -> None:
    """Refuse what ``torch.load(weights_only=True)`` would refuse."""
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(entry, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, entry in enumerate(value):
            _check_plain(entry, f"{where}[{index}]")
    elif not (value is None or isinstance(value, torch.Tensor) or type(value) in (bool, int, float, str)):
        expected = "a tensor, number, string, None, or a dict, list or tuple of them"
        raise TypeError(f"{where} must be {expected}, got {type(value).__name__}")


def save_checkpoint(path: Path | str, state: dict[str, Any]) -> int:
    """Write a checkpoint, whole or not at all.

    Args:
        path: file to write; replaced if it exists.
        state: tensors, numbers, strings, and dicts, lists and tuples of them.

    Returns:
        Its size in bytes.

    Raises:
        TypeError: if ``state`` holds anything else, which could not be read again.
        CheckpointError: if it cannot be written, say because the disk is full; what was there is as it was.
    """
    path = Path(path)
    _check_plain(state, "state")
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(bytes(HEADER.size))
            writer = _HashingWriter(file)
            torch.save(state, writer)  # type: ignore[arg-type]
            if writer.error is not None:
                raise writer.error
            checksum = _checksum(FORMAT_VERSION, writer.length, writer.digest.digest())
            file.seek(0)
            file.write(HEADER.pack(MAGIC, FORMAT_VERSION, writer.length, checksum))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        _synchronise_folder(path.parent)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise CheckpointError(f"checkpoint {path} could not be written: {error.strerror or error}") from error
    return HEADER.size + writer.length


def _synchronise_folder(folder: Path) -> None:
    """Make a rename in a folder outlast a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, after checking that it is one and that it is whole.

    Args:
        path: the file.

    Raises:
        CheckpointError: if it is no checkpoint, of a newer format, truncated, or damaged.
        OSError: if it cannot be opened.
    """
    path = Path(path)
    with path.open("rb") as file:
        header = file.read(HEADER.size)
        if header[: len(MAGIC)] != MAGIC:
            raise CheckpointError(f"{path} is not a checkpoint of sparse_rtrl")
        if len(header) < HEADER.size:
            raise CheckpointError(f"{path} is truncated: {len(header)} bytes, shorter than its header")
        _, version, length, checksum = HEADER.unpack(header)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version}, this sparse_rtrl reads version {FORMAT_VERSION}"
                + (": it was written by a newer one" if version > FORMAT_VERSION else "")
            )
        there = os.fstat(file.fileno()).st_size - HEADER.size
        if there != length:
            kind = "truncated" if there < length else "damaged"
            raise CheckpointError(f"{path} is {kind}: {there} bytes of payload, {length} were written")
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        if _checksum(version, length, digest.digest()) != checksum:
            raise CheckpointError(f"{path} is damaged: its checksum does not match its content")
        file.seek(HEADER.size)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{path} holds something else than tensors, numbers, strings and containers of them; nothing of it was"
                " executed"
            ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} must hold a dict, got {type(state).__name__}")
    return state


class CheckpointFolder:
    """The checkpoints of one run, of which the newest few are kept.

    Their names sort by age: ``update-000000012-step-000000384.ckpt``.

    Args:
        folder: where they lie; created if it is not there.
        keep: how many to keep, at least 1.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = folder
        self.keep = keep
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(f".*{SUFFIX}.new"):
            left_over.unlink()  # left by a process that was killed while it wrote

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(self.folder.glob(f"update-*{SUFFIX}"))

    def save(self, state: dict[str, Any], update: int, step: int) -> tuple[Path, int]:
        """Write a checkpoint, then delete those that are no longer to be kept.

        Args:
            state: see :func:`save_checkpoint`.
            update: updates done.
            step: steps done.

        Returns:
            The file, and its size in bytes.

        Raises:
            CheckpointError: if it cannot be written; the message names the newest one, which is as it was.
        """
        path = self.folder / f"update-{update:09d}-step-{step:012d}{SUFFIX}"
        earlier = [p for p in self.paths() if p != path]
        try:
            size = save_checkpoint(path, state)
        except CheckpointError as error:
            intact = f"{earlier[-1]} is intact" if earlier else "there is no earlier one"
            raise CheckpointError(f"{error}; {intact}") from error
        for old in earlier[: -self.keep + 1 or None]:
            old.unlink()
        return path, size

    def load_newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Read the newest checkpoint; None if there is none.

        Raises:
            CheckpointError: if it cannot be read; the message names the earlier ones.
        """
        paths = self.paths()
        if not paths:
            return None
        try:
            return paths[-1], load_checkpoint(paths[-1])
        except CheckpointError as error:
            if len(paths) == 1:
                raise
            raise CheckpointError(f"{error}; resume from an earlier one by its path: {paths[-2]}") from error

    def set_aside_after(self, path: Path) -> None:
        """Rename the checkpoints that are newer than the one a run is resumed from, so that they no longer count."""
        for newer in self.paths():
            if newer.name > path.name:
                os.replace(newer, newer.with_name(newer.name + ".aside"))
