"""Pictures of runs from their logs: curves over tokens, one line per run, and heat maps over tokens."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from sparse_rtrl.training.metrics import METRICS, Metric

POINTS = 1000
"""Most points of a curve, and four times the most columns of a heat map; longer logs are averaged."""

Rows = Sequence[dict[str, Any]]
"""Lines of ``metrics.jsonl``."""

CURVES = [metric for metric in METRICS.values() if metric.title and metric.entry is None]
"""Metrics that are numbers and have a picture, in the order of the report."""

HEAT_MAPS = [metric for metric in METRICS.values() if metric.title and metric.entry]
"""Metrics that are lists and have a picture."""


def series(rows: Rows, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tokens and values of a metric where it was logged and is finite; a list has a row per entry.

    Args:
        rows: lines of metrics.
        metric: name of one of :data:`~sparse_rtrl.training.metrics.METRICS`.

    Returns:
        Tokens ``(n,)`` and values ``(n,)`` or ``(entries, n)``.
    """
    told = [(row["tokens"], row[metric]) for row in rows if metric in row and np.all(np.isfinite(row[metric]))]
    width = len(told[-1][1]) if told and isinstance(told[-1][1], list) else None
    if width is not None:  # a resumed run with other experts would not fit into one map
        told = [(tokens, value) for tokens, value in told if len(value) == width]
    tokens = np.array([t for t, _ in told], dtype=np.float64)
    return tokens, np.array([v for _, v in told], dtype=np.float64).T


def thinned(tokens: NDArray[np.float64], values: NDArray[np.float64], points: int) -> tuple[Any, Any]:
    """At most ``points`` means over consecutive entries, each at the tokens of its last entry."""
    size = math.ceil(tokens.shape[-1] / points)
    if size <= 1:
        return tokens, values
    starts = np.arange(0, tokens.shape[-1], size)
    ends = np.minimum(starts + size, tokens.shape[-1])
    return tokens[ends - 1], np.add.reduceat(values, starts, axis=-1) / (ends - starts)


def plot_curves(runs: Mapping[str, Rows], metric: Metric) -> Figure | None:
    """Draw a metric of :data:`CURVES` over tokens, a line per run; None if no run logged it."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, rows in runs.items():
        tokens, values = series(rows, metric.name)
        if not len(tokens):
            continue
        if metric.name.endswith("_bytes"):
            values = values / 2**20
        style = {"marker": "o"} if len(tokens) == 1 else {"linewidth": 1.2}
        axes.plot(*thinned(tokens, values, POINTS), label=name, **style)  # type: ignore[arg-type]
    if not axes.lines:
        return None
    axes.set(title=metric.title, xlabel="tokens", ylabel=metric.unit)
    if metric.logarithmic and all((np.asarray(line.get_ydata()) > 0).all() for line in axes.lines):
        axes.set_yscale("log")
    if metric.from_zero:
        axes.set_ylim(0, 1.08 * max(np.asarray(line.get_ydata()).max() for line in axes.lines))
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def plot_heat_map(rows: Rows, metric: Metric) -> Figure | None:
    """Draw a metric of :data:`HEAT_MAPS` over tokens, a row per entry; None if it was not logged."""
    tokens, values = series(rows, metric.name)
    if not values.size:
        return None
    tokens, values = thinned(tokens, values, POINTS // 4)
    figure = Figure(figsize=(7, 1.4 + 0.22 * min(len(values), 24)), layout="constrained")
    axes = figure.subplots()
    edges = np.concatenate(([0.0], tokens))
    mesh = axes.pcolormesh(edges, np.arange(len(values) + 1) - 0.5, values, cmap="viridis", vmin=0)
    figure.colorbar(mesh, ax=axes, label=metric.unit)
    axes.set(title=metric.title, xlabel="tokens", ylabel=metric.entry)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def to_png(figure: Figure, path: Path) -> bytes:
    """Write a figure as a PNG file and return its content."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    path.write_bytes(content.getvalue())
    return content.getvalue()
