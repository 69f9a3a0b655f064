"""What diagonal cells learn online, one token at a time, beside truncated and full backpropagation.

``python bench/diagonal_learning.py --out bench/results/diagonal_learning.jsonl`` trains every configuration that the
file does not hold yet and appends a row for each, so that it can be stopped and started again; ``--summary`` prints
means with 95 % intervals over the seeds (Student's t), ``--picture FILE`` draws the learning curves.

Two tasks. *copy*: 20 symbols drawn from an alphabet of 20 are repeated after a pause, 100 steps in all, so that 80
steps lie between a symbol and its answer. *adding* (Hochreiter & Schmidhuber 1997, experiment 4; values in [0, 1] and
the squared error of a sum as in Le et al. 2015): 1,000 pairs of a value and a mark, two of which are marked, one in
each half; at the last step the sum of the two marked values is asked for. Always answering 1 has an error of 1/6.

An LRU is linear in its input and could not multiply a value by its mark, so the product of the two is a third input of
the adding task, and values are shifted to a mean of zero. Retention, whose normalised output knows no scale, gets the
number 1 as a fourth. What remains to be learned is what to keep for 1,000 steps. In the copy task it tells positions
apart by rotation: its keys turn by 16 angles between 0 and pi per step, and its state is as large as that of the LRU.

Methods: RTRL with segments of one step, TBPTT of one and of 64 steps, BPTT. All take one optimizer step per batch of
sequences, with the same sequences and initial parameters for a seed; ``rtrl-token`` steps the optimizer at every answer
instead. On the first batch the gradient of RTRL is compared with that of BPTT.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from influence_update import machine
from matplotlib.figure import Figure
from torch import Tensor, nn

from sparse_rtrl import RTRL
from sparse_rtrl.cells import LRUCell, RetentionCell
from sparse_rtrl.cells.diagonal_cell import DiagonalCell
from sparse_rtrl.training.tasks import IGNORE, Copy

METHODS = {"rtrl": 1, "tbptt1": 1, "tbptt64": 64, "bptt": None, "rtrl-token": 1}
"""Steps per segment; None for the whole sequence."""

LABELS = {
    "rtrl": "RTRL, segment 1",
    "rtrl-token": "RTRL, a step at every answer",
    "tbptt1": "TBPTT(1)",
    "tbptt64": "TBPTT(64)",
    "bptt": "BPTT",
}
BATCH_SIZE = {"copy": 16, "adding": 32}
UPDATES = {"copy": 1500, "adding": 300}
LEARNING_RATE = {"copy": 5e-3, "adding": 1e-2}
"""Of Adam at the start; it falls linearly to a tenth."""

SCORE_BATCHES = 32

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantile 0.975 of Student's t for a mean over as many values."""


class CopyProblem:
    """The copy task: cross entropy, and the share of right answers as score."""

    score_name, chance, best = "accuracy", 1 / 20, max

    def __init__(self, batch_size: int, seed: int, length: int = 100, symbols: int = 20) -> None:
        self.task = Copy(length, batch_size, num_symbols=symbols, pattern_length=symbols, seed=seed)
        self.input_size, self.output_size = self.task.input_size, self.task.output_size

    def draw(self) -> tuple[Tensor, Tensor]:
        """Inputs ``(T, B, input_size)`` and classes ``(T, B)``."""
        batch = self.task.sample()
        return batch.x, batch.target

    def asked(self, target: Tensor) -> int:
        """Answers that targets ask for."""
        return int((target != IGNORE).sum())

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Sum over the answers."""
        return nn.functional.cross_entropy(outputs.flatten(0, 1), target.flatten(), reduction="sum")

    def score(self, outputs: Tensor, target: Tensor) -> float:
        """Share of right answers."""
        asked = target != IGNORE
        return float((outputs.argmax(-1) == target)[asked].double().mean())


class AddingProblem:
    """The adding problem: squared error, which is the score too."""

    score_name, chance, best = "mean squared error", 1 / 6, min
    output_size = 1

    def __init__(self, batch_size: int, seed: int, length: int = 1000, constant: bool = False) -> None:
        self.batch_size, self.length, self.constant = batch_size, length, constant
        self.input_size = 4 if constant else 3
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Inputs ``(T, B, input_size)`` and sums ``(T, B)``, NaN where nothing is asked."""
        shape, half = (self.length, self.batch_size), self.length // 2
        values, marks = torch.rand(shape, generator=self.generator), torch.zeros(shape)
        for first, count in ((0, half), (half, self.length - half)):
            place = first + torch.randint(count, (1, self.batch_size), generator=self.generator)
            marks.scatter_(0, place, 1.0)
        target = torch.full(shape, torch.nan)
        target[-1] = (values * marks).sum(0)
        values = 2 * values - 1
        inputs = torch.stack((values, marks, values * marks, torch.ones(shape)), -1)
        return inputs[..., : self.input_size], target

    def asked(self, target: Tensor) -> int:
        """Answers that targets ask for."""
        return int((~target.isnan()).sum())

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Sum over the answers."""
        asked = ~target.isnan()
        return (outputs.squeeze(-1)[asked] - target[asked]).square().sum()

    def score(self, outputs: Tensor, target: Tensor) -> float:
        """Mean squared error."""
        return float(self.loss(outputs, target)) / self.asked(target)


Problem = CopyProblem | AddingProblem


def make_problem(task: str, cell: str, seed: int, length: int | None = None) -> Problem:
    """The task of a configuration as an endless stream of batches; None for the length of the comparison."""
    if task == "copy":
        return CopyProblem(BATCH_SIZE[task], seed, **({} if length is None else {"length": length}))
    return AddingProblem(BATCH_SIZE[task], seed, 1000 if length is None else length, constant=cell == "retention")


def make_cell(task: str, name: str, problem: Problem, seed: int) -> DiagonalCell:
    """The cell of a configuration."""
    torch.manual_seed(seed)
    sizes = problem.input_size, problem.output_size
    if name == "lru":
        if task == "copy":
            return LRUCell(sizes[0], 128, sizes[1])
        return LRUCell(sizes[0], 64, sizes[1], r_min=0.99, r_max=0.9999, max_phase=math.pi / 50)
    if task == "copy":
        angles = math.pi / 16 * torch.arange(1, 17).view(4, 4).t()  # every head has slow and fast ones
        return RetentionCell(sizes[0], 4, 8, sizes[1], decay=1 - 2.0**-7, rotation=angles)
    exponents = (9, 11, 13, 15)  # memories of about 2**exponent steps
    return RetentionCell(sizes[0], 4, 8, sizes[1], decay=[1 - 2.0**-e for e in exponents])


class Training:
    """One configuration: a cell, a way to its gradient, and the optimizer."""

    def __init__(
        self, task: str, cell: str, method: str, seed: int, updates: int | None = None, length: int | None = None
    ) -> None:
        self.updates = UPDATES[task] if updates is None else updates
        self.batch_size, self.learning_rate = BATCH_SIZE[task], LEARNING_RATE[task]
        self.method = method
        self.make_problem = functools.partial(make_problem, task, cell, length=length)
        self.problem = self.make_problem(seed=seed)
        self.cell = make_cell(task, cell, self.problem, seed)
        self.parameters = [p for p in self.cell.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.learning_rate)
        self.learner = RTRL(self.cell, self.batch_size) if method.startswith("rtrl") else None

    def step(self) -> None:
        """Step the optimizer and clear the gradient."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self, x: Tensor, target: Tensor, method: str) -> float:
        """Add the gradient of the mean loss over the answers of a batch to ``.grad``; returns the loss."""
        problem, every = self.problem, METHODS[method] or len(x)
        asked, total = problem.asked(target), 0.0
        if self.learner is not None and method.startswith("rtrl"):
            self.learner.reset()
        state = self.cell.initial_state(x.shape[1])
        for xs, targets in zip(x.split(every), target.split(every), strict=True):
            here = problem.asked(targets)
            if self.learner is not None and method.startswith("rtrl"):
                outputs = self.learner.unroll(xs)
            else:
                with torch.set_grad_enabled(here > 0):
                    outputs, state = self.cell.unroll(xs, state)
                state = state.detach()
            if here:
                loss = problem.loss(outputs, targets)
                (loss / (here if method == "rtrl-token" else asked)).backward()
                total += float(loss.detach())
                if method == "rtrl-token":
                    self.step()
        return total / asked

    def gradient_error(self) -> float:
        """Relative difference of the gradient of this method and of BPTT, on sequences of their own."""
        problem = self.make_problem(seed=1 << 31)
        x, target = problem.draw()
        found = []
        for method in ("bptt", "rtrl" if self.method == "rtrl-token" else self.method):
            self.optimizer.zero_grad()
            self.backward(x, target, method)
            zero = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            found.append(torch.cat([g.flatten() for g in zero]).double())
        self.optimizer.zero_grad()
        return float((found[1] - found[0]).norm() / found[0].norm())

    def run(self) -> Iterator[tuple[int, float]]:
        """Train; yields updates and the mean loss since the last time."""
        losses: list[float] = []
        for update in range(self.updates):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * (1 - 0.9 * update / max(self.updates - 1, 1))
            losses.append(self.backward(*self.problem.draw(), self.method))
            if self.method != "rtrl-token":
                self.step()
            if (update + 1) % 50 == 0 or update + 1 == self.updates:
                yield update + 1, statistics.mean(losses)
                losses = []

    @torch.no_grad()
    def score(self) -> float:
        """Score on fresh sequences."""
        problem = self.make_problem(seed=(1 << 31) + 1)
        values = []
        for _ in range(SCORE_BATCHES):
            x, target = problem.draw()
            values.append(problem.score(self.cell.unroll(x, self.cell.initial_state(x.shape[1]))[0], target))
        return statistics.mean(values)


def train(task: str, cell: str, method: str, seed: int, updates: int | None = None, length: int | None = None) -> dict:
    """Train one configuration; returns its row."""
    training = Training(task, cell, method, seed, updates, length)
    error = training.gradient_error()
    if method.startswith("rtrl"):
        assert error < 1e-3, error
    start, curve = time.process_time(), []
    for update, loss in training.run():
        curve.append((update, loss))
        print(f"{task} {cell} {method} seed {seed}: update {update}, loss {loss:.4f}", flush=True)
    seconds = time.process_time() - start
    return {
        "task": task,
        "cell": cell,
        "method": method,
        "seed": seed,
        "updates": training.updates,
        "batch_size": training.batch_size,
        "learning_rate": training.learning_rate,
        "gradient_error_against_bptt": error,
        "cpu_seconds": seconds,
        "curve": curve,
        "score_name": training.problem.score_name,
        "score": training.score(),
        "machine": machine(),
    }


def configurations(
    tasks: list[str], cells: list[str], methods: list[str], seeds: int
) -> Iterator[tuple[str, str, str, int]]:
    """All of them, one seed of everything after the other."""
    for seed, task, cell, method in itertools.product(range(seeds), tasks, cells, methods):
        if (task, method) != ("adding", "rtrl-token"):  # the same as rtrl: there is one answer
            yield task, cell, method, seed


def load(path: Path) -> list[dict]:
    """Rows of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def interval(values: list[float]) -> float:
    """Half of the 95 % interval of a mean, of Student; NaN for a single value."""
    if len(values) not in STUDENT:
        return math.nan
    return STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def grouped(rows: list[dict]) -> dict[tuple[str, str, str], list[dict]]:
    """Rows of all seeds by task, cell and method."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in sorted(rows, key=lambda row: (row["task"], row["cell"], [*METHODS].index(row["method"]))):
        groups.setdefault((row["task"], row["cell"], row["method"]), []).append(row)
    return groups


def summarize(rows: list[dict]) -> list[str]:
    """A table of means and intervals."""
    lines = ["task    cell       method      seeds  score                      CPU seconds per run"]
    for (task, cell, method), group in grouped(rows).items():
        scores = [row["score"] for row in group]
        score = f"{statistics.mean(scores):.4f} ± {interval(scores):.4f} {group[0]['score_name']}"
        took = statistics.mean(row["cpu_seconds"] for row in group)
        lines.append(f"{task:7} {cell:10} {method:11} {len(group):5}  {score}  {took:.0f}")
    return lines


def draw(rows: list[dict], path: str) -> None:
    """Learning curves: mean loss over the seeds, and the range."""
    panels = sorted({(row["task"], row["cell"]) for row in rows})
    rows_of_panels = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(10, 3.4 * rows_of_panels), layout="constrained")
    axes = figure.subplots(rows_of_panels, 2, squeeze=False).flatten()[: len(panels)]
    for axis, panel in zip(axes, panels, strict=True):
        for (task, cell, method), group in grouped(rows).items():
            if (task, cell) != panel:
                continue
            updates = [update for update, _ in group[0]["curve"]]
            losses = [[loss for _, loss in row["curve"]] for row in group]
            means = [statistics.mean(values) for values in zip(*losses, strict=True)]
            dashes = "--" if method == "bptt" else "-"  # RTRL lies under it
            (line,) = axis.plot(updates, means, dashes, label=LABELS[method])
            ends = [[f(values) for values in zip(*losses, strict=True)] for f in (min, max)]
            axis.fill_between(updates, *ends, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=f"{panel[0]}, {panel[1]}", xlabel="batches of sequences", ylabel="training loss", yscale="log")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, or summarize what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, one JSON object per line")
    parser.add_argument("--tasks", nargs="+", choices=UPDATES, default=[*UPDATES])
    parser.add_argument("--cells", nargs="+", choices=["lru", "retention"], default=["lru", "retention"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, help="fewer than in the comparison, to try it out")
    parser.add_argument("--length", type=int, help="steps per sequence, to try it out")
    parser.add_argument("--summary", action="store_true", help="train nothing, print a table")
    parser.add_argument("--picture", help="train nothing, draw the learning curves into this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if not options.summary and not options.picture:
        done = {(row["task"], row["cell"], row["method"], row["seed"]) for row in load(options.out)}
        for configuration in configurations(options.tasks, options.cells, options.methods, options.seeds):
            if configuration not in done:
                row = train(*configuration, options.updates, options.length)
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    rows = load(options.out)
    print(*summarize(rows), sep="\n")
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
