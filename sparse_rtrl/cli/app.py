"""The ``sparse-rtrl`` command."""

from __future__ import annotations

import sys
import time
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from sparse_rtrl.cells.registry import CELLS
from sparse_rtrl.cli.experiment import METHODS, RunConfig
from sparse_rtrl.training.corpora import CORPORA
from sparse_rtrl.training.tasks import TASKS

# What draws or runs is imported inside the commands: matplotlib alone takes a second.

if TYPE_CHECKING:
    MethodName: TypeAlias = str
    CellName: TypeAlias = str
    TaskName: TypeAlias = str
    TrainingData: TypeAlias = str
else:

    def _choice(name: str, *registries: dict[str, Any]) -> type[Enum]:
        """The names of registries, as the command line takes them."""
        return Enum(name, {key.replace("-", "_"): key for registry in registries for key in registry}, type=str)

    MethodName = _choice("MethodName", METHODS)
    CellName = _choice("CellName", CELLS)
    TaskName = _choice("TaskName", TASKS)
    TrainingData = _choice("TrainingData", TASKS, CORPORA)


class _OneLineErrors(typer.core.TyperGroup):
    """Turns the errors a user can mend into one line; anything else keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        from rich.console import Console

        try:
            return super().invoke(ctx)
        except (ValueError, FloatingPointError, MemoryError, OSError) as error:
            Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        except RuntimeError as error:
            # Only our own: the process of an experiment failed. Other runtime errors are defects and keep their trace.
            if type(error).__name__ != "ExperimentError":
                raise
            Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(code=2)


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="""Exact online gradients for recurrent cells with slot memory and experts.

Start with `sparse-rtrl demo`: it trains one cell with sparse RTRL, BPTT and truncated BPTT and compares them.
`sparse-rtrl check` shows that the gradient is that of BPTT; `sparse-rtrl train` trains; every command explains itself
with `--help`.""",
)
compare_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Compare training methods, each trained before it is scored and each in a process of its own.

- `compare direct`: several methods on one task: accuracy, memory, time.
- `compare scaling`: memory and time over sequence lengths.
- `compare trials`: accuracy over independent seeds and lengths.""",
)
app.add_typer(compare_app, name="compare", rich_help_panel="Learn")


_CELL, _TASK, _OPTIMIZER, _OUTPUT, _LONG = "Cell", "Task", "Training", "Output", "Long runs"

EXIT_INTERRUPTED = 75
"""Exit status of ``train`` after SIGTERM or SIGINT: everything is saved, ``--resume`` goes on (EX_TEMPFAIL)."""

_CHANGEABLE = {
    *("updates", "learning_rate", "final_learning_rate", "clip_norm", "weight_decay", "influence_cap", "threads"),
    *("checkpoint_minutes", "checkpoint_every", "keep_checkpoints", "log_every"),
}
"""Options that may be given together with ``--resume``."""


def _tasks_with(option: str) -> list[str]:
    """The tasks that take an option of the command line."""
    return [name for name, task in TASKS.items() if option in task.options]


def _cells_with(option: str) -> list[str]:
    """The cells that take an option of the command line."""
    return [name for name, cell in CELLS.items() if option in cell.options]


Methods = Annotated[list[MethodName], typer.Option("--method", "-m", help="Repeat the option for several methods.")]
Cell = Annotated[CellName, typer.Option(help="The recurrent cell.", rich_help_panel=_CELL)]
SlotSize = Annotated[int, typer.Option(help="Numbers per slot.", rich_help_panel=_CELL)]
NumSlots = Annotated[
    int, typer.Option(help="Slots, or heads; other cells get slots * slot size units.", rich_help_panel=_CELL)
]
NumExperts = Annotated[int, typer.Option(help="Experts.", rich_help_panel=_CELL)]
TopK = Annotated[int, typer.Option(help="Experts active in a step.", rich_help_panel=_CELL)]
ReadSlots = Annotated[int, typer.Option(help="Slots read in a step.", rich_help_panel=_CELL)]
WriteSlots = Annotated[int, typer.Option(help="Slots written in a step.", rich_help_panel=_CELL)]
TokenShift = Annotated[
    bool,
    typer.Option(
        "--token-shift",
        help="Show the input of the step before as well, so that a cell remembers which input followed which; "
        "retention takes it for its keys.",
        rich_help_panel=_CELL,
    ),
]
WriteTo = Annotated[
    str | None,
    typer.Option(
        help="Cell slot-moe: important or least_used slots are written; least_used with one written slot and all read "
        "keeps many things apart.",
        rich_help_panel=_CELL,
    ),
]
ReadWeights = Annotated[
    str | None,
    typer.Option(
        help="Cell slot-moe: sigmoid or softmax weights of the read slots; softmax finds one thing among many.",
        rich_help_panel=_CELL,
    ),
]
Decay = Annotated[
    float | None,
    typer.Option(
        help="Retention: decay of all heads, 1 for linear attention; those of the paper if absent.",
        rich_help_panel=_CELL,
    ),
]
TaskChoice = Annotated[TaskName, typer.Option(help="What to learn.", rich_help_panel=_TASK)]
Length = Annotated[int, typer.Option(help="Steps per sequence at the end of training.", rich_help_panel=_TASK)]
StartLength = Annotated[
    int | None,
    typer.Option(
        help="Length at the beginning; it grows from there to --length. If absent 12, or the shortest sequence of the "
        "task.",
        rich_help_panel=_TASK,
    ),
]
CurriculumUpdates = Annotated[
    int | None,
    typer.Option(help="Updates until --length is reached; all of --updates if absent.", rich_help_panel=_TASK),
]
CurriculumShape = Annotated[str, typer.Option(help="linear or geometric.", rich_help_panel=_TASK)]
MinDistance = Annotated[
    int | None,
    typer.Option(
        help=f"Tasks {', '.join(_tasks_with('min_distance'))}: least steps between what is remembered and its question;"
        " one more than --segment if absent, so that truncated BPTT never sees both in one segment.",
        rich_help_panel=_TASK,
    ),
]
Pairs = Annotated[int, typer.Option(help="Recall: key-value pairs to remember.", rich_help_panel=_TASK)]
BatchSize = Annotated[int, typer.Option(help="Streams.", rich_help_panel=_OPTIMIZER)]
Updates = Annotated[int, typer.Option(help="Batches to train on.", rich_help_panel=_OPTIMIZER)]
Segment = Annotated[int, typer.Option(help="Steps per segment of rtrl and tbptt.", rich_help_panel=_OPTIMIZER)]
CommitEvery = Annotated[
    str | None,
    typer.Option(
        help="Method rtrl: steps between two updates of the influence, or auto for the cheapest; --segment if absent. "
        "The gradient is the same.",
        rich_help_panel=_OPTIMIZER,
    ),
]
LearningRate = Annotated[float, typer.Option("--lr", help="Learning rate of AdamW.", rich_help_panel=_OPTIMIZER)]
FinalLearningRate = Annotated[
    float,
    typer.Option("--final-lr", help="Learning rate at the last update, reached linearly.", rich_help_panel=_OPTIMIZER),
]
ClipNorm = Annotated[float, typer.Option(help="Largest gradient norm; 0 for no clipping.", rich_help_panel=_OPTIMIZER)]
StepPerSegment = Annotated[
    bool, typer.Option(help="Step after each segment that asks something.", rich_help_panel=_OPTIMIZER)
]
Seed = Annotated[int, typer.Option(help="Of parameters and sequences.", rich_help_panel=_OPTIMIZER)]
Threads = Annotated[int, typer.Option(help="Threads of PyTorch per process.", rich_help_panel=_OPTIMIZER)]
EvalSequences = Annotated[int, typer.Option(help="Fresh sequences to score on.", rich_help_panel=_OPTIMIZER)]
Parallel = Annotated[int, typer.Option(help="Trainings at a time; 0 for one per core.", rich_help_panel=_OUTPUT)]
Runs = Annotated[Path, typer.Option(help="Folder that holds the runs.", rich_help_panel=_OUTPUT)]
Name = Annotated[str | None, typer.Option(help="Name of the run; date and time if absent.", rich_help_panel=_OUTPUT)]


def _config(values: dict[str, Any]) -> RunConfig:
    """Make the configuration of a run from the options of a command, taking those it knows."""
    values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    task, cell, every = values["task"], values.get("cell"), values.get("commit_every")
    task_options = _task_options(task, values)
    settings = dict(values)
    if isinstance(every, str):
        settings["commit_every"] = _commit_every(every)
    if values.get("corpus") is not None:
        settings["corpus"] = str(values["corpus"])
    if not values.get("clip_norm", 1.0):
        settings["clip_norm"] = None
    if cell is not None:
        settings["cell_options"] = _cell_options(cell, values)
        if "token_shift" in CELLS[cell].options:
            settings["token_shift"] = False
    if task in CORPORA:
        settings |= {"start_length": None, "eval_lengths": ()}
    elif values.get("start_length", 0) is None:
        shortest = TASKS[task](values["length"], 1, seed=0, **task_options).min_length
        settings["start_length"] = min(max(12, shortest), values["length"])
    known = {f.name for f in fields(RunConfig)}
    # Options that take several values, such as the methods or lengths of a comparison, are not those of one run.
    settings = {name: value for name, value in settings.items() if name in known and not isinstance(value, list)}
    return RunConfig(**settings, task_options=task_options)


def _names(methods: list[str]) -> list[str]:
    """The methods of a comparison."""
    return [method.value if isinstance(method, Enum) else method for method in methods]


def _task_options(task: str, values: dict[str, Any]) -> dict[str, Any]:
    """Further arguments of a task; a least distance is one more than a segment unless it is given."""
    distance = values.get("min_distance")
    known = TASKS[task].options if task in TASKS else {}
    if distance is not None and "min_distance" not in known:
        raise ValueError(f"--min-distance is for the tasks {', '.join(_tasks_with('min_distance'))}, got task {task}")
    given = {"pairs": values.get("pairs", 4), "min_distance": distance}
    if distance is None and "segment" in values:
        given["min_distance"] = values["segment"] + 1
    return {argument: given[option] for option, argument in known.items()}


def _cell_options(cell: str, values: dict[str, Any]) -> dict[str, Any]:
    """Further arguments of a cell that were given.

    Raises:
        ValueError: if one was given that the cell does not have.
    """
    every = {option for ready in CELLS.values() for option in ready.options}
    given = {option: values[option] for option in sorted(every) if values.get(option) not in (None, False)}
    if "token_shift" not in CELLS[cell].options:
        given.pop("token_shift", None)  # the stream does it
    for option in given:
        if option not in CELLS[cell].options:
            named = option.replace("_", "-")
            raise ValueError(f"--{named} is for the cell {', '.join(_cells_with(option))}, got cell {cell}")
    return given


def _commit_every(value: str) -> int | str:
    """A number of steps, or ``auto``."""
    if value == "auto":
        return value
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"--commit-every must be auto or a number of at least 1, got {value}")
    return int(value)


def _changes(ctx: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
    """The options that were given together with ``--resume``.

    Raises:
        ValueError: if one of them must be as it was.
    """
    given = {n for n in ctx.params if getattr(ctx.get_parameter_source(n), "name", "") == "COMMANDLINE"} - {"resume"}
    if fixed := sorted(given - _CHANGEABLE):
        raise ValueError(f"{', '.join(fixed)} cannot differ from the run that --resume goes on with; leave it out")
    return {name: getattr(_config(values), name) for name in given}


@app.command(rich_help_panel="Learn")
def train(
    ctx: typer.Context,
    method: Annotated[MethodName, typer.Option("--method", "-m", help="Where the gradient comes from.")] = "rtrl",
    cell: Cell = "slot-moe",
    slot_size: SlotSize = 16,
    num_slots: NumSlots = 4,
    num_experts: NumExperts = 4,
    top_k: TopK = 2,
    read_slots: ReadSlots = 2,
    write_slots: WriteSlots = 2,
    token_shift: TokenShift = False,
    decay: Decay = None,
    write_to: WriteTo = None,
    read_weights: ReadWeights = None,
    task: Annotated[
        TrainingData,
        typer.Option(
            help="What to learn: a task, or to predict "
            + " or ".join(f"{corpus.meaning} ({name})" for name, corpus in CORPORA.items())
            + ".",
            rich_help_panel=_TASK,
        ),
    ] = "haystack",
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="Tasks bytes and fasta: a file, or a folder whose files are read one after the other; without it, "
            "bytes reads the source of Python's standard library.",
            rich_help_panel=_TASK,
        ),
    ] = None,
    reset_at_borders: Annotated[
        bool,
        typer.Option(
            help="Tasks bytes and fasta: start a new sequence with every file, or FASTA sequence.",
            rich_help_panel=_TASK,
        ),
    ] = False,
    length: Annotated[
        int,
        typer.Option(
            help="Steps per sequence at the end of training; of bytes and fasta, steps per update.",
            rich_help_panel=_TASK,
        ),
    ] = 128,
    start_length: StartLength = None,
    curriculum_updates: CurriculumUpdates = None,
    curriculum_shape: CurriculumShape = "geometric",
    min_distance: MinDistance = None,
    pairs: Pairs = 4,
    batch_size: BatchSize = 16,
    updates: Updates = 400,
    segment: Segment = 8,
    commit_every: CommitEvery = None,
    learning_rate: LearningRate = 1e-2,
    final_learning_rate: FinalLearningRate = 1e-3,
    clip_norm: ClipNorm = 1.0,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=_OPTIMIZER)] = 0.0,
    influence_cap: Annotated[
        float | None,
        typer.Option(
            help="Method rtrl: largest Frobenius norm of the influence of a stream and group; what exceeds it is "
            "scaled down, which is logged and makes the gradient inexact.",
            rich_help_panel=_OPTIMIZER,
        ),
    ] = None,
    lyapunov_weight: Annotated[
        float | None,
        typer.Option(
            help="Methods rtrl, bptt, tbptt: add this times the squared distance of the finite-time Lyapunov exponent "
            "from its target to the loss of every segment; 0 only logs the exponent.",
            rich_help_panel=_OPTIMIZER,
        ),
    ] = None,
    lyapunov_target: Annotated[
        float, typer.Option(help="Exponent aimed at, in nats per step.", rich_help_panel=_OPTIMIZER)
    ] = 0.0,
    step_per_segment: StepPerSegment = False,
    seed: Seed = 0,
    threads: Threads = 1,
    eval_sequences: EvalSequences = 1000,
    evaluate_at: Annotated[
        list[int] | None,
        typer.Option(help="Length to score at; repeat for several; --length if absent.", rich_help_panel=_OPTIMIZER),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with the run in this folder, from its newest checkpoint, or from this checkpoint. It keeps its "
            "options; updates, learning rates, clipping, decay, cap, threads, logging, checkpoints may be given anew.",
            rich_help_panel=_LONG,
        ),
    ] = None,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Minutes between two checkpoints.", rich_help_panel=_LONG)
    ] = 5.0,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Save a checkpoint after this many updates too.", rich_help_panel=_LONG)
    ] = None,
    keep_checkpoints: Annotated[int, typer.Option(help="Newest checkpoints to keep.", rich_help_panel=_LONG)] = 3,
    log_every: Annotated[int, typer.Option(help="Updates between two lines of metrics.", rich_help_panel=_LONG)] = 1,
    runs: Runs = Path("runs"),
    name: Name = None,
) -> None:
    """Train one model and keep everything about it in a run folder.

    The folder gets `config.json`, `metrics.jsonl`, `events.jsonl`, TensorBoard event files, `checkpoints/`,
    `training.png`, `results.json` and the parameters (`model.pt`).

    A run that was killed goes on with `--resume` as if nothing had happened, bit for bit. SIGTERM and SIGINT (Ctrl-C)
    finish the segment, save and exit with status 75; a second one stops at once. A run that diverges stops with
    status 2 and names the first bad step and the checkpoint from before it.

    **Examples**

    - `sparse-rtrl train` — sparse RTRL on the haystack, length growing from 12 to 128
    - `sparse-rtrl train -m tbptt --segment 8 --name truncated` — the same with truncated BPTT
    - `sparse-rtrl train --task recall --num-slots 8 --read-slots 4 --write-slots 4 --length 64
      --evaluate-at 512`
    - `sparse-rtrl train --cell lru --segment 1` — a linear recurrent unit, exact and fully online
    - `sparse-rtrl train --evaluate-at 128 --evaluate-at 10000` — score far beyond the training length
    - `sparse-rtrl train --task bytes --corpus FILE --length 64 --updates 1000` — predict the next byte of any file;
      `--task fasta` for DNA; without `--corpus` the source of Python's standard library
    - `sparse-rtrl train --name long --updates 20000 --checkpoint-minutes 1` and then
      `sparse-rtrl train --resume runs/long` — after a crash, a kill or Ctrl-C
    - `tensorboard --logdir runs` — look at all runs
    """
    values = {**locals(), "eval_lengths": tuple(evaluate_at or [length])}
    from sparse_rtrl.cli import commands

    if resume is None:
        finished = commands.train_one(_config(values), runs, name)
    else:
        finished = commands.resume(resume, _changes(ctx, values))
    if not finished:
        raise typer.Exit(code=EXIT_INTERRUPTED)


@compare_app.command("direct")
def compare_direct(
    method: Methods = ["rnn-bptt", "gru-bptt", "bptt", "tbptt", "rtrl"],  # noqa: B006
    cell: Cell = "slot-moe",
    slot_size: SlotSize = 16,
    task: TaskChoice = "haystack",
    length: Length = 128,
    start_length: StartLength = None,
    curriculum_updates: CurriculumUpdates = None,
    curriculum_shape: CurriculumShape = "geometric",
    batch_size: BatchSize = 16,
    updates: Updates = 400,
    segment: Segment = 8,
    learning_rate: LearningRate = 1e-2,
    final_learning_rate: FinalLearningRate = 1e-3,
    seed: Seed = 0,
    eval_sequences: EvalSequences = 1000,
    parallel: Parallel = 1,
    runs: Runs = Path("runs"),
    name: Name = None,
) -> None:
    """Plain networks with BPTT, the slot cell with BPTT, and the slot cell with sparse RTRL on one task.

    Every method gets the same sequences and the same number of updates, is then scored on fresh sequences, and is
    measured for memory and time by itself. The table has the 95 % interval and the chance line.

    **Examples**

    - `sparse-rtrl compare direct`
    - `sparse-rtrl compare direct -m rtrl -m jacrev --length 32 --updates 100`
    """
    config = _config({**locals(), "eval_lengths": (length,)})
    from sparse_rtrl.cli.commands import compare_on_one_task

    compare_on_one_task(config, _names(method), parallel, None, runs, name, "direct")


@compare_app.command("scaling")
def compare_scaling(
    method: Methods = ["bptt", "tbptt", "rtrl"],  # noqa: B006
    cell: Cell = "slot-moe",
    slot_size: SlotSize = 16,
    num_slots: NumSlots = 4,
    num_experts: NumExperts = 4,
    task: TaskChoice = "haystack",
    length: Annotated[
        list[int] | None,
        typer.Option(help="Steps per sequence; repeat for several.", rich_help_panel=_TASK),
    ] = None,
    batch_size: BatchSize = 16,
    segment: Segment = 8,
    repeats: Annotated[int, typer.Option(help="Timed updates per point.", rich_help_panel=_OPTIMIZER)] = 3,
    threads: Threads = 1,
    runs: Runs = Path("runs"),
    name: Name = None,
) -> None:
    """Peak memory and time per token over sequence lengths, each number from a fresh process.

    **Examples**

    - `sparse-rtrl compare scaling` — lengths 64, 128, 256, 512
    - `sparse-rtrl compare scaling --length 2000 --length 20000 -m rtrl --batch-size 1`
    """
    lengths = length or [64, 128, 256, 512]
    config = _config({**locals(), "length": max(lengths)})
    from sparse_rtrl.cli.commands import compare_over_lengths

    compare_over_lengths(config, _names(method), lengths, repeats, runs, name)


@compare_app.command("trials")
def compare_trials(
    method: Methods = ["gru-bptt", "bptt", "tbptt", "rtrl"],  # noqa: B006
    trials: Annotated[int, typer.Option(help="Seeds per method and length.")] = 5,
    cell: Cell = "slot-moe",
    slot_size: SlotSize = 16,
    num_slots: NumSlots = 4,
    num_experts: NumExperts = 4,
    top_k: TopK = 2,
    read_slots: ReadSlots = 2,
    write_slots: WriteSlots = 2,
    token_shift: TokenShift = False,
    decay: Decay = None,
    write_to: WriteTo = None,
    read_weights: ReadWeights = None,
    task: TaskChoice = "haystack",
    length: Annotated[
        list[int] | None,
        typer.Option(help="Steps per sequence; repeat for several.", rich_help_panel=_TASK),
    ] = None,
    start_length: StartLength = None,
    curriculum_updates: CurriculumUpdates = None,
    curriculum_shape: CurriculumShape = "geometric",
    min_distance: MinDistance = None,
    pairs: Pairs = 4,
    batch_size: BatchSize = 16,
    updates: Updates = 400,
    segment: Segment = 8,
    commit_every: CommitEvery = None,
    learning_rate: LearningRate = 1e-2,
    final_learning_rate: FinalLearningRate = 1e-3,
    seed: Seed = 0,
    eval_sequences: EvalSequences = 1000,
    evaluate_at: Annotated[
        list[int] | None,
        typer.Option(help="Further length to score the same models at; repeat.", rich_help_panel=_OPTIMIZER),
    ] = None,
    parallel: Parallel = 0,
    runs: Runs = Path("runs"),
    name: Name = None,
) -> None:
    """Accuracy over independent trials: every seed of every method at every length is trained, then scored.

    The table has the mean, the worst and best trial, how many trials solve the task with a 95 % interval over
    trials, and the chance line.

    **Examples**

    - `sparse-rtrl compare trials` — 5 seeds at lengths 32, 64, 128
    - `sparse-rtrl compare trials --trials 10 --length 128 -m rtrl -m tbptt`
    - `sparse-rtrl compare trials --length 128 --evaluate-at 10000 -m rtrl` — score far beyond the training length
    """
    lengths = length or [32, 64, 128]
    config = _config({**locals(), "length": max(lengths)})
    from sparse_rtrl.cli.commands import compare_over_trials

    compare_over_trials(config, _names(method), lengths, evaluate_at or [], trials, parallel, runs, name)


@app.command(rich_help_panel="Learn")
def demo(
    length: Length = 128,
    start_length: StartLength = None,
    curriculum_updates: CurriculumUpdates = None,
    curriculum_shape: CurriculumShape = "geometric",
    slot_size: SlotSize = 16,
    batch_size: BatchSize = 16,
    updates: Updates = 400,
    recall_updates: Annotated[
        int, typer.Option(help="Batches to train on in the second part.", rich_help_panel=_OPTIMIZER)
    ] = 300,
    segment: Segment = 8,
    learning_rate: LearningRate = 1e-2,
    final_learning_rate: FinalLearningRate = 1e-3,
    seed: Seed = 0,
    eval_sequences: EvalSequences = 1000,
    time_budget: Annotated[
        float,
        typer.Option(help="Seconds for everything; a training that would take longer stops early and says so."),
    ] = 280.0,
    parallel: Parallel = 0,
    runs: Runs = Path("runs"),
    name: Name = None,
) -> None:
    """The main job in at most five minutes: a needle in a haystack, and pairs to remember.

    Sparse RTRL, BPTT and truncated BPTT train the same slot cell to find a needle in a haystack, on the same sequences,
    whose length grows to --length, for the same number of updates. Then sparse RTRL and truncated BPTT train it to
    recall which of four values followed which key (--recall-updates). Both backpropagate through segments of only
    --segment steps, and what is asked for is always further back than that.

    **Examples**

    - `sparse-rtrl demo` — what `make demo` runs
    - `sparse-rtrl demo --length 64 --updates 300 --seed 3`
    """
    config = _config({**locals(), "task": "haystack", "eval_lengths": (length,)})
    recall = _recall_of_pairs(config, recall_updates)
    from sparse_rtrl.cli.commands import compare_on_one_task

    ends_at = time.monotonic() + time_budget
    compare_on_one_task(config, ["rtrl", "bptt", "tbptt"], parallel, time_budget, runs, name, "demo")
    left = max(1.0, ends_at - time.monotonic())
    second = None if name is None else f"{name}-recall"
    compare_on_one_task(recall, ["rtrl", "tbptt"], parallel, left, runs, second, "demo-recall")


def _recall_of_pairs(config: RunConfig, updates: int) -> RunConfig:
    """The second part of the demo: four pairs, a slot for each of eight keys, the least used one written."""
    distance = config.segment + 1
    shortest = 16 + distance
    return replace(
        config,
        task="recall",
        task_options={"num_pairs": 4, "min_distance": distance},
        token_shift=True,
        cell_options={"write_to": "least_used", "read_weights": "softmax"},
        num_slots=8,
        read_slots=8,
        write_slots=1,
        num_experts=2,
        top_k=1,
        batch_size=2 * config.batch_size,
        length=2 * shortest,
        start_length=shortest,
        eval_lengths=(2 * shortest,),
        updates=updates,
        commit_every="auto",
    )


@app.command(rich_help_panel="Inspect")
def report(
    run: Annotated[list[Path], typer.Argument(help="Folders of runs of sparse-rtrl train.", metavar="RUN...")],
    out: Annotated[Path, typer.Option(help="Folder for the page and its pictures.")] = Path("report"),
) -> None:
    """Write one HTML page about runs, finished or not: curves, memory, expert load, slot use, and how they compare.

    The page, `report.html`, holds its pictures and opens without a network; they are also written beside it as PNG.

    **Examples**

    - `sparse-rtrl report runs/long` — one run, also while it is going on
    - `sparse-rtrl report runs/rtrl runs/truncated --out comparison`
    """
    from sparse_rtrl.cli.run_report import write_report

    typer.echo(f"The report is {write_report(run, out)}")


@app.command(rich_help_panel="Inspect")
def check(
    length: Annotated[list[int] | None, typer.Option(help="Steps; repeat for several.", rich_help_panel=_TASK)] = None,
    cell: Cell = "slot-moe",
    slot_size: SlotSize = 8,
    num_slots: NumSlots = 4,
    num_experts: NumExperts = 4,
    top_k: TopK = 2,
    read_slots: ReadSlots = 2,
    write_slots: WriteSlots = 2,
    segment: Segment = 1,
    batch_size: BatchSize = 3,
    buffer: Annotated[int, typer.Option(help="Segments kept for sleeping experts.")] = 64,
    commit_every: Annotated[
        int | None, typer.Option(help="Steps between two influence updates; the cost model chooses if absent.")
    ] = None,
    catch_up: Annotated[str, typer.Option(help="auto, eager, replay or product.")] = "auto",
    seed: Seed = 0,
    threads: Threads = 1,
) -> None:
    """Compare the gradient of sparse RTRL with that of BPTT, parameter by parameter.

    Relative error and cosine in float64, which must be at most 1e-12, and in float32, which may be at most twice that
    of float32 BPTT. The exit status is 1 if any parameter is off.

    **Examples**

    - `sparse-rtrl check` — lengths 1, 2, 17, 64
    - `sparse-rtrl check --length 300 --buffer 5 --catch-up product`
    - `sparse-rtrl check --segment 16 --cell sparse-latent-moe`
    """
    values = {
        **locals(),
        "task": "haystack",
        "min_distance": 0,
        "commit_every": "auto" if commit_every is None else commit_every,
    }
    config = _config(values | {"length": 128})
    from sparse_rtrl.cli.commands import check_gradient

    if not check_gradient(config, length or [1, 2, 17, 64]):
        raise typer.Exit(code=1)


@app.command(rich_help_panel="Inspect")
def plan(
    cell: Cell = "slot-moe",
    slot_size: SlotSize = 32,
    num_slots: NumSlots = 4,
    num_experts: NumExperts = 64,
    top_k: TopK = 2,
    read_slots: ReadSlots = 2,
    write_slots: WriteSlots = 2,
    batch_size: BatchSize = 1,
    commit_every: Annotated[int, typer.Option(help="Steps between two influence updates.")] = 1,
    flush_every: Annotated[float, typer.Option(help="Steps between two optimizer steps.")] = 64.0,
    buffer: Annotated[
        int | None, typer.Option(help="Segments kept for sleeping experts; the planner chooses if absent.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time this machine first, instead of the built-in rates.")
    ] = False,
) -> None:
    """Show how sleeping experts would be kept, and what each way would cost.

    Eager updating moves every expert at every influence update; lazy ways catch up when an expert wakes, by replaying
    the missed segments or by one merged product. The planner takes the cheapest; nothing is trained.

    **Examples**

    - `sparse-rtrl plan` — 4 slots, 64 experts, an optimizer step every 64 steps
    - `sparse-rtrl plan --flush-every 1` — an optimizer step at every token, and before it every deferred gradient
    - `sparse-rtrl plan --num-slots 64 --num-experts 256 --measure`
    """
    from sparse_rtrl.cli.commands import show_plan

    values = {**locals(), "task": "haystack", "segment": 1, "buffer": buffer or 1, "commit_every": commit_every}
    show_plan(_config(values), flush_every, "auto" if buffer is None else buffer, measure)


@app.command(rich_help_panel="Inspect")
def tape(
    cell: Annotated[str, typer.Option(help="elman, gru or lstm.")] = "gru",
    input_size: Annotated[int, typer.Option(min=1, help="Size of the input.")] = 4,
    units: Annotated[int, typer.Option(min=1, help="Units of the cell.")] = 5,
) -> None:
    """Print the row tape of a cell: how rows go back through a step, where parameters enter, structure and cost.

    **Examples**

    - ``sparse-rtrl tape --cell gru --units 32``
    """
    from sparse_rtrl.cli import tapes
    from sparse_rtrl.cli.commands import console

    if cell not in tapes.TAPED:
        raise typer.BadParameter(f"must be one of {', '.join(tapes.TAPED)}, got {cell}", param_hint="--cell")
    tapes.show(console, cell, input_size, units)


@app.command(rich_help_panel="Inspect")
def env() -> None:
    """Show versions, hardware, and which backends this installation has; paste it into bug reports.

    Example: `sparse-rtrl env`
    """
    from sparse_rtrl.cli.commands import show_environment

    show_environment()


if __name__ == "__main__":
    sys.exit(app())
