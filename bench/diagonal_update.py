"""Speed of ``diagonal_update_`` on the CPU beside a copy of the same bytes, in one run.

``python bench/diagonal_update.py --out bench/results/diagonal_update_cpu.json``. A copy of ``P`` into another tensor
reads and writes as many bytes as the update of ``P`` must; the two alternate, and the median of the ratios of
neighbours is taken, as the bandwidth of a shared machine drifts. What else must come from memory counts too: the
gradient where it is formed, and the factors of rows of a single entry. Every result is compared with the reference in
double precision before anything is timed.
"""

import argparse
import itertools
import json
import statistics

import torch
from influence_update import machine, seconds

from sparse_rtrl.ops import dispatch, reference

CASES = (
    # B, R, J, dtype: within the second-level cache, then beyond all caches
    (1, 128, 128, torch.complex64),
    (16, 128, 128, torch.complex64),
    (16, 2048, 512, torch.float32),
    (16, 2048, 512, torch.complex64),
    (1, 4096, 2048, torch.complex64),
    (16, 1024, 512, torch.float64),
    (16, 2**20, 1, torch.float32),
    (16, 2**19, 1, torch.complex64),
    (16, 50_000, 22, torch.complex64),
)
MIB = 2**20


def problem(batch: int, rows: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Arguments of an update that forgets, so that repeats neither grow nor vanish; the last two are of the loss."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    decay = randn(batch, rows)
    return [
        randn(batch, rows, columns),
        0.9 * decay / decay.abs(),
        randn(batch, rows, 1),
        randn(batch, 1, columns, dtype=dtype.to_real()),
        randn(rows, columns),
        randn(batch, rows),
    ]


def error(arguments: list[torch.Tensor], rows: int = 64) -> float:
    """Largest relative error of ``P`` and of the gradient against double precision, on the last rows."""
    few = [a[:, -rows:] if i in (0, 1, 2, 5) else a[-rows:] if i == 4 else a for i, a in enumerate(arguments)]
    exact = [a.to(torch.complex128 if a.is_complex() else torch.float64, copy=True) for a in few]
    reference.diagonal_update_(*exact)
    whole = [a.clone() for a in arguments]
    dispatch.diagonal_update_(*whole)
    found = {0: whole[0][:, -rows:]} | ({4: whole[4][-rows:]} if len(whole) > 4 else {})
    return max(float((f - exact[i]).norm() / exact[i].norm()) for i, f in found.items())


def measure(arguments: list[torch.Tensor], rounds: int) -> dict:
    """Bandwidths of an update, without its last two arguments if the loss is left out."""
    (batch, rows, columns), dtype, loss = arguments[0].shape, arguments[0].dtype, len(arguments) > 4
    found_error = error(arguments)
    assert found_error < (1e-12 if dtype.to_real() == torch.float64 else 1e-5), found_error
    P = arguments[0]
    target = torch.empty_like(P)
    copied = 2 * P.numel() * P.element_size()
    moved = copied
    if loss:
        moved += 2 * arguments[4].numel() * P.element_size()
    if columns == 1:
        moved += (3 if loss else 2) * batch * rows * P.element_size()
    repeats = max(1, 16 * MIB // copied)
    times: dict[str, list[float]] = {"update": [], "copy": []}
    for _ in range(rounds + 1):
        times["update"].append(seconds(lambda: dispatch.diagonal_update_(*arguments), repeats))
        times["copy"].append(seconds(lambda: target.copy_(P), repeats))
    assert torch.equal(target, P)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    rates = {"update": moved / medians["update"], "copy": copied / medians["copy"]}
    pairs = zip(times["update"][1:], times["copy"][1:], strict=True)
    fractions = statistics.quantiles([moved / update / (copied / copy) for update, copy in pairs], n=4)
    return {
        "B": batch,
        "R": rows,
        "J": columns,
        "dtype": str(dtype).removeprefix("torch."),
        "loss": loss,
        "threads": torch.get_num_threads(),
        "megabytes_of_influence": P.numel() * P.element_size() / 1e6,
        "bytes_moved": moved,
        "gigabytes_per_second": {name: rate / 1e9 for name, rate in rates.items()},
        "fraction_of_copy": fractions[1],
        "quartiles": [fractions[0], fractions[2]],
        "relative_error": found_error,
    }


def main() -> None:
    """Measure all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out")
    options = parser.parse_args()
    dispatch.select("cpp", torch.device("cpu"), torch.float32)
    rows = []
    print("threads  B      R    J dtype      loss  MB of P  update    copy GB/s  of copy")
    for case in CASES:
        arguments = problem(*case)
        for threads, loss in itertools.product(options.threads, (False, True)):
            torch.set_num_threads(threads)
            row = measure(arguments if loss else arguments[:4], options.rounds)
            rows.append(row)
            rates = row["gigabytes_per_second"]
            print(
                f"{threads:7} {row['B']:2} {row['R']:7} {row['J']:4} {row['dtype']:10} {'with' if loss else '':4}"
                f" {row['megabytes_of_influence']:8.1f} {rates['update']:7.1f} {rates['copy']:7.1f}"
                f" {row['fraction_of_copy']:13.2f}",
                flush=True,
            )
    if options.out:
        with open(options.out, "w") as file:
            json.dump({"machine": machine(), "rows": rows}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
