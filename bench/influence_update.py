"""Time of the compiled influence update over that of ``torch.mm`` with the same number of operations, in one run.

``python bench/influence_update.py --out bench/results/influence_update_cpu.json``. Alternating repeats, medians; the
faster of the product in the same shape and of a cube of equal size counts, times the number of streams. The columns of
the factors are counted as operations. Every result is compared with the reference before anything is timed.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time

import torch

from sparse_rtrl.ops import dispatch, reference

SHAPES = [(64, 128, 8192), (128, 256, 32768), (32, 64, 4096)]
BATCHES = [1, 16]
TAU = 2


def problem(w: int, r: int, columns: int, batch: int) -> list:
    generator = torch.Generator().manual_seed(0)
    slot_size = w // 2
    num_slots = r // slot_size
    P = torch.randn(batch, num_slots * slot_size + 1, columns, generator=generator)
    slots = torch.stack([torch.randperm(num_slots, generator=generator) for _ in range(batch)])
    every, m = torch.arange(batch), 32
    return [
        P,
        torch.randn(batch, w, r, generator=generator) / r**0.5 / 2,
        slots[:, :2].contiguous(),
        slots,
        None,
        every,
        every,
        [torch.randn(batch, w, TAU, m, generator=generator) / 8],
        [torch.randn(batch, TAU, columns // m, generator=generator)],
        [0],
    ]


def error(arguments: list) -> float:
    """Relative error of one update against the reference in float64, on the first stream."""
    few = [a[:1].clone() if isinstance(a, torch.Tensor) else a for a in arguments[:7]]
    few += [[d[:1].clone() for d in arguments[7]], [z[:1].clone() for z in arguments[8]], arguments[9]]
    exact = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in few[:7]]
    exact += [[d.double() for d in few[7]], [z.double() for z in few[8]], few[9]]
    dispatch.influence_update_(*few)
    reference.influence_update_(*exact)
    return float((few[0].double() - exact[0]).norm() / exact[0].norm())


def seconds(function, repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def measure(w: int, r: int, columns: int, batch: int, rounds: int) -> dict:
    arguments = problem(w, r, columns, batch)
    found_error = error(arguments)
    assert found_error < 1e-6, found_error
    k = r + TAU
    A = torch.randn(w, k)
    Bs = [torch.randn(k, columns) for _ in range(batch)]
    out = torch.empty(w, columns)
    side = round((w * k * columns) ** (1 / 3))
    cube, cube_out = torch.randn(side, side), torch.empty(side, side)
    scale = batch * w * k * columns / side**3

    def same_shape() -> None:
        for B in Bs:
            torch.mm(A, B, out=out)

    times: dict[str, list[float]] = {"update": [], "mm": [], "cube": []}
    for _ in range(rounds + 1):
        times["update"].append(seconds(lambda: dispatch.influence_update_(*arguments)))
        times["mm"].append(seconds(same_shape))
        times["cube"].append(scale * seconds(lambda: torch.mm(cube, cube, out=cube_out)))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    flop = 2.0 * batch * w * k * columns
    return {
        "w": w,
        "r": r,
        "columns": columns,
        "batch": batch,
        "ratio": medians["update"] / min(medians["mm"], medians["cube"]),
        "ratio_same_shape": medians["update"] / medians["mm"],
        "gflops": {name: flop / value / 1e9 for name, value in medians.items()},
        "relative_error": found_error,
    }


def machine() -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    try:
        lines = open("/proc/cpuinfo").read().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    return {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dispatch.select("cpp", torch.device("cpu"), torch.float32)
    rows = []
    print(
        f"{'w':>4} {'r':>4} {'N':>6} {'B':>3} {'ratio':>6} {'same shape':>10} {'update':>7} {'mm':>7} {'cube':>7} GF/s"
    )
    for batch in BATCHES:
        for w, r, columns in SHAPES:
            row = measure(w, r, columns, batch, options.rounds)
            rows.append(row)
            rates = " ".join(f"{row['gflops'][name]:7.1f}" for name in ("update", "mm", "cube"))
            print(
                f"{w:4} {r:4} {columns:6} {batch:3} {row['ratio']:6.3f} {row['ratio_same_shape']:10.3f} {rates}",
                flush=True,
            )
    if options.out:
        with open(options.out, "w") as file:
            json.dump({"machine": machine(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
