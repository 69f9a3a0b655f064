"""Merges of the circular tree, counted, beside those of a classical tree that refreshes every ancestor at each append.

``python bench/tree_merges.py``: merges per append amortised (at most 1) and the most a query took (at most
``2 log2 L``), for windows of 8 to 4096 segments.
"""

import json
import sys

import torch

from sparse_rtrl import CircularTree


def count(capacity: int) -> dict:
    tree = CircularTree(capacity, 1, 1, 1)
    Jh, slot = torch.full((1, 1, 1), 0.5), torch.zeros(1, 1, dtype=torch.int64)
    most = 0
    for appended in range(2 * capacity + capacity // 2):
        tree.append_segment(Jh, slot, slot, None)
        if appended % max(1, capacity // 16) == 0:
            before = tree.query_merges
            tree.suffix(max(0, tree.count - capacity + appended % 7))
            most = max(most, tree.query_merges - before)
    log = capacity.bit_length() - 1
    assert tree.merges <= tree.count and most <= 2 * log
    return {
        "L": capacity,
        "merges_per_append": tree.merges / tree.count,
        "classical_merges_per_append": log,
        "most_merges_per_query": most,
        "bound_per_query": 2 * log,
    }


def main() -> None:
    rows = []
    print(f"{'L':>5} {'merges/append':>13} {'classical':>9} {'most/query':>10} {'2 log2 L':>8}")
    for power in range(3, 13):
        row = count(1 << power)
        rows.append(row)
        print(
            f"{row['L']:5} {row['merges_per_append']:13.3f} {row['classical_merges_per_append']:9}"
            f" {row['most_merges_per_query']:10} {row['bound_per_query']:8}",
            flush=True,
        )
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
