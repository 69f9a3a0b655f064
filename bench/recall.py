"""Multi-query associative recall: pairs of keys and values among distractors, asked for long after they were shown.

``python bench/recall.py --out bench/results/recall.json``. Every sequence shows pairs of a key and a value, then asks
for all of them in another order; a segment and more of distractors lie between. All methods see every input beside the
one before (token shift) and train on the same number of sequences, whose length grows to ``--length``, by
``sparse-rtrl train``; they are scored on 1,000 fresh ones of 512 and 4,096 steps:

- *slots*: the slot cell with as many slots as keys, which writes the least used slot and reads all, by sparse RTRL in
  segments of 8 steps (the influence is moved every ``--commit-every`` steps, which changes nothing in the gradient), by
  truncated BPTT with the same segments, and by BPTT, whose gradient is that of RTRL and whose cost is less while
  sequences are short;
- *without allocation* (slots written by importance, half of them at a step), *without all reads* (half of the slots
  are read), *without softmax* (sigmoid weights), *without shift*: the same slot cell with one thing changed, by BPTT,
  whose gradient is that of RTRL;
- *retention*, *lru*, *gru*: linear attention, a linear recurrent unit and a GRU of as many state entries, by BPTT
  through the whole sequence. Retention takes the shift in its keys.

Chance is one in four. A model that knows which values were shown, but not to which key each belongs, gets 0.53 with
four pairs: the expected share of the value shown most often. Called again, the script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from training_runs import accuracy_of, save, train

from sparse_rtrl.cli.slot_picture import trace_slots

SLOTS = {
    "write-slots": 1,
    "num-experts": 2,
    "top-k": 1,
    "write-to": "least_used",
    "read-weights": "softmax",
}
METHODS = {
    "slots-rtrl": {"method": "rtrl", **SLOTS},
    "slots-tbptt": {"method": "tbptt", **SLOTS},
    "slots-bptt": {"method": "bptt", **SLOTS},
    "slots-without-allocation": {"method": "bptt", **SLOTS, "write-to": "important", "write-slots": 0.5},
    "slots-without-all-reads": {"method": "bptt", **SLOTS, "read-slots": 0.5},
    "slots-without-softmax": {"method": "bptt", **SLOTS, "read-weights": "sigmoid"},
    "slots-without-shift": {"method": "bptt", **SLOTS, "token-shift": False},
    "retention-bptt": {"method": "bptt", "cell": "retention", "decay": 1.0},
    "lru-bptt": {"method": "bptt", "cell": "lru"},
    "gru-bptt": {"method": "gru-bptt"},
}
"""Options of ``sparse-rtrl train``; 0.5 stands for half of the slots."""


def settings_of(name: str, pairs: int, seed: int, options: argparse.Namespace) -> dict[str, object]:
    """Options of ``sparse-rtrl train`` for one run."""
    slots = options.num_slots or 2 * pairs
    settings: dict[str, object] = {"task": "recall", "pairs": pairs, "seed": seed, "segment": options.segment}
    settings |= {"num-slots": slots, "read-slots": slots, "slot-size": 16}
    settings |= {"length": options.length, "batch-size": options.batch, "token-shift": True}
    settings |= {"updates": options.updates, "curriculum-updates": max(1, round(0.8 * options.updates))}
    if METHODS[name]["method"] == "rtrl":
        settings["commit-every"] = options.commit_every
    settings |= METHODS[name]
    if "num-experts" in settings:
        settings |= {"num-experts": options.num_experts, "top-k": options.top_k}
    if options.start_length:
        settings["start-length"] = options.start_length
    settings |= {part: slots // 2 for part in ("read-slots", "write-slots") if settings.get(part) == 0.5}
    if not settings["token-shift"]:
        del settings["token-shift"]
    return settings | {"eval-sequences": options.sequences, "evaluate-at": options.evaluate_at}


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--pairs", type=int, nargs="+", default=[4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--segment", type=int, default=8)
    parser.add_argument("--commit-every", default="auto")
    parser.add_argument("--num-slots", type=int, help="two for each pair if absent")
    parser.add_argument("--num-experts", type=int, default=2)
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--start-length", type=int, help="steps of the first sequences; the least there are if absent")
    parser.add_argument("--length", type=int, default=128, help="steps of the longest sequences trained on")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--evaluate-at", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--sequences", type=int, default=1000, help="of each of these lengths")
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="trainings at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/recall"), help="folder of the runs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trace", type=Path, help="JSON file: what the slots of the first run do over one sequence")
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
    if options.trace:
        folder = options.runs / "{}-{}-{}".format(*wanted[0])
        trace = trace_slots(folder, json.loads((folder / "config.json").read_text()))
        content = {name: value.tolist() for name, value in asdict(trace).items()}
        options.trace.write_text(json.dumps({"run": folder.name, "commit": runs[0]["commit"], **content}) + "\n")
    return runs


if __name__ == "__main__":
    main()
