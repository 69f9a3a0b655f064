"""One training run described by plain values, carried out here or in a process of its own.

A process of its own (``python -m sparse_rtrl.cli.experiment``) reads a job as JSON from standard input and writes
events, one JSON object per line, to standard output. The experiments of a comparison run this way so that the memory of
one is not counted for another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sparse_rtrl.cells.diagonal_cell import DiagonalCell
from sparse_rtrl.cells.registry import CELLS, CellSizes
from sparse_rtrl.cells.slot_cell import SlotCell
from sparse_rtrl.cli.measurement import median_seconds, peak_growth
from sparse_rtrl.training.baselines import BPTT, TBPTT, DenseJacobianRTRL, RecurrentNetwork
from sparse_rtrl.training.corpora import CORPORA, Corpus
from sparse_rtrl.training.evaluation import Accuracy, evaluate
from sparse_rtrl.training.gradient_method import GradientMethod, SparseRTRL
from sparse_rtrl.training.lyapunov import LyapunovRegularizer
from sparse_rtrl.training.streams import CorpusStream, TokenShift
from sparse_rtrl.training.tasks import TASKS, Curriculum, Stream, Task
from sparse_rtrl.training.trainer import Progress, Trainer, train

# Half of the 32 bits that PyTorch's CPU generator takes of a seed: no run is scored on the stream it trained on.
_EVALUATION_SEED = 1 << 31


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run.

    Attributes:
        method: one of :data:`METHODS`.
        cell: one of :data:`CELLS`; ignored by the methods that bring their own network.
        slot_size: numbers per slot ``D``.
        num_slots: slots ``S``; plain networks and diagonal cells get as many units as ``S * D``, see
            :func:`build_cell`.
        num_experts: experts ``E``.
        top_k: experts active in a step.
        read_slots: slots read in a step.
        write_slots: slots written in a step.
        cell_options: further arguments of the cell.
        task: one of ``TASKS``, or of :data:`CORPORA` to predict the next symbol of real data.
        task_options: further arguments of the task.
        token_shift: give the model the input of the step before as well, see
            :class:`~sparse_rtrl.training.streams.TokenShift`.
        corpus: file or folder of a corpus; None for the standard library's source if ``task`` is ``bytes``.
        reset_at_borders: see :class:`~sparse_rtrl.training.streams.CorpusStream`.
        length: length of the sequences at the end of the training; of a corpus, steps per update.
        start_length: length at its beginning; None for ``length``, that is no curriculum.
        curriculum_updates: updates until ``length`` is reached; None for all ``updates``.
        curriculum_shape: see :class:`~sparse_rtrl.training.tasks.Curriculum`.
        batch_size: streams.
        updates: batches to train on.
        segment: steps per segment of rtrl and tbptt.
        buffer: segments the tree keeps (rtrl).
        commit_every: see :class:`~sparse_rtrl.training.gradient_method.SparseRTRL`.
        catch_up: see :class:`~sparse_rtrl.RTRL`.
        learning_rate: of AdamW.
        final_learning_rate: learning rate at the last update, reached linearly; None for constant.
        clip_norm: largest gradient norm; None for no clipping.
        weight_decay: of AdamW.
        influence_cap: see :class:`~sparse_rtrl.training.gradient_method.SparseRTRL`; for the method rtrl only.
        lyapunov_weight: weight of the Lyapunov regularizer, added to the loss of every segment; 0 only watches the
            exponent, None does neither. For slot cells with rtrl, bptt and tbptt.
        lyapunov_target: exponent it aims at, in nats per step.
        step_per_segment: step after every segment that asks something instead of once per batch.
        seed: of the parameters and of the training sequences.
        threads: threads of PyTorch.
        eval_lengths: lengths to evaluate at after the training.
        eval_sequences: fresh sequences per length.
        checkpoint_minutes: minutes between two checkpoints of ``sparse-rtrl train``; saving changes nothing in a run.
        checkpoint_every: updates between two checkpoints besides; None for none.
        keep_checkpoints: newest checkpoints to keep.
        log_every: updates between two lines of metrics.
    """

    method: str = "rtrl"
    cell: str = "slot-moe"
    slot_size: int = 16
    num_slots: int = 4
    num_experts: int = 4
    top_k: int = 2
    read_slots: int = 2
    write_slots: int = 2
    cell_options: dict[str, Any] = field(default_factory=dict)
    task: str = "haystack"
    task_options: dict[str, Any] = field(default_factory=dict)
    token_shift: bool = False
    corpus: str | None = None
    reset_at_borders: bool = False
    length: int = 128
    start_length: int | None = None
    curriculum_updates: int | None = None
    curriculum_shape: str = "linear"
    batch_size: int = 16
    updates: int = 500
    segment: int = 8
    buffer: int = 64
    commit_every: int | Literal["auto"] | None = None
    catch_up: Literal["auto", "eager", "replay", "product"] = "auto"
    learning_rate: float = 1e-2
    final_learning_rate: float | None = None
    clip_norm: float | None = 1.0
    weight_decay: float = 0.0
    influence_cap: float | None = None
    lyapunov_weight: float | None = None
    lyapunov_target: float = 0.0
    step_per_segment: bool = False
    seed: int = 0
    threads: int = 1
    eval_lengths: tuple[int, ...] = ()
    eval_sequences: int = 1000
    checkpoint_minutes: float = 5.0
    checkpoint_every: int | None = None
    keep_checkpoints: int = 3
    log_every: int = 1

    def __post_init__(self) -> None:
        for name, value, known in (
            ("method", self.method, METHODS),
            ("cell", self.cell, CELLS),
            ("task", self.task, (*TASKS, *CORPORA)),
            ("catch_up", self.catch_up, ("auto", "eager", "replay", "product")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value}")
        least_one = ("batch_size", "updates", "segment", "threads", "eval_sequences", "keep_checkpoints", "log_every")
        for name in (*least_one, "checkpoint_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.checkpoint_minutes > 0:
            raise ValueError(f"checkpoint_minutes must be positive, got {self.checkpoint_minutes}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Refuse options that do not go together."""
        if self.influence_cap is not None and self.method != "rtrl":
            raise ValueError(f"influence_cap must be None for the method {self.method}, got {self.influence_cap}")

        if self.lyapunov_weight is not None and not METHODS[self.method].regularized:
            raise ValueError(f"lyapunov_weight must be None for the method {self.method}, got {self.lyapunov_weight}")
        if self.task not in CORPORA and (self.corpus is not None or self.reset_at_borders):
            raise ValueError(f"corpus and reset_at_borders are for the tasks {', '.join(CORPORA)}, got {self.task}")
        if self.task in CORPORA and (self.eval_lengths or self.start_length is not None):
            raise ValueError(f"eval_lengths and start_length are for sequences; {self.task} is a stream without end")
        if self.task in CORPORA and self.corpus is None and not CORPORA[self.task].has_default:
            raise ValueError(f"corpus must name a file or a folder of them for the task {self.task}, got None")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Rebuild a configuration from ``asdict`` of one, which may have gone through JSON."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(unknown)}")
        return cls(**{**values, "eval_lengths": tuple(values.get("eval_lengths", ()))})


def build_task(config: RunConfig, length: int, batch_size: int, seed: int) -> Task:
    """The task of a run at a given length."""
    return TASKS[config.task](length, batch_size, seed=seed, **config.task_options)


def shifted(config: RunConfig, stream: Stream) -> Stream:
    """A stream as the model of a run sees it."""
    return TokenShift(stream) if config.token_shift else stream


def build_stream(config: RunConfig) -> Stream:
    """What a run trains on: its corpus, or the sequences of its task, under a curriculum if the run has one."""
    if config.task in CORPORA:
        corpus = CORPORA[config.task].find(None if config.corpus is None else Path(config.corpus))
        return shifted(config, CorpusStream(corpus, config.batch_size, config.length, config.reset_at_borders))
    start = config.length if config.start_length is None else config.start_length
    task = build_task(config, config.length, config.batch_size, config.seed)
    updates = config.curriculum_updates or config.updates
    return shifted(config, Curriculum(task, start, config.length, updates, config.curriculum_shape))


@dataclass(frozen=True)
class Ends:
    """Sizes that a model takes from what it is trained on.

    Attributes:
        input_size: of a step's input.
        output_size: number of classes.
    """

    input_size: int
    output_size: int


def build_cell(config: RunConfig, ends: Ends) -> SlotCell | DiagonalCell:
    """The cell of a run.

    A diagonal one has ``num_slots * slot_size`` units or channels, retention ``num_slots`` heads of ``slot_size``.
    """
    sizes = CellSizes(*(getattr(config, size.name) for size in fields(CellSizes)))
    return CELLS[config.cell].build(ends.input_size, ends.output_size, sizes, **config.cell_options)


def _lyapunov(config: RunConfig, cell: SlotCell | DiagonalCell) -> LyapunovRegularizer | None:
    if config.lyapunov_weight is None:
        return None
    if not isinstance(cell, SlotCell):
        raise ValueError(f"lyapunov_weight is for {_slot_cells()}, got cell {config.cell}")
    return LyapunovRegularizer(cell, config.batch_size, config.lyapunov_weight, config.lyapunov_target, config.seed)


def _slot_cells() -> str:
    """The cells with slots, for messages."""
    return f"the cells {', '.join(name for name, cell in CELLS.items() if issubclass(cell.kind, SlotCell))}"


def _sparse_rtrl(config: RunConfig, ends: Ends) -> GradientMethod:
    cell = build_cell(config, ends)
    lyapunov = _lyapunov(config, cell)
    options = (config.segment, config.buffer, config.commit_every, config.catch_up, config.influence_cap)
    return SparseRTRL(cell, config.batch_size, *options, lyapunov)


def _bptt(config: RunConfig, ends: Ends) -> GradientMethod:
    cell = build_cell(config, ends)
    return BPTT(cell, _lyapunov(config, cell))


def _tbptt(config: RunConfig, ends: Ends) -> GradientMethod:
    cell = build_cell(config, ends)
    return TBPTT(cell, config.segment, _lyapunov(config, cell))


def _jacrev(config: RunConfig, ends: Ends) -> GradientMethod:
    cell = build_cell(config, ends)
    if not isinstance(cell, SlotCell):
        raise ValueError(f"method jacrev is for {_slot_cells()}, got cell {config.cell}")
    return DenseJacobianRTRL(cell)


def _network(kind: Literal["gru", "rnn"]) -> Callable[[RunConfig, Ends], GradientMethod]:
    """A plain network with as many units as the cell's state has entries."""

    def build(config: RunConfig, ends: Ends) -> GradientMethod:
        hidden_size = config.num_slots * config.slot_size
        return BPTT(RecurrentNetwork(kind, ends.input_size, hidden_size, ends.output_size))

    return build


@dataclass(frozen=True)
class Method:
    """A model and the way to its gradient.

    Attributes:
        meaning: what it is, in a few words.
        label: its name in tables and plots; ``{segment}`` stands for the steps of a segment.
        build: makes it for a run and the sizes of what it trains on, with freshly drawn parameters.
        regularized: whether it takes a Lyapunov regularizer.
    """

    meaning: str
    label: str
    build: Callable[[RunConfig, Ends], GradientMethod]
    regularized: bool = False


METHODS = {
    "rtrl": Method("exact sparse RTRL, in segments", "sparse RTRL, segment {segment}", _sparse_rtrl, True),
    "bptt": Method("BPTT through the whole sequence", "BPTT", _bptt, True),
    "tbptt": Method("truncated BPTT, in segments", "TBPTT({segment})", _tbptt, True),
    "jacrev": Method("dense-Jacobian RTRL by torch.func", "RTRL by torch.func", _jacrev),
    "gru-bptt": Method("a GRU with BPTT", "GRU, BPTT", _network("gru")),
    "rnn-bptt": Method("a tanh RNN with BPTT", "RNN, BPTT", _network("rnn")),
}
"""Methods by the name they have on the command line."""


def build_method(config: RunConfig) -> GradientMethod:
    """The model of a run, freshly initialised from its seed, and the way to its gradient."""
    torch.manual_seed(config.seed)
    data: Task | type[Corpus]
    if config.task in CORPORA:
        data = CORPORA[config.task].kind
    else:
        data = build_task(config, config.length, config.batch_size, config.seed)
    ends = Ends(data.input_size * (2 if config.token_shift else 1), data.output_size)
    return METHODS[config.method].build(config, ends)


def build_trainer(config: RunConfig) -> Trainer:
    """The trainer of a run."""
    return Trainer(
        build_method(config),
        config.learning_rate,
        config.final_learning_rate,
        config.clip_norm,
        config.step_per_segment,
        config.weight_decay,
    )


def build_evaluation_task(config: RunConfig, length: int) -> Task:
    """The fresh sequences a run is scored on: of the task it trained on, from another stream of random numbers."""
    # About four million tokens at a time bound the memory at any length.
    batch_size = min(config.eval_sequences, max(1, 2**22 // length), 500)
    return build_task(config, length, batch_size, (config.seed + _EVALUATION_SEED) % 2**32)


def evaluate_at(config: RunConfig, trainer: Trainer, length: int) -> Accuracy:
    """Accuracy on fresh sequences of one length; every method of a seed gets the same sequences."""
    task = build_evaluation_task(config, length)
    shown = TokenShift(task) if config.token_shift else task
    return evaluate(trainer.method.model, shown, config.eval_sequences)


def chance(config: RunConfig, length: int) -> float:
    """Accuracy of guessing at a length."""
    return build_task(config, length, 1, 0).chance


@dataclass(frozen=True)
class Probe:
    """What one length costs.

    Attributes:
        length: steps per sequence.
        peak_bytes: growth of the resident set by building the trainer and training on sequences of this length.
        seconds_per_token: median time of an update divided by its tokens.
    """

    length: int
    peak_bytes: int
    seconds_per_token: float


def probe(config: RunConfig, length: int, updates: int = 2, repeats: int = 5) -> Probe:
    """Measure memory and time of training at one length; call it in a fresh process.

    Args:
        config: the run.
        length: steps per sequence.
        updates: updates to run while memory is watched.
        repeats: timed updates, after those.
    """
    config = replace(config, length=length, start_length=None)
    shortest = build_task(config, length, 1, 0).min_length
    rehearsal = replace(config, batch_size=1, length=shortest)
    build_trainer(rehearsal).train_batch(next(iter(shifted(config, build_task(rehearsal, shortest, 1, 0)))))
    kept: dict[str, Trainer] = {}

    def first_updates() -> None:
        kept["trainer"] = build_trainer(config)
        stream = iter(shifted(config, build_task(config, length, config.batch_size, config.seed)))
        for _ in range(updates):
            kept["trainer"].train_batch(next(stream))

    peak = peak_growth(first_updates)
    batch = next(iter(shifted(config, build_task(config, length, config.batch_size, config.seed + 1))))
    seconds = median_seconds(lambda: kept["trainer"].train_batch(batch), repeats, warm_ups=0)
    return Probe(length, peak, seconds / (length * config.batch_size))


class ExperimentError(RuntimeError):
    """The process of an experiment failed."""


def run_job(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Carry out a job in this process.

    Args:
        job: ``{"action": "train", "config": ..., "max_seconds": ...}`` or
            ``{"action": "probe", "config": ..., "length": ..., "repeats": ...}``.

    Yields:
        Events: ``progress`` after each update, then one ``result``.
    """
    config = RunConfig.from_dict(job["config"])
    torch.set_num_threads(config.threads)
    if job["action"] == "probe":
        measured = probe(config, job["length"], repeats=job.get("repeats", 5))
        yield {"event": "result", **asdict(measured)}
        return
    trainer = build_trainer(config)
    last: Progress | None = None
    for last in train(trainer, build_stream(config), config.updates, job.get("max_seconds")):
        yield {"event": "progress", **_progress_event(last)}
    yield {
        "event": "result",
        "updates": last.update if last else 0,
        "seconds": last.seconds if last else 0.0,
        "accuracy": {length: asdict(evaluate_at(config, trainer, length)) for length in config.eval_lengths},
    }


def _progress_event(progress: Progress) -> dict[str, Any]:
    return {
        "update": progress.update,
        "length": progress.length,
        "loss": progress.tally.mean_loss,
        "accuracy": progress.tally.accuracy,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
    }


def run_in_process(job: dict[str, Any], on_event: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Carry out a job in a process of its own and wait for its result.

    Args:
        job: see :func:`run_job`.
        on_event: called with each ``progress`` event.

    Raises:
        ExperimentError: if the process fails, with its last words.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(job["config"]["threads"])}
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_rtrl.cli.experiment"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin and process.stdout and process.stderr
    words: list[str] = []
    listener = threading.Thread(target=lambda: words.extend(process.stderr or ()), daemon=True)
    listener.start()
    result = None
    try:
        with process.stdin as stdin:
            json.dump(job, stdin)
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "result":
                result = event
            elif on_event is not None:
                on_event(event)
        code = process.wait()
    finally:
        process.kill()
        process.stdout.close()
    listener.join()
    if result is None:
        said = words[-1].strip() if words else "it said nothing"
        raise ExperimentError(f"{job['config']['method']} ended with exit status {code}: {said}")
    return result


def main() -> None:
    """Carry out the job on standard input, writing events to standard output."""
    job = json.load(sys.stdin)
    if (deadline := job.pop("deadline", None)) is not None:
        job["max_seconds"] = max(0.0, deadline - time.time())
    for event in run_job(job):
        print(json.dumps(event), flush=True)


if __name__ == "__main__":
    main()
