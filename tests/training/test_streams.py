"""Streams against slow readers that keep everything in lists, and their errors."""

import gzip
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_rtrl.training import corpora
from sparse_rtrl.training.corpora import ByteCorpus, FastaCorpus, byte_corpus, fasta_corpus, files_under
from sparse_rtrl.training.streams import CorpusStream, TaskStream, TokenShift
from sparse_rtrl.training.tasks import IGNORE, AnBn, Copy, Haystack


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def symbols_of(batch):
    """Tokens ``(B, n)`` with -1 for a row of zeros."""
    filled = batch.x.sum(-1).bool()
    assert torch.equal(batch.x.sum(-1), filled.float())
    return batch.x.argmax(-1).masked_fill(~filled, -1).t()


def test_a_folder_is_its_files_in_order_and_goes_round(tmp_path):
    write(tmp_path, b_txt="world", a_bin=bytes([0, 255, 7]), sub__c="!", empty_txt="")
    write(tmp_path / ".hidden", x="never")
    corpus = byte_corpus(tmp_path)
    content = bytes([0, 255, 7]) + b"world!"
    assert len(corpus) == 9 and corpus.borders.tolist() == [0, 3, 8, 9]
    for start, count in itertools.product(range(9), range(1, 25)):
        expected = bytes(content[(start + i) % 9] for i in range(count))
        assert corpus.read(start, count).tobytes() == expected
    assert [corpus.record_of(p) for p in (0, 2, 3, 8)] == [(0, 3), (0, 3), (3, 8), (8, 9)]
    assert files_under(tmp_path / "b.txt") == [tmp_path / "b.txt"]
    assert len(files_under(tmp_path, (".txt",))) == 2


def test_the_default_corpus_is_the_standard_library():
    corpus = byte_corpus()
    folder = Path(sys.modules["os"].__file__).parent
    number = corpus.files.index(folder / "os.py")
    start, stop = corpus.borders[number : number + 2].tolist()
    assert corpus.read(start, stop - start).tobytes() == (folder / "os.py").read_bytes()
    assert len(corpus) > 5_000_000 and not any("site-packages" in str(file) for file in corpus.files)


def test_more_files_than_stay_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_MAPS", 2)
    write(tmp_path, **{f"f{i}_txt": str(i) * 2 for i in range(9)})
    corpus = byte_corpus(tmp_path)
    assert corpus.read(0, 18).tobytes() == b"".join(str(i).encode() * 2 for i in range(9))
    assert corpus._map.cache_info().currsize == 2


def test_only_what_is_read_of_a_huge_file_comes_into_memory(tmp_path):
    size = 2**40  # a terabyte of zeros that takes no space, with a word near its end
    with (tmp_path / "huge").open("wb") as file:
        file.seek(size - 10)
        file.write(b"needle 123")
    stream = CorpusStream(byte_corpus(tmp_path / "huge"), batch_size=3, length=4)
    stream.positions[2] = size - 10
    batch = stream.sample()
    assert bytes(symbols_of(batch)[2].tolist()) == b"need" and bytes(batch.target.t()[2].tolist()) == b"eedl"
    assert stream.positions.tolist() == [4, size // 3 + 4, size - 6]


def test_streams_predict_the_next_byte_and_go_round(tmp_path):
    write(tmp_path, a="abcde", b="fghijkl")
    content = b"abcdefghijkl"
    stream = CorpusStream(byte_corpus(tmp_path), batch_size=3, length=5)
    assert (stream.input_size, stream.output_size, stream.positions.tolist()) == (256, 256, [0, 4, 8])
    for number, batch in enumerate(itertools.islice(stream, 6)):
        assert batch.x.shape == (5, 3, 256) and batch.target.dtype == torch.int64
        assert batch.reset.tolist() == [number == 0] * 3
        for b, (tokens, target) in enumerate(zip(symbols_of(batch).tolist(), batch.target.t().tolist(), strict=True)):
            places = [(4 * b + 5 * number + i) % 12 for i in range(6)]
            assert tokens == [content[p] for p in places[:-1]]
            assert target == [content[p] for p in places[1:]]


def records_read(stream, steps):
    """What each stream was given and asked between two resets, pads left out."""
    read = [[] for _ in range(stream.batch_size)]
    for batch in itertools.islice(stream, steps):
        for b, (tokens, target) in enumerate(zip(symbols_of(batch).tolist(), batch.target.t().tolist(), strict=True)):
            if batch.reset[b]:
                read[b].append(([], []))
            filled = [t for t in tokens if t >= 0]
            assert tokens == filled + [-1] * (len(tokens) - len(filled))
            assert all(t == IGNORE for t in target[len(filled) :])
            read[b][-1][0].extend(filled)
            read[b][-1][1].extend(target[: len(filled)])
    return read


@pytest.mark.parametrize("length", [1, 3, 4, 50])
def test_records_are_sequences_of_their_own_where_asked(tmp_path, length):
    write(tmp_path, a="abcd", b="x", c="efghijk", d="lm")
    stream = CorpusStream(byte_corpus(tmp_path), 2, length, reset_at_borders=True)
    first, second = records_read(stream, 60)
    records = [b"abcd", b"efghijk", b"lm"]
    for got, start in ((first, 0), (second, 1)):
        # The second stream starts at symbol 7, the "g" of the third file.
        expected = itertools.islice(itertools.cycle(records), start, None)
        for number, ((tokens, target), record) in enumerate(zip(got[:-1], expected, strict=False)):
            record = record[2:] if start == 1 and number == 0 else record
            assert bytes(tokens) == record[:-1] and bytes(target) == record[1:]
        assert len(got) > 3


FASTA = b">one a header\r\nACGTU\r\nacgtu\r\n\r\n>empty\n>two\nNRYSWKMBDHVNn-A"


def test_fasta_is_decoded_line_by_line(tmp_path, monkeypatch):
    write(tmp_path, a_fa=FASTA, b_fna_gz=gzip.compress(b">three\nGATTACA\n"), notes_txt="not DNA")
    bases = [0, 1, 2, 3, 3] * 2 + [4] * 14 + [0] + [2, 0, 3, 3, 0, 1, 0]
    corpus = fasta_corpus(tmp_path)
    assert corpus.read(0, len(corpus)).tolist() == bases and corpus.borders.tolist() == [0, 10, 25, 32]
    monkeypatch.setattr(corpora, "_PIECE", 3)  # a line longer than a piece
    pieces = fasta_corpus(tmp_path)
    assert pieces.read(0, len(corpus)).tolist() == bases and pieces.fingerprint == corpus.fingerprint
    with pytest.raises(ValueError, match=r"bad.fa, line 3: '\?'"):
        fasta_corpus(write(tmp_path / "bad", bad_fa=b">header\nACGTACGT\nAC?T\n") / "bad.fa")
    (tmp_path / "bad" / "bad.fa").unlink()
    write(tmp_path, a_fa=FASTA.replace(b">empty\n>two\n", b""))
    assert fasta_corpus(tmp_path).fingerprint != corpus.fingerprint


def test_unknown_bases_are_inputs_but_not_asked_for(tmp_path):
    write(tmp_path, a_fa=b">r\nACNGT")
    batch = CorpusStream(fasta_corpus(tmp_path / "a.fa"), 1, 4).sample()
    assert batch.x.shape == (4, 1, 5) and symbols_of(batch).tolist() == [[0, 1, 4, 2]]
    assert batch.target.flatten().tolist() == [1, IGNORE, 2, 3]


@pytest.mark.parametrize("reset_at_borders", [False, True])
def test_corpus_streams_resume_bit_for_bit(tmp_path, reset_at_borders):
    write(tmp_path, a="abcd", c="efghijklmnop", d="qr")

    def build(files=tmp_path, batch_size=3, borders=reset_at_borders):
        return CorpusStream(byte_corpus(files), batch_size, 3, borders)

    stream = build()
    for _ in range(7):
        list(itertools.islice(stream, 1))
        other = build()
        other.load_state_dict(stream.state_dict())
        kept = stream.state_dict()
        for a, b in itertools.islice(zip(stream, other, strict=True), 5):
            assert all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("x", "target", "reset"))
        stream.load_state_dict(kept)
    for wrong, words in (
        (build(batch_size=2), "state must be of 2 streams, got 3"),
        (build(borders=not reset_at_borders), "reset_at_borders"),
        (build(files=tmp_path / "c"), "state must be of this corpus"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong.load_state_dict(kept)


def solve(task, tokens):
    """The answers to a sequence, read off its tokens."""
    if isinstance(task, Haystack):
        assert (tokens[0], tokens[-1]) == (Haystack.BOS, Haystack.Q)
        assert [tokens.count(t) for t in range(4)] == [1] * 4
        key = tokens.index(Haystack.KEY)
        assert tokens[key + 2] == Haystack.SEP and len(tokens) - 1 - key >= task.min_distance
        return {len(tokens) - 1: tokens[key + 1] - 4}
    if isinstance(task, Copy):
        go = tokens.index(task.output_size + 1)
        pattern = tokens[: len(tokens) - go]
        return dict(enumerate(pattern, go))
    n = tokens.count(AnBn.A)
    return {t: int(t == 2 * n - 1) for t in range(n, 2 * n)}


@pytest.mark.parametrize("length", [1, 4, 7, 30])
@pytest.mark.parametrize(
    "build",
    [
        lambda: Haystack(14, 5, min_distance=6),
        lambda: Haystack(5, 40),
        lambda: Copy(13, 4),
        lambda: Copy(13, 4, pattern_length=2),
        lambda: AnBn(9, 4),
    ],
)
def test_sequences_of_a_task_in_parts(build, length):
    task = build()
    stream, seen = TaskStream(task, length), []
    for _ in range(4):
        kept, parts = stream.state_dict(), []
        for start in range(0, task.length, length):
            batch = stream.sample()
            assert len(batch.x) == min(length, task.length - start)
            assert batch.reset.tolist() == [start == 0] * task.batch_size
            parts.append(batch)
            other = TaskStream(build(), length)  # goes on from the middle of a sequence
            other.load_state_dict(stream.state_dict())
            middle = stream.state_dict()
            assert torch.equal(other.sample().x, stream.sample().x)
            stream.load_state_dict(middle)
        tokens = torch.cat([symbols_of(batch) for batch in parts], 1)
        target = torch.cat([batch.target for batch in parts]).t().tolist()
        for row, asked in zip(tokens.tolist(), target, strict=True):
            assert {t: c for t, c in enumerate(asked) if c != IGNORE} == solve(task, row)
        seen.append(tokens)
        again = TaskStream(build(), length)
        again.load_state_dict(kept)
        assert torch.equal(again.sample().x, parts[0].x)
    assert not torch.equal(seen[0], seen[1])


def test_a_long_haystack_is_never_held_as_a_whole():
    stream = TaskStream(Haystack(10**12, 2, seed=3), 8)
    assert sum(part.numel() for part in stream.state_dict()["begun"].values()) == 0
    stream.sample()
    assert sum(part.numel() for part in stream.state_dict()["begun"].values()) == 4
    stream._step = 10**12 - 3
    batch = stream.sample()
    assert len(batch.x) == 3 and batch.target[-1].tolist() == stream._begun["value"].tolist()


def _unreadable(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)
    return byte_corpus(write(folder, a="abc") / "a")


def _shrunk(folder, monkeypatch):
    corpus = byte_corpus(write(folder, a="abcdef") / "a")
    corpus._map.cache_clear()
    write(folder, a="ab")
    return corpus.read(0, 4)


def _fasta(content):
    return lambda folder, _: fasta_corpus(write(folder, a_fa=content) / "a.fa")


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda f, _: byte_corpus(f / "gone"), FileNotFoundError, "there is no .*gone"),
        (lambda f, _: byte_corpus(write(f, a="") / "a"), ValueError, "at least one byte, but .*a is empty"),
        (lambda f, _: byte_corpus(write(f, a="", b="")), ValueError, "all 2 files are empty"),
        (lambda f, _: byte_corpus(f), ValueError, "folder with files, but .* has none"),
        (lambda f, _: ByteCorpus([]), ValueError, "no files were found"),
        (lambda f, _: ByteCorpus([f]), OSError, "must be a file that can be read"),
        (_unreadable, OSError, "must be a file that can be read"),
        (_shrunk, OSError, "had 6 bytes when the corpus was opened and has 2 now"),
        (lambda f, _: fasta_corpus(write(f, a_txt="x")), ValueError, r"files ending in .fa, .fasta"),
        (_fasta(b">x\nACGT\n\nAC!T\n"), ValueError, "a.fa, line 4: '!' is no IUPAC code"),
        (_fasta(b">x\nAC\n>y\nGATTACZ"), ValueError, "a.fa, line 4: 'Z' is no IUPAC code"),
        (_fasta(b"\nACGT\n"), ValueError, "a.fa, line 2: bases stand before the first header"),
        (_fasta(b">only a header\n"), ValueError, "at least one base"),
        (_fasta(b""), ValueError, "at least one base, but .*a.fa is empty"),
        (_fasta(gzip.compress(b">x\nACGT\n" * 99)[:-9]), OSError, "a.fa is no complete gzip file"),
        (lambda f, _: FastaCorpus([f / "gone.fa"]), FileNotFoundError, "there is no .*gone.fa"),
        (lambda f, _: CorpusStream(byte_corpus(write(f, a="abc")), 4, 1), ValueError, "got 4 streams and 3 symbols"),
        (lambda f, _: CorpusStream(byte_corpus(write(f, a="a")), 1, 1), ValueError, "got 1 streams and 1 symbols"),
        (lambda f, _: CorpusStream(byte_corpus(write(f, a="abc")), 0, 1), ValueError, "batch_size .* got 0"),
        (lambda f, _: CorpusStream(byte_corpus(write(f, a="abc")), 1, 0), ValueError, "length .* got 0"),
        (
            lambda f, _: CorpusStream(byte_corpus(write(f, a="a", b="b")), 1, 1, reset_at_borders=True),
            ValueError,
            "record of at least 2 symbols",
        ),
        (lambda f, _: TaskStream(Haystack(5, 1), 0), ValueError, "length .* got 0"),
    ],
)
def test_errors_say_what_was_expected(build, error, words, tmp_path, monkeypatch):
    with pytest.raises(error, match=words):
        build(tmp_path, monkeypatch)


def test_chance_is_the_most_frequent_answer(tmp_path):
    assert CorpusStream(byte_corpus(write(tmp_path, a="aabac")), 1, 1).chance == pytest.approx(3 / 5)
    bases = fasta_corpus(write(tmp_path, b_fa=b">r\nNNNNNCCG") / "b.fa")
    assert CorpusStream(bases, 1, 1).chance == pytest.approx(2 / 3)
    assert np.dtype(byte_corpus(tmp_path / "a").read(0, 2).dtype) == np.uint8


@pytest.mark.parametrize("kind", ["corpus", "task"])
def test_token_shift_shows_the_input_before(tmp_path, kind):
    def source():
        if kind == "task":
            return Haystack(12, 3)
        return CorpusStream(byte_corpus(write(tmp_path / "it", a="abcde", b="fgh", c="ijklm")), 2, 3, True)

    plain, shifted = iter(source()), TokenShift(source())
    batches = iter(shifted)
    assert shifted.input_size == 2 * source().input_size and shifted.chance == source().chance
    last, ends, starts = None, 0, 0
    for number in range(9):
        expected, found = next(plain), next(batches)
        x, before = found.x.chunk(2, -1)
        assert torch.equal(x, expected.x) and torch.equal(found.target, expected.target)
        assert torch.equal(before[1:], x[:-1])
        fresh = expected.reset if expected.reset is not None else torch.ones(len(x[0]), dtype=torch.bool)
        assert not before[0, fresh].any()
        if last is not None:
            assert torch.equal(before[0, ~fresh], last[~fresh])
        last, ends, starts = x[-1], ends + int((~fresh).sum()), starts + int(fresh.sum())
        if number == 4:
            other = TokenShift(source())
            other.load_state_dict(shifted.state_dict())
            batches = iter(other)
            shifted = other
    assert starts and (ends or kind == "task")
