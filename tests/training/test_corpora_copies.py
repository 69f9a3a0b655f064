"""Corpora, and streams through them, are copied and pickled in mid-stream."""

import copy
import pickle

import pytest
import torch

from sparse_rtrl.training.corpora import byte_corpus, fasta_corpus
from sparse_rtrl.training.streams import CorpusStream

COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda each: pickle.loads(pickle.dumps(each))}


def bytes_of(folder):
    (folder / "a.txt").write_bytes(bytes(range(200)))
    (folder / "b.txt").write_bytes(b"some more")
    return byte_corpus(folder)


def fasta_of(folder):
    (folder / "a.fa").write_text(">one\nACGTNACG\n>two\nTTGACA\n")
    return fasta_corpus(folder / "a.fa")


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", [bytes_of, fasta_of])
def test_a_copy_goes_on_where_the_stream_stands(make, how, tmp_path):
    stream = CorpusStream(make(tmp_path), batch_size=2, length=3)
    stream.sample()
    corpus = COPIES[how](stream.corpus)
    assert corpus.fingerprint == stream.corpus.fingerprint and corpus.borders.tolist() == stream.corpus.borders.tolist()
    assert corpus.read(0, len(corpus)).tolist() == stream.corpus.read(0, len(corpus)).tolist()
    if how == "copy":
        return
    other = COPIES[how](stream)
    for _ in range(9):
        one, two = stream.sample(), other.sample()
        assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(two).values(), strict=True))


def test_a_pickle_holds_no_symbols_and_notices_other_files(tmp_path):
    (tmp_path / "long.fa").write_text(">one\n" + "ACGT" * 5000 + "\n")
    corpus = fasta_corpus(tmp_path / "long.fa")
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 1000
    assert copy.deepcopy(corpus)._symbols is corpus._symbols
    (tmp_path / "long.fa").write_text(">one\n" + "ACGA" * 5000 + "\n")
    with pytest.raises(ValueError, match=r"a pickled corpus must not change, .*long\.fa are different now"):
        pickle.loads(pickled)
    (tmp_path / "a.txt").write_bytes(b"0123456789")
    pickled = pickle.dumps(byte_corpus(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_bytes(b"0123")
    with pytest.raises(OSError, match="had 10 bytes when the corpus was opened and has 4 now"):
        pickle.loads(pickled).read(0, 4)
