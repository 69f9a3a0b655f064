"""Operator calls per token of every contestant of ``compare.py``: what Python and the dispatcher have to get through.

``python bench/operator_calls.py --config A --batch 1``. Counts are exact and do not depend on how busy a machine is.
Views are counted apart: they cost a call, but touch no data.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from compare_methods import CONFIGURATIONS, METHODS, Stream
from torch.utils._python_dispatch import TorchDispatchMode

LENGTH = 128


class Calls(TorchDispatchMode):
    """Counts the operators that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts["views" if func.is_view else func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count(name: str, config: str, batch: int) -> Counter[str]:
    """Operator calls of one sequence of ``LENGTH`` steps, after one that does not count."""
    method, stream = METHODS[name](config, batch), Stream(batch)
    method.run(stream, LENGTH)
    with Calls() as calls:
        method.run(stream, LENGTH)
    return calls.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(CONFIGURATIONS), default="A")
    parser.add_argument("--batch", type=int, default=1)
    # What a compiled graph or a functional transform runs is no operator call.
    counted = [name for name in METHODS if name not in ("bptt-compiled", "jacrev")]
    parser.add_argument("--contestants", nargs="+", choices=counted, default=counted)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.contestants:
        counts = count(name, options.config, options.batch)
        views = counts.pop("views", 0)
        most = ", ".join(f"{op} {number / LENGTH:.1f}" for op, number in counts.most_common(6))
        print(f"{name:20}{sum(counts.values()) / LENGTH:8.1f} calls and {views / LENGTH:6.1f} views per step; {most}")


if __name__ == "__main__":
    main()
