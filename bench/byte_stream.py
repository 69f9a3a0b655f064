"""A million bytes of real text in one pass: bits per byte and memory of sparse RTRL and of truncated BPTT.

``python bench/byte_stream.py --out bench/results/byte_stream.json``. Both methods train the same slot cell
with the same segment and the same number of updates on the source of Python's standard library, read once by parallel
streams; every byte is predicted before it is learned from. Each run is one ``sparse-rtrl train`` in a process of its
own and in a folder of its own: called again, the script goes on where it was stopped. Memory is the resident set of the
process, from its log.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from training_runs import save, train

from sparse_rtrl.training import runlog

SETTLED = 10_000
"""Tokens after which the process may not grow any more."""


def settings_of(method: str, seed: int, options: argparse.Namespace) -> dict[str, object]:
    """Options of ``sparse-rtrl train`` for one run."""
    updates = math.ceil(options.tokens / (options.batch * options.segment))
    settings: dict[str, object] = {
        "task": "bytes",
        "method": method,
        "seed": seed,
        "updates": updates,
        "length": options.segment,
        "segment": options.segment,
        "batch-size": options.batch,
        "slot-size": options.slot_size,
        "lr": options.learning_rate,
        "final-lr": options.learning_rate / 10,
        "log-every": max(1, updates // 400),
    }
    return settings if options.corpus is None else settings | {"corpus": options.corpus}


def mean_bits(rows: list[dict], first: float, last: float) -> float:
    """Bits per byte between two shares of the stream."""
    total = rows[-1]["tokens"]
    begins = [0, *(row["tokens"] for row in rows)]
    part = [(r["bits_per_byte"], r["tokens"] - b) for r, b in zip(rows, begins, strict=False) if b >= first * total]
    part = part[: sum(1 for r in rows if first * total < r["tokens"] <= last * total + 1e-9)]
    return sum(bits * count for bits, count in part) / sum(count for _, count in part)


def summarize(folder: Path, method: str, seed: int) -> dict:
    rows = runlog.read_lines(folder / "metrics.jsonl")
    memory = [row["memory_bytes"] for row in rows if row["tokens"] >= SETTLED]
    return {
        "method": method,
        "seed": seed,
        "tokens": rows[-1]["tokens"],
        "updates": rows[-1]["update"],
        "bits_per_byte": mean_bits(rows, 0.0, 1.0),
        "bits_per_byte_by_tenth": [mean_bits(rows, i / 10, (i + 1) / 10) for i in range(10)],
        "memory_after_10000_tokens": memory[0] if memory else None,
        "memory_least_and_most_since": [min(memory), max(memory)] if memory else None,
        "tokens_per_second": rows[-1]["tokens"] / rows[-1]["seconds"],
        "curve": [[row["tokens"], row["bits_per_byte"], row["memory_bytes"]] for row in rows],
    }


def plot(runs: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    bits, memory = figure.subplots(1, 2)
    labels = {"rtrl": "sparse RTRL", "tbptt": "truncated BPTT"}
    for run in runs:
        tokens, values, resident = zip(*run["curve"], strict=True)
        color = f"C{list(labels).index(run['method'])}"
        label = labels[run["method"]] if run["seed"] == min(r["seed"] for r in runs) else None
        window = max(1, len(values) // 40)
        smooth = [sum(values[max(0, i - window) : i + 1]) / (i + 1 - max(0, i - window)) for i in range(len(values))]
        bits.plot(tokens, smooth, color=color, linewidth=1, label=label)
        memory.plot(tokens, [bytes_ / 2**20 for bytes_ in resident], color=color, linewidth=1, label=label)
    late = [value for run in runs for _, value, _ in run["curve"][len(run["curve"]) // 10 :]]
    bits.set(xlabel="bytes", ylabel="bits per byte, rolling mean", ylim=(min(late) - 0.1, max(late) + 0.5))
    memory.set(xlabel="bytes", ylabel="resident set, MiB", ylim=(0, None))
    bits.legend()
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="bytes, of all streams together")
    parser.add_argument("--corpus", type=Path, help="file or folder; the standard library's source if absent")
    parser.add_argument("--methods", nargs="+", choices=["rtrl", "tbptt"], default=["rtrl", "tbptt"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=64, help="parallel streams")
    parser.add_argument("--segment", type=int, default=4, help="steps per segment, and per update")
    parser.add_argument("--slot-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--runs", type=Path, default=Path("runs/byte_stream"), help="folder of the runs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    runs = []
    for seed in options.seeds:
        for method in options.methods:
            folder = options.runs / f"{method}-{seed}"
            # Large blocks go back to the system when they are freed: the resident set is what is held, not what malloc
            # keeps.
            train(folder, settings_of(method, seed, options), {"MALLOC_MMAP_THRESHOLD_": "65536"})
            runs.append(summarize(folder, method, seed))
            least, most = runs[-1]["memory_least_and_most_since"] or (math.nan, math.nan)
            print(
                f"{method:5} seed {seed}: {runs[-1]['bits_per_byte']:.3f} bits per byte over the stream,"
                f" {runs[-1]['bits_per_byte_by_tenth'][-1]:.3f} over its last tenth; from {SETTLED:,} bytes on"
                f" {least / 2**20:.1f} to {most / 2**20:.1f} MiB; {runs[-1]['tokens_per_second']:.0f} bytes/s",
                flush=True,
            )
            if options.out:  # after every run, so that nothing is lost
                save(options.out, options, runs)
    if options.plot:
        plot(runs, options.plot)
    return runs


if __name__ == "__main__":
    main()
