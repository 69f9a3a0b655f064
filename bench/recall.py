"""Multi-query associative recall: pairs of keys and values among distractors, asked for long after they were shown.

``python bench/recall.py --methods retention-rtrl retention-tbptt --out FILE`` and ``--methods slots-rtrl slots-tbptt
gru-bptt --pairs 4 --out FILE``; both results are in ``bench/results/recall.json``. Every sequence shows pairs of a key
and a value, then asks for all of them in another order; a segment and more of distractors lie between. Trained on short
sequences by ``sparse-rtrl train``, scored on 1,000 fresh ones of 512 and 4,096 steps. The cells:

- *slots*: the slot cell, by sparse RTRL and by truncated BPTT with the same segments of 8 steps (the influence is moved
  every 32 steps, the cheapest here, which changes nothing in the gradient);
- *gru*: a GRU of as many state entries, by BPTT through the whole sequence;
- *retention*: linear attention with token shift, which stores pairs of consecutive inputs by its making. Even random
  keys and values are a memory, so that truncated BPTT, whose gradient does not reach what was stored, can do well too.

Chance is one in four. A model that knows which values were shown, but not to which key each belongs, gets 0.53 with
four pairs: the expected share of the value shown most often. Called again, the script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from training_runs import accuracy_of, save, train

METHODS = {
    "slots-rtrl": {"method": "rtrl", "commit-every": "auto"},
    "slots-tbptt": {"method": "tbptt"},
    "gru-bptt": {"method": "gru-bptt"},
    "retention-rtrl": {"method": "rtrl", "cell": "retention", "decay": 1.0, "token-shift": True},
    "retention-tbptt": {"method": "tbptt", "cell": "retention", "decay": 1.0, "token-shift": True},
}


def settings_of(name: str, pairs: int, seed: int, options: argparse.Namespace) -> dict[str, object]:
    """Options of ``sparse-rtrl train`` for one run."""
    shortest = 4 * pairs + options.segment + 1
    settings: dict[str, object] = {"task": "recall", "pairs": pairs, "seed": seed, "segment": options.segment}
    if name.startswith("retention"):  # a step costs little: longer sequences, on which noise in the keys adds up
        slots, updates, length, batch = 4, options.retention_updates, 4 * shortest, 16
    else:
        slots, updates, length, batch = 2 * pairs, options.updates, round(1.6 * shortest), 32
    settings |= {"num-slots": slots, "read-slots": slots // 2, "write-slots": slots // 2, "slot-size": 16}
    settings |= {"length": length, "batch-size": batch}
    settings |= {"updates": updates, "curriculum-updates": max(1, round(0.8 * updates))}
    return settings | METHODS[name] | {"eval-sequences": options.sequences, "evaluate-at": options.evaluate_at}


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--pairs", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--segment", type=int, default=8)
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--retention-updates", type=int, default=400)
    parser.add_argument("--evaluate-at", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--sequences", type=int, default=1000, help="of each of these lengths")
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="trainings at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/recall"), help="folder of the runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    runs: list[dict] = []

    def carry_out(name: str, pairs: int, seed: int) -> tuple[dict, dict]:
        folder = options.runs / f"{name}-{pairs}-{seed}"
        return train(folder, settings_of(name, pairs, seed, options)), accuracy_of(folder)

    wanted = [(name, pairs, seed) for pairs in options.pairs for name in options.methods for seed in options.seeds]
    with ThreadPoolExecutor(options.parallel) as pool:
        futures = [pool.submit(carry_out, *run) for run in wanted]
        for (name, pairs, seed), future in zip(wanted, futures, strict=True):
            begun, accuracy = future.result()
            runs.append({"run": name, "pairs": pairs, "seed": seed, **begun, "accuracy": accuracy})
            told = ", ".join(f"{a['value']:.1%} at {int(length):,}" for length, a in accuracy.items())
            print(f"{pairs} pairs, {name:15} seed {seed}: {told}", flush=True)
            if options.out:  # after every run, so that nothing is lost
                save(options.out, options, runs)
    return runs


if __name__ == "__main__":
    main()
