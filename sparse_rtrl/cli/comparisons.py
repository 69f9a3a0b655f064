"""Comparisons of training methods: every experiment is trained before it is scored, in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sparse_rtrl.cli.experiment import METHODS, Probe, RunConfig, chance, run_in_process
from sparse_rtrl.training.evaluation import Accuracy, wilson_interval

OnEvent = Callable[[str, dict[str, Any]], None]
"""Called with an experiment's label and each of its progress events; from several threads."""


@dataclass
class Outcome:
    """What became of one experiment.

    Attributes:
        label: how it is called in tables and plots.
        config: its run.
        updates: updates it trained for; fewer than ``config.updates`` if time ran out.
        seconds: training time.
        accuracy: after the training, by length.
        history: its progress events.
        probe: memory and time at one length; None if not measured.
    """

    label: str
    config: RunConfig
    updates: int
    seconds: float
    accuracy: dict[int, Accuracy]
    history: list[dict[str, Any]] = field(default_factory=list)
    probe: Probe | None = None

    @property
    def stopped_early(self) -> bool:
        """Whether time ran out before the planned updates were done."""
        return self.updates < self.config.updates

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the history."""
        accuracy = {
            length: asdict(a) | {"value": a.value, "interval": a.interval, "chance": chance(self.config, length)}
            for length, a in self.accuracy.items()
        }
        return {
            "label": self.label,
            "config": asdict(self.config),
            "updates": self.updates,
            "stopped_early": self.stopped_early,
            "seconds": self.seconds,
            "accuracy": accuracy,
            "probe": asdict(self.probe) if self.probe else None,
        }


def label_of(config: RunConfig) -> str:
    """Short name of a method with its segment, such as ``TBPTT(8)``."""
    return METHODS[config.method].label.format(segment=config.segment)


def configs_for(base: RunConfig, methods: Iterable[str]) -> list[RunConfig]:
    """The same run with each of several methods.

    Raises:
        ValueError: if a method is unknown or comes twice.
    """
    methods = list(methods)
    if len(set(methods)) < len(methods):
        raise ValueError(f"methods must be distinct, got {', '.join(methods)}")
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"methods must be among {', '.join(METHODS)}, got {', '.join(unknown)}")
    return [replace(base, method=method) for method in methods]


def train_all(
    configs: dict[str, RunConfig],
    parallel: int = 1,
    deadline: float | None = None,
    on_event: OnEvent | None = None,
) -> list[Outcome]:
    """Train and then score experiments, each in its own process.

    Args:
        configs: runs by label.
        parallel: processes at a time.
        deadline: ``time.time()`` at which trainings stop, however far they are; None for no limit.
        on_event: see :data:`OnEvent`.

    Returns:
        Outcomes in the order of ``configs``.
    """

    def run(label: str) -> Outcome:
        history: list[dict[str, Any]] = []

        def note(event: dict[str, Any]) -> None:
            history.append(event)
            if on_event is not None:
                on_event(label, event)

        job = {"action": "train", "config": asdict(configs[label]), "deadline": deadline}
        result = run_in_process(job, note)
        accuracy = {int(length): Accuracy(**counts) for length, counts in result["accuracy"].items()}
        return Outcome(label, configs[label], result["updates"], result["seconds"], accuracy, history)

    with ThreadPoolExecutor(max_workers=max(1, parallel)) as pool:
        return list(pool.map(run, configs))


def probe_cost(config: RunConfig, length: int, repeats: int = 5) -> Probe:
    """Memory and time of a run at one length, measured in a process of its own."""
    result = run_in_process({"action": "probe", "config": asdict(config), "length": length, "repeats": repeats})
    return Probe(result["length"], result["peak_bytes"], result["seconds_per_token"])


def compare_methods(
    configs: list[RunConfig],
    parallel: int = 1,
    time_budget: float | None = None,
    repeats: int = 5,
    on_event: OnEvent | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> list[Outcome]:
    """Train the same task with several methods, score them, then measure what each costs.

    Cost is measured after all trainings, one experiment at a time, so that they do not disturb each other's clock.

    Args:
        configs: the runs; they should differ in the method only.
        parallel: trainings at a time.
        time_budget: seconds for everything; trainings stop in time for scoring and measuring. None for no limit.
        repeats: timed updates per experiment.
        on_event: see :data:`OnEvent`.
        on_phase: called with a line about what is done next.
    """
    # Scoring and probing take about a sixth of a short run; start-up and the last update come on top.
    deadline = None if time_budget is None else time.time() + 0.75 * time_budget
    outcomes = train_all({label_of(config): config for config in configs}, parallel, deadline, on_event)
    for outcome in outcomes:
        if on_phase is not None:
            on_phase(f"Measuring memory and time of {outcome.label}")
        outcome.probe = probe_cost(outcome.config, outcome.config.length, repeats)
    return outcomes


def scaling(
    configs: list[RunConfig], lengths: list[int], repeats: int = 3, on_phase: Callable[[str], None] | None = None
) -> dict[str, list[Probe]]:
    """Memory and time of training over sequence lengths, one fresh process per method and length.

    Args:
        configs: one run per method.
        lengths: steps per sequence.
        repeats: timed updates per point.
        on_phase: called with a line about what is done next.

    Returns:
        One probe per length, by label.
    """
    probes: dict[str, list[Probe]] = {}
    for config in configs:
        label = label_of(config)
        for length in lengths:
            if on_phase is not None:
                on_phase(f"Measuring {label} at length {length}")
            probes.setdefault(label, []).append(probe_cost(config, length, repeats))
    return probes


@dataclass(frozen=True)
class Trials:
    """Accuracy of one method at one length over independent trials, each with its own seed.

    Attributes:
        label: the method.
        length: steps per sequence at the end of the training.
        scored_at: steps per sequence of the scoring.
        chance: accuracy of guessing.
        accuracies: one per trial.
    """

    label: str
    length: int
    scored_at: int
    chance: float
    accuracies: tuple[Accuracy, ...]

    @property
    def mean(self) -> float:
        """Mean accuracy over trials."""
        return sum(a.value for a in self.accuracies) / len(self.accuracies)

    @property
    def range(self) -> tuple[float, float]:
        """Worst and best trial."""
        values = [a.value for a in self.accuracies]
        return min(values), max(values)

    def solved(self, threshold: float = 0.99) -> int:
        """Trials that reach an accuracy."""
        return sum(a.value >= threshold for a in self.accuracies)

    def solved_interval(self, threshold: float = 0.99) -> tuple[float, float]:
        """95 % Wilson interval of the share of trials that reach an accuracy; trials are the independent unit."""
        return wilson_interval(self.solved(threshold) / len(self.accuracies), len(self.accuracies))


def run_trials(
    configs: list[RunConfig],
    lengths: list[int],
    trials: int,
    parallel: int = 1,
    on_event: OnEvent | None = None,
    evaluate_at: Iterable[int] = (),
) -> list[Trials]:
    """Train and score every method at every length from several seeds.

    Args:
        configs: one run per method; its seed is that of the first trial.
        lengths: final training length, which is also a length scored at.
        trials: seeds per method and length.
        parallel: trainings at a time.
        on_event: see :data:`OnEvent`; labels carry the length and the seed.
        evaluate_at: further lengths to score every model at.

    Returns:
        One entry per training length, method and length scored at.
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    runs: dict[str, RunConfig] = {}
    for length in lengths:
        for config in configs:
            for trial in range(trials):
                start = None if config.start_length is None else min(config.start_length, length)
                run = replace(
                    config,
                    length=length,
                    start_length=start,
                    seed=config.seed + trial,
                    eval_lengths=(length, *(e for e in evaluate_at if e != length)),
                )
                runs[f"{label_of(config)}, length {length}, seed {run.seed}"] = run
    outcomes = {outcome.label: outcome for outcome in train_all(runs, parallel, on_event=on_event)}
    results = []
    for length in lengths:
        for config in configs:
            mine = [outcomes[f"{label_of(config)}, length {length}, seed {config.seed + t}"] for t in range(trials)]
            for scored_at in mine[0].accuracy:
                accuracies = tuple(outcome.accuracy[scored_at] for outcome in mine)
                results.append(Trials(label_of(config), length, scored_at, chance(config, scored_at), accuracies))
    return results
