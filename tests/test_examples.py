"""The integration examples run, and change what they say they change."""

import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ["--hidden", "6", "--batch", "2", "--segment", "4", "--size", "200"]


@pytest.fixture(autouse=True)
def examples_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_text_is_that_of_the_standard_library():
    from char_stream import BYTES, segments, text

    first = sorted(Path(sys.modules["os"].__file__).parent.glob("*.py"))[0]
    assert bytes(text(50).tolist()) == first.read_bytes()[:50]
    xs = list(segments(200, 2, 4))
    assert xs[0][0].shape == (4, 2) and int(torch.stack([x for x, _ in xs]).max()) < BYTES
    for x, y in xs:
        assert torch.equal(x[1:], y[:-1])
    with pytest.raises(ValueError, match="size must be at most"):
        text(10**12)


def test_plain_loop_before_and_after():
    import tbptt_loop

    losses = tbptt_loop.main([*TINY, "--learning-rate", "0.01"])
    assert len(losses["before"]) == len(losses["after"]) == 24
    assert losses["before"][:2] == pytest.approx(losses["after"][:2])  # the first gradient has no past to miss
    assert abs(losses["before"][-1] - losses["after"][-1]) > 1e-6
    assert losses["after"][-1] < losses["after"][0]


def test_carry_where_detach_used_to_be_says_so():
    import tbptt_loop
    from char_stream import segments

    from sparse_rtrl import Carry

    model = tbptt_loop.Model(6)
    carry = Carry(model)
    h = torch.zeros(2, 6)
    with pytest.raises(RuntimeError, match=r"right after the forward pass, before backward"):
        for x, y in segments(200, 2, 4):
            h = carry(h)  # misplaced: at the top of the loop, after the backward pass of the segment before
            logits, h = model(x, h)
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()


def test_lightning_loop_takes_the_steps_of_the_plain_loop():
    pytest.importorskip("lightning", reason="needs pip install lightning")
    import lightning_loop

    losses = lightning_loop.main([*TINY, "--learning-rate", "0.01"])
    assert len(losses) == 24
    assert losses[-1] < losses[0]


def test_language_model_learns_real_text():
    import lstm_language_model

    losses = lstm_language_model.main([*TINY, "--size", "600", "--learning-rate", "0.02"])
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_bytes_of_a_file_are_learned(tmp_path):
    import byte_lm

    (tmp_path / "text").write_bytes(b"abcabcabd" * 40)
    tiny = ["--corpus", str(tmp_path / "text"), "--tokens", "640", "--streams", "4", "--segment", "4"]
    losses = byte_lm.main([*tiny, "--slot-size", "4", "--learning-rate", "0.03"])
    assert len(losses) == 40
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_dna_is_learned_beyond_chance():
    import dna

    losses = dna.main(["--tokens", "2560"])
    assert len(losses) == 40
    # The bases of the example file have an entropy of 1.92 bits without their context, and 0.6 with it.
    assert sum(losses[-10:]) / 10 < 1.5 < sum(losses[:10]) / 10
