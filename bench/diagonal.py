"""Time per token of diagonal cells: exact online gradients beside a plain forward pass and TBPTT(64), in one run.

``python bench/diagonal.py --out bench/results/diagonal_cpu.json`` runs LRU and retention at widths 128, 512 and 2048
with batch 1 and 16. Width is the size of input, output and hidden state (LRU), or of all keys and all values together
(retention, heads of 32). Nobody steps an optimizer. Contestants alternate on one thread, medians of the processor time
of rounds; but for the last, every step has a loss:

- *forward*: the cell without gradient, one token at a time, and 64 tokens at a time;
- *tbptt(1)*, *tbptt(64)*: forward and backward over so many tokens, the past before them ignored;
- *rtrl(1)*, *rtrl(64)*: :class:`sparse_rtrl.RTRL`, the exact gradient after each token, or after each 64;
- *rtrl(1), no loss*: the same learner on 16 single tokens that no loss is asked for.

The gradients of both learners are compared with BPTT, and that of TBPTT(64) shown to differ, before anything is timed.
Memory: the bytes of the influence matrices, and by how much the resident set of a process of its own, in which TBPTT
has run before, has grown and at most grew when a learner was built and took four single steps with a loss and 20
without. Cases that the file holds already are not measured again, so that it can be stopped and started.
"""

import argparse
import csv
import ctypes
import gc
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from influence_update import machine
from torch import Tensor

from sparse_rtrl import RTRL
from sparse_rtrl.cells import LRUCell, RetentionCell
from sparse_rtrl.cells.diagonal_cell import DiagonalCell
from sparse_rtrl.cli.measurement import peak_growth, resident_bytes
from sparse_rtrl.learners.diagonal_rtrl import DiagonalRTRL
from sparse_rtrl.ops import dispatch

WIDTHS, BATCHES, SEGMENT = (128, 512, 2048), (1, 16), 64
ERROR_BOUND = 1e-3
CONTESTANTS = ("forward(1)", "forward(64)", "tbptt(1)", "tbptt(64)", "rtrl(1)", "rtrl(1), no loss", "rtrl(64)")
MEMORY = ("influence_bytes", "resident_growth_bytes", "peak_growth_bytes")


def make_cell(kind: str, width: int) -> DiagonalCell:
    """A layer whose input and output are as wide as it is."""
    torch.manual_seed(0)
    if kind == "lru":
        return LRUCell(width, width, width)
    return RetentionCell(width, max(1, width // 32), min(32, width), width)


def mean_output(outputs: Tensor, weight: Tensor) -> Tensor:
    """A loss of some steps: a fixed direction of the outputs, averaged over the streams."""
    return (outputs * weight).sum() / outputs.shape[1]


def gradient(cell: DiagonalCell) -> Tensor:
    """Gradient of the parameters that reach the state, as one vector; clears it."""
    found = torch.cat(
        [p.grad.flatten() for n, p in cell.named_parameters() if p.grad is not None and not n.startswith("readout.")]
    )
    clear(cell)
    return found


def clear(cell: DiagonalCell) -> None:
    """Forget the gradient."""
    for parameter in cell.parameters():
        parameter.grad = None


def run_learner(learner: DiagonalRTRL, xs: Tensor, weight: Tensor, segment: int) -> None:
    """Learn from all tokens."""
    for x in xs.split(segment):
        mean_output(learner.unroll(x), weight).backward()


def run_tbptt(cell: DiagonalCell, xs: Tensor, weight: Tensor, segment: int) -> None:
    """Truncated backpropagation; with the length of ``xs`` as segment it is BPTT."""
    state = cell.initial_state(xs.shape[1])
    for x in xs.split(segment):
        outputs, state = cell.unroll(x, state)
        mean_output(outputs, weight).backward()
        state = state.detach()


@torch.no_grad()
def run_forward(cell: DiagonalCell, xs: Tensor, segment: int) -> None:
    """The plain forward pass."""
    state = cell.initial_state(xs.shape[1])
    for x in xs.split(segment):
        _, state = cell.unroll(x, state)


def check_gradients(cell: DiagonalCell, batch: int, weight: Tensor) -> dict[str, float]:
    """Relative errors against BPTT over two segments, and over 6 tokens for segments of one.

    The errors of truncated BPTT over the same segments show that the past matters.
    """
    errors = {}
    for segment, length in ((SEGMENT, 2 * SEGMENT), (1, 6)):
        xs = torch.randn(length, batch, cell.input_size)
        run_tbptt(cell, xs, weight, length)
        exact = gradient(cell)
        run_learner(RTRL(cell, batch), xs, weight, segment)
        errors[f"rtrl({segment})"] = float((gradient(cell) - exact).norm() / exact.norm())
        run_tbptt(cell, xs, weight, segment)
        errors[f"tbptt({segment})"] = float((gradient(cell) - exact).norm() / exact.norm())
    return errors


def run_without_loss(learner: DiagonalRTRL, xs: Tensor) -> None:
    """Take single steps."""
    for x in xs:
        learner(x)


def memory(kind: str, width: int, batch: int) -> dict[str, int]:
    """Bytes by which this process has grown, and at most grew, with a learner; it should do nothing else."""
    xs = torch.randn(4, batch, width)
    weight = torch.randn(width)
    rehearsal = make_cell(kind, 8)
    run_learner(RTRL(rehearsal, batch), xs[:, :, :8], weight[:8], 1)
    cell = make_cell(kind, width)
    run_tbptt(cell, xs, weight, 1)  # so that .grad is there
    learners: list[DiagonalRTRL] = []

    def work() -> None:
        learners.append(RTRL(cell, batch))
        run_learner(learners[0], xs, weight, 1)
        for _ in range(5):
            run_without_loss(learners[0], xs)

    trimmed_resident()  # and so peak_growth begins
    before = trimmed_resident()
    peak = peak_growth(work)
    return {"resident_growth_bytes": trimmed_resident() - before, "peak_growth_bytes": peak}


def trimmed_resident() -> int:
    """Resident bytes, after the allocator handed back what is free."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
    return resident_bytes()


def memory_alone(*case: str | int) -> dict[str, int]:
    """What :func:`memory` finds in a process of its own."""
    command = [sys.executable, __file__, "--memory", *map(str, case)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def cpu_seconds(function: Callable[[], None], repeats: int = 1) -> float:
    """Processor time of one call: with one thread that of the clock, but for what else runs on the machine."""
    start = time.process_time()
    for _ in range(repeats):
        function()
    return (time.process_time() - start) / repeats


def measure(kind: str, width: int, batch: int, rounds: int, budget: float) -> dict:
    """Check, then time all contestants of one case."""
    cell = make_cell(kind, width)
    weight = torch.randn(width, generator=torch.Generator().manual_seed(1))
    errors = check_gradients(cell, batch, weight)
    assert max(errors["rtrl(1)"], errors["rtrl(64)"]) < ERROR_BOUND < errors["tbptt(64)"], errors
    assert errors["tbptt(1)"] > ERROR_BOUND
    learner, silent = RTRL(cell, batch), RTRL(cell, batch)
    xs = torch.randn(SEGMENT, batch, width)
    contestants: dict[str, tuple[int, Callable[[], None]]] = {
        "forward(1)": (4, lambda: run_forward(cell, xs[:4], 1)),
        "forward(64)": (SEGMENT, lambda: run_forward(cell, xs, SEGMENT)),
        "tbptt(1)": (4, lambda: run_tbptt(cell, xs[:4], weight, 1)),
        "tbptt(64)": (SEGMENT, lambda: run_tbptt(cell, xs, weight, SEGMENT)),
        "rtrl(1)": (4, lambda: run_learner(learner, xs[:4], weight, 1)),
        "rtrl(1), no loss": (16, lambda: run_without_loss(silent, xs[:16])),
        "rtrl(64)": (SEGMENT, lambda: run_learner(learner, xs, weight, SEGMENT)),
    }
    repeats = {
        name: max(1, math.floor(budget / max(cpu_seconds(call), 1e-6))) for name, (_, call) in contestants.items()
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, (tokens, call) in contestants.items():
            clear(cell)
            times[name].append(cpu_seconds(call, repeats[name]) / tokens)
    medians = {name: statistics.median(values) for name, values in times.items()}
    recurrent = sum(p.numel() for n, p in cell.named_parameters() if p.requires_grad and not n.startswith("readout."))
    kept = learner._engine.influence.kept_bytes
    found = memory_alone(kind, width, batch)
    return {
        "cell": kind,
        "width": width,
        "batch": batch,
        "seconds_per_token": medians,
        "ratios": {
            f"{name} / {other}": medians[name] / medians[other]
            for name, other in (
                ("rtrl(1)", "forward(1)"),
                ("rtrl(1), no loss", "forward(1)"),
                ("rtrl(1)", "tbptt(1)"),
                ("rtrl(1)", "tbptt(64)"),
                ("rtrl(64)", "forward(64)"),
                ("rtrl(64)", "tbptt(64)"),
            )
        },
        "recurrent_parameters": recurrent,
        "influence_bytes": kept,
        "influence_bytes_over_parameters": kept / (4 * batch * recurrent),
        **found,
        "resident_growth_over_parameters": found["resident_growth_bytes"] / (4 * batch * recurrent),
        "relative_gradient_error": errors,
        "machine": machine(),
    }


def write(rows: list[dict], path: Path) -> None:
    """Write what is measured so far as JSON, and the times and bytes as CSV beside it."""
    path.write_text(json.dumps(rows, indent=1) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", "width", "batch", *CONTESTANTS, *MEMORY])
        for row in rows:
            times = [row["seconds_per_token"][name] for name in CONTESTANTS]
            writer.writerow([row["cell"], row["width"], row["batch"], *times, *(row[name] for name in MEMORY)])


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure all cases, print a table, and write JSON and CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["lru", "retention"])
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--budget", type=float, default=0.1, help="seconds for a contestant in a round, at least a call"
    )
    parser.add_argument("--out", type=Path, help="JSON file; a CSV file of the times is written beside it")
    parser.add_argument("--memory", nargs=3, metavar=("CELL", "WIDTH", "BATCH"), help="print the memory of one case")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.memory:
        kind, width, batch = options.memory
        print(json.dumps(memory(kind, int(width), int(batch))))
        return []
    assert not dispatch.compiled_problem, dispatch.compiled_problem
    rows = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    done = {(row["cell"], row["width"], row["batch"]) for row in rows}
    print("microseconds of processor time per token")
    print(
        " ".join(f"{name:>16}" for name in ("cell", "width", "batch", *CONTESTANTS, "MB of P", "MB grown", "grown/4Bθ"))
    )
    for case in itertools.product(options.cells, options.widths, options.batches):
        if case in done:
            continue
        row = measure(*case, options.rounds, options.budget)
        rows.append(row)
        cells = [*case, *(f"{row['seconds_per_token'][name] * 1e6:.0f}" for name in CONTESTANTS)]
        cells += [f"{row[name] / 1e6:.1f}" for name in MEMORY[:2]]
        print(" ".join(f"{c:>16}" for c in (*cells, f"{row['resident_growth_over_parameters']:.3f}")), flush=True)
        if options.out:
            write(rows, options.out)
    return rows


if __name__ == "__main__":
    main()
