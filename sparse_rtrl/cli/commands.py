"""What the commands of ``sparse-rtrl`` do, once their options are read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sparse_rtrl.capture.parameters import ParameterGroups
from sparse_rtrl.cells.slot_cell import SlotCell
from sparse_rtrl.cli import comparisons, experiment, plots, report
from sparse_rtrl.cli.environment import compiled_parts, describe_environment
from sparse_rtrl.cli.experiment import RunConfig
from sparse_rtrl.influence.plan import measured_rates, plan
from sparse_rtrl.training import runlog
from sparse_rtrl.training.checkpoint import CheckpointError, CheckpointFolder, load_checkpoint
from sparse_rtrl.training.gradient_check import GradientError, gradient_errors
from sparse_rtrl.training.run import Run
from sparse_rtrl.training.tasks import IGNORE, Batch
from sparse_rtrl.training.trainer import Training

console = Console()


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("length {task.fields[length]}"),
        TextColumn("accuracy {task.fields[accuracy]}"),
        TextColumn("{task.fields[rate]} tokens/s"),
        TimeElapsedColumn(),
        console=console,
    )


class _Bars:
    """One progress bar per training, with rolling accuracy and tokens per second."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, Any] = {}
        self._recent: dict[str, list[float]] = {}

    def add(self, label: str, updates: int) -> None:
        """Add the bar of a training that has not begun."""
        self._bars[label] = self._progress.add_task(label, total=updates, length="-", accuracy="-", rate="-")
        self._recent[label] = []

    def update(self, label: str, event: dict[str, Any]) -> None:
        """Advance a bar; called from several threads, one per label."""
        recent = self._recent[label] = [*self._recent[label][-19:], event["accuracy"]]
        self._progress.update(
            self._bars[label],
            completed=event["update"],
            length=event["length"],
            accuracy=f"{plots.rolling_mean(recent, 20)[-1]:.0%}",
            rate=f"{event['tokens'] / max(event['seconds'], 1e-9):,.0f}",
        )


@contextmanager
def _bars(trainings: dict[str, int]) -> Iterator[_Bars]:
    with _progress() as progress:
        bars = _Bars(progress)
        for label, updates in trainings.items():
            bars.add(label, updates)
        yield bars


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train_one(config: RunConfig, runs: Path, name: str | None) -> bool:
    """Train in this process, logging and saving to a new run folder, and score; whether it was not interrupted."""
    training = _build_training(config)  # reports unfit options before there is a folder
    folder = runlog.create_run_folder(runs, name, f"{config.task}-{config.method}")
    write_config(folder, config)
    return _train(training, config, folder, None, {})


def resume(path: Path, changes: dict[str, Any]) -> bool:
    """Go on with a run; whether it was not interrupted again.

    Args:
        path: its folder, for its newest checkpoint, or one of its checkpoints.
        changes: settings that differ from now on.
    """
    folder = path if path.is_dir() else path.parent.parent
    if not (folder / "config.json").exists():
        raise ValueError(f"resume must be the folder of a run or one of its checkpoints, got {path}")
    checkpoints = CheckpointFolder(folder / "checkpoints")
    found = checkpoints.load_newest() if path.is_dir() else (path, load_checkpoint(path))
    if found is None:  # killed before the first was written
        settings = json.loads((folder / "config.json").read_text())
        settings.pop("environment")
    elif "description" not in found[1]:
        raise CheckpointError(f"{found[0]} is no checkpoint of a run of sparse-rtrl train")
    else:
        settings = found[1]["description"]["config"]
    config = RunConfig.from_dict({**settings, **changes})
    return _train(_build_training(config), config, folder, found, changes)


def _build_training(config: RunConfig) -> Training:
    torch.set_num_threads(config.threads)
    return Training(experiment.build_trainer(config), experiment.build_stream(config), config.updates)


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the configuration of a run, from which :func:`resume` starts it if it has no checkpoint yet."""
    runlog.write_json(folder / "config.json", asdict(config) | {"environment": describe_environment()})


def _train(
    training: Training,
    config: RunConfig,
    folder: Path,
    found: tuple[Path, dict[str, Any]] | None,
    changes: dict[str, Any],
) -> bool:
    """Train from the beginning, or from a checkpoint that was found, and score."""
    state = None if found is None else found[1]
    with runlog.RunLog(folder, resume_at=state["training"]["update"] if state else 0) as log:
        run = Run(
            training,
            log,
            CheckpointFolder(folder / "checkpoints", config.keep_checkpoints),
            {"config": asdict(config), "torch": str(torch.__version__)},
            60 * config.checkpoint_minutes,
            config.checkpoint_every,
            config.log_every,
        )
        if found is None:
            log.event("started", 0, 0)
        else:
            _go_on(run, *found, changes)
        label = comparisons.label_of(config)
        with _bars({label: config.updates}) as bars:
            stopped_by = run.carry_out(lambda row: bars.update(label, row))
        if stopped_by is not None:
            console.print(f"{stopped_by}: saved after update {training.update}. Go on with --resume {folder}")
            return False
        _score(config, training, log)
    console.print(f"Everything is in {folder}")
    return True


def _go_on(run: Run, path: Path, state: dict[str, Any], changes: dict[str, Any]) -> None:
    run.load_state_dict(state)
    run.checkpoints.set_aside_after(path)
    training, before = run.training, state["description"]
    run.log.event("resumed", training.update, training.tokens, checkpoint=path.name, changed=sorted(changes))
    if changes:
        write_config(run.log.folder, RunConfig.from_dict(run.description["config"]))
    if before["torch"] != torch.__version__:
        console.print(f"Saved with torch {before['torch']}, going on with {torch.__version__}: not bit for bit")


def _bits_per_symbol(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Cross entropy in bits over the whole stream and over its last tenth, from the lines of metrics."""
    begins = [0, *(row["tokens"] for row in rows)]
    late = [(row, begin) for row, begin in zip(rows, begins, strict=False) if row["tokens"] > 0.9 * begins[-1]]
    bits = {}
    for name, part in (("stream", list(zip(rows, begins, strict=False))), ("last_tenth", late)):
        told = [(row["loss"], row["tokens"] - begin) for row, begin in part if not math.isnan(row["loss"])]
        bits[name] = sum(loss * count for loss, count in told) / sum(count for _, count in told) / math.log(2)
    return bits


def _score(config: RunConfig, training: Training, log: runlog.RunLog) -> None:
    folder, model, label = log.folder, training.trainer.method.model, comparisons.label_of(config)
    rows = runlog.read_lines(folder / "metrics.jsonl")
    results = {}
    for length in config.eval_lengths:
        accuracy = experiment.evaluate_at(config, training.trainer, length)
        log.evaluation(training.update, length, accuracy.value)
        level = experiment.chance(config, length)
        results[length] = asdict(accuracy) | {
            "value": accuracy.value,
            "interval": accuracy.interval,
            "chance": level,
        }
        console.print(
            f"length {length:,}: {report.format_accuracy(accuracy)} on {accuracy.sequences:,} fresh sequences"
            f" (chance {level:.1%})",
            highlight=False,
        )
    summary: dict[str, Any] = {"label": label, "accuracy": results}
    if config.task in experiment.CORPORA:
        bits = summary["bits_per_symbol"] = _bits_per_symbol(rows)
        console.print(f"bits per symbol: {bits['stream']:.3f} over the stream, {bits['last_tenth']:.3f} at its end")
    runlog.write_json(folder / "results.json", summary)
    torch.save(model.state_dict(), folder / "model.pt")
    plots.plot_training(
        rows,
        training.stream.chance,
        f"{config.task}, {label}",
        folder / "training.png",
    )


def compare_on_one_task(
    config: RunConfig,
    methods: list[str],
    parallel: int,
    time_budget: float | None,
    runs: Path,
    name: str | None,
    kind: str,
) -> None:
    """Train, score and measure several methods; print the table and draw the picture."""
    configs = comparisons.configs_for(config, methods)
    for each in configs:
        experiment.build_stream(each)  # reports unfit lengths before anything starts
    folder = runlog.create_run_folder(runs, name, kind)
    with _bars({comparisons.label_of(c): c.updates for c in configs}) as bars:
        outcomes = comparisons.compare_methods(
            configs, parallel or _cores(), time_budget, on_event=bars.update, on_phase=console.print
        )
    runlog.write_json(folder / "config.json", asdict(config))
    runlog.write_json(
        folder / "results.json",
        {"environment": describe_environment(), "outcomes": [outcome.to_dict() for outcome in outcomes]},
    )
    rows = [{"method": outcome.label} | row for outcome in outcomes for row in outcome.history]
    runlog.write_rows(folder / "metrics.csv", [{k: v for k, v in row.items() if k != "event"} for row in rows])
    plots.plot_comparison(outcomes, config.length, folder / "comparison.png")
    console.print(report.comparison_table(outcomes, config.length))
    console.print(f"The picture of it is {folder / 'comparison.png'}")


def compare_over_lengths(
    config: RunConfig, methods: list[str], lengths: list[int], repeats: int, runs: Path, name: str | None
) -> None:
    """Measure memory and time over lengths; print the table and draw the picture."""
    configs = comparisons.configs_for(config, methods)
    for length in lengths:
        experiment.build_task(config, length, 1, 0)
    folder = runlog.create_run_folder(runs, name, "scaling")
    probes = comparisons.scaling(configs, sorted(lengths), repeats, console.print)
    runlog.write_json(folder / "config.json", asdict(config))
    rows = [{"method": label} | asdict(point) for label, points in probes.items() for point in points]
    runlog.write_rows(folder / "scaling.csv", rows)
    plots.plot_scaling(probes, folder / "scaling.png")
    console.print(report.scaling_table(probes, config.batch_size))
    console.print(f"The picture of it is {folder / 'scaling.png'}")


def compare_over_trials(
    config: RunConfig,
    methods: list[str],
    lengths: list[int],
    evaluate_at: list[int],
    trials: int,
    parallel: int,
    runs: Path,
    name: str | None,
) -> None:
    """Train and score over seeds and lengths; print the table and draw the picture."""
    configs = comparisons.configs_for(config, methods)
    for length in lengths + evaluate_at:
        experiment.build_task(config, length, 1, 0)
    folder = runlog.create_run_folder(runs, name, "trials")
    with _progress() as progress:
        bars = _Bars(progress)

        def note(label: str, event: dict[str, Any]) -> None:
            if event["update"] == 1:
                bars.add(label, config.updates)
            bars.update(label, event)

        results = comparisons.run_trials(
            configs, sorted(lengths), trials, parallel or _cores(), note, evaluate_at=evaluate_at
        )
    runlog.write_json(folder / "config.json", asdict(config) | {"environment": describe_environment()})
    rows = [
        {
            "method": row.label,
            "length": row.length,
            "scored_at": row.scored_at,
            "seed": config.seed + i,
            "chance": row.chance,
            "accuracy": a.value,
        }
        | asdict(a)
        for row in results
        for i, a in enumerate(row.accuracies)
    ]
    runlog.write_rows(folder / "trials.csv", rows)
    plots.plot_trials(results, folder / "trials.png")
    console.print(report.trials_table(results))
    console.print(f"The picture of it is {folder / 'trials.png'}")


def check_gradient(config: RunConfig, lengths: list[int]) -> bool:
    """Print gradient errors against BPTT; whether all are within tolerance."""
    torch.set_num_threads(config.threads)
    cell = experiment.build_method(config).model
    generator = torch.Generator().manual_seed(config.seed)
    errors: list[GradientError] = []
    for length in lengths:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        errors += gradient_errors(
            cell,  # type: ignore[arg-type]
            _random_batch(length, config.batch_size, generator),
            config.segment,
            buffer=config.buffer,
            commit_every=config.commit_every,
            catch_up=config.catch_up,
        )
    console.print(report.gradient_table(errors))
    failed = sum(not error.passed for error in errors)
    console.print(
        f"[red]{failed} of {len(errors)} gradients are off[/]" if failed else f"all {len(errors)} gradients agree"
    )
    return not failed


def _random_batch(length: int, batch_size: int, generator: torch.Generator) -> Batch:
    """Random inputs with answers asked at random steps, surely at the last one, so that any length can be checked."""
    x = torch.randn(length, batch_size, 8, generator=generator)
    target = torch.randint(4, (length, batch_size), generator=generator)
    silent = torch.rand(length, batch_size, generator=generator) < 0.5
    silent[-1] = False
    return Batch(x, target.masked_fill(silent, IGNORE))


def show_plan(config: RunConfig, flush_every: float, buffer: int | Literal["auto"], measure: bool) -> None:
    """Print the planner's decision for a configuration, and its cost table."""
    cell = experiment.build_method(replace(config, method="bptt")).model
    if not isinstance(cell, SlotCell):
        raise ValueError(f"cell must have experts to plan for, got {config.cell}")
    groups = ParameterGroups.of_cell(cell)
    rates: dict[str, Any] = measured_rates() if measure else {}
    decision = plan(
        num_slots=config.num_slots,
        slot_size=config.slot_size,
        read_slots=config.read_slots,
        write_slots=config.write_slots,
        num_experts=config.num_experts,
        top_k=config.top_k,
        expert_columns=groups.expert_columns,
        batch_size=config.batch_size,
        commit_every=config.commit_every if isinstance(config.commit_every, int) else 1,
        flush_every=flush_every,
        buffer=buffer,
        **rates,
    )
    for name, rate in rates.items():
        console.print(f"measured {name}: {rate:.3g} per second")
    console.print(report.plan_table(decision))
    console.print(decision.decision)


def show_environment() -> None:
    """Print the environment, and a notice if nothing is compiled."""
    table = Table(show_header=False)
    for name, value in describe_environment().items():
        table.add_row(name, value)
    console.print(table)
    if not compiled_parts():
        console.print("No compiled parts: every operation runs on the plain PyTorch reference.")
