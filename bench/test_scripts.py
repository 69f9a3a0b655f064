"""The measuring scripts on tiny problems, so that they cannot rot."""

import argparse
import math

import carry
import diagonal
import diagonal_learning
import diagonal_update
import pytest
import stack_approximation
import torch
import truncation_bias


def test_carry_against_the_textbook():
    options = argparse.Namespace(segments=[1, 4], rounds=1, seconds=0.0)
    rows = carry.measure("gru", 6, 2, options)
    assert [(row["kind"], row["segment"]) for row in rows] == [
        ("textbook", 1),
        ("carry", 1),
        ("tbptt", 1),
        ("carry", 4),
        ("tbptt", 4),
    ]
    assert all(0 < row["relative_error"] < 1e-4 for row in rows)


def test_truncation_bias():
    arguments = ["--cell", "elman", "--hidden", "6", "--batch", "2", "--train-bytes", "400", "--steps", "20"]
    (result,) = truncation_bias.main([*arguments, "--lengths", "1", "4"])
    assert math.isfinite(result["bits_per_byte"])
    for row in result["rows"]:
        assert row["carry_relative_error"] < 1e-5 < 1e-3 < row["tbptt_relative_error"]


def test_diagonal_update():
    row = diagonal_update.measure(diagonal_update.problem(2, 8, 4, torch.complex64), rounds=2)
    assert row["bytes_moved"] == 8 * (2 * 2 * 8 * 4 + 2 * 8 * 4) and 0 < row["relative_error"] < 1e-5
    assert row["fraction_of_copy"] > 0


def test_diagonal_cells(tmp_path):
    arguments = ["--widths", "8", "--batches", "2", "--rounds", "1", "--budget", "0", "--out", str(tmp_path / "d.json")]
    for row in diagonal.main(arguments):
        assert min(row["seconds_per_token"].values()) > 0
        assert row["influence_bytes"] == pytest.approx(4 * 2 * row["recurrent_parameters"], rel=0.1)
    assert len((tmp_path / "d.csv").read_text().splitlines()) == 3


def test_diagonal_learning(tmp_path, monkeypatch):
    monkeypatch.setattr(diagonal_learning, "SCORE_BATCHES", 1)
    out = tmp_path / "rows.jsonl"
    arguments = ["--out", str(out), "--cells", "lru", "--seeds", "1", "--updates", "1"]
    diagonal_learning.main([*arguments, "--length", "42"])
    rows = diagonal_learning.load(out)
    assert len(rows) == 9
    by_method = {(row["task"], row["method"]): row for row in rows}
    for task in ("copy", "adding"):
        exact, online = by_method[task, "bptt"], by_method[task, "rtrl"]
        assert online["score"] == pytest.approx(exact["score"], rel=1e-3)
        assert by_method[task, "tbptt1"]["gradient_error_against_bptt"] > 1e-2
    before = out.read_text()
    diagonal_learning.main([*arguments, "--length", "42"])  # nothing is left to do
    assert out.read_text() == before
    diagonal_learning.main([*arguments, "--picture", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_stack_approximation():
    arguments = ["--cell", "lru", "--depth", "2", "--width", "4", "--batch", "2", "--train-bytes", "200"]
    (result,) = stack_approximation.main([*arguments, "--steps", "12", "--lengths", "1", "12"])
    one, whole = result["rows"]
    assert one["per_layer_cosine_last_cell"] > 0.99999 > one["per_layer_cosine_all"]
    assert whole["per_layer_cosine_all"] > 0.99999 > one["tbptt_cosine_last_cell"]
    assert result["per_layer_bytes"] < result["joint_bytes"]
