"""A gate against slower code: twelve ratios to eager BPTT, compared with stored ones.

``python bench/gate.py`` (or ``make bench-gate``) times every contestant against BPTT of the same cell, in turns and in
one process, and compares the medians of the ratios with those in ``bench/results/gate.json``. A ratio that is more than
``--tolerance`` times the stored one fails; ``--store`` replaces the record. Every gradient is compared with BPTT in
float64 before anything is timed, and it is checked which path captured it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_rtrl import RTRL, Carry, SlotMoECell
from sparse_rtrl.capture.fused import FusedSteps
from sparse_rtrl.capture.segment import StepJacobian
from sparse_rtrl.capture.taped import TapedSteps
from sparse_rtrl.cli.environment import describe_environment

RECORD = Path(__file__).parent / "results" / "gate.json"
STEPS = 64
TOLERANCE = 1e-3  # float32 against float64, relative


@dataclass(frozen=True)
class Row:
    """One contestant.

    Attributes:
        name: of the row.
        build: a new module and, per stream, the shape of its first state.
        batch: streams.
        segment: steps between two calls of the learner.
        path: class that its captured steps must have.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: int
    segment: int
    path: type


class Attending(nn.Module):
    """A module that someone wrote: slots that a query reads, a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(16, 16), nn.Linear(16, 32)
        self.block = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.hidden_size = 64

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        slots = h.view(-1, 4, 16)
        k, v = self.kv(slots).chunk(2, -1)
        read = torch.softmax(self.q(x).unsqueeze(1) @ k.transpose(1, 2), -1) @ v
        return torch.tanh(0.9 * slots + self.block(slots + read)).flatten(1)


class TwoLayers(nn.Module):
    """``nn.LSTM`` of two layers of 64 units, its state flat."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(16, 64, num_layers=2)
        self.hidden_size = 256

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        state = h.view(-1, 2, 2, 64).permute(1, 2, 0, 3)
        _, new = self.layers(x.unsqueeze(0), (state[0].contiguous(), state[1].contiguous()))
        return torch.stack(new).permute(2, 0, 1, 3).flatten(1)


class ConvLSTM(nn.Module):
    """A convolutional LSTM on an image of 4 x 4, 4 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Conv2d(5, 16, 3, padding=1)
        self.hidden_size = 128

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        hidden, cell = h.view(-1, 2, 4, 4, 4).unbind(1)
        i, f, o, g = self.gates(torch.cat((x.view(-1, 1, 4, 4), hidden), 1)).chunk(4, 1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        return torch.stack((torch.sigmoid(o) * torch.tanh(cell), cell), 1).flatten(1)


def slots() -> SlotMoECell:
    """Configuration A."""
    sizes = {"slot_size": 32, "num_slots": 4, "num_experts": 4, "top_k": 2, "read_slots": 2, "write_slots": 2}
    return SlotMoECell(input_size=16, output_size=4, **sizes)


ROWS = [
    Row("GRU 32, 1 stream, segment 1", lambda: nn.GRUCell(16, 32), 1, 1, TapedSteps),
    Row("GRU 32, 1 stream, segment 16", lambda: nn.GRUCell(16, 32), 1, 16, TapedSteps),
    Row("GRU 32, 1 stream, segment 64", lambda: nn.GRUCell(16, 32), 1, 64, TapedSteps),
    Row("GRU 32, 16 streams, segment 64", lambda: nn.GRUCell(16, 32), 16, 64, TapedSteps),
    Row("GRU 128, 1 stream, segment 64", lambda: nn.GRUCell(16, 128), 1, 64, TapedSteps),
    Row("Elman 64, 16 streams, segment 16", lambda: nn.RNNCell(16, 64), 16, 16, TapedSteps),
    Row("attention, 1 stream, segment 64", Attending, 1, 64, TapedSteps),
    Row("two-layer LSTM 64, 16 streams, segment 32", TwoLayers, 16, 32, TapedSteps),
    Row("ConvLSTM 4 x 4 x 4, 1 stream, segment 16", ConvLSTM, 1, 16, TapedSteps),
    Row("GRU 32 with a step outside, 1 stream, segment 16", lambda: nn.GRUCell(16, 32), 1, 16, StepJacobian),
    Row("slots A, fused, 1 stream, segment 64", slots, 1, 64, FusedSteps),
    Row("slots A, fused, 16 streams, segment 64", slots, 16, 64, FusedSteps),
]


class Loop:
    """A training loop around a module, by ``Carry``, ``RTRL`` or truncated BPTT of the same segments.

    Args:
        row: what runs.
        exact: whether its gradient is exact; truncated BPTT if not.
    """

    def __init__(self, row: Row, exact: bool) -> None:
        torch.manual_seed(0)
        self.row, self.module = row, row.build()
        self.slots = isinstance(self.module, SlotMoECell)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(STEPS, row.batch, 16, generator=generator)
        size = 4 if self.slots else self.module.hidden_size
        self.c = torch.randn(STEPS, row.batch, size, generator=generator)
        self.outside = row.path is StepJacobian
        if self.slots and exact:
            self.learner = RTRL(self.module, row.batch)
        self.end = Carry(self.module) if exact and not self.slots else Tensor.detach
        if self.slots:
            self.h = self.module.initial_state(row.batch)
        else:
            self.h = self.end(torch.zeros(row.batch, self.module.hidden_size))

    def _steps(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for x_t in x:
            if self.slots:
                output, _, h = self.module(x_t, h)
            else:
                h = output = self.module(x_t, h)
                if self.outside:
                    h = output = torch.atan(h)
            outputs.append(output)
        return torch.stack(outputs), h

    def run(self) -> float:
        """Run :data:`STEPS` steps; returns seconds of this thread."""
        began = time.thread_time()
        for first in range(0, STEPS, self.row.segment):
            x, c = (t[first : first + self.row.segment] for t in (self.x, self.c))
            if hasattr(self, "learner"):
                outputs = self.learner.unroll(x)
                (outputs * c).sum().backward()
                continue
            outputs, h = self._steps(x, self.h)
            self.h = self.end(h)
            (outputs * c).sum().backward()
        return time.thread_time() - began

    def error(self) -> float:
        """Relative error of the gradient of two runs, against BPTT in float64."""
        self.module.zero_grad()
        self.run()
        self.run()
        kinds = self.learner._engine.influence.window if hasattr(self, "learner") else self.end._past._influence.window
        wrong = [type(kind).__name__ for kind in kinds if type(kind) is not self.row.path]
        assert kinds and not wrong, f"{self.row.name}: captured as {wrong}, not as {self.row.path.__name__}"
        found = torch.cat([p.grad.flatten().double() for p in self.module.parameters() if p.grad is not None])
        other = Loop(self.row, exact=False)
        other.module.load_state_dict(self.module.state_dict())
        other.module.double()
        other.x, other.c, other.h = other.x.double(), other.c.double(), other.h.double()
        outputs, _ = other._steps(torch.cat((other.x, other.x)), other.h)
        (outputs * torch.cat((other.c, other.c))).sum().backward()
        true = torch.cat([p.grad.flatten() for p in other.module.parameters() if p.grad is not None])
        return float((found - true).norm() / true.norm())


def measure(row: Row, rounds: int) -> dict[str, float]:
    """Median ratio to truncated BPTT of the same segments, in turns, and its spread."""
    error = Loop(row, exact=True).error()
    assert error < TOLERANCE, f"{row.name}: its gradient is wrong by {error:.1e}"
    ours, theirs = Loop(row, exact=True), Loop(row, exact=False)
    for loop in (ours, theirs, ours, theirs):
        loop.run()
    ratios = []
    for _ in range(rounds):
        mine = ours.run()
        ratios.append(mine / theirs.run())
    quartiles = statistics.quantiles(ratios, n=4)
    return {"ratio": statistics.median(ratios), "low": quartiles[0], "high": quartiles[2], "error": error}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", nargs="+", help="beginnings of names; all if absent")
    parser.add_argument(
        "--tolerance", type=float, default=1.25, help="a larger ratio than so many times the stored one fails"
    )
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    stored = json.loads(options.record.read_text())["rows"] if options.record.exists() else {}
    found, slower = {}, []
    for row in ROWS:
        if options.rows and not row.name.startswith(tuple(options.rows)):
            continue
        found[row.name] = measure(row, options.rounds)
        before = stored.get(row.name, {}).get("ratio")
        ratio = found[row.name]["ratio"]
        told = "" if before is None else f", stored {before:.2f}"
        print(f"{row.name:50} {ratio:6.2f}{told}", flush=True)
        if before is not None and ratio > options.tolerance * before:
            slower.append(row.name)
    if options.store:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        record = {"machine": describe_environment(), "commit": commit, "steps": STEPS, "rows": {**stored, **found}}
        options.record.write_text(json.dumps(record, indent=1) + "\n")
    elif slower:
        print(f"slower than {options.tolerance} times what is stored: {', '.join(slower)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
