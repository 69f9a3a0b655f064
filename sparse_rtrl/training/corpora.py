"""Corpora: real files as long sequences of bytes or nucleotides, mapped into memory instead of read into it."""

from __future__ import annotations

import copy
import gzip
import hashlib
import os
import sysconfig
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

Symbols = NDArray[np.uint8]

_MAPS = 1024
"""At most this many files stay mapped at a time; a process may have only some ten thousand maps."""

_PIECE = 2**20
"""At most this many bytes of a line are decoded at a time."""

_GZIP = b"\x1f\x8b"


class Corpus(ABC):
    """A sequence of symbols, made of records (files, or the sequences of FASTA files) one after the other.

    Attributes:
        input_size: number of symbols.
        output_size: number of symbols that may be asked for: those below it.
        borders: first symbol of every record, and the number of all symbols, ``(R + 1,)`` int64, strictly rising.
        fingerprint: differs between corpora that hold different symbols, for all practical purposes.
    """

    input_size: int
    output_size: int
    borders: NDArray[np.int64]
    fingerprint: str

    def __len__(self) -> int:
        return int(self.borders[-1])

    @abstractmethod
    def _read(self, start: int, stop: int) -> Symbols:
        """Symbols ``start`` to ``stop``, which lie inside the corpus."""

    def read(self, start: int, count: int) -> Symbols:
        """Copy symbols out of the corpus, which goes round: its first symbol follows its last.

        Args:
            start: first symbol, from 0 to ``len(self) - 1``.
            count: number of symbols.

        Returns:
            ``(count,)`` uint8, each below ``input_size``.
        """
        pieces = []
        while count:
            stop = min(start + count, len(self))
            pieces.append(self._read(start, stop))
            count -= stop - start
            start = 0
        return np.concatenate(pieces)

    def record_of(self, position: int) -> tuple[int, int]:
        """First symbol of the record that ``position`` lies in, and of the one after it."""
        record = int(np.searchsorted(self.borders, position, side="right")) - 1
        return int(self.borders[record]), int(self.borders[record + 1])


class ByteCorpus(Corpus):
    """The bytes of files, one file after the other with nothing between; empty files are left out.

    Files are mapped into memory where they are read, so they may be larger than it. The pages that were read count
    towards the resident set of the process until the system needs them for something else.

    Args:
        files: in this order.
        root: folder that names in the fingerprint start from; a moved folder is still the same corpus.

    Raises:
        FileNotFoundError: if a file is not there.
        OSError: if one cannot be read.
        ValueError: if there are no files, or all are empty.
    """

    input_size = output_size = 256

    def __init__(self, files: Sequence[Path], root: Path | None = None) -> None:
        sizes = [_size_of(file) for file in files]
        self.files = [file for file, size in zip(files, sizes, strict=True) if size]
        if not self.files:
            raise ValueError(f"corpus must hold at least one byte, but {_names(files)}")
        self.borders = np.cumsum([0, *(size for size in sizes if size)], dtype=np.int64)
        self._map = lru_cache(maxsize=_MAPS)(self._open)
        self.fingerprint = self._fingerprint(root)

    def __getstate__(self) -> dict[str, Any]:
        # A copy maps the files again.
        return {name: value for name, value in vars(self).items() if name != "_map"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map = lru_cache(maxsize=_MAPS)(self._open)

    def _open(self, number: int) -> Symbols:
        file = self.files[number]
        size = int(self.borders[number + 1] - self.borders[number])
        now = _size_of(file)
        if now != size:
            raise OSError(f"{file} had {size:,} bytes when the corpus was opened and has {now:,} now")
        return np.memmap(file, dtype=np.uint8, mode="r")

    def _read(self, start: int, stop: int) -> Symbols:
        first = int(np.searchsorted(self.borders, start, side="right")) - 1
        pieces = []
        for number in range(first, len(self.files)):
            offset = int(self.borders[number])
            if offset >= stop:
                break
            pieces.append(np.asarray(self._map(number)[max(start - offset, 0) : stop - offset]))
        return np.concatenate(pieces)

    def _fingerprint(self, root: Path | None) -> str:
        """Of every file its name, its size and the ends of it, 4 KiB each: reading all could take hours."""
        digest = hashlib.sha256()
        for number, file in enumerate(self.files):
            name = file.name if root is None else file.relative_to(root).as_posix()
            content = self._map(number)
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(bytes(content[:4096]) + bytes(content[-4096:]))
        return digest.hexdigest()


class FastaCorpus(Corpus):
    """The nucleotides of FASTA files, plain or gzip, each sequence a record.

    ``A C G T`` are the symbols 0 to 3, in either case; ``U`` is read as ``T``. The other IUPAC codes
    (``R Y S W K M B D H V N``) and the gap ``-`` say that a base is not known exactly: all are the symbol 4, which is
    an input like any other but is never asked for. Headers, blank lines and blanks are left out, and nothing marks
    the border of two sequences.

    The files are decoded once, line by line, into an unnamed file of one byte per base that is mapped into memory and
    disappears with the process: a genome may be larger than memory, and every character is checked at the start.

    Args:
        files: in this order.
        folder: where the decoded file lies; None for the system's folder of temporary files. Where that is kept in
            memory, name a folder on a disk for a large genome.

    Raises:
        FileNotFoundError: if a file is not there.
        OSError: if one cannot be read, or the decoded file does not fit.
        ValueError: with file and line, if a character is no IUPAC code or bases stand before the first header; if there
            are no bases.
    """

    input_size, output_size = 5, 4

    def __init__(self, files: Sequence[Path], folder: Path | None = None) -> None:
        self.files, self.folder = list(files), folder
        lengths: list[int] = []
        digest = hashlib.sha256()
        with tempfile.TemporaryFile(dir=folder) as decoded:
            for file in files:
                _size_of(file)
                try:
                    with _open_fasta(file) as source:
                        _decode(source, file, decoded, lengths, digest)
                except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                    raise OSError(f"{file} is no complete gzip file: {error}") from error
            lengths = [length for length in lengths if length]
            if not lengths:
                raise ValueError(f"corpus must hold at least one base, but {_names(files)}")
            decoded.flush()
            self._symbols = np.memmap(decoded, dtype=np.uint8, mode="r")
        self.borders = np.cumsum([0, *lengths], dtype=np.int64)
        digest.update(self.borders.tobytes())
        self.fingerprint = digest.hexdigest()

    def __copy__(self) -> FastaCorpus:
        """A corpus that shares the decoded file, which is never written to again."""
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> FastaCorpus:
        """As :meth:`__copy__`."""
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:
        # The decoded file has no name; a pickle decodes the files anew, which must be the same.
        return {"files": self.files, "folder": self.folder, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["files"], state["folder"])  # type: ignore[misc]
        if self.fingerprint != state["fingerprint"]:
            raise ValueError(
                "the files of a pickled corpus must not change, but the sequences of"
                f" {_named(self.files)} are different now"
            )

    def _read(self, start: int, stop: int) -> Symbols:
        return np.array(self._symbols[start:stop])


_BAD = 255


def _codes() -> bytes:
    table = bytearray([_BAD]) * 256
    for code, letters in enumerate(("A", "C", "G", "TU", "RYSWKMBDHVN-")):
        for letter in letters + letters.lower():
            table[ord(letter)] = code
    return bytes(table)


_CODES = _codes()


def _open_fasta(file: Path) -> BinaryIO:
    with file.open("rb") as start:
        compressed = start.read(2) == _GZIP
    return gzip.open(file) if compressed else file.open("rb")  # type: ignore[return-value]


def _decode(source: BinaryIO, file: Path, decoded: BinaryIO, lengths: list[int], digest: hashlib._Hash) -> None:
    """Append the bases of one file to ``decoded`` and the lengths of its sequences to ``lengths``."""
    number, line_goes_on, in_header, found = 1, False, False, False
    while piece := source.readline(_PIECE):
        if not line_goes_on:
            in_header = piece.startswith(b">")
            if in_header:
                found = True
                lengths.append(0)
        if not in_header:
            bases = piece.translate(_CODES, b" \t\r\n")
            if bases:
                if _BAD in bases:
                    raw = piece.translate(None, b" \t\r\n")
                    bad = chr(raw[bases.index(_BAD)])
                    raise ValueError(f"{file}, line {number}: {bad!r} is no IUPAC code of a nucleotide")
                if not found:
                    raise ValueError(f"{file}, line {number}: bases stand before the first header, a line with '>'")
                decoded.write(bases)
                digest.update(bases)
                lengths[-1] += len(bases)
        line_goes_on = not piece.endswith(b"\n")
        number += not line_goes_on


def _size_of(file: Path) -> int:
    if not file.exists():
        raise FileNotFoundError(f"corpus must name a file or folder that exists, but there is no {file}")
    if not file.is_file() or not os.access(file, os.R_OK):
        raise OSError(f"corpus must be a file that can be read, which {file} is not")
    return file.stat().st_size


def _named(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def _names(files: Sequence[Path]) -> str:
    if not files:
        return "no files were found"
    return f"{files[0]} is empty" if len(files) == 1 else f"all {len(files)} files are empty, the first is {files[0]}"


FASTA_SUFFIXES = (".fa", ".fasta", ".fna", ".ffn", ".fa.gz", ".fasta.gz", ".fna.gz", ".ffn.gz")
"""How the names of FASTA files in a folder end."""


def files_under(path: Path, suffixes: tuple[str, ...] = ("",), without: frozenset[str] = frozenset()) -> list[Path]:
    """A file, or the files in a folder and its subfolders, by name in code point order.

    Args:
        path: file or folder.
        suffixes: what the names of a folder's files may end in.
        without: folders of these names are left out, as is all that starts with a dot.

    Raises:
        FileNotFoundError: if ``path`` is not there.
        ValueError: if a folder has no such file.
    """
    if not path.is_dir():
        _size_of(path)
        return [path]
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        found += [Path(folder, name) for name in names if not name.startswith(".") and name.endswith(suffixes)]
    files = sorted((file for file in found if file.is_file()), key=lambda file: file.relative_to(path).as_posix())
    if not files:
        kind = "" if suffixes == ("",) else f" ending in {', '.join(suffixes)}"
        raise ValueError(f"corpus must be a file or a folder with files{kind}, but {path} has none")
    return files


def byte_corpus(path: Path | None = None) -> ByteCorpus:
    """The bytes of a file or of all files of a folder; of the running Python's standard library if none is given.

    The standard library is its ``*.py`` files without tests and installed packages, about 12 MB.
    """
    if path is not None:
        return ByteCorpus(files_under(path), path if path.is_dir() else None)
    library = Path(sysconfig.get_paths()["stdlib"])
    without = frozenset({"site-packages", "dist-packages", "test", "tests"})
    return ByteCorpus(files_under(library, (".py",), without), library)


def fasta_corpus(path: Path, folder: Path | None = None) -> FastaCorpus:
    """The nucleotides of a FASTA file or of all FASTA files of a folder, which end in one of ``FASTA_SUFFIXES``."""
    return FastaCorpus(files_under(path, FASTA_SUFFIXES), folder)


@dataclass(frozen=True)
class CorpusKind:
    """A kind of data that a run can train on.

    Attributes:
        kind: its class.
        find: the corpus in a file or folder; in none where ``has_default``.
        has_default: whether there is one without a path.
        meaning: what is predicted.
    """

    kind: type[Corpus]
    find: Callable[[Path | None], Corpus]
    has_default: bool
    meaning: str


CORPORA = {
    "bytes": CorpusKind(ByteCorpus, byte_corpus, True, "the next byte of files"),
    "fasta": CorpusKind(FastaCorpus, lambda path: fasta_corpus(_given(path)), False, "the next base of DNA"),
}
"""Kinds of corpora by the name they have as a task on the command line."""


def _given(path: Path | None) -> Path:
    if path is None:
        raise ValueError("corpus must name a file or a folder of them, got None")
    return path
