"""Time and memory of ``Carry`` against truncated BPTT and the textbook form of RTRL, in one run.

``python bench/carry.py --cell gru --hidden 128 --batch 16`` measures segments of 1, 16, 64 and 256 steps of
``nn.RNNCell`` or ``nn.GRUCell`` with a loss at every step. The textbook keeps the whole influence matrix and moves it
at every step with ``torch.baddbmm``, Jacobians written by hand, no allocation in the loop. Contestants alternate;
medians of blocks of steps. Every gradient is compared with BPTT through the whole past in float64 in the same run, and
``--memory`` adds the peak memory of each, in a process of its own. ``--verify`` adds ``Carry`` that compares no segment
with an ordinary backward pass, and one that compares every segment; by default it is one in 64. Rows are added to
``--out``; ``--plot`` draws them.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_rtrl import Carry
from sparse_rtrl.cli.environment import describe_environment
from sparse_rtrl.cli.measurement import peak_growth

CELLS: dict[str, Callable[..., nn.Module]] = {"elman": nn.RNNCell, "gru": nn.GRUCell}
INPUT = 16
SEGMENTS = (1, 16, 64, 256)
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
TOLERANCE = 1e-3  # float32 against float64, relative


class Stream:
    """Inputs and loss weights ``(B, I)`` and ``(B, H)`` of step ``t``, the same for every contestant."""

    def __init__(self, batch: int, hidden: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(64, batch, INPUT, generator=generator)
        self.c = torch.randn(64, batch, hidden, generator=generator)

    def __getitem__(self, t: int) -> tuple[Tensor, Tensor]:
        return self.x[t % 64], self.c[t % 64]


class Textbook:
    """``P <- J P + F`` for the whole influence matrix at every step, and ``g += u P``; Jacobians by hand."""

    def __init__(self, cell: nn.Module, batch: int) -> None:
        self.parameters = [getattr(cell, name).detach() for name in NAMES]
        self.gru = isinstance(cell, nn.GRUCell)
        hidden = cell.hidden_size
        columns = sum(p.numel() for p in self.parameters)
        self.P, self.spare = torch.zeros(batch, hidden, columns), torch.zeros(batch, hidden, columns)
        self.J = torch.zeros(batch, hidden, hidden)
        self.h = torch.zeros(batch, hidden)
        self.gradient = torch.zeros(columns)

    def immediate(self, x: Tensor, gates: tuple[tuple[Tensor, Tensor], ...]) -> None:
        """Write ``F`` into ``spare``: gate ``g`` with pre-activation deltas ``(d_ih, d_hh)`` moves its own rows."""
        batch, hidden = self.h.shape
        self.spare.zero_()
        count, start = len(gates), 0
        for index, z in enumerate((x, self.h, None, None)):
            size = 1 if z is None else z.shape[1]
            part = self.spare[:, :, start : start + count * hidden * size].view(batch, hidden, count, hidden, size)
            for g, deltas in enumerate(gates):
                d = deltas[index % 2].unsqueeze(1)  # (B, 1, H)
                part[:, :, g].diagonal(dim1=1, dim2=2).copy_(d if z is None else d * z.unsqueeze(2))
            start += count * hidden * size

    def step(self, x: Tensor, c: Tensor) -> None:
        w_ih, w_hh, b_ih, b_hh = self.parameters
        i, j = torch.addmm(b_ih, x, w_ih.T), torch.addmm(b_hh, self.h, w_hh.T)
        if self.gru:
            (i_r, i_z, i_n), (j_r, j_z, j_n) = i.chunk(3, 1), j.chunk(3, 1)
            r, z = torch.sigmoid(i_r + j_r), torch.sigmoid(i_z + j_z)
            n = torch.tanh(i_n + r * j_n)
            new = n + z * (self.h - n)
            d_n = (1 - z) * (1 - n * n)
            d_z = (self.h - n) * z * (1 - z)
            d_r = d_n * j_n * r * (1 - r)
            d_m = d_n * r
            w_r, w_z, w_n = w_hh.chunk(3, 0)
            torch.mul(d_r.unsqueeze(2), w_r, out=self.J)
            self.J.addcmul_(d_z.unsqueeze(2), w_z).addcmul_(d_m.unsqueeze(2), w_n)
            self.J.diagonal(dim1=1, dim2=2).add_(z)
            self.immediate(x, ((d_r, d_r), (d_z, d_z), (d_n, d_m)))
        else:
            new = torch.tanh(i + j)
            d = 1 - new * new
            torch.mul(d.unsqueeze(2), w_hh, out=self.J)
            self.immediate(x, ((d, d),))
        torch.baddbmm(self.spare, self.J, self.P, out=self.spare)
        self.P, self.spare = self.spare, self.P
        self.h = new
        self.gradient += c.flatten() @ self.P.view(c.numel(), -1)

    def segment(self, stream: Stream, t: int) -> None:
        with torch.no_grad():
            self.step(*stream[t])


class Loop:
    """A segment-wise training loop around ``nn.RNNCell`` or ``nn.GRUCell``, with ``Carry`` or with ``detach``."""

    def __init__(self, cell: nn.Module, batch: int, segment: int, kind: str) -> None:
        self.cell, self.length = cell, segment
        verify = kind.partition("-")[2] or "sample"
        self.carry = torch.Tensor.detach if kind == "tbptt" else Carry(cell, verify=verify)
        self.h = self.carry(torch.zeros(batch, cell.hidden_size))

    def segment(self, stream: Stream, t: int) -> None:
        h, loss = self.h, torch.zeros(())
        for step in range(t, t + self.length):
            x, c = stream[step]
            h = self.cell(x, h)
            loss = loss + torch.dot(h.flatten(), c.flatten())
        self.h = self.carry(h)
        loss.backward()

    @property
    def gradient(self) -> Tensor:
        return torch.cat([getattr(self.cell, name).grad.flatten() for name in NAMES])


class Contestant:
    """One way to train, with its own cell, its place in the stream and the times of its blocks."""

    def __init__(self, kind: str, length: int, cell: str, hidden: int, batch: int) -> None:
        torch.manual_seed(0)
        self.kind, self.length = kind, length
        self.cell = CELLS[cell](INPUT, hidden)
        self.stream = Stream(batch, hidden)
        self.runner = Textbook(self.cell, batch) if kind == "textbook" else Loop(self.cell, batch, length, kind)
        self.t = 0
        self.times: list[float] = []

    def run(self, steps: int) -> float:
        """Take at least some steps in whole segments; seconds per step."""
        begin, start = self.t, time.perf_counter()
        while self.t < begin + steps:
            self.runner.segment(self.stream, self.t)
            self.t += self.length
        return (time.perf_counter() - start) / (self.t - begin)

    def error(self) -> float:
        """Relative error of the gradient so far against BPTT through all of it in float64."""
        cell = type(self.cell)(INPUT, self.cell.hidden_size).double()
        cell.load_state_dict(self.cell.state_dict())
        h = torch.zeros(self.stream.x.shape[1], cell.hidden_size, dtype=torch.float64)
        loss = torch.zeros((), dtype=torch.float64)
        for t in range(self.t):
            if self.kind == "tbptt" and t % self.length == 0:
                h = h.detach()
            x, c = self.stream[t]
            h = cell(x.double(), h)
            loss = loss + (h * c).sum()
        loss.backward()
        expected = torch.cat([getattr(cell, name).grad.flatten() for name in NAMES])
        return float((self.runner.gradient - expected).norm() / expected.norm())


def contestants(segments: tuple[int, ...], verify: bool = False) -> Iterator[tuple[str, int]]:
    yield "textbook", 1
    for length in segments:
        yield "carry", length
        if verify:
            yield "carry-never", length
            yield "carry-always", length
        yield "tbptt", length


def columns(cell: str, hidden: int) -> int:
    return (3 if cell == "gru" else 1) * hidden * (INPUT + hidden + 2)


def predicted(kind: str, length: int, hidden: int) -> float:
    """Multiply-adds per step and parameter: ``H^2`` for the textbook, ``2 H + H^2 / n`` for a segment."""
    if kind == "textbook":
        return hidden**2 + hidden
    return 2 * hidden + hidden**2 / length if kind.startswith("carry") else 1.0


def block_steps(kind: str, length: int, flops: float) -> int:
    """Steps that are timed together: whole segments and, for ``Carry``, whole windows of segments."""
    if kind == "textbook":
        return 1 if flops > 1e9 else 16
    return max(64, length)


def measure(cell: str, hidden: int, batch: int, options: argparse.Namespace) -> list[dict]:
    """Check every contestant, then time them in turn."""
    entries, rows = [], []
    for kind, length in contestants(options.segments, getattr(options, "verify", False)):
        entry = Contestant(kind, length, cell, hidden, batch)
        flops = batch * columns(cell, hidden) * predicted(kind, length, hidden)
        block = block_steps(kind, length, flops)
        # More than one segment and, for Carry, more than one window of segments.
        entry.run(max(block + length, 3))
        error = entry.error()
        assert error < TOLERANCE, (kind, length, error)
        entries.append((entry, block, error))
    for _ in range(options.rounds):
        for entry, block, _ in entries:
            if len(entry.times) < 3 or sum(entry.times) * block < options.seconds:
                entry.times.append(entry.run(block))
    for entry, _, error in entries:
        rows.append(
            {
                "cell": cell,
                "hidden": hidden,
                "batch": batch,
                "kind": entry.kind,
                "segment": entry.length,
                "microseconds_per_step": statistics.median(entry.times) * 1e6,
                "blocks": len(entry.times),
                "relative_error": error,
                "predicted_multiply_adds": predicted(entry.kind, entry.length, hidden) * columns(cell, hidden) * batch,
                "influence_bytes": 4 * batch * (hidden + 1) * columns(cell, hidden),
            }
        )
    return rows


def peak(kind: str, length: int, cell: str, hidden: int, batch: int) -> int:
    """Peak memory of the first segments of a training run, above the imports; for a process of its own."""

    def work(size: int, streams: int) -> None:
        Contestant(kind, length, cell, size, streams).run(1 if kind == "textbook" else max(length + 1, 80))

    work(8, 1)
    return peak_growth(lambda: work(hidden, batch))


def measure_memory(rows: list[dict]) -> None:
    for row in rows:
        of = [str(row[name]) for name in ("kind", "segment", "cell", "hidden", "batch")]
        run = subprocess.run([sys.executable, __file__, "--peak", *of], check=True, capture_output=True, text=True)
        row["peak_bytes"] = int(run.stdout)


def show(rows: list[dict]) -> None:
    print("cell  hidden batch  method    segment   us/step  vs textbook  formula  peak/influence    error")
    for row in rows:
        book = next(
            r for r in rows if r["kind"] == "textbook" and all(r[k] == row[k] for k in ("cell", "hidden", "batch"))
        )
        speed = book["microseconds_per_step"] / row["microseconds_per_step"]
        formula = book["predicted_multiply_adds"] / row["predicted_multiply_adds"]
        memory = row.get("peak_bytes", float("nan")) / row["influence_bytes"]
        print(
            f"{row['cell']:6}{row['hidden']:6}{row['batch']:6}  {row['kind']:13}{row['segment']:4}"
            f"{row['microseconds_per_step']:10.1f}{speed:13.2f}{formula:9.1f}{memory:16.2f}{row['relative_error']:9.0e}"
        )


def save(rows: list[dict], path: Path) -> list[dict]:
    """Add rows to a JSON file and a CSV file beside it, in place of older ones of the same configuration."""

    def key(row: dict) -> tuple:
        return row["cell"], row["hidden"], row["batch"], row["kind"] != "textbook", row["kind"], row["segment"]

    old = json.loads(path.read_text())["rows"] if path.exists() else []
    merged = sorted({key(row): row for row in old + rows}.values(), key=key)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    path.write_text(json.dumps({"machine": describe_environment(), "commit": commit, "rows": merged}, indent=1) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in merged for name in row))
        writer.writeheader()
        writer.writerows(merged)
    return merged


def plot(rows: list[dict], path: Path) -> None:
    """Time per step over the segment length, with the cost formula scaled to the textbook's time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = sorted({(row["cell"], row["batch"]) for row in rows})
    figure, axes = plt.subplots(1, len(groups), figsize=(4.2 * len(groups), 3.6), squeeze=False, layout="constrained")
    for ax, (cell, batch) in zip(axes[0], groups, strict=True):
        here = [row for row in rows if (row["cell"], row["batch"]) == (cell, batch)]
        for colour, hidden in enumerate(sorted({row["hidden"] for row in here})):
            mine = [row for row in here if row["hidden"] == hidden]
            book = next(row for row in mine if row["kind"] == "textbook")
            ax.axhline(book["microseconds_per_step"], color=f"C{colour}", linestyle=":")
            for kind, style in (("carry", "o-"), ("tbptt", "x--")):
                points = [(row["segment"], row["microseconds_per_step"]) for row in mine if row["kind"] == kind]
                ax.plot(*zip(*sorted(points), strict=True), style, color=f"C{colour}", label=f"{kind}, H = {hidden}")
            rate = book["microseconds_per_step"] / book["predicted_multiply_adds"]
            points = [(row["segment"], row["predicted_multiply_adds"] * rate) for row in mine if row["kind"] == "carry"]
            ax.plot(*zip(*sorted(points), strict=True), "-", color=f"C{colour}", alpha=0.25, linewidth=4)
        ax.set(xscale="log", yscale="log", xlabel="segment, steps", title=f"{cell}, batch {batch}")
    axes[0, 0].set_ylabel("time per step, µs\n(dotted: textbook; wide: (2H + H²/n) N at its rate)")
    axes[0, 0].legend(fontsize=6, ncol=2)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--hidden", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--segments", type=int, nargs="+", default=SEGMENTS)
    parser.add_argument("--rounds", type=int, default=9, help="most blocks per contestant")
    parser.add_argument("--seconds", type=float, default=4.0, help="stop timing a contestant after so long")
    parser.add_argument("--memory", action="store_true", help="add peak memory to the rows in --out, a process each")
    parser.add_argument("--verify", action="store_true", help="add the cost of comparing no and every segment")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        kind, length, cell, hidden, batch = options.peak
        print(peak(kind, int(length), cell, int(hidden), int(batch)))
        return
    rows = []
    for cell in options.cell:
        for hidden in options.hidden:
            for batch in options.batch:
                if options.memory:
                    kept = json.loads(options.out.read_text())["rows"]
                    found = [r for r in kept if (r["cell"], r["hidden"], r["batch"]) == (cell, hidden, batch)]
                    measure_memory(found)
                else:
                    found = measure(cell, hidden, batch, options)
                show(found)
                sys.stdout.flush()
                rows += found
    if options.out:
        rows = save(rows, options.out)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
