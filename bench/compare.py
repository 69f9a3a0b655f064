"""Time per token and peak memory of exact sparse RTRL beside BPTT and its kin, over lengths, in one run.

``python bench/compare.py --config A --batch 1 --lengths 64 256 1024 4096 --out bench/results/compare_cpu.json``

Every contestant lives in a process of its own, forked before any work. They run the same cell on the same stream, with
a loss at every step, and take turns; ratios to eager BPTT are medians over the turns. The first run of a length is
that whose peak memory counts: the growth of the resident set from before anything of the method was built, after a
rehearsal on a tiny cell. Times come from the runs after it, unless those would take longer than ``--seconds``.

No time is reported of a contestant whose gradient was not right. Up to 4096 steps every gradient is compared with BPTT
in float64, that of TBPTT with TBPTT in float64. Beyond, what goes on step by step is compared after 4096 steps, and all
exact gradients of the whole length with each other.

A contestant that does not get the memory of ``--memory`` GiB, or would take longer than ``--time-limit`` seconds by its
time per token so far, has that as its result. Rows that ``--out`` has already are not measured again, so an
interrupted command is repeated as it is; the longest length takes about an hour. ``--plot`` draws the rows.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import itertools
import json
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from compare_methods import CONFIGURATIONS, METHODS, POOL, CompiledBPTT, Method, Stream, build_cell, reference_gradient

from sparse_rtrl.cli.environment import describe_environment
from sparse_rtrl.cli.measurement import peak_growth

TOLERANCE = 1e-3  # float32 against float64, relative, of each parameter
AGREEMENT = 3e-2  # of whole gradients beyond the reference's length: a top-k that falls differently moves them
KEYS = ("config", "batch", "threads", "length", "contestant")


class Contestant:
    """The part of a contestant that runs in its own process and answers one request after another."""

    def __init__(self, name: str, config: str, batch: int, threads: int, memory: int) -> None:
        torch.set_num_threads(threads)
        self.name, self.config, self.batch = name, config, batch
        self.stream = Stream(batch)
        self.method: Method | None = None
        self.seconds_per_step = math.nan
        self.peak = 0
        if name == "bptt-compiled":  # compiling takes memory too, but not at the second run
            CompiledBPTT(config, batch).run(self.stream, CompiledBPTT.chunk)
        else:
            tiny = METHODS[name]("tiny", 1)
            tiny.run(Stream(1), tiny.pilot, lambda done: tiny.gradient().numpy())
        memory += status_bytes("VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))

    def reference(self, length: int, truncated: bool) -> Any:
        return reference_gradient(self.config, self.stream, length, truncated).numpy()

    def first(self, length: int, limit: float) -> dict[str, Any]:
        """Build the method anew and run it for the first time, watching memory; None instead of too long a run."""
        self.method = None
        peak_then = 0
        kept: list[torch.Tensor] = []

        def at(done: int) -> None:
            nonlocal peak_then
            if done == POOL < length:
                assert self.method is not None
                peak_then = status_bytes("VmHWM")
                self.method.gradient(kept[0]).mul_(length / POOL)

        def work() -> None:
            self.method = METHODS[self.name](self.config, self.batch)
            # Written to here already, so that keeping a gradient on the way takes no memory then.
            kept.append(torch.ones(sum(p.numel() for p in self.method.cell.parameters()), dtype=torch.float64))
            if math.isnan(self.seconds_per_step):
                if self.timed(self.method.pilot) < 1.0:  # else the first run's overhead does not matter
                    self.timed(self.method.pilot)
            if self.seconds_per_step * length <= limit:
                self.timed(length, at)

        self.peak = peak_growth(work)
        predicted = self.seconds_per_step * length
        if predicted > limit:
            return {"status": "out of time", "predicted_seconds": predicted}
        prefix = {}
        if peak_then:
            prefix = {"gradient": kept[0].numpy(), "peak": self.peak - (status_bytes("VmHWM") - peak_then)}
        return {"status": "ran", "peak": self.peak, "seconds": predicted, "gradient": self.all_of(), "prefix": prefix}

    def all_of(self) -> Any:
        assert self.method is not None
        return self.method.gradient().numpy()

    def timed(self, length: int, at: Any = None) -> float:
        """Seconds of one run over a sequence."""
        assert self.method is not None
        start = time.perf_counter()
        self.method.run(self.stream, length, at)
        seconds = time.perf_counter() - start
        self.seconds_per_step = seconds / length
        if self.peak > 2**30:  # memory that the allocator keeps would be missing for the others
            ctypes.CDLL(None).malloc_trim(0)
        return seconds

    def drop(self) -> None:
        """Give back what the method holds."""
        self.method = None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


def status_bytes(name: str) -> int:
    """A size that the kernel knows of this process: ``VmData``, or ``VmHWM``, the peak of the resident set."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def serve(connection: Connection, *arguments: Any) -> None:
    """Answer the requests of the parent until it says stop."""
    contestant: Any = None
    while True:
        request, *rest = connection.recv()
        if request == "stop":
            return
        try:
            if request == "begin":
                contestant = Contestant(*arguments)
                connection.send("ready")
            else:
                connection.send(getattr(contestant, request)(*rest))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not any(w in str(error) for w in ("memory", "bad_alloc")):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the graph, and there is no memory to answer with
            contestant.drop()
            connection.send({"status": "out of memory", "reason": str(error).splitlines()[0]})


class Remote:
    """The parent's end of a contestant."""

    def __init__(self, *arguments: Any) -> None:
        self.name = arguments[0]
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        """Send a request and wait for the answer; a process that the system killed ran out of memory."""
        try:
            self.connection.send(request)
            return self.connection.recv()
        except (EOFError, BrokenPipeError):
            self.process.join()
            if self.process.exitcode in (-6, -9):  # an allocation failed where nothing caught it
                return {"status": "out of memory", "reason": f"ended by signal {-self.process.exitcode}"}
            raise RuntimeError(f"{self.name} ended with exit status {self.process.exitcode}") from None

    def end(self) -> None:
        """Let the process end, if it has not yet."""
        if self.process.is_alive():
            self.connection.send(("stop",))
        self.process.join()


def gradient_error(found: Any, expected: Any, sizes: list[int]) -> float:
    """Largest relative error of a parameter, ``|g - g_ref| / max(|g_ref|, 1e-3 |g_ref of all parameters|)``."""
    everything, start, worst = float((expected**2).sum()) ** 0.5, 0, 0.0
    for size in sizes:
        part = slice(start, start + size)
        norm = max(float((expected[part] ** 2).sum()) ** 0.5, 1e-3 * everything)
        worst = max(worst, float(((found[part] - expected[part]) ** 2).sum()) ** 0.5 / norm)
        start += size
    return worst


class Comparison:
    """All contestants of one configuration and batch size.

    Args:
        config: one of ``CONFIGURATIONS``.
        batch: streams.
        names: contestants.
        options: of the command line.
    """

    def __init__(self, config: str, batch: int, names: list[str], options: argparse.Namespace) -> None:
        self.config, self.batch, self.options = config, batch, options
        memory = int(options.memory * 2**30)
        self.referee = Remote("bptt", config, batch, options.threads, 2 * memory)  # float64
        self.contestants = [Remote(name, config, batch, options.threads, memory) for name in names]
        self.sizes: list[int] = []

    def begin(self) -> None:
        """Let everyone rehearse and compile, one after the other."""
        for contestant in (self.referee, *self.contestants):
            contestant.ask("begin")
        self.sizes = [parameter.numel() for parameter in build_cell(self.config).parameters()]

    def end(self) -> None:
        for contestant in (self.referee, *self.contestants):
            contestant.end()

    def measure(self, length: int, names: set[str]) -> list[dict[str, Any]]:
        """One row for each of some contestants at one length."""
        options, rows, running = self.options, [], []
        checked = min(length, POOL)
        references: dict[bool, Any] = {}
        whole: dict[str, Any] = {}
        for contestant in self.contestants:
            if contestant.name not in names:
                continue
            row: dict[str, Any] = {
                "config": self.config,
                "batch": self.batch,
                "threads": options.threads,
                "length": length,
                "contestant": contestant.name,
            }
            rows.append(row)
            answer = contestant.ask("first", length, options.time_limit)
            print(f"{self.config} batch {self.batch} length {length} {contestant.name}: {answer['status']}", flush=True)
            row["status"] = answer["status"]
            if answer["status"] != "ran":
                row |= {name: answer[name] for name in ("reason", "predicted_seconds") if name in answer}
                row["memory_limit_gib"] = round(options.memory, 1)
                continue
            row["peak_bytes"], seconds = answer["peak"], answer["seconds"]
            exact = METHODS[contestant.name].exact
            if exact not in references:
                references[exact] = self.referee.ask("reference", checked, not exact)
                if isinstance(references[exact], dict):
                    raise SystemExit(f"the float64 reference does not fit into --memory: {references[exact]['reason']}")
            prefix = answer["prefix"]
            gradient = answer["gradient"] if length == checked else prefix.get("gradient")
            agree = True
            if gradient is not None:
                row["relative_error"] = gradient_error(gradient, references[exact], self.sizes)
                row["check"] = f"float64 after {checked} steps"
                agree = row["relative_error"] < TOLERANCE
            if prefix:
                row["peak_bytes_at_4096"] = prefix["peak"]
            if length > checked and exact:
                for other, theirs in whole.items():
                    deviation = gradient_error(answer["gradient"], theirs, [len(theirs)])
                    if deviation > row.get("deviation", -1.0):
                        row["deviation"], row["deviation_from"] = deviation, other
                agree = agree and row.get("deviation", 0.0) < AGREEMENT
                whole[contestant.name] = answer["gradient"]
            if not agree:
                row["status"] = "wrong"
                continue
            if gradient is None and len(whole) < 2:
                row["check"] = "none but the others'"
            row["times"] = [] if seconds <= 2 * options.seconds else [seconds]
            if not row["times"]:
                running.append((contestant, row))
        for turn in range(options.rounds):
            for contestant, row in running if turn % 2 == 0 else reversed(running):
                if len(row["times"]) == turn and sum(row["times"]) < options.seconds:
                    row["times"].append(contestant.ask("timed", length))
        for contestant in self.contestants:
            if contestant.process.is_alive():
                contestant.ask("drop")
        times = {row["contestant"]: row.pop("times", []) for row in rows}
        for row in rows:
            mine = times[row["contestant"]]
            if not mine:
                continue
            row["runs"] = len(mine)
            row["microseconds_per_token"] = statistics.median(mine) / (length * self.batch) * 1e6
            for name, baseline in (("ratio_to_bptt", "bptt"), ("ratio_to_compiled", "bptt-compiled")):
                if times.get(baseline):
                    row[name] = statistics.median(a / b for a, b in zip(mine, times[baseline], strict=False))
        return rows


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return (*(row[name] for name in KEYS[:-1]), list(METHODS).index(row["contestant"]))


def save(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Add rows to a JSON file and the CSV file beside it, in place of older ones of the same contestant and sizes."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    new = [row | {"commit": commit} for row in rows]
    merged = sorted({key(row): row for row in old + new}.values(), key=key)
    path.write_text(json.dumps({"machine": describe_environment(), "rows": merged}, indent=1) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in merged for name in row))
        writer.writeheader()
        writer.writerows(merged)
    return merged


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    print("config batch   length  contestant           us/token  / bptt / compiled  peak MiB  error    result")
    for row in sorted(rows, key=key):
        texts = [
            f"{row[name] * scale:{form}}" if name in row else f"{'-':>{form.split('.')[0]}}"
            for name, scale, form in (
                ("microseconds_per_token", 1, "11.1f"),
                ("ratio_to_bptt", 1, "8.2f"),
                ("ratio_to_compiled", 1, "11.2f"),
                ("peak_bytes", 2**-20, "10.1f"),
                ("relative_error", 1, "9.0e"),
            )
        ]
        result = row["status"] if row["status"] != "ran" else row.get("check", "")
        if "predicted_seconds" in row:
            result += f", {row['predicted_seconds']:.0f} s"
        if "deviation" in row:
            result += f"; {row['deviation']:.0e} from {row['deviation_from']}"
        name = f"{row['config']:6}{row['batch']:6}{row['length']:9}  {row['contestant']:18}"
        print(name + "".join(texts) + "  " + result)


def break_even(rows: list[dict[str, Any]], ours: str, theirs: str, value: str) -> float | None:
    """Length where two measured curves cross, between the lengths where both were measured, on logarithmic axes."""
    curves = [
        {row["length"]: row[value] for row in rows if row["contestant"] == name and value in row}
        for name in (ours, theirs)
    ]
    points = [(math.log(n), math.log(curves[1][n] / curves[0][n])) for n in sorted(curves[0].keys() & curves[1].keys())]
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        if y < 0 <= next_y:
            return math.exp(x - y * (next_x - x) / (next_y - y))
    return None


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time per token and peak memory over the length for each configuration, batch size and thread count."""
    import matplotlib
    from matplotlib.figure import Figure

    # A curve needs two lengths.
    lengths: dict[tuple[Any, ...], set[int]] = {}
    for row in rows:
        lengths.setdefault(tuple(row[name] for name in KEYS[:3]), set()).add(row["length"])
    groups = sorted(group for group, some in lengths.items() if len(some) > 1)
    colours = matplotlib.colormaps["tab20"].colors
    figure = Figure(figsize=(12, 4.4 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 2, squeeze=False)
    for (seconds, memory), group in zip(panels, groups, strict=True):
        here = [row for row in rows if tuple(row[name] for name in KEYS[:3]) == group]
        for colour, name in enumerate(METHODS):
            style = {"marker": "o", "markersize": 3, "label": name, "color": colours[2 * colour % 20 + colour // 10]}
            style["linestyle"] = "-" if "rtrl" in name else "--"
            for axes, value, scale in ((seconds, "microseconds_per_token", 1.0), (memory, "peak_bytes", 2**-20)):
                points = sorted((r["length"], r[value] * scale) for r in here if r["contestant"] == name and value in r)
                if points:
                    axes.plot(*zip(*points, strict=True), **style)
        crossing = break_even(here, "rtrl-64", "bptt", "peak_bytes")
        if crossing is not None:
            memory.axvline(crossing, color="gray", linestyle=":")
            label = f" break-even\n {crossing:,.0f} steps"
            memory.annotate(label, (crossing, 0.02), xycoords=("data", "axes fraction"))
        config, batch, threads = group
        title = f"configuration {config}, batch {batch}, {threads} threads"
        seconds.set(ylabel="µs per token", title=title)
        memory.set(ylabel="peak memory, MiB", title=title)
        for axes in (seconds, memory):
            axes.set(xlabel="length of the sequence", xscale="log", yscale="log")
            axes.grid(True, which="major", alpha=0.3)
        memory.legend(*seconds.get_legend_handles_labels(), fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure what is missing, print the table, save and draw; returns the rows of the asked sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", choices=list(CONFIGURATIONS), default=["A"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024, 4096], help="powers of two from 64")
    parser.add_argument("--contestants", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="most timed runs per contestant and length")
    parser.add_argument("--seconds", type=float, default=2.0, help="stop timing a contestant after so long")
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds that one run may be predicted to take")
    parser.add_argument("--memory", type=float, help="GiB that one contestant may have; default: half of what is free")
    parser.add_argument("--again", action="store_true", help="measure also what --out has already")
    parser.add_argument("--out", type=Path, help="JSON file, with a CSV file beside it")
    parser.add_argument("--plot", type=Path, help="PNG file")
    options = parser.parse_args(arguments)
    if any(length < 64 or length & (length - 1) for length in options.lengths):
        parser.error(f"--lengths must be powers of two from 64 on, got {options.lengths}")
    if options.memory is None:
        options.memory = psutil.virtual_memory().available / 2**31
    torch.set_num_threads(1)  # this process forks again for the next sizes: what it computes must start no threads
    # Compilation within each process; a pool of compilers would be forked with threads running.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    lengths = sorted(set(options.lengths))
    rows: list[dict[str, Any]] = []
    if options.out and options.out.exists():
        rows = json.loads(options.out.read_text())["rows"]
    for config in options.config:
        for batch in options.batch:
            sizes = {"config": config, "batch": batch, "threads": options.threads}
            have = set() if options.again else {key(row) for row in rows}
            wanted = {
                length: {
                    name
                    for name in options.contestants
                    if key(sizes | {"length": length, "contestant": name}) not in have
                }
                for length in lengths
            }
            names = [name for name in METHODS if any(name in group for group in wanted.values())]
            if not names:
                continue
            comparison = Comparison(config, batch, names, options)
            comparison.begin()
            for length in lengths:
                measured = comparison.measure(length, wanted[length])
                rows = save(measured, options.out) if options.out else rows + measured
            comparison.end()
    asked = [
        row
        for row in rows
        if row["config"] in options.config
        and row["batch"] in options.batch
        and row["length"] in lengths
        and row["contestant"] in options.contestants
        and row["threads"] == options.threads
    ]
    show(asked)
    if options.plot:
        plot(rows, options.plot)
    return asked


if __name__ == "__main__":
    main()
