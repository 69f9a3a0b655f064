"""The measuring scripts on tiny problems, so that they cannot rot."""

import argparse
import math

import carry
import compare
import compare_methods
import pytest
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


def test_comparison(tmp_path):
    names = ["bptt", "tbptt-64", "rtrl-token"]
    out = tmp_path / "rows.json"
    arguments = ["--config", "tiny", "--lengths", "64", "128", "--threads", "1", "--seconds", "60", "--rounds", "1"]
    arguments += ["--contestants", *names, "--out", str(out), "--plot", str(tmp_path / "rows.png")]
    rows = compare.main(arguments)
    assert sorted((row["length"], row["contestant"]) for row in rows) == sorted(
        (n, c) for n in (64, 128) for c in names
    )
    assert all(row["status"] == "ran" and 0 < row["relative_error"] < 1e-4 for row in rows)
    assert all(row["ratio_to_bptt"] > 0 for row in rows)
    before = out.read_text()
    assert compare.main(arguments) == rows and out.read_text() == before  # nothing is measured twice


def test_comparison_reports_no_time_of_a_wrong_gradient(monkeypatch):
    monkeypatch.setattr(compare_methods.TBPTT, "exact", True)  # now measured against BPTT through everything
    arguments = ["--config", "tiny", "--lengths", "128", "--threads", "1", "--seconds", "0", "--contestants"]
    (row,) = compare.main([*arguments, "tbptt-64"])
    assert row["status"] == "wrong" and row["relative_error"] > 1e-2 and "microseconds_per_token" not in row


def test_comparison_without_time_or_memory():
    arguments = ["--config", "tiny", "--lengths", "4096", "--threads", "1", "--contestants", "bptt", "--seconds", "0"]
    (row,) = compare.main([*arguments, "--time-limit", "0.001"])
    assert row["status"] == "out of time" and row["predicted_seconds"] > 0.001
    (row,) = compare.main([*arguments, "--time-limit", "1000", "--memory", "0.02"])
    assert row["status"] == "out of memory" and row["reason"]


def test_break_even_length():
    rows = [
        {"contestant": name, "length": length, "peak_bytes": size}
        for name, sizes in (("rtrl-64", (8, 8, 8)), ("bptt", (1, 4, 16)))
        for length, size in zip((64, 256, 1024), sizes, strict=True)
    ]
    assert compare.break_even(rows, "rtrl-64", "bptt", "peak_bytes") == pytest.approx(512)
    assert compare.break_even(rows[:5], "rtrl-64", "bptt", "peak_bytes") is None
