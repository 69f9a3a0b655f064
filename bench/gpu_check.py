"""Everything that takes a GPU, in one command: ``python -m bench.gpu_check``, or ``make gpu-check``.

Builds the compiled parts, runs the tests of the operations on the device, measures the roofs of the device (copy
bandwidth, float32 and TF32 rates of large matrix products), then the kernels beside the plain PyTorch reference and
``torch.compile`` of it, then whole learning steps beside BPTT (``--memory-end`` adds the length at which BPTT runs out
of the card's memory, and RTRL over twice that). Writes ``bench/results/<gpu>-<date>.json`` and a plot. It needs torch,
triton, nvcc and pytest, and no network; the plot needs matplotlib and is left out without it.

A time is reported only for code whose result was compared with float64 in the same run. ``--dry-run`` goes through all
of it on a CPU except the launches: the launchers run up to the launch, the reference then stands in for the kernel, and
no times are reported.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from bench import gpu_learning
from sparse_rtrl import triton_kernels
from sparse_rtrl.ops import reference
from sparse_rtrl.ops.triton_backend import WITHOUT_PRECISION
from sparse_rtrl.triton_kernels import launch

ROOT = Path(__file__).parent.parent
TESTS = {"tests/ops/test_triton.py": "pytest", "tests/ops/test_cuda.py": "hypothesis"}
"""Files with tests that run on the device, and the package that each needs; without it a file is left out."""

SHAPES = ((32, 64, 128, 8192), (8, 128, 256, 32768), (64, 32, 64, 4096), (1, 64, 128, 8192))
"""``(B, w, r, N)`` of the influence update."""

DIAGONALS = (
    (16, 2048, 2048, torch.complex64, False),
    (16, 2048, 2048, torch.complex64, True),
    (16, 4096, 2048, torch.float32, False),
    (16, 2**22, 1, torch.float32, False),
)
"""``(B, R, J)`` of the update of a diagonal recurrence, its dtype, and whether it forms the gradient."""

TAU = 1
ERROR_BOUND = 4.0
"""Error against float64 that a kernel may have, over that of the reference in float32."""


def describe_machine(device: torch.device) -> dict[str, str]:
    """Hardware, versions and commit."""
    git = "git describe --always --dirty"
    commit = subprocess.run(git, shell=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    nvcc = subprocess.run("nvcc --version | tail -1", shell=True, capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
        "driver": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "nvcc": nvcc or "not found",
        "commit": commit or "unknown",
    }


def median_seconds(function: Callable[[], None], repeats: int) -> float:
    """Median time of a call on the GPU, each between two events, after two calls that do not count.

    Before each call the second-level cache is overwritten, and the GPU waits until the host has queued the call.
    """
    for _ in range(2):
        function()
    cache = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        torch.cuda._sleep(10_000_000)  # clock cycles, some milliseconds
        first.record()
        function()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
    return statistics.median(times)


def measure_roofs(device: torch.device, dry_run: bool) -> dict[str, float | None]:
    """Bytes per second of a copy (reads and writes), and operations per second of large float32 products."""
    entries, side = (2**10, 64) if dry_run else (2**28, 8192)
    source = torch.randn(entries, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    product = torch.empty_like(a)
    work = {"copy": 8.0 * entries, "ieee": 2.0 * side**3, "tf32": 2.0 * side**3}
    roofs: dict[str, float | None] = {}
    allowed = torch.backends.cuda.matmul.allow_tf32
    for name, amount in work.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        call = (
            functools.partial(target.copy_, source)
            if name == "copy"
            else functools.partial(torch.mm, a, b, out=product)
        )
        call()
        if name == "copy" and not torch.equal(source, target):
            raise RuntimeError("the copy whose bandwidth is measured went wrong")
        roofs[name] = None if dry_run else amount / median_seconds(call, 20)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    # Three products of TF32 numbers make one of float32 numbers.
    roofs["tf32x3"] = None if roofs["tf32"] is None else roofs["tf32"] / 3
    return roofs


def make_update(batch: int, w: int, r: int, columns: int, device: torch.device) -> list[Any]:
    """Arguments of an influence update with loss row and factors; repeated, it neither grows nor dies out fast."""
    generator = torch.Generator().manual_seed(0)
    slot_size = w // 2
    num_slots = r // slot_size
    slots = torch.stack([torch.randperm(num_slots, generator=generator) for _ in range(batch)])
    every, m = torch.arange(batch), 32

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    arguments = [
        torch.empty(0),
        randn(batch, w, r) / r**0.5,
        slots[:, :2].contiguous(),
        slots,
        randn(batch, r),
        every,
        every,
        [randn(batch, w, TAU, m) / 8],
        [randn(batch, TAU, columns // m)],
        [0],
    ]
    moved = to(arguments, None, device)
    moved[0] = torch.randn(batch, num_slots * slot_size + 1, columns, device=device)
    return moved


def make_diagonal(
    batch: int, rows: int, columns: int, dtype: torch.dtype, loss: bool, device: torch.device
) -> list[Any]:
    """Arguments of an update of a diagonal recurrence that forgets, with the gradient if there is a loss."""

    def randn(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    P, decay, delta = randn(batch, rows, columns), randn(batch, rows), randn(batch, rows, TAU)
    arguments = [P, 0.9 * decay / decay.abs(), delta, randn(batch, TAU, columns, dtype=dtype.to_real())]
    return [*arguments, randn(rows, columns), randn(batch, rows)] if loss else arguments


def to(value: Any, dtype: torch.dtype | None, device: torch.device) -> Any:
    """Copies of arguments on a device, floating-point tensors in a dtype."""
    if isinstance(value, list):
        return [to(v, dtype, device) for v in value]
    if isinstance(value, torch.Tensor):
        if dtype is not None and value.is_complex():
            return value.to(device, dtype.to_complex(), copy=True)
        return value.to(device, dtype if value.is_floating_point() else None, copy=True)
    return value


def update_cost(batch: int, w: int, r: int, columns: int) -> tuple[float, float]:
    """Bytes of influence that must move, and floating-point operations."""
    return 4.0 * batch * columns * (r + w + 2), 2.0 * batch * columns * (r * (w + 1) + w * TAU)


def ring_of(arguments: list[Any], capacity: int) -> list[Any]:
    """A ring of segments that all are the map of an update, and starts with a gap of the whole ring."""
    _, Jh, write, support, u, streams, groups = arguments[:7]
    rows, order = write.sort(dim=1)
    cols, col_order = support.sort(dim=1)
    batch, kw, ks = len(Jh), write.shape[1], support.shape[1]
    size = Jh.shape[2] // ks
    blocks = Jh.view(batch, kw, size, ks, size)
    blocks = blocks.gather(1, order.view(batch, kw, 1, 1, 1).expand_as(blocks))
    blocks = blocks.gather(3, col_order.view(batch, 1, 1, ks, 1).expand_as(blocks)).reshape(Jh.shape)
    u = u.view(batch, ks, size).gather(1, col_order.unsqueeze(-1).expand(-1, -1, size)).flatten(1)
    ring = [part.unsqueeze(0).repeat(capacity, *[1] * part.dim()) for part in (rows, cols, blocks, u)]
    count = torch.tensor(capacity, device=Jh.device)
    return [*ring, count, streams, groups, torch.zeros_like(groups), size]


def replay(P: torch.Tensor, rows: Any, cols: Any, blocks: Any, loss_rows: Any, count: Any, *rest: Any) -> None:
    """The reference of a catch-up whose gap is the whole ring for every matrix."""
    streams, groups = rest[:2]
    for n in range(len(rows)):
        reference.influence_update_(P, blocks[n], rows[n], cols[n], loss_rows[n], streams, groups, [], [], [])


def cases(device: torch.device, dry_run: bool) -> Any:
    """What is measured: name, shape, kernel, reference, arguments, bytes and operations."""
    for shape in SHAPES:
        batch, w, r, columns = (min(shape[0], 2), *shape[1:3], 32) if dry_run else shape
        arguments = make_update(batch, w, r, columns, device)
        cost = update_cost(batch, w, r, columns)
        sizes = {"B": batch, "w": w, "r": r, "N": columns}
        yield "influence_update_", sizes, triton_kernels.influence_update_, reference.influence_update_, arguments, cost
    batch, w, r, columns = (1, 256, 512, 64) if dry_run else (4, 512, 1024, 16384)
    arguments = make_update(batch, w, r, columns, device)
    sizes = {"B": batch, "w": w, "r": r, "N": columns}
    name, cost = "segment update", update_cost(batch, w, r, columns)
    yield name, sizes, triton_kernels.influence_update_, reference.influence_update_, arguments, cost
    batch, w, r, columns, gap = (1, 64, 128, 64, 3) if dry_run else (32, 64, 128, 8192, 16)
    update = make_update(batch, w, r, columns, device)
    hidden = update[0].shape[1] - 1
    cost = (8.0 * batch * columns * (hidden + 1), gap * 2.0 * batch * columns * r * (w + 1))
    sizes = {"B": batch, "w": w, "r": r, "N": columns, "H": hidden, "gap": gap}
    yield "catch_up_", sizes, triton_kernels.catch_up_, replay, [update[0], *ring_of(update, gap)], cost
    u = torch.randn(batch, hidden, device=device)
    cost = (4.0 * batch * columns * (hidden + 2), 2.0 * batch * columns * hidden)
    sizes = {"B": batch, "N": columns, "H": hidden}
    yield "loss_row_", sizes, triton_kernels.loss_row_, reference.loss_row_, [update[0], u, update[6]], cost
    for batch, rows, columns, dtype, loss in DIAGONALS:
        if dry_run:
            batch, rows, columns = min(batch, 2), min(rows, 8), min(columns, 16)
        arguments = make_diagonal(batch, rows, columns, dtype, loss, device)
        numbers, parts = batch * rows * columns, 2 if dtype.is_complex else 1
        # Of rows as short as one entry, what belongs to the row counts too; g is read and written once.
        beside = batch * rows * (3 if loss else 2) if columns == 1 else 0
        moved = float(dtype.itemsize * (2 * numbers + beside + (2 * rows * columns if loss else 0)))
        cost = (moved, parts**2 * 2.0 * numbers * (1 + loss) + parts * 2.0 * numbers * TAU)
        sizes = {"B": batch, "R": rows, "J": columns, "dtype": str(dtype).removeprefix("torch."), "loss": loss}
        yield "diagonal_update_", sizes, triton_kernels.diagonal_update_, reference.diagonal_update_, arguments, cost


@functools.cache
def compiled(plain: Callable[..., None], backend: str) -> Callable[..., None]:
    """A baseline compiled by torch, for each shape anew."""
    return torch.compile(plain, backend=backend, dynamic=False)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.to(exact.dtype) - exact).norm() / exact.norm())


def measure(
    case: tuple[Any, ...], precision: str, roofs: dict[str, float | None], repeats: int, dry_run: bool
) -> dict[str, Any]:
    """Check a kernel and its baselines against float64, then time those whose result is right."""
    name, sizes, kernel, plain, arguments, (moved, operations) = case
    P, rest = arguments[0], arguments[1:]
    device = P.device
    exact = to(arguments, torch.float64, device)
    plain(*exact)
    expected = exact[0]
    options = {} if name in WITHOUT_PRECISION else {"precision": precision}

    def ours(P: torch.Tensor, *rest: Any) -> None:
        kernel(P, *rest, **options)
        if dry_run:  # nothing was launched
            plain(P, *rest)

    contestants = {
        "kernel": ours,
        "reference": plain,
        "torch.compile": compiled(plain, "eager" if dry_run else "inductor"),
    }
    errors, results = {}, {}
    for label, function in contestants.items():
        start = P.clone()
        function(start, *rest)
        errors[label] = relative_error(start, expected)
        results[label] = start
    again = P.clone()
    ours(again, *rest)
    # TF32 has 10 bits; that precision is measured, but never a candidate for the default.
    bound = 2e-3 if precision == "tf32" else max(ERROR_BOUND * errors["reference"], torch.finfo(torch.float32).eps)
    checked = {label: error <= bound for label, error in errors.items()}
    checked["kernel"] &= torch.equal(again, results["kernel"])
    times: dict[str, float | None] = dict.fromkeys(contestants)
    for label, function in contestants.items():
        if checked[label] and not dry_run:
            work = P.clone()
            times[label] = median_seconds(functools.partial(function, work, *rest), repeats)
    rate, copy = roofs[precision], roofs["copy"]
    roof = None if rate is None or copy is None else max(moved / copy, operations / rate)
    took = times["kernel"]
    return {
        "name": name,
        "shape": sizes,
        "dtype": str(P.dtype).removeprefix("torch."),
        "precision": precision,
        "median_seconds": took,
        "bytes": moved,
        "flops": operations,
        "fraction_of_roof": roof / took if roof is not None and took is not None else None,
        "baseline_seconds": {label: times[label] for label in contestants if label != "kernel"},
        "error_against_float64": errors,
        "checked": checked,
        "bitwise_repeatable": torch.equal(again, results["kernel"]),
    }


def run_command(command: list[str], planned_only: bool, **environment: str) -> int | None:
    """Run a command in the repository, with the package importable from there, or only say which."""
    print("+", *(f"{name}={value}" for name, value in environment.items()), " ".join(command), flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return None if planned_only else subprocess.run(command, cwd=ROOT, env=environment).returncode


def print_row(row: dict[str, Any]) -> None:
    shape = " ".join(f"{k}={v}" for k, v in row["shape"].items())
    text = f"{row['name']:18} {shape:36} {row['precision']:7} error {row['error_against_float64']['kernel']:.1e}"
    if row["median_seconds"] is not None:
        speedups = [
            f"{seconds / row['median_seconds']:.2f} x {label}"
            for label, seconds in row["baseline_seconds"].items()
            if seconds is not None
        ]
        text += f" {row['median_seconds'] * 1e6:9.1f} us, {row['fraction_of_roof']:4.0%} of the roof; "
        text += "faster than: " + ", ".join(speedups)
    elif not all(row["checked"].values()):
        text += f" not timed, the result was not right: {row['checked']}"
    print(text, flush=True)


def plot(rows: list[dict[str, Any]], path: Path) -> bool:
    """Fraction of the roof of every row as bars; False if matplotlib is not there."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [f"{r['name']} {tuple(r['shape'].values())} {r['precision']}" for r in rows]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.3 * len(rows)), layout="constrained")
    axes.barh(labels, [r["fraction_of_roof"] or 0.0 for r in rows])
    axes.axvline(0.8, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlim=(0, 1.1), xlabel="fraction of the measured roof")
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Run the check; the exit status is 0 if the build, the tests and every comparison were right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="everything but the launches, on a CPU")
    parser.add_argument("--out", type=Path, help="JSON file; the default names the GPU and the date")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--skip-tests", action="store_true", help="neither build nor run the tests")
    parser.add_argument("--memory-end", action="store_true", help="run BPTT until the memory is used up; minutes")
    options = parser.parse_args(arguments)
    dry_run = options.dry_run
    if not dry_run and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is available to torch: use --dry-run to go through the steps on a CPU")
    if dry_run:
        launch.run = lambda kernel, programs, arguments, **constants: None
        launch.check_device = lambda P: None
    device = torch.device("cpu" if dry_run else "cuda")
    machine = describe_machine(device)
    status: dict[str, int | None] = {}
    if not options.skip_tests:
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        status["build"] = run_command(build, dry_run, SPARSE_RTRL_CPP="1", SPARSE_RTRL_CUDA="1")
        load = "import sys; from sparse_rtrl.ops import dispatch as d; sys.exit(d.compiled_problem or d.cuda_problem)"
        status["load"] = run_command([sys.executable, "-c", load], dry_run)
        found = [name for name, package in TESTS.items() if importlib.util.find_spec(package)]
        if len(found) < len(TESTS):
            print(f"left out, a package is missing: {', '.join(TESTS.keys() - found)}")
        collect = ["--collect-only", "-qq"] if dry_run else []
        status["tests"] = run_command([sys.executable, "-m", "pytest", *collect, *found], False)
    roofs = measure_roofs(device, dry_run)
    print("roofs:", {name: f"{value:.3g}" for name, value in roofs.items() if value is not None})
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    date = datetime.date.today().isoformat()
    gpu = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    out = options.out or ROOT / "bench" / "results" / f"{gpu}-{date}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "machine": machine,
        "date": date,
        "dry_run": dry_run,
        "status": status,
        "roofs": roofs,
        "rows": rows,
    }
    report["failures"] = failures
    for case in cases(device, dry_run):
        for precision in ("ieee",) if case[0] in WITHOUT_PRECISION else launch.PRECISIONS:
            try:
                rows.append(measure(case, precision, roofs, options.repeats, dry_run))
                print_row(rows[-1])
            except Exception as error:  # one kernel that cannot run must not cost the measurements of the others
                failures.append(f"{case[0]} {case[1]} {precision}: {error!r}")
                print(failures[-1], flush=True)
            out.write_text(json.dumps(report, indent=1) + "\n")
    try:
        report["learning"] = gpu_learning.measure(device, dry_run)
        print(*report["learning"], sep="\n")
        if options.memory_end and not dry_run:
            report["memory_end"] = gpu_learning.where_bptt_ends(device)
            print(report["memory_end"])
    except Exception as error:
        failures.append(f"learning steps: {error!r}")
        print(failures[-1], flush=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    picture = out.with_suffix(".png")
    print(f"wrote {out}" + (f" and {picture}" if plot(rows, picture) else "; no plot, matplotlib is not installed"))
    wrong = [row for row in rows if not all(row["checked"].values())]
    wrong += [row for row in report.get("learning", []) if not row["checked"]]
    return int(bool(any(status.values()) or failures or wrong))


if __name__ == "__main__":
    started = time.perf_counter()
    exit_status = main()
    print(f"{time.perf_counter() - started:.0f} s")
    sys.exit(exit_status)
