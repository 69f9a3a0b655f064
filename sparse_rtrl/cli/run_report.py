"""A report on runs: one HTML page that needs nothing else, and its pictures as PNG files."""

from __future__ import annotations

import base64
import json
import math
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from sparse_rtrl.cli import run_plots
from sparse_rtrl.cli.slot_picture import plot_slots, trace_slots
from sparse_rtrl.training.runlog import read_lines

SETTLED = 10_000
"""Tokens after which memory should not change; the report says by how much it did."""


@dataclass
class LoggedRun:
    """What the folder of a run holds.

    Attributes:
        name: name of the folder.
        config: its configuration.
        metrics: lines of ``metrics.jsonl``.
        events: lines of ``events.jsonl``.
        results: ``results.json``; empty if the run has not ended.
        notes: what is missing or incomplete, for the reader of the report.
    """

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _state(events: list[dict[str, Any]]) -> str | None:
    """How far the run is, if it did not finish."""
    last = [e for e in events if e["event"] in ("started", "resumed", "interrupted", "diverged", "finished")][-1:]
    if not last:
        return "its events were not logged, so whether it finished is not known"
    kind, update = last[0]["event"], max(event["update"] for event in events)
    if kind == "interrupted":
        return f"interrupted by {last[0].get('signal', 'a signal')} after update {update:,}"
    if kind == "diverged":
        return f"diverged: {last[0].get('error', '')}"
    return None if kind == "finished" else f"not finished: still running, or killed after update {update:,}"


def load_run(folder: Path) -> LoggedRun:
    """Read what there is of a run.

    Raises:
        ValueError: if ``folder`` is not the folder of a run, or its configuration cannot be read.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"RUN must be the folder of a run, with its config.json, got {folder}")
    try:
        run = LoggedRun(folder.resolve().name, json.loads(file.read_text()))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    for name in ("metrics", "events"):
        try:
            setattr(run, name, read_lines(folder / f"{name}.jsonl"))
        except ValueError as error:
            run.notes.append(f"{name}.jsonl is damaged and was left out: {error}")
    if not run.metrics:
        run.notes.append("no metrics were logged; the folder of a comparison has none of this kind")
    if (state := _state(run.events)) is not None:
        run.notes.append(state)
    if (folder / "results.json").is_file():
        try:
            run.results = json.loads((folder / "results.json").read_text())
        except ValueError as error:
            run.notes.append(f"results.json is damaged and was left out: {error}")
    return run


def _row(run: LoggedRun) -> dict[str, str]:
    """The line of a run in the table that compares them."""
    row = {"run": run.name, "method": str(run.config.get("method", "")), "task": str(run.config.get("task", ""))}
    row |= {"segment": str(run.config.get("segment", "")), "seed": str(run.config.get("seed", ""))}
    if run.metrics:
        last = run.metrics[-1]
        row |= {"updates": f"{last['update']:,}", "tokens": f"{last['tokens']:,}", "loss": f"{last['loss']:.4g}"}
        speeds = [r["tokens_per_second"] for r in run.metrics if math.isfinite(r.get("tokens_per_second", math.nan))]
        row["tokens/s (median)"] = f"{statistics.median(speeds):,.0f}" if speeds else ""
        memory = [r["memory_bytes"] for r in run.metrics if "memory_bytes" in r]
        row["memory, MiB"] = f"{memory[-1] / 2**20:.1f}" if memory else ""
        settled = [r["memory_bytes"] for r in run.metrics if "memory_bytes" in r and r["tokens"] >= SETTLED]
        column = f"of it, spread from {SETTLED:,} tokens on"
        row[column] = f"{max(settled) / min(settled) - 1:.1%}" if settled else ""
    for name, bits in run.results.get("bits_per_symbol", {}).items():
        row[f"bits per symbol, {name.replace('_', ' ')}"] = f"{bits:.3f}"
    for length, accuracy in run.results.get("accuracy", {}).items():
        row[f"accuracy at {int(length):,}"] = f"{accuracy['value']:.2%}"
    return row


def _slots(run: LoggedRun, folder: Path) -> Figure | None:
    """The slots of a run over one sequence; None, with a note if there should be one, where there is none."""
    try:
        trace = trace_slots(folder, run.config)
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        run.notes.append(f"its slots were not drawn: {error}")
        return None
    return None if trace is None else plot_slots(trace, run.name)


def _unique(names: list[str]) -> list[str]:
    """The names, with a number where one comes again."""
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return out


def _event_text(event: dict[str, Any]) -> dict[str, str]:
    details = {k: v for k, v in event.items() if k not in ("event", "update", "tokens", "time")}
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event["time"]))
    text = ", ".join(f"{name} {value}" for name, value in details.items())
    return {"time": when, "event": event["event"], "update": f"{event['update']:,}", "details": text}


def write_report(folders: list[Path], out: Path) -> Path:
    """Write ``report.html`` and its pictures.

    Args:
        folders: folders of runs, each with its ``config.json``.
        out: folder to write into; what an earlier report left there is replaced.

    Returns:
        Path of the page, which holds its pictures and opens without a network.

    Raises:
        ValueError: if a folder is not that of a run; nothing is written then.
    """
    runs = [load_run(folder) for folder in folders]
    for run, name in zip(runs, _unique([run.name for run in runs]), strict=True):
        run.name = name
    out.mkdir(parents=True, exist_ok=True)

    def embed(figure: Figure | None, name: str) -> str | None:
        if figure is None:
            return None
        path = out / (re.sub(r"[^A-Za-z0-9_.-]+", "-", name) + ".png")
        return "data:image/png;base64," + base64.b64encode(run_plots.to_png(figure, path)).decode()

    logged = {run.name: run.metrics for run in runs}
    curves = [(m.title, embed(run_plots.plot_curves(logged, m), m.name)) for m in run_plots.CURVES]
    rows = [_row(run) for run in runs]
    sections = []
    for number, run in enumerate(runs, 1):
        maps = [
            (m.title, embed(run_plots.plot_heat_map(run.metrics, m), f"{m.name}-{number}-{run.name}"))
            for m in run_plots.HEAT_MAPS
        ]
        maps.append(("Slots over one sequence", embed(_slots(run, folders[number - 1]), f"slots-{number}-{run.name}")))
        events = [_event_text(event) for event in run.events if event["event"] != "checkpoint"]
        sections.append(
            {
                "name": run.name,
                "notes": run.notes,
                "maps": [(title, image) for title, image in maps if image],
                "events": events[-200:],
                "left_out": len(events) - len(events[-200:]),
                "checkpoints": sum(event["event"] == "checkpoint" for event in run.events),
                "config": {k: v for k, v in run.config.items() if k != "environment"},
                "environment": run.config.get("environment") or {},
            }
        )
    environment = Environment(
        loader=PackageLoader("sparse_rtrl.cli", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        title="Runs: " + ", ".join(run.name for run in runs),
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        columns=list(dict.fromkeys(column for row in rows for column in row)),
        rows=rows,
        curves=[(title, image) for title, image in curves if image],
        sections=sections,
    )
    path = out / "report.html"
    path.write_text(page)
    return path
