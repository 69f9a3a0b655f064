"""Reports on runs: what the page says and shows, and what it says of runs that are broken or not finished."""

import base64
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from typer.testing import CliRunner

from sparse_rtrl.cli import app, run_plots
from sparse_rtrl.cli.run_report import load_run, write_report
from sparse_rtrl.training import runlog
from sparse_rtrl.training.metrics import METRICS


def line(update, **values):
    tokens = 5000 * update
    row = {"update": update, "tokens": tokens, "length": 8, "seconds": update * 2.0, "loss": 3.0 / update}
    row |= {"accuracy": 0.5, "tokens_per_second": 2500.0, "memory_bytes": (100 + update) * 2**20}
    return row | {"expert_load": [0.25, 0.75], "slot_reads": [0.0, 1.0, 0.5]} | values


def make_run(folder, rows, events=("started", "finished"), **config):
    folder.mkdir(parents=True)
    runlog.write_json(folder / "config.json", {"method": "rtrl", "task": "bytes", "seed": 0, "segment": 8, **config})
    with runlog.RunLog(folder) as log:
        for row in rows:
            log.metrics(row)
        for event in events:
            log.event(event, len(rows), 0)
    return folder


class Page(HTMLParser):
    """Visible text, pictures, and every address that the page refers to."""

    def __init__(self, path):
        super().__init__()
        self.text, self.pictures, self.addresses, self.open = "", [], [], []
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("href", "src")]
        self.pictures += [dict(attributes)["alt"]] if tag == "img" else []
        assert tag != "script"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += " " + data.strip()


def test_the_page_compares_runs_and_needs_nothing_else(tmp_path):
    first = make_run(tmp_path / "rtrl", [line(i) for i in range(1, 6)])
    rows = [{k: v for k, v in line(i).items() if k != "expert_load"} for i in range(1, 4)]
    second = make_run(tmp_path / "other" / "rtrl", rows, method="tbptt <b>&", task="haystack")
    runlog.write_json(first / "results.json", {"bits_per_symbol": {"stream": 3.25, "last_tenth": 2.5}})
    runlog.write_json(second / "results.json", {"accuracy": {"10000": {"value": 0.9876}}})
    output = CliRunner().invoke(app, ["report", str(first), str(second), "--out", str(tmp_path / "out")])
    assert output.exit_code == 0, output.output
    page = Page(tmp_path / "out" / "report.html")
    for words in ("rtrl (2)", "tbptt <b>&", "25,000", "3.250", "2.500", "98.76%", "accuracy at 10,000", "105.0"):
        assert words in page.text
    events = page.text.split("details")[1].split("Configuration")[0].split()
    assert events[events.index("started") + 1] == events[events.index("finished") + 1] == "5"  # the update
    assert "2.9%" in page.text  # 105 MiB over 102 MiB, from 10,000 tokens on
    assert "Expert load of rtrl over tokens" in page.pictures and "Slots read of rtrl (2) over tokens" in page.pictures
    assert "Expert load of rtrl (2) over tokens" not in page.pictures and "Loss over tokens" in page.pictures
    assert len(page.addresses) == len(page.pictures) == len(list((tmp_path / "out").glob("*.png")))
    for address in page.addresses:
        head, content = address.split(",")
        assert head == "data:image/png;base64" and base64.b64decode(content).startswith(b"\x89PNG")


def test_incomplete_runs_are_noted(tmp_path):
    torn = make_run(tmp_path / "torn", [line(1), line(2)], events=("started",))
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"update": 3, "tok')
    damaged = make_run(tmp_path / "damaged", [line(1)], events=("started", "interrupted"))
    (damaged / "metrics.jsonl").write_text('{"update": 1}\n{broken\n')
    (damaged / "results.json").write_text("{")
    diverged = make_run(tmp_path / "diverged", [line(1, loss=math.nan, lyapunov=0.1)], events=("started", "diverged"))
    empty = make_run(tmp_path / "empty", [], events=())
    assert len(load_run(torn).metrics) == 2
    page = Page(write_report([torn, damaged, diverged, empty], tmp_path / "out"))
    for words in (
        "still running, or killed after update 2",
        "metrics.jsonl is damaged",
        "results.json is damaged",
        "interrupted by a signal after update 1",
        "diverged",
        "no metrics were logged",
        "its events were not logged",
    ):
        assert words in page.text
    assert "Lyapunov exponent over tokens" in page.pictures
    page = Page(write_report([empty], tmp_path / "out"))
    assert "No run has logged metrics" in page.text and page.pictures == []


def test_a_folder_that_is_no_run_is_refused_before_anything_is_written(tmp_path):
    good = make_run(tmp_path / "good", [line(1)])
    output = CliRunner().invoke(app, ["report", str(good), str(tmp_path), "--out", str(tmp_path / "out")])
    assert output.exit_code == 2 and "RUN must be the folder of a run" in output.output
    (good / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        load_run(good)
    assert not (tmp_path / "out").exists()


def test_curves_and_heat_maps_show_the_log():
    rows = [line(i, loss=None if i == 2 else float(i), expert_load=[i / 10, 1.0]) for i in range(1, 6)]
    rows = [json.loads(json.dumps(row)) for row in rows]
    rows[1]["loss"] = math.nan
    figure = run_plots.plot_curves({"a": rows, "b": []}, METRICS["loss"])
    (drawn,) = figure.axes[0].lines
    assert drawn.get_xydata().tolist() == [[5000.0 * i, i] for i in (1, 3, 4, 5)]
    figure = run_plots.plot_heat_map(rows, METRICS["expert_load"])
    mesh = figure.axes[0].collections[0]
    assert mesh.get_array().tolist() == [[0.1, 0.2, 0.3, 0.4, 0.5], [1.0] * 5]
    memory = run_plots.plot_curves({"a": rows}, METRICS["memory_bytes"]).axes[0]
    assert memory.lines[0].get_ydata().tolist() == [101, 102, 103, 104, 105] and memory.get_ylim()[0] == 0
    assert run_plots.plot_curves({"a": rows}, METRICS["lyapunov"]) is None
    assert run_plots.plot_heat_map(rows, METRICS["slot_writes"]) is None


def test_long_logs_are_averaged():
    tokens, values = run_plots.thinned(np.arange(1.0, 11), np.arange(10.0), 4)
    assert tokens.tolist() == [3, 6, 9, 10] and values.tolist() == [1, 4, 7, 9]
    tokens, values = run_plots.thinned(np.arange(1.0, 8), np.stack((np.arange(7.0), np.ones(7))), 4)
    assert tokens.tolist() == [2, 4, 6, 7] and values.tolist() == [[0.5, 2.5, 4.5, 6], [1] * 4]
