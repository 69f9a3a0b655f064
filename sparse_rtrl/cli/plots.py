"""Pictures of trainings and comparisons, as PNG files; no display needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparse_rtrl.cli.comparisons import Outcome, Trials
from sparse_rtrl.cli.experiment import Probe, chance

_MEGABYTE = 2**20


def rolling_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last ``window`` values at each point, NaNs left out; NaN where there is nothing else."""
    means = []
    for end in range(1, len(values) + 1):
        recent = [v for v in values[max(0, end - window) : end] if not math.isnan(v)]
        means.append(sum(recent) / len(recent) if recent else math.nan)
    return means


def _chance_line(axes: Axes, level: float) -> None:
    axes.axhline(level, color="gray", linestyle="--", linewidth=1, label=f"chance, {level:.0%}")


def _learning_curve(axes: Axes, rows: Sequence[dict[str, Any]], label: str, color: str) -> None:
    window = max(1, len(rows) // 25)
    accuracy = rolling_mean([row["accuracy"] for row in rows], window)
    axes.plot([row["update"] for row in rows], accuracy, label=label, color=color, linewidth=1.5)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)


def plot_training(rows: Sequence[dict[str, Any]], chance_level: float, title: str, path: Path) -> None:
    """Draw loss, accuracy and length over updates.

    Args:
        rows: metrics of the updates; see :func:`~sparse_rtrl.training.runlog.read_lines`.
        chance_level: accuracy of guessing.
        title: heading.
        path: PNG file to write.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    _learning_curve(upper, rows, "training batches, rolling mean", "C0")
    _chance_line(upper, chance_level)
    upper.set(ylabel="accuracy", ylim=(0, 1.05), title=title)
    upper.legend(loc="center right")
    updates = [row["update"] for row in rows]
    lower.plot(updates, rolling_mean([row["loss"] for row in rows], max(1, len(rows) // 25)), color="C3")
    lower.set(xlabel="update", ylabel="cross entropy per answer")
    length = lower.twinx()
    length.plot(updates, [row["length"] for row in rows], color="C2", linewidth=1)
    length.set_ylabel("sequence length", color="C2")
    _save(figure, path)


def plot_comparison(outcomes: Sequence[Outcome], length: int, path: Path) -> None:
    """Draw accuracy with 95 % intervals and the chance line, learning curves, peak memory and time per token.

    Args:
        outcomes: experiments, scored at ``length``.
        length: steps per sequence of the scoring and the cost measurement.
        path: PNG file to write.
    """
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (score, curves), (memory, seconds) = figure.subplots(2, 2)
    labels = [outcome.label for outcome in outcomes]
    colors = [f"C{i}" for i in range(len(outcomes))]
    level = chance(outcomes[0].config, length)

    accuracies = [outcome.accuracy[length] for outcome in outcomes]
    values = [a.value for a in accuracies]
    below = [a.value - a.interval[0] for a in accuracies]
    above = [a.interval[1] - a.value for a in accuracies]
    bars = score.bar(labels, values, color=colors, yerr=[below, above], capsize=6)
    score.bar_label(bars, [f"{v:.1%}" for v in values], padding=3)
    _chance_line(score, level)
    score.set(ylabel="accuracy", ylim=(0, 1.15), title=f"{accuracies[0].sequences} fresh sequences of length {length}")
    score.legend(loc="center right")

    for outcome, color in zip(outcomes, colors, strict=True):
        _learning_curve(curves, outcome.history, outcome.label, color)
    _chance_line(curves, level)
    curves.set(xlabel="update", ylabel="accuracy on training batches", ylim=(0, 1.05), title="Learning")
    curves.legend()

    for axes, unit, title, cost in (
        (
            memory,
            "MiB",
            "Peak memory of training",
            [o.probe.peak_bytes / _MEGABYTE if o.probe else 0 for o in outcomes],
        ),
        (seconds, "µs", "Time per token", [o.probe.seconds_per_token * 1e6 if o.probe else 0 for o in outcomes]),
    ):
        bars = axes.bar(labels, cost, color=colors)
        axes.bar_label(bars, [f"{c:.3g}" for c in cost], padding=3)
        axes.set(ylabel=unit, title=f"{title}, length {length}")
        axes.margins(y=0.15)
    for axes in (score, memory, seconds):
        axes.tick_params(axis="x", labelrotation=15 if len(labels) > 3 else 0)
    _save(figure, path)


def plot_scaling(probes: dict[str, list[Probe]], path: Path) -> None:
    """Draw peak memory and time per token over the sequence length.

    Args:
        probes: measurements by label.
        path: PNG file to write.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    for label, points in probes.items():
        lengths = [p.length for p in points]
        memory.plot(lengths, [p.peak_bytes / _MEGABYTE for p in points], marker="o", label=label)
        seconds.plot(lengths, [p.seconds_per_token * 1e6 for p in points], marker="o", label=label)
    memory.set(title="Peak memory of training", ylabel="MiB")
    seconds.set(title="Time per token", ylabel="µs")
    for axes in (memory, seconds):
        axes.set(xlabel="sequence length", xscale="log", yscale="log")
        axes.grid(True, which="both", alpha=0.3)
    memory.legend()
    _save(figure, path)


def plot_trials(trials: Sequence[Trials], path: Path) -> None:
    """Draw every trial as a point and the mean as a bar, per length trained to and scored at, with the chance line.

    Args:
        trials: results per method and lengths.
        path: PNG file to write.
    """
    panels_of = sorted({(t.length, t.scored_at) for t in trials})
    labels = list(dict.fromkeys(t.label for t in trials))
    figure = Figure(figsize=(2 + 3.5 * len(panels_of), 5), layout="constrained")
    panels = figure.subplots(1, len(panels_of), sharey=True, squeeze=False)[0]
    for axes, (length, scored_at) in zip(panels, panels_of, strict=True):
        here = {t.label: t for t in trials if (t.length, t.scored_at) == (length, scored_at)}
        for place, label in enumerate(labels):
            values = [a.value for a in here[label].accuracies]
            axes.bar(place, here[label].mean, color=f"C{place}", alpha=0.4)
            axes.scatter([place] * len(values), values, color=f"C{place}", zorder=3)
        _chance_line(axes, here[labels[0]].chance)
        axes.set_xticks(range(len(labels)), labels, rotation=25, ha="right")
        axes.set(title=f"trained to {length:,}, scored at {scored_at:,}", ylim=(0, 1.05))
    panels[0].set_ylabel("accuracy on fresh sequences, each trial")
    panels[0].legend(loc="center right")
    _save(figure, path)
