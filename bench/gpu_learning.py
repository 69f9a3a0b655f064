"""Learning steps on a GPU: RTRL with and without CUDA graphs beside BPTT, eager and replayed as one CUDA graph.

Called by ``bench.gpu_check``. Configuration A of ``compare_methods``, batch 16, a loss at every step. The orthogonal
weight is a plain parameter here, for every contestant: its parametrization calls a solver that no graph can record.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from bench.compare_methods import CLASSES, INPUT, build_cell, summed_loss, unroll
from sparse_rtrl import RTRL, SlotMoECell
from sparse_rtrl.learners.cuda_graph import FixedSteps, run_directly

LENGTH = 256
TOLERANCE = 1e-3  # float32 against float64, relative


class Problem:
    """One cell, one stream, and the gradient by BPTT in float64 along the choices of the float32 forward pass."""

    def __init__(self, config: str, batch: int, length: int, device: torch.device) -> None:
        self.config, self.device = config, device
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(length, batch, INPUT, generator=generator).to(device)
        self.target = torch.randint(CLASSES, (length, batch), generator=generator).to(device)
        cell, routings = self.cell(), []
        with torch.no_grad():
            state = cell.initial_state(batch)
            for x in self.x:
                routings.append(cell.route(x, state))
                state = cell(x, state, routings[-1])[2]
        recorded = iter(routings)
        cell.route = lambda x, state: next(recorded)  # type: ignore[method-assign]
        cell.double()
        self.bptt(cell, self.x.double())
        self.expected = gradient(cell)

    def cell(self) -> SlotMoECell:
        cell = build_cell(self.config)
        parametrize.remove_parametrizations(cell.core, "weight")
        cell.to(self.device)
        for parameter in cell.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return cell

    def bptt(self, cell: SlotMoECell, x: Tensor) -> None:
        """Add the gradient of the mean loss to ``.grad``."""
        loss, _ = unroll(cell, x, self.target, cell.initial_state(x.shape[1]))
        (loss / self.target.numel()).backward()

    def rtrl(self, learner: RTRL, segment: int) -> None:
        """Add it by segments."""
        learner.reset()
        for x, target in zip(self.x.split(segment), self.target.split(segment), strict=True):
            (summed_loss(learner.unroll(x), target) / self.target.numel()).backward()
        learner.flush()


def gradient(cell: SlotMoECell) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in cell.parameters()])


def recorded_bptt(problem: Problem, cell: SlotMoECell) -> Callable[[], None]:
    """A whole sequence forward and backward, as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            problem.bptt(cell, problem.x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.bptt(cell, problem.x)
    return graph.replay


def contestants(problem: Problem, dry_run: bool) -> dict[str, tuple[SlotMoECell, Callable[[], None]]]:
    """What runs a whole sequence, and the cell whose ``.grad`` it fills."""
    batch = problem.x.shape[1]
    found: dict[str, tuple[SlotMoECell, Callable[[], None]]] = {}
    cell = problem.cell()
    found["bptt"] = cell, lambda cell=cell: problem.bptt(cell, problem.x)
    if not dry_run:
        cell = problem.cell()
        found["bptt, CUDA graph"] = cell, recorded_bptt(problem, cell)
    for segment in (1, 64):
        cell = problem.cell()
        ordinary = RTRL(cell, batch, commit_every=segment)
        found[f"rtrl-{segment}"] = cell, lambda learner=ordinary, n=segment: problem.rtrl(learner, n)
        cell = problem.cell()
        learner = RTRL(cell, batch, catch_up="eager", cuda_graph=not dry_run)
        if dry_run:
            learner._fixed = FixedSteps(learner._engine, learner._state, run_directly)
        found[f"rtrl-{segment}, CUDA graphs"] = cell, lambda learner=learner, n=segment: problem.rtrl(learner, n)
    return found


def measure(device: torch.device, dry_run: bool, repeats: int = 5) -> list[dict[str, Any]]:
    """Check every contestant, then time them in turn: a row each, with no time of one whose gradient is wrong."""
    problem = Problem(*("tiny", 2, 64) if dry_run else ("A", 16, LENGTH), device)
    rows, times = [], {}
    running = contestants(problem, dry_run)
    for name, (cell, run) in running.items():
        for parameter in cell.parameters():
            parameter.grad.zero_()
        run()
        error = float((gradient(cell).double() - problem.expected).norm() / problem.expected.norm())
        rows.append({"name": name, "relative_error": error, "checked": error < TOLERANCE})
        if rows[-1]["checked"] and not dry_run:
            times[name] = []
    for _ in range(repeats):
        for name, taken in times.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            running[name][1]()
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    for row in rows:
        if row["name"] in times:
            row["microseconds_per_step"] = statistics.median(times[row["name"]]) / len(problem.x) * 1e6
            ratios = [a / b for a, b in zip(times[row["name"]], times.get("bptt", []), strict=False)]
            row["ratio_to_bptt"] = statistics.median(ratios) if ratios else None
    return rows


def where_bptt_ends(device: torch.device, most_steps: int = 2**22) -> dict[str, Any]:
    """Steps of BPTT's forward pass until the memory of the card is used up, and RTRL over twice as many."""
    problem = Problem("A", 16, LENGTH, device)
    cell = problem.cell()
    state, kept, steps = cell.initial_state(16), [], 0
    try:
        while steps < most_steps:
            loss, state = unroll(cell, problem.x, problem.target, state)
            kept.append(loss)
            steps += LENGTH
        ended = False
    except torch.cuda.OutOfMemoryError:
        ended = True
    del kept, state
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    learner = RTRL(problem.cell(), 16, cuda_graph=True)
    start = time.perf_counter()
    for _ in range(2 * steps // LENGTH):
        for x, target in zip(problem.x.split(64), problem.target.split(64), strict=True):
            summed_loss(learner.unroll(x), target).backward()
    learner.reset()  # raises if anything was not finite
    return {
        "bptt_steps_until_out_of_memory": steps if ended else None,
        "bptt_steps": steps,
        "rtrl_steps": 2 * steps,
        "rtrl_peak_bytes": torch.cuda.max_memory_allocated(),
        "rtrl_seconds": time.perf_counter() - start,
    }
