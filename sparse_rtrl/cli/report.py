"""Tables of results for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.table import Table

from sparse_rtrl.cli.comparisons import Outcome, Trials
from sparse_rtrl.cli.experiment import Probe, chance
from sparse_rtrl.influence.plan import Plan
from sparse_rtrl.training.evaluation import Accuracy
from sparse_rtrl.training.gradient_check import GradientError


def format_accuracy(accuracy: Accuracy) -> str:
    """Accuracy with its 95 % interval, such as ``99.2 % [98.4, 99.6]``."""
    low, high = accuracy.interval
    return f"{accuracy.value:.1%} [{low:.1%}, {high:.1%}]"


def format_bytes(count: float) -> str:
    """Bytes as MiB."""
    return f"{count / 2**20:.1f} MiB"


def comparison_table(outcomes: Sequence[Outcome], length: int) -> Table:
    """Accuracy, chance line, peak memory and time per token of each experiment."""
    config = outcomes[0].config
    sequences = outcomes[0].accuracy[length].sequences
    table = Table(
        title=f"{config.task} of length {length}, {sequences:,} fresh sequences",
        caption=(
            f"Memory: growth of the process while training on length {length}, batch {config.batch_size}. "
            f"Time: median of whole updates, {config.threads} thread(s). A token is one step of one stream."
        ),
    )
    table.add_column("method")
    for heading in ("accuracy [95 % interval]", "updates", "peak memory", "time per token"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        updates = f"{outcome.updates:,}"
        if outcome.stopped_early:
            updates += f" of {outcome.config.updates:,}, out of time"
        table.add_row(
            outcome.label,
            format_accuracy(outcome.accuracy[length]),
            updates,
            format_bytes(outcome.probe.peak_bytes) if outcome.probe else "",
            f"{outcome.probe.seconds_per_token * 1e6:.0f} µs" if outcome.probe else "",
        )
    table.add_section()
    table.add_row("chance", f"{chance(config, length):.1%}", "", "", "", style="dim")
    return table


def scaling_table(probes: dict[str, list[Probe]], batch_size: int) -> Table:
    """Peak memory and time per token over length."""
    table = Table(title="Cost of training over sequence length", caption=f"Batch {batch_size}, one process per number.")
    table.add_column("length", justify="right")
    for label in probes:
        table.add_column(f"{label}\npeak memory", justify="right")
        table.add_column(f"{label}\ntime per token", justify="right")
    for points in zip(*probes.values(), strict=True):
        cells = [f"{points[0].length:,}"]
        for point in points:
            cells += [format_bytes(point.peak_bytes), f"{point.seconds_per_token * 1e6:.0f} µs"]
        table.add_row(*cells)
    return table


def trials_table(trials: Sequence[Trials], threshold: float = 0.99) -> Table:
    """Accuracy over independent trials."""
    table = Table(
        title=f"{len(trials[0].accuracies)} independent trials per row, each trained before it was scored",
        caption="The interval is Wilson's at 95 % for the share of trials that solve the task.",
    )
    table.add_column("trained to", justify="right")
    table.add_column("scored at", justify="right")
    table.add_column("method")
    for heading in ("mean accuracy", "worst to best", f"solved (≥ {threshold:.0%})", "95 % interval", "chance"):
        table.add_column(heading, justify="right")
    for row in trials:
        low, high = row.solved_interval(threshold)
        worst, best = row.range
        table.add_row(
            f"{row.length:,}",
            f"{row.scored_at:,}",
            row.label,
            f"{row.mean:.1%}",
            f"{worst:.1%} to {best:.1%}",
            f"{row.solved(threshold)} of {len(row.accuracies)}",
            f"[{low:.0%}, {high:.0%}]",
            f"{row.chance:.1%}",
        )
    return table


def gradient_table(errors: Sequence[GradientError]) -> Table:
    """Error and cosine of each parameter's gradient."""
    table = Table(title="Sparse RTRL against BPTT in float64")
    for heading in ("length", "dtype", "parameter", "error", "allowed", "1 - cosine", ""):
        name = heading == "parameter"
        justify: Literal["left", "right"] = "left" if name or heading in ("dtype", "") else "right"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=not name)
    for row in errors:
        verdict = "[green]ok[/]" if row.passed else "[red]wrong[/]"
        table.add_row(
            str(row.length),
            row.dtype,
            row.parameter,
            f"{row.error:.1e}",
            f"{row.allowed():.1e}",
            f"{1 - row.cosine:.1e}",
            verdict,
        )
    return table


def plan_table(plan: Plan) -> Table:
    """The predicted cost of each way to keep sleeping experts."""
    table = Table(title="microseconds per stream and segment, work on sleeping experts", box=box.SIMPLE_HEAVY)
    for name in ("path", "segments kept", "tree levels", "wake-ups", "appends", "flushes", "bookkeeping", "total"):
        table.add_column(name, justify="left" if name == "path" else "right")
    for row in plan.table:
        costs = [f"{row[name] * 1e6:,.1f}" for name in ("wake", "append", "flush", "overhead", "total")]
        table.add_row(row["path"], str(row["buffer"]), str(row["levels"]), *costs)
    return table
