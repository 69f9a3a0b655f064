"""Memory over the length of a stream, and the error of the gradient: ``Carry``, BPTT and truncated BPTT.

``python bench/memory.py --out bench/results/memory.json``. A GRU of 32 units reads one stream in segments of 16 steps,
with a loss at every step and no optimizer step, so that all three ways have the same gradient to find. Peak memory is
the growth of the resident set over a run in float32, each in a process of its own, after a run of two segments that
does not count. The error is that of the whole gradient against BPTT through all steps, in float64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from training_runs import commit

from sparse_rtrl import Carry
from sparse_rtrl.cli.environment import describe_environment
from sparse_rtrl.cli.measurement import peak_growth

METHODS = ("carry", "bptt", "tbptt")
INPUT = 8


def gradient(method: str, length: int, hidden: int, segment: int, dtype: torch.dtype) -> Tensor:
    """Gradient ``(N,)`` of the sum of the losses over a stream of ``length`` steps, all parameters in one vector."""
    torch.manual_seed(0)
    cell = nn.GRUCell(INPUT, hidden, dtype=dtype)
    weights = torch.randn(hidden, dtype=dtype)
    cut = {"carry": lambda: Carry(cell), "bptt": lambda: lambda h: h, "tbptt": lambda: torch.Tensor.detach}[method]()
    h = cut(torch.zeros(1, hidden, dtype=dtype))
    kept = []  # losses that wait for one backward pass through everything
    for start in range(0, length, segment):
        x = torch.randn(segment, 1, INPUT, generator=torch.Generator().manual_seed(start)).to(dtype)
        states = []
        for x_t in x:
            h = cell(x_t, h)
            states.append(h)
        loss = torch.stack(states).square().matmul(weights).sum()
        h = cut(h)
        if method == "bptt":
            kept.append(loss)
        else:
            loss.backward()
    if kept:
        torch.stack(kept).sum().backward()
    return torch.cat([p.grad.flatten() for p in cell.parameters()])


def peak(method: str, length: int, hidden: int, segment: int) -> int:
    """Peak memory of a run, bytes above what the process held before; for a process of its own."""
    gradient(method, 2 * segment, hidden, segment, torch.float32)
    return peak_growth(lambda: gradient(method, length, hidden, segment, torch.float32))


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--segment", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256, 1024, 4096, 16384, 65536])
    parser.add_argument("--longest-bptt", type=int, default=16384, help="steps beyond which BPTT is left out")
    parser.add_argument("--longest-compared", type=int, default=4096, help="steps beyond which no error is computed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shape = options.hidden, options.segment
    if options.peak:
        print(peak(options.peak[0], int(options.peak[1]), *shape))
        return []
    rows = []
    for length in options.lengths:
        exact = gradient("bptt", length, *shape, torch.float64) if length <= options.longest_compared else None
        for method in METHODS:
            if method == "bptt" and length > options.longest_bptt:
                continue
            of = ["--hidden", str(shape[0]), "--segment", str(shape[1]), "--peak", method, str(length)]
            run = subprocess.run([sys.executable, __file__, *of], check=True, capture_output=True, text=True)
            row = {"method": method, "length": length, "peak_bytes": int(run.stdout)}
            if exact is not None:
                found = gradient(method, length, *shape, torch.float64)
                row["relative_error"] = float((found - exact).norm() / exact.norm())
            rows.append(row)
            print(row, flush=True)
    if options.out:
        head = {"machine": describe_environment(), "commit": commit()}
        settings = {"hidden": shape[0], "segment": shape[1], "input": INPUT, "streams": 1}
        options.out.write_text(json.dumps(head | {"options": settings, "rows": rows}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
