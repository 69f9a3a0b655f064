"""Every table of numbers and every picture of README and docs, made from the records in ``bench/results/``.

``python tools/figures.py`` compares what README and docs say with the records, names what differs and then exits with
status 1; ``--write`` rewrites it. In a page a table stands between ``<!-- figures: NAME -->`` and ``<!-- end -->``,
where ``NAME`` is that of a function here marked ``@table``, with dashes. A picture marked ``@picture`` is
``docs/pictures/NAME.png`` and carries a digest of its records, so that a changed record is noticed without drawing.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PICTURES = ROOT / "docs" / "pictures"
REPOSITORY_PATH = "bench/results/"
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

TABLES: dict[str, Callable[[], str]] = {}
DRAWN: dict[str, tuple[tuple[str, ...], Callable[[Path], None]]] = {}


def table(build: Callable[[], str]) -> Callable[[], str]:
    """Register the text of the marker that has the function's name, with dashes."""
    TABLES[build.__name__.replace("_", "-")] = build
    return build


def picture(*records: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register a picture, and the records that it shows."""

    def register(draw: Callable[[Path], None]) -> Callable[[Path], None]:
        DRAWN[draw.__name__.replace("_", "-")] = (records, draw)
        return draw

    return register


# Reading records


def load(name: str) -> Any:
    """A record: the content of a JSON file, the rows of a CSV or JSON Lines file, the lines of a text file."""
    path = RESULTS / name
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines


def one(rows: Iterable[dict], **wanted: object) -> dict:
    """The only row with these values."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    if len(found) != 1:
        raise LookupError(f"there must be one row with {wanted}, got {len(found)}")
    return found[0]


def commits(value: object) -> list[str]:
    """All commits that a record names, shortened, in the order of their first appearance."""
    if isinstance(value, dict):
        here = [value["commit"][:7]] if isinstance(value.get("commit"), str) else []
        found = here + [commit for key in value if key != "commit" for commit in commits(value[key])]
    elif isinstance(value, list):
        found = [commit for item in value for commit in commits(item)]
    elif isinstance(value, str) and value.startswith("commit "):  # the head of a text file
        found = [value.split()[1][:7]]
    else:
        found = []
    return list(dict.fromkeys(found))


def source(*names: str, note: str = "") -> str:
    """The line below a table: its records and the commits they were made with."""
    parts = []
    for name in names:
        found = commits(load(name))
        made = f"commit {', '.join(f'`{commit}`' for commit in found)}" if found else "commit not recorded"
        parts.append(f"`{REPOSITORY_PATH}{name}` ({made})")
    return f"\n*From {'; '.join(parts)}.{' ' + note if note else ''}*\n"


# Writing Markdown


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * share:.{digits}f} %"


def each(shares: Iterable[float]) -> str:
    """Shares of several seeds as percentages, lowest to highest."""
    return ", ".join(f"{100 * share:.1f}" for share in sorted(shares)) + " %"


def short(value: float) -> str:
    """About two or three digits."""
    if value == 0:
        return "0"
    if value < 0.01 or value >= 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.2f}" if value < 3 else f"{value:.1f}" if value < 30 else f"{value:.0f}"


def mebibytes(size: float) -> str:
    """A size in MiB."""
    return f"{size / 2**20:.1f} MiB" if size < 100 * 2**20 else f"{size / 2**20:.0f} MiB"


# README


@table
def four_numbers() -> str:
    """Exactness, learning, memory and price: one number each."""
    memory = load("memory.json")
    options = memory["options"]
    compared = [row for row in memory["rows"] if "relative_error" in row]
    error = max(row["relative_error"] for row in compared if row["method"] == "carry")
    cut = max(row["relative_error"] for row in compared if row["method"] == "tbptt")
    most = max(row["length"] for row in compared)
    carried = {row["length"]: row["peak_bytes"] for row in memory["rows"] if row["method"] == "carry"}
    full = {row["length"]: row["peak_bytes"] for row in memory["rows"] if row["method"] == "bptt"}
    runs = load("haystack_long.json")["runs"]
    found = {m: [run["long"] for run in runs if run["method"] == m] for m in ("rtrl", "tbptt")}
    right = {
        m: percent(sum(r["correct"] for r in rows) / sum(r["sequences"] for r in rows), 0) for m, rows in found.items()
    }
    speed = load("carry_cpu.json")["rows"]
    gru = {"cell": "gru", "hidden": 128, "batch": 16}
    book, ours, truncated = (
        one(speed, **gru, kind=kind, segment=segment)["microseconds_per_step"]
        for kind, segment in (("textbook", 1), ("carry", 64), ("tbptt", 64))
    )
    rows = [
        [
            f"error of the gradient, GRU of {options['hidden']} units, {most:,} steps in segments of"
            f" {options['segment']}, float64",
            f"**{short(error)}**",
            f"truncated BPTT: {short(cut)}",
        ],
        [
            f"peak memory of the same at {max(full):,} steps, float32",
            f"**{mebibytes(carried[max(full)])}**",
            f"BPTT: {mebibytes(full[max(full)])}",
        ],
        [
            f"a needle found in {found['rtrl'][0]['length']:,} tokens of haystack, slot cell trained in segments of 8",
            f"**{right['rtrl']}**",
            f"truncated BPTT: {right['tbptt']}; chance: 25 %",
        ],
        [
            "time per step, GRU of 128 units, 16 streams, segments of 64",
            f"**{ours / 1000:.0f} ms**",
            f"textbook RTRL: {book / 1000:.0f} ms; truncated BPTT: {truncated / 1000:.1f} ms",
        ],
    ]
    return markdown(["", "this library", "beside it"], rows) + source(
        "memory.json", "haystack_long.json", "carry_cpu.json"
    )


@picture("memory.json")
def memory_and_error(path: Path) -> None:
    """Memory over the length, and the error of the gradient."""
    from matplotlib.figure import Figure

    record = load("memory.json")
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    memory, error = figure.subplots(1, 2)
    styles = {
        "bptt": ("BPTT", "tab:gray", "s-"),
        "tbptt": ("truncated BPTT", "tab:orange", "^-"),
        "carry": ("Carry", "tab:blue", "o-"),
    }
    for method, (label, colour, style) in styles.items():
        rows = [row for row in record["rows"] if row["method"] == method]
        line = {"color": colour, "label": label, "linewidth": 2.5 if method == "carry" else 1.5}
        memory.plot([row["length"] for row in rows], [row["peak_bytes"] / 2**20 for row in rows], style, **line)
        pairs = [(row["length"], row["relative_error"]) for row in rows if row.get("relative_error", 0) > 0]
        if method != "bptt":  # what it is compared with
            error.plot(*zip(*pairs, strict=True), style, **line)
    memory.set(xlabel="steps of the stream", ylabel="peak memory, MiB", title="Memory does not grow")
    error.set(xlabel="steps of the stream", ylabel="relative error of the gradient", title="The gradient is exact")
    error.axhline(1e-12, color="black", linestyle=":", linewidth=1)
    error.text(64, 2e-12, "promised: 1e-12", fontsize=8)
    for axes in (memory, error):
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    memory.legend(frameon=False)
    error.set_ylim(1e-16, 1)
    save(figure, path)


# Gradient and learning (docs/evidence.md)


@table
def gradient() -> str:
    """Largest error over all parameters by length."""
    errors: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in load("gradient_check.txt"):
        cells = [cell.strip() for cell in line.split("│")]
        if len(cells) == 9 and cells[2].startswith("float"):
            errors.setdefault((cells[2], cells[1]), []).append((float(cells[4]), float(cells[5])))
    lengths = list(dict.fromkeys(length for _, length in errors))
    rows = [
        ["float64", *(short(max(e for e, _ in errors["float64", n])) for n in lengths)],
        ["float32", *(short(max(e for e, _ in errors["float32", n])) for n in lengths)],
        ["float32: twice the error of BPTT", *(short(max(a for _, a in errors["float32", n])) for n in lengths)],
    ]
    return markdown(["length", *lengths], rows) + source("gradient_check.txt")


@table
def haystack() -> str:
    """Accuracy by recipe and by the length it is scored at."""

    def scores(name: str, method: str, at: int) -> list[float]:
        return [
            float(r["accuracy"]) for r in load(name) if r["method"].startswith(method) and int(r["scored_at"]) == at
        ]

    rows = []
    for trained, name, lengths in (
        ("8 steps, segment 1, 500 updates", "haystack-length-8.csv", (8,)),
        ("12 growing to 110, segment 8, 400 updates", "haystack-length-110.csv", (128, 10_000)),
        ("12 growing to 110, segment 8, 600 updates", "haystack-600-updates.csv", (128, 10_000)),
        ("the same, with what recall needs", "haystack-least-used.csv", (128, 10_000)),
    ):
        for at in lengths:
            columns = [scores(name, method, at) for method in ("sparse RTRL", "TBPTT", "BPTT")]
            rows.append([trained, f"{at:,}", *(each(values) if values else "" for values in columns)])
    runs = load("haystack_long.json")["runs"]
    by_method = {m: [run["long"] for run in runs if run["method"] == m] for m in ("rtrl", "tbptt")}
    cells = []
    for found in by_method.values():
        counts = "/".join(str(number) for number in sorted({run["sequences"] for run in found}))
        cells.append(f"{each(run['value'] for run in found)} ({counts} sequences)")
    rows.append(["600 updates, as above", f"{by_method['rtrl'][0]['length']:,}", *cells, ""])
    head = ["trained to", "scored at", "sparse RTRL", "truncated BPTT, same segment", "BPTT"]
    return markdown(head, rows) + source(
        "haystack-length-8.csv",
        "haystack-length-8.json",
        "haystack-length-110.csv",
        "haystack-length-110.json",
        "haystack-600-updates.csv",
        "haystack-least-used.csv",
        "haystack_long.json",
    )


@table
def recall() -> str:
    """Associative recall by method, pairs and length."""
    labels = {
        "slots-rtrl": "slot cell, least used slots written, RTRL",
        "slots-bptt": "slot cell, least used slots written, BPTT",
        "slots-tbptt": "slot cell, least used slots written, truncated BPTT",
        "slots-without-allocation": "slot cell, important slots written, BPTT",
        "slots-without-all-reads": "slot cell, half of the slots read, BPTT",
        "slots-without-softmax": "slot cell, sigmoid weights, BPTT",
        "slots-without-shift": "slot cell, without token shift, BPTT",
        "retention-bptt": "retention, BPTT through the whole sequence",
        "lru-bptt": "LRU, likewise",
        "gru-bptt": "GRU, likewise",
    }
    runs = load("recall.json")["runs"]
    rows = []
    for pairs in sorted({run["pairs"] for run in runs}):
        for name, label in labels.items():
            here = [run for run in runs if (run["run"], run["pairs"]) == (name, pairs)]
            if here:
                accuracies = [each(run["accuracy"][at]["value"] for run in here) for at in ("512", "4096")]
                rows.append([str(pairs), label, *accuracies])
    return markdown(["pairs", "", "at 512", "at 4,096"], rows) + source("recall.json")


@table
def slot_memory() -> str:
    """What the slot cell needs to learn recall, one thing changed at a time."""
    rows = []
    for row in load("slot_memory.json")["rows"]:
        cells = [row["variant"]]
        for values in row["accuracy"].values():
            cells.append(" / ".join(f"{value:.1%}" for value in (min(values), statistics.median(values), max(values))))
        rows.append(cells)
    lengths = [f"at {length} steps" for length in load("slot_memory.json")["rows"][0]["accuracy"]]
    return markdown(["", *lengths], rows) + source("slot_memory.json")


@picture("recall_trace.json")
def slots_over_a_sequence(path: Path) -> None:
    """Content of slots and what is written, over one sequence of a trained cell."""
    import torch

    from sparse_rtrl.cli.slot_picture import SlotTrace, plot_slots

    record = load("recall_trace.json")
    names = ("tokens", "target", "answer", "norms", "reads", "writes")
    plot_slots(SlotTrace(*(torch.tensor(record[name]) for name in names)), record["run"]).savefig(path, dpi=130)


LEARNED = {
    "rtrl": "RTRL(1)",
    "bptt": "BPTT through everything",
    "tbptt64": "TBPTT(64)",
    "tbptt1": "TBPTT(1)",
    "rtrl-token": "RTRL(1), optimizer step at every answer",
}
STUDENT = {3: 4.303}
"""Quantile 0.975 of Student's t for a mean over as many values."""


@table
def diagonal_learning() -> str:
    """Scores of diagonal cells trained one token at a time."""
    runs = load("diagonal_learning.jsonl")
    columns = [("copy", "lru"), ("copy", "retention"), ("adding", "lru"), ("adding", "retention")]
    rows = []
    for method, label in LEARNED.items():
        cells = []
        for task, cell in columns:
            scores = [run["score"] for run in runs if (run["task"], run["cell"], run["method"]) == (task, cell, method)]
            if not scores:
                cells.append("")
                continue
            half = STUDENT[len(scores)] * statistics.stdev(scores) / len(scores) ** 0.5
            cells.append(f"{statistics.mean(scores):.3f} ± {half:.3f}")
        rows.append([label, *cells])
    head = ["", *(f"{task}, {'LRU' if cell == 'lru' else cell}" for task, cell in columns)]
    return markdown(head, rows) + source("diagonal_learning.jsonl")


@table
def demo() -> str:
    """What ``make demo`` ends with."""
    rows = []
    for task, name in (("haystack, 128 steps", "demo.json"), ("recall of 4 pairs, 50 steps", "demo_recall.json")):
        for outcome in load(name)["outcomes"]:
            (accuracy,) = outcome["accuracy"].values()
            low, high = (f"{100 * end:.1f}" for end in accuracy["interval"])
            rows.append(
                [
                    task,
                    outcome["label"],
                    f"{percent(accuracy['value'])} [{low}, {high}]",
                    mebibytes(outcome["probe"]["peak_bytes"]),
                    f"{outcome['probe']['seconds_per_token'] * 1e6:.0f} µs",
                    f"{outcome['seconds']:.0f} s",
                ]
            )
    head = ["task", "method", "accuracy on 1,000 fresh sequences [95 %]", "peak memory", "time per token", "training"]
    return markdown(head, rows) + source("demo.json", "demo_recall.json")


@table
def truncation() -> str:
    """Cosine and relative error of truncated BPTT and of Carry by segment."""
    results = load("truncation_bias.json")["results"]
    segments = (1, 4, 16, 64)
    rows = []
    for name, label in (("tbptt", "truncated BPTT"), ("carry", "`Carry`")):
        for result in results:
            found = [one(result["rows"], segment=n) for n in segments]
            cells = [f"{r[f'{name}_cosine']:.3f} ({short(r[f'{name}_relative_error'])})" for r in found]
            rows.append([f"{label}, {'GRU' if result['cell'] == 'gru' else 'Elman'}", *cells])
    return markdown(["segment", *map(str, segments)], rows) + source("truncation_bias.json")


@picture("truncation_bias.json")
def truncation_bias(path: Path) -> None:
    """Cosine and relative error over the segment length."""
    bench("truncation_bias").plot(load("truncation_bias.json")["results"], path)


@table
def byte_stream() -> str:
    """A million bytes: bits per byte and memory, by seed."""
    runs = load("byte_stream.json")["runs"]
    rows = []
    for seed in sorted({run["seed"] for run in runs}):
        cells = []
        for method in ("rtrl", "tbptt"):
            run = one(runs, method=method, seed=seed)
            cells.append(f"{run['bits_per_byte']:.3f} ({run['bits_per_byte_by_tenth'][-1]:.3f})")
        least, most = one(runs, method="rtrl", seed=seed)["memory_least_and_most_since"]
        memory = f"{least / 2**20:.1f} to {most / 2**20:.1f} MiB, {percent(most / least - 1, 2)}"
        rows.append([str(seed), *cells, memory])
    head = [
        "seed",
        "sparse RTRL",
        "truncated BPTT, same segment",
        "RTRL: resident set from 10,000 bytes on, and its spread",
    ]
    return markdown(head, rows) + source("byte_stream.json")


@picture("byte_stream.json")
def bytes_and_memory(path: Path) -> None:
    """Bits per byte and memory over a million bytes."""
    bench("byte_stream").plot(load("byte_stream.json")["runs"], path)


# Approximations (docs/methods.md)


@table
def approximations() -> str:
    """Cosine to the exact gradient, and what is kept."""
    record = load("approximations.json")
    names = {"snap1": "SnAp-1", "rflo": "RFLO", "uoro": "UORO", "truncated": "truncated BPTT"}
    rows = []
    for row in record["rows"]:
        if row["segment"] in (1, 4, 16):
            kept = row["kept_bytes"]
            cells = [f"{min(row['mean_cosine_second_half'][m], 1):.3f}, {mebibytes(kept[m])}" for m in names]
            rows.append([str(row["segment"]), mebibytes(kept["exact"]), *cells])
    head = ["steps per segment", "exact keeps", *names.values()]
    return markdown(head, rows) + source("approximations.json")


@picture("approximations.json")
def approximation_cosines(path: Path) -> None:
    """Cosines along the stream and over segment lengths."""
    record = load("approximations.json")
    options = record["options"]
    bench("approximations").draw(record["rows"], options["hidden_size"], options["batch"], str(path))


# Diagonal cells (docs/diagonal.md)


@table
def stacks() -> str:
    """How close the per-layer rule comes to the joint gradient."""
    names = {"lru": "LRU", "elstm": "element-wise LSTM", "retention": "retention"}
    rows = []
    results = load("stack_approximation.json")["results"]
    for cell, label in names.items():
        for result in (r for r in results if r["cell"] == cell):
            for row in result["rows"]:
                if row["segment"] in (1, 16):
                    pairs = [
                        f"{row[f'{m}_cosine_all']:.3f} ({row[f'{m}_cosine_cells']:.3f})" for m in ("per_layer", "tbptt")
                    ]
                    sizes = [mebibytes(result[f"{kind}_bytes"]) for kind in ("per_layer", "joint")]
                    rows.append([f"{result['depth']} {label}", str(row["segment"]), *pairs, *sizes])
    head = ["layers", "segment", "per-layer approximation", "truncated BPTT", "it keeps", "the joint influence"]
    return markdown(head, rows) + source("stack_approximation.json")


@picture("diagonal_learning.jsonl")
def diagonal_curves(path: Path) -> None:
    """Learning curves of diagonal cells."""
    bench("diagonal_learning").draw(load("diagonal_learning.jsonl"), str(path))


@table
def diagonal_speed() -> str:
    """Processor time per token of diagonal cells, and memory."""
    columns = ["forward(1)", "tbptt(1)", "rtrl(1), no loss", "rtrl(1)", "forward(64)", "tbptt(64)", "rtrl(64)"]
    rows = load("diagonal_cpu.json")
    lines = []
    for row in rows:
        times = [f"{row['seconds_per_token'][name] * 1e3:.2f}" for name in columns]
        sizes = [f"{row[name] / 1e6:.1f}" for name in ("influence_bytes", "resident_growth_bytes")]
        lines.append([row["cell"], str(row["width"]), str(row["batch"]), *times, *sizes])
    head = ["cell", "width", "batch", *(name.replace("tbptt", "TBPTT").replace("rtrl", "RTRL") for name in columns)]

    def between(cell: str, name: str) -> str:
        ratios = [row["ratios"][name] for row in rows if row["cell"] == cell]
        return f"{min(ratios):.1f} to {max(ratios):.1f}"

    said = (
        "\nRTRL(1) forms a gradient of all parameters at every token, as TBPTT(1) does, and takes"
        f" {between('lru', 'rtrl(1) / tbptt(1)')} times as long for LRU and"
        f" {between('retention', 'rtrl(1) / tbptt(1)')} times for retention. A step that no loss asks for takes"
        f" {between('lru', 'rtrl(1), no loss / forward(1)')} forward passes of LRU and"
        f" {between('retention', 'rtrl(1), no loss / forward(1)')} of retention.\n"
    )
    return markdown([*head, "P, MB", "grown, MB"], lines) + source("diagonal_cpu.json") + said


# Speed (docs/performance.md)

CONTESTANTS = {
    "rtrl-64": "RTRL, segment 64",
    "rtrl-suggested": "RTRL, suggested segment",
    "rtrl-8": "RTRL, segment 8",
    "rtrl-1": "RTRL, segment 1, a commit at every step",
    "rtrl-token": "RTRL, gradient and step of Adam at every token",
    "rtrl-64-user-cell": "RTRL, segment 64, a cell without fused pass",
    "bptt": "BPTT, eager",
    "bptt-compiled": "BPTT, compiled",
    "bptt-checkpointed": "BPTT, checkpointed",
    "tbptt-64": "TBPTT(64)",
    "jacrev": "`vmap` of `torch.func.jacrev`",
}


def _ratios(config: str, batch: int) -> str:
    rows = [r for r in load("compare_cpu.json")["rows"] if (r["config"], r["batch"]) == (config, batch)]
    lengths = sorted({row["length"] for row in rows})
    lines = []
    for name, label in CONTESTANTS.items():
        found = {row["length"]: row for row in rows if row["contestant"] == name}
        if not found:
            continue
        cells = []
        for length in lengths:
            row = found.get(length)
            if row is None:
                cells.append("")
            elif row["status"] != "ran":
                cells.append(row["status"])
            else:
                # A ratio is a median over turns, which needs a run of BPTT in each.
                turns = min(row["runs"], one(rows, contestant="bptt", length=length)["runs"])
                cells.append(f"{short(row['ratio_to_bptt'])}{'¹' if turns == 1 else f' ({turns})'}")
        peak = found.get(lengths[-1], {}).get("peak_bytes")
        lines.append([label, *cells, mebibytes(peak) if peak else ""])
    eager = [one(rows, contestant="bptt", length=length)["microseconds_per_token"] for length in lengths]
    lines.append(["eager BPTT, µs per token", *(f"{time:.0f}" for time in eager), ""])
    head = [f"{config}, batch {batch}", *(f"{length:,} steps" for length in lengths)]
    return markdown([*head, f"peak memory at {lengths[-1]:,}"], lines)


@table
def compare() -> str:
    """Time per token over that of eager BPTT, by contestant and length."""
    tables = [_ratios("A", 1), _ratios("A", 16), _ratios("B", 1)]
    note = "In brackets: turns that the median is taken over. ¹ One run of each, no median: a hint, not a measurement."
    return "\n".join(tables) + source("compare_cpu.json", note=note)


@table
def compare_long() -> str:
    """Memory at a million steps."""
    rows = load("compare_cpu_long.json")["rows"]
    most = max(row["length"] for row in rows)
    long = one(rows, length=most, contestant="rtrl-64")
    bptt = one(rows, length=most, contestant="bptt")
    per_step = one(rows, length=4096, contestant="bptt")["peak_bytes"] / 4096
    lines = [
        ["RTRL, segment 64, after 4,096 steps of that run", mebibytes(long["peak_bytes_at_4096"])],
        [f"the same after {most:,} steps", mebibytes(long["peak_bytes"])],
        ["time per token, one run", f"{long['microseconds_per_token']:.0f} µs"],
        [
            "eager BPTT, not run: by what its shorter run took",
            f"{bptt['predicted_seconds'] / 60:.0f} minutes, {per_step * most / 2**30:.0f} GiB",
        ],
    ]
    return markdown([f"{most:,} steps, A, batch 1, one thread", "growth of the resident set"], lines) + source(
        "compare_cpu_long.json"
    )


@picture("compare_cpu.json")
def compare_lengths(path: Path) -> None:
    """Time per token and memory over the length."""
    bench("compare").plot(load("compare_cpu.json")["rows"], path)


@table
def operator_calls() -> str:
    """Operator calls per step, from a text record."""
    lines = []
    for line in load("operator_calls_cpu.txt"):
        found = re.match(r"(\S+) +([\d.]+) calls and +([\d.]+) views", line)
        if found:
            lines.append([CONTESTANTS[found[1]], found[2], found[3]])
    return markdown(["", "operator calls per step", "views"], lines) + source("operator_calls_cpu.txt")


@table
def segments() -> str:
    """How many times faster per step Carry is than the textbook."""
    rows = list(load("carry_cpu.json")["rows"])
    for line in load("carry_cpu_256.txt"):
        cells = line.split()
        if cells[0] != "cell":
            row = dict(zip(("cell", "hidden", "batch", "kind", "segment"), cells, strict=False))
            numbers = {key: int(row[key]) for key in ("hidden", "batch", "segment")}
            rows.append({**row, **numbers, "microseconds_per_step": float(cells[5])})
    rows += load("carry_cpu_256_gru_16.json")["rows"]
    lengths = (1, 16, 64, 256)
    lines = []
    keys = sorted({(r["cell"], -r["hidden"], -r["batch"]) for r in rows}, reverse=False)
    for cell, hidden, batch in keys:
        here = [r for r in rows if (r["cell"], -r["hidden"], -r["batch"]) == (cell, hidden, batch)]
        book = one(here, kind="textbook")
        ours = {r["segment"]: r for r in here if r["kind"] == "carry"}
        cut = {r["segment"]: r for r in here if r["kind"] == "tbptt"}
        cells = [
            f"{book['microseconds_per_step'] / ours[n]['microseconds_per_step']:.1f}" if n in ours else ""
            for n in lengths
        ]
        times = [f"{kind[64]['microseconds_per_step'] / 1e3:.1f}" for kind in (ours, cut)]
        peaks = [r["peak_bytes"] / r["influence_bytes"] for r in ours.values() if r.get("peak_bytes")]
        memory = f"{min(peaks):.2f} to {max(peaks):.2f}" if peaks else ""
        if peaks:
            memory += f" ({book['peak_bytes'] / book['influence_bytes']:.2f})"
        name = "GRU" if cell == "gru" else "Elman"
        lines.append([f"{name} {-hidden}, {-batch}", *cells, *times, memory])
    head = ["cell, hidden size, batch", *(f"segment {n}" for n in lengths)]
    head += ["ms per step at 64", "truncated BPTT", "peak memory over the influence (textbook)"]
    return markdown(head, lines) + source(
        "carry_cpu.json",
        "carry_cpu_256.txt",
        "carry_cpu_256_gru_16.json",
        note="The commit is that of the last run that added rows.",
    )


@picture("carry_cpu.json")
def segment_times(path: Path) -> None:
    """Time per step over the segment length."""
    bench("carry").plot(load("carry_cpu.json")["rows"], path)


@table
def registered() -> str:
    """What the command line offers, from where it is registered."""
    from sparse_rtrl.cells.registry import CELLS
    from sparse_rtrl.cli.experiment import METHODS
    from sparse_rtrl.training.corpora import CORPORA
    from sparse_rtrl.training.tasks import TASKS

    def first_line(kind: type) -> str:
        return (kind.__doc__ or "").partition("\n")[0].rstrip(".")

    rows = [("--method", name, method.meaning) for name, method in METHODS.items()]
    rows += [("--cell", name, first_line(cell.kind)) for name, cell in CELLS.items()]
    rows += [("--task", name, first_line(task)) for name, task in TASKS.items()]
    rows += [("--task", name, f"Predict {corpus.meaning}") for name, corpus in CORPORA.items()]
    return markdown(["option", "value", "what it is"], [[f"`{a}`", f"`{b}`", c] for a, b, c in rows])


@table
def metrics() -> str:
    """What a run logs."""
    from sparse_rtrl.training.metrics import METRICS

    return markdown(["metric", "what it says"], [[f"`{m.name}`", m.meaning] for m in METRICS.values()])


@table
def cost_of_verify() -> str:
    """Time with the default sample and with every segment compared, over that without comparisons."""
    rows = []
    kept = load("verify_carry_cpu.json")["rows"]
    for hidden in (32, 128):
        for segment in (1, 16, 64):
            for batch in (1, 16):
                here = {"hidden": hidden, "segment": segment, "batch": batch}
                never, sample, always = (
                    one(kept, kind=kind, **here)["microseconds_per_step"]
                    for kind in ("carry-never", "carry", "carry-always")
                )
                rows.append([f"Carry, GRU {hidden}", str(batch), str(segment), never, sample, always])
    kept = load("verify_slots_cpu.json")["rows"]
    for batch in (1, 16):
        never, sample, always = (
            one(kept, contestant=name, batch=batch)["microseconds_per_token"] * batch
            for name in ("rtrl-64-unverified", "rtrl-64", "rtrl-64-verified")
        )
        rows.append(["RTRL, slot cell A", str(batch), "64", never, sample, always])
    head = ["", "streams", "segment", "no comparisons, µs per step", "a sample", "every segment"]
    told = [[*row[:3], f"{row[3]:,.0f}", *(f"{value / row[3] - 1:+.1%}" for value in row[4:])] for row in rows]
    return markdown(head, told) + source("verify_carry_cpu.json", "verify_slots_cpu.json")


@table
def sleeping_experts() -> str:
    """Influence work with the planner and without."""
    rows = load("lazy_cpu.json")["rows"]
    lines = []
    for experts in sorted({row["experts"] for row in rows}):
        here = {"slots": 4, "experts": experts, "step_every": 64}
        uniform, zipf = (one(rows, **here, routing=routing) for routing in ("uniform", "zipf"))
        lines.append(
            [
                str(experts),
                f"{uniform['eager_ms']:.1f} ms",
                f"{uniform['planner_ms']:.1f} ms ({uniform['planner_over_eager']:.2f})",
                f"{zipf['planner_ms']:.1f} ms ({zipf['planner_over_eager']:.2f})",
                "eager" if uniform["plan"] == "eager" else "merged products",
            ]
        )
    head = ["experts", "eager", "planner, uniform routing (over eager)", "planner, Zipf routing", "the planner chose"]
    return markdown(head, lines) + source("lazy_cpu.json", note=f"{len(rows)} configurations are there.")


@picture("lazy_cpu.json")
def sleeping_expert_times(path: Path) -> None:
    """Influence work over the number of experts."""
    bench("lazy").plot(load("lazy_cpu.json")["rows"], str(path))


@table
def influence_update() -> str:
    """Time of the compiled update over that of a matrix product."""
    rows = load("influence_update_cpu.json")["rows"]
    shapes = list(dict.fromkeys((row["w"], row["r"], row["columns"]) for row in rows))
    lines = []
    for batch in sorted({row["batch"] for row in rows}):
        cells = [one(rows, w=w, r=r, columns=n, batch=batch)["ratio"] for w, r, n in shapes]
        lines.append([str(batch), *(f"{ratio:.2f}" for ratio in cells)])
    head = ["batch", *(f"w = {w}, r = {r}, N = {n:,}" for w, r, n in shapes)]
    return markdown(head, lines) + source("influence_update_cpu.json")


# Pictures


def bench(name: str) -> Any:
    """A script of ``bench/``, for its drawing."""
    folder = str(ROOT / "bench")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def save(figure: Any, path: Path) -> None:
    """Write a picture."""
    figure.savefig(path, dpi=130)


def digest(records: Iterable[str]) -> str:
    """What a picture carries about its records."""
    found = hashlib.sha256()
    for name in records:
        found.update((RESULTS / name).read_bytes())
    return found.hexdigest()


def digest_in(path: Path) -> str | None:
    """The digest that a picture carries; None if there is no picture or no digest in it."""
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get("records")


def stamp(path: Path, value: str) -> None:
    """Put a digest into a picture, in 256 colours, which makes it small."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("records", value)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256)
    small.save(path, pnginfo=info, optimize=True)


# Comparing and rewriting


def pages() -> list[Path]:
    """README and every page of the docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def rewritten(text: str) -> str:
    """A page with every table as the records have it.

    Raises:
        KeyError: for a marker whose name no table has.
    """
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2]]() + found[4], text)


def differences(write: bool) -> list[str]:
    """What differs from the records, one line each; rewritten if asked."""
    text_of = {path: path.read_text() for path in pages()}
    return different_tables(text_of, write) + different_pictures(text_of, write)


def different_tables(text_of: dict[Path, str], write: bool) -> list[str]:
    """Tables of pages that differ from the records."""
    found, used = [], set()
    for path, text in text_of.items():
        place = path.relative_to(ROOT)
        marks = [match for match in BLOCK.finditer(text)]
        if len(marks) != text.count("<!-- figures:"):
            found.append(f"{place}: a table must end with <!-- end -->")
        for match in marks:
            used.add(match[2])
            if match[2] not in TABLES:
                found.append(f"{place}: no table is called {match[2]}; there are {', '.join(TABLES)}")
            elif match[3] != TABLES[match[2]]():
                found.append(f"{place}: {match[2]} differs from its records")
        if write and all(match[2] in TABLES for match in marks):
            path.write_text(rewritten(text))
    return found + [f"no page has the table {name}" for name in TABLES if name not in used]


def different_pictures(text_of: dict[Path, str], write: bool) -> list[str]:
    """Pictures that no page shows, or that are of other records."""
    found = []
    for name, (records, draw) in DRAWN.items():
        path = PICTURES / f"{name}.png"
        if not any(path.name in text for text in text_of.values()):
            found.append(f"no page has the picture {path.name}")
        if digest_in(path) != digest(records):
            found.append(f"{path.relative_to(ROOT)} is not of its records {', '.join(records)}")
            if write:
                path.parent.mkdir(exist_ok=True)
                draw(path)
                stamp(path, digest(records))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Compare or rewrite; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite what differs")
    options = parser.parse_args(arguments)
    found = differences(options.write)
    if options.write:
        print(*found, sep="\n")
        found = differences(False)  # what rewriting could not mend
    print(*found, sep="\n", file=sys.stderr)
    if found and not options.write:
        print("python tools/figures.py --write rewrites tables and pictures", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
