"""Cosine to the full gradient of truncated BPTT and of ``Carry``, over the segment length, on real text.

``python bench/truncation_bias.py --out bench/results/truncation_bias.json``.
An Elman and a GRU cell predict the bytes of the standard library's source files; after some training, parameters are
fixed and the gradient of the loss over a stretch of text is taken three ways: BPTT through all of it in float64 (the
full gradient), truncated BPTT with segments of ``n`` steps, and ``Carry`` with the same segments in float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_rtrl import Carry
from sparse_rtrl.cli.environment import describe_environment

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from char_stream import BYTES, segments, text

CELLS = {"elman": nn.RNNCell, "gru": nn.GRUCell}
LENGTHS = (1, 2, 4, 8, 16, 32, 64)


class Model(nn.Module):
    """A cell that reads bytes and a readout."""

    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        self.cell, self.readout = CELLS[cell](BYTES, hidden), nn.Linear(hidden, BYTES)

    def loss(self, x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over a segment ``(n, B)`` in nats, and the new state."""
        states = []
        for x_t in nn.functional.one_hot(x, BYTES).to(h.dtype):
            h = self.cell(x_t, h)
            states.append(h)
        logits = self.readout(torch.stack(states))
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"), h


def gradient(model: Model, x: Tensor, y: Tensor, length: int, cut: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient of the cell's parameters, side by side, with ``cut`` between segments."""
    model.zero_grad()
    h = cut(torch.zeros(x.shape[1], model.cell.hidden_size, dtype=model.readout.weight.dtype))
    for start in range(0, len(x), length):
        loss, h = model.loss(x[start : start + length], y[start : start + length], h)
        h = cut(h)
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.cell.parameters()])


def measure(cell: str, options: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    model = Model(cell, options.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    h, bits = torch.zeros(options.batch, options.hidden), []
    for x, y in segments(options.train_bytes, options.batch, 16):
        loss, h = model.loss(x, y, h.detach())
        (loss / x.numel()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bits.append(float(loss.detach()) / x.numel() / 0.6931)
    rows: list[dict] = []
    unseen = text(options.train_bytes + options.batch * (options.steps + 1))[options.train_bytes :]
    streams = unseen.view(options.batch, -1).T
    x, y = streams[:-1], streams[1:]
    full = gradient(copy.deepcopy(model).double(), x, y, len(x), lambda h: h)
    for length in options.lengths:
        row: dict = {"segment": length}
        for name, cut in (("tbptt", Tensor.detach), ("carry", Carry(model))):
            found = gradient(model, x, y, length, cut).double()
            row[f"{name}_cosine"] = float(torch.dot(found, full) / found.norm() / full.norm())
            row[f"{name}_relative_error"] = float((found - full).norm() / full.norm())
        rows.append(row)
    return {"cell": cell, "bits_per_byte": sum(bits[-50:]) / len(bits[-50:]), "rows": rows}


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    for colour, result in enumerate(results):
        lengths = [row["segment"] for row in result["rows"]]
        for name, label, style in (("tbptt", "truncated BPTT", "x--"), ("carry", "Carry", "o-")):
            options = {"color": f"C{colour}", "label": f"{result['cell']}, {label}"}
            left.plot(lengths, [row[f"{name}_cosine"] for row in result["rows"]], style, **options)
            right.plot(lengths, [row[f"{name}_relative_error"] for row in result["rows"]], style, **options)
    left.set(xscale="log", xlabel="segment, steps", ylabel="cosine to the full gradient")
    right.set(xscale="log", yscale="log", xlabel="segment, steps", ylabel="relative error of the gradient")
    for ax in (left, right):
        ax.set_xticks(lengths, [str(n) for n in lengths])
        ax.minorticks_off()
    left.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--train-bytes", type=int, default=64_000)
    parser.add_argument("--steps", type=int, default=512, help="steps of the stretch whose gradient is compared")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = []
    for cell in options.cell:
        results.append(measure(cell, options))
        print(f"{cell}: {results[-1]['bits_per_byte']:.2f} bits per byte after training; cosine and relative error of")
        for row in results[-1]["rows"]:
            print(
                f"  n = {row['segment']:3}: TBPTT {row['tbptt_cosine']:.4f} {row['tbptt_relative_error']:.1e},"
                f" Carry {row['carry_cosine']:.7f} {row['carry_relative_error']:.1e}"
            )
    if options.out:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        content = {"machine": describe_environment(), "commit": commit, "hidden": options.hidden, "results": results}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)
    return results


if __name__ == "__main__":
    main()
