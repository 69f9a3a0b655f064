"""Cosine to the exact gradient of the per-layer approximation of stacks, and of truncated BPTT, by segment length.

``python bench/stack_approximation.py --out bench/results/stack_approximation.json``. Stacks of diagonal cells predict
the bytes of the standard library's source files; after some training by the per-layer rule, parameters are fixed and
the gradient of the loss over a stretch of text is taken three ways: BPTT through all of it in float64 (which is what
``Carry(stack)`` gives, at the cost of the joint influence), ``PerLayerApproximation``, and truncated BPTT, the latter
two with segments of ``n`` steps.
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
from torch.utils import _pytree as pytree

from sparse_rtrl import Carry, DiagonalCell, DiagonalStack, ELSTMCell, LRUCell, PerLayerApproximation, RetentionCell
from sparse_rtrl.cli.environment import describe_environment

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from char_stream import BYTES, segments, text

CELLS: dict[str, Callable[[int], DiagonalCell]] = {
    "lru": lambda width: LRUCell(width, width, width),
    "elstm": lambda width: ELSTMCell(width, width, width, forget_bias=2.0),
    "retention": lambda width: RetentionCell(width, 4, width // 4, width),
}


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    """Sum in nats over ``logits (n, B, BYTES)`` and ``y (n, B)``."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")


def one_hot(x: Tensor, like: Tensor) -> Tensor:
    return nn.functional.one_hot(x, BYTES).to(like.dtype)


def gradients(stack: DiagonalStack) -> dict[str, Tensor]:
    return {n: p.grad.double().flatten() for n, p in stack.named_parameters() if p.grad is not None}


def truncated(stack: DiagonalStack, x: Tensor, y: Tensor, length: int) -> dict[str, Tensor]:
    """Gradient by BPTT within segments of ``length`` steps; the whole one if that is all of it."""
    stack.zero_grad()
    state = stack.initial_state(x.shape[1])
    for start in range(0, len(x), length):
        state = pytree.tree_map(Tensor.detach, state)
        inputs = one_hot(x[start : start + length], stack.input.weight)
        logits, state = stack.unroll(inputs, state)
        loss_of(logits, y[start : start + length]).backward()
    return gradients(stack)


def per_layer(stack: DiagonalStack, x: Tensor, y: Tensor, length: int) -> dict[str, Tensor]:
    """Gradient by the per-layer approximation."""
    stack.zero_grad()
    learner = PerLayerApproximation(stack, x.shape[1])
    for start in range(0, len(x), length):
        logits = learner.unroll(one_hot(x[start : start + length], stack.input.weight))
        loss_of(logits, y[start : start + length]).backward()
    return gradients(stack)


def cosine(found: dict[str, Tensor], exact: dict[str, Tensor], prefixes: tuple[str, ...]) -> float:
    """Cosine over the parameters whose names begin with one of ``prefixes``."""
    names = [name for name in exact if name.startswith(prefixes)]
    a, b = (torch.cat([g[name] for name in names]) for g in (found, exact))
    return float(torch.dot(a, b) / a.norm() / b.norm())


def measure(cell: str, depth: int, options: argparse.Namespace) -> dict:
    """Train a stack by the per-layer rule, then compare gradients at fixed parameters."""
    torch.manual_seed(0)
    stack = DiagonalStack(BYTES, [CELLS[cell](options.width) for _ in range(depth)], BYTES)
    learner = PerLayerApproximation(stack, options.batch)
    optimizer = torch.optim.Adam(stack.parameters(), lr=2e-3)
    bits = []
    for x, y in segments(options.train_bytes, options.batch, 16):
        loss = loss_of(learner.unroll(one_hot(x, stack.input.weight)), y)
        (loss / x.numel()).backward()
        nn.utils.clip_grad_norm_(stack.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bits.append(float(loss.detach()) / x.numel() / 0.6931)
    unseen = text(options.train_bytes + options.batch * (options.steps + 1))[options.train_bytes :]
    streams = unseen.view(options.batch, -1).T
    x, y = streams[:-1], streams[1:]
    exact = truncated(copy.deepcopy(stack).double(), x, y, len(x))
    recurrent = tuple(f"cells.{layer}." for layer in range(depth))
    rows = []
    for length in options.lengths:
        row: dict = {"segment": length}
        for name, take in (("per_layer", per_layer), ("tbptt", truncated)):
            found = take(stack, x, y, length)
            row[f"{name}_cosine_all"] = cosine(found, exact, ("",))
            row[f"{name}_cosine_cells"] = cosine(found, exact, recurrent)
            row[f"{name}_cosine_first_cell"] = cosine(found, exact, recurrent[:1])
            row[f"{name}_cosine_last_cell"] = cosine(found, exact, recurrent[-1:])
        rows.append(row)
        print(cell, depth, {name: round(value, 4) for name, value in row.items()}, flush=True)
    carry = Carry(stack)
    state = stack(one_hot(x[0], stack.input.weight), carry(stack.initial_state(options.batch)))[1]
    return {
        "cell": cell,
        "depth": depth,
        "bits_per_byte": sum(bits[-50:]) / len(bits[-50:]),
        "per_layer_bytes": learner.kept_bytes,
        "joint_bytes": carry.estimate(state).kept_bytes,
        "rows": rows,
    }


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--depth", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--train-bytes", type=int, default=24_000)
    parser.add_argument("--steps", type=int, default=256, help="length of the stretch of text")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = [measure(cell, depth, options) for cell in options.cell for depth in options.depth]
    if options.out:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        settings = {k: v for k, v in vars(options).items() if k != "out"}
        out = {
            "environment": describe_environment(),
            "commit": commit.stdout.strip(),
            "options": settings,
            "results": results,
        }
        options.out.write_text(json.dumps(out, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
