"""The measuring scripts on tiny problems, so that they cannot rot."""

import argparse
import json
import math

import byte_stream
import carry
import compare
import compare_methods
import diagonal
import diagonal_learning
import diagonal_update
import haystack_long
import memory
import pytest
import recall
import slot_memory
import stack_approximation
import torch
import truncation_bias

from sparse_rtrl import SlotMoECell
from sparse_rtrl.training.streams import TaskStream
from sparse_rtrl.training.tasks import Haystack


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


def test_memory_and_error_over_the_length():
    rows = memory.main(["--hidden", "6", "--segment", "4", "--lengths", "32", "64", "--longest-bptt", "32"])
    assert [(row["method"], row["length"]) for row in rows] == [
        *((method, 32) for method in memory.METHODS),
        ("carry", 64),
        ("tbptt", 64),
    ]
    for row in rows:
        least, most = (1e-5, 1.0) if row["method"] == "tbptt" else (0.0, 1e-12)
        assert least <= row["relative_error"] <= most


def test_diagonal_update():
    row = diagonal_update.measure(diagonal_update.problem(2, 8, 4, torch.complex64), rounds=2)
    assert row["bytes_moved"] == 8 * (2 * 2 * 8 * 4 + 2 * 8 * 4) and 0 < row["relative_error"] < 1e-5
    assert row["fraction_of_copy"] > 0


def test_diagonal_cells(tmp_path):
    arguments = ["--widths", "8", "--batches", "2", "--rounds", "1", "--budget", "0", "--out", str(tmp_path / "d.json")]
    for row in diagonal.main(arguments):
        assert min(row["seconds_per_token"].values()) > 0
        assert row["influence_bytes"] == pytest.approx(4 * 2 * row["recurrent_parameters"], rel=0.1)
        assert row["peak_growth_bytes"] >= row["resident_growth_bytes"]
    assert len(diagonal.main(arguments)) == 2  # which are there already
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


def test_byte_stream(tmp_path):
    arguments = ["--methods", "tbptt", "--seeds", "3", "--batch", "2", "--segment", "4", "--slot-size", "4"]
    arguments += ["--tokens", "96", "--runs", str(tmp_path), "--plot", str(tmp_path / "plot.png")]
    (run,) = byte_stream.main([*arguments, "--out", str(tmp_path / "out.json")])
    assert (run["tokens"], run["updates"], run["seed"]) == (96, 12, 3)
    assert run["bits_per_byte"] == sum(bits for _, bits, _ in run["curve"]) / 12
    assert run["bits_per_byte_by_tenth"][-1] == run["curve"][-1][1]
    assert byte_stream.main(arguments) == [run]  # nothing is done twice
    assert (tmp_path / "plot.png").exists() and (tmp_path / "out.json").exists()


def test_comparison(tmp_path):
    names = ["bptt", "tbptt-64", "rtrl-token"]
    out = tmp_path / "rows.json"
    arguments = ["--config", "tiny", "--lengths", "64", "128", "--threads", "1", "--seconds", "9", "--rounds", "1"]
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


def test_recall(tmp_path):
    arguments = ["--methods", "slots-rtrl", "slots-tbptt", "--pairs", "2", "--seeds", "1", "--updates", "250"]
    arguments += ["--length", "24", "--evaluate-at", "30", "--sequences", "50", "--commit-every", "32"]
    arguments += ["--parallel", "1", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "recall.json")]
    arguments += ["--trace", str(tmp_path / "trace.json")]
    exact, truncated = recall.main(arguments)
    assert [*exact["accuracy"]] == ["30"] and exact["accuracy"]["30"]["sequences"] == 50
    assert exact["accuracy"]["30"]["value"] > 0.8 > truncated["accuracy"]["30"]["value"]
    assert json.loads((tmp_path / "recall.json").read_text())["runs"] == recall.main(arguments) == [exact, truncated]
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert len(trace["norms"]) == len(trace["tokens"]) == 96 and trace["run"] == "slots-rtrl-2-1"


def test_haystack_long(tmp_path):
    arguments = ["--methods", "tbptt", "--seeds", "1", "--length", "20", "--updates", "3", "--curriculum-updates", "2"]
    arguments += ["--evaluate-at", "30", "--sequences", "10", "--long-length", "203", "--long-sequences", "9"]
    arguments += ["--runs", str(tmp_path)]
    (run,) = haystack_long.main(arguments)
    assert run["accuracy"]["30"]["sequences"] == 10 and run["long"]["sequences"] == 9
    assert 0 <= run["long"]["correct"] <= 9
    assert haystack_long.main(arguments) == [run]


def test_a_long_scoring_goes_on_where_it_was(tmp_path):
    cell = SlotMoECell(
        input_size=8, slot_size=4, num_slots=2, num_experts=2, top_k=1, read_slots=1, write_slots=1, output_size=4
    )
    state, saved = cell.initial_state(50), []

    def stream():
        return TaskStream(Haystack(60, 50, seed=5), 11)

    one = stream()
    whole = haystack_long.score(cell, one, state, lambda h: saved.append((h, one.state_dict())), 0.0)
    assert len(saved) == 5 and whole.asked == 50
    for entered, position in saved:
        other = stream()
        other.load_state_dict(position)
        assert haystack_long.score(cell, other, entered) == whole


def test_slot_memory(tmp_path):
    arguments = ["--pairs", "2", "--seeds", "2", "--updates", "220", "--stretch", "1.2", "--sequences", "50"]
    (row,) = slot_memory.main([*arguments, "--variants", "recipe", "--out", str(tmp_path / "it")])
    assert min(row["accuracy"]["19"]) > 0.8  # without knowing which value belongs to which key 0.63
    assert json.loads((tmp_path / "it").read_text())["rows"] == [row]
