"""Cosine between the gradient of each method of ``Carry`` and the exact gradient, on text.

``python bench/approximations.py --out bench/results/approximations.json``: a GRU
learns to predict the next byte of the source files of this Python's standard library, online, with the exact gradient
and Adam; at every segment each method's gradient of the GRU's parameters is compared with the exact one. Segments of 1,
4 and 16 steps. The exact method is compared with BPTT first, on the same text.
"""

import argparse
import json
import statistics
import subprocess
import sysconfig
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from sparse_rtrl import Carry
from sparse_rtrl.cli.environment import describe_environment

METHODS = ("exact", "snap1", "rflo", "uoro", "truncated")
LABELS = {"snap1": "SnAp-1", "rflo": "RFLO", "uoro": "UORO", "truncated": "truncated BPTT"}
SEGMENTS = (1, 4, 16)
BLOCK = 64
"""Steps over which gradients are also summed before they are compared."""


class ByteModel(nn.Module):
    """A GRU that predicts the next byte from one-hot bytes; an embedding would reach every unit within a step."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.cell, self.readout = nn.GRUCell(128, hidden_size), nn.Linear(hidden_size, 128)

    def forward(self, text: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses of ``text (n + 1, B)`` over its ``n`` steps, averaged over the streams, and the state."""
        states = []
        for byte in nn.functional.one_hot(text[:-1], 128).to(h):
            h = self.cell(byte, h)
            states.append(h)
        logits = self.readout(torch.stack(states))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), text[1:].flatten(), reduction="sum")
        return loss / text.shape[1], h


def streams(steps: int, batch: int) -> Tensor:
    """Text as ``(steps + 1, batch)`` ASCII codes, each stream from its own part of the library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long() % 128
    starts = torch.arange(batch) * ((len(text) - steps - 1) // batch)
    return torch.stack([text[start : start + steps + 1] for start in starts], 1)


def recurrent_gradient(model: ByteModel) -> Tensor:
    """Gradient of the parameters that reach the state, as one vector."""
    return torch.cat([p.grad.flatten() for p in model.cell.parameters()])


def error_of_the_exact_method(hidden_size: int) -> float:
    """Relative error against BPTT over 48 steps in float64."""
    model, text = ByteModel(hidden_size).double(), streams(48, 4)
    start = torch.zeros(4, hidden_size, dtype=torch.float64)
    model(text, start)[0].backward()
    expected = recurrent_gradient(model)
    model.zero_grad()
    carry = Carry(model)
    h = carry(start)
    for t in range(0, 48, 4):
        loss, h = model(text[t : t + 5], h)
        h = carry(h)
        loss.backward()
    return float((recurrent_gradient(model) - expected).norm() / expected.norm())


def compare(segment: int, steps: int, hidden_size: int, batch: int) -> dict:
    """Cosines over a stream, for segments of ``segment`` steps."""
    torch.manual_seed(0)
    model, text = ByteModel(hidden_size), streams(steps, batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    carries = {method: Carry(model, method=method) for method in METHODS}
    states = {method: carry(torch.zeros(batch, hidden_size)) for method, carry in carries.items()}
    single: dict[str, list[float]] = {method: [] for method in LABELS}
    summed: dict[str, list[float]] = {method: [] for method in LABELS}
    sums: dict[str, Tensor] = {}
    losses = []
    for t in range(0, steps, segment):
        gradients = {}
        for method in reversed(METHODS):  # the exact one last: its gradient is the one that is followed
            optimizer.zero_grad()
            loss, h = model(text[t : t + segment + 1], states[method])
            states[method] = carries[method](h)
            loss.backward()
            gradients[method] = recurrent_gradient(model)
            sums[method] = sums.get(method, 0) + gradients[method]
        losses.append(loss.item() / segment)
        optimizer.step()
        for method in LABELS:
            single[method].append(float(torch.cosine_similarity(gradients[method], gradients["exact"], 0)))
        if (t + segment) % BLOCK == 0:
            for method in LABELS:
                summed[method].append(float(torch.cosine_similarity(sums[method], sums["exact"], 0)))
            sums = {}

    def second_half(cosines: dict[str, list[float]]) -> dict[str, float]:
        return {method: statistics.mean(values[len(values) // 2 :]) for method, values in cosines.items()}

    return {
        "segment": segment,
        "kept_bytes": {method: carry.kept_bytes for method, carry in carries.items()},
        "loss_first_and_last_tenth": [
            statistics.mean(losses[: len(losses) // 10]),
            statistics.mean(losses[-(len(losses) // 10) :]),
        ],
        "mean_cosine_second_half": second_half(single),
        "mean_cosine_of_sums_second_half": second_half(summed),
        "cosine": {m: [round(x, 4) for x in v] for m, v in single.items()},
    }


def draw(rows: list[dict], hidden_size: int, batch: int, path: str) -> None:
    """Left: single gradients along the stream at segments of one step. Middle and right: means over segment lengths."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    stream, single, summed = figure.subplots(1, 3)
    for number, (method, label) in enumerate(LABELS.items()):
        values = rows[0]["cosine"][method]
        window = max(1, len(values) // 40)
        means = [statistics.mean(values[i : i + window]) for i in range(0, len(values) - window + 1, window)]
        steps = [i * window * rows[0]["segment"] for i in range(len(means))]
        line = {"color": f"C{number}", "linewidth": 4 if method == "snap1" else 1.5}  # else it hides behind RFLO
        stream.plot(steps, means, label=label, **line)
        for axes, key in ((single, "mean_cosine_second_half"), (summed, "mean_cosine_of_sums_second_half")):
            axes.plot([row["segment"] for row in rows], [row[key][method] for row in rows], "o-", **line)
    stream.set(xlabel="step of the stream", ylabel="cosine to the exact gradient", title="segments of 1 step")
    stream.legend(loc="lower left")
    for axes, title in ((single, "one segment's gradient"), (summed, f"gradients summed over {BLOCK} steps")):
        axes.set(xscale="log", xlabel="steps per segment", title=title)
        axes.set_xticks(SEGMENTS, SEGMENTS)
        axes.minorticks_off()
    for axes in (stream, single, summed):
        axes.axhline(1, color="gray", linestyle="--", linewidth=1)
        axes.set_ylim(min(0, *axes.get_ylim()), 1.05)
        axes.grid(alpha=0.3)
    figure.suptitle(f"GRU {hidden_size}, batch {batch}, next byte of the standard library's source")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2048, help="length of each stream")
    parser.add_argument("--hidden-size", type=int, default=48)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--picture", help="PNG file to write")
    options = parser.parse_args()
    error = error_of_the_exact_method(options.hidden_size)
    print(f"exact method against BPTT, float64: {error:.1e}", flush=True)
    assert error <= 1e-12
    rows = []
    for segment in SEGMENTS:
        start = time.perf_counter()
        row = compare(segment, options.steps, options.hidden_size, options.batch)
        rows.append(row)
        cosines = ", ".join(f"{label} {row['mean_cosine_second_half'][m]:.3f}" for m, label in LABELS.items())
        print(f"segments of {segment}: {cosines} ({time.perf_counter() - start:.0f} s)", flush=True)
    if options.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        environment = {**describe_environment(), "commit": commit}
        head = {"environment": environment, "exact_error_float64": error, "options": vars(options)}
        Path(options.out).write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    if options.picture:
        draw(rows, options.hidden_size, options.batch, options.picture)


if __name__ == "__main__":
    main()
