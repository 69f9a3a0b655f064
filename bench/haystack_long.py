"""Haystack far beyond the training length: trained by curriculum in segments of 8 steps, scored at a million tokens.

``python bench/haystack_long.py --out bench/results/haystack_long.json``. Sparse RTRL and truncated BPTT train the same
slot cell on the same sequences, whose length grows to 110, with the same segment and number of updates; the key is
always further back than a segment. Both are scored by ``sparse-rtrl train`` on 1,000 fresh sequences of lengths 128 and
10,000, and here on sequences of a million tokens, which are drawn in parts and never held as a whole. Called again, the
script goes on where it was stopped, in a training as in a scoring.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from training_runs import accuracy_of, save, train

from sparse_rtrl.cells.slot_cell import SlotCell
from sparse_rtrl.cli.experiment import RunConfig, build_method
from sparse_rtrl.training.checkpoint import load_checkpoint, save_checkpoint
from sparse_rtrl.training.evaluation import Accuracy
from sparse_rtrl.training.gradient_method import unroll
from sparse_rtrl.training.streams import TaskStream
from sparse_rtrl.training.tasks import Haystack
from sparse_rtrl.training.trainer import Tally

EVALUATION_SEED = 2**31 + 2**30


def trained_cell(folder: Path) -> tuple[SlotCell, RunConfig]:
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("environment")
    config = RunConfig.from_dict(settings)
    cell = build_method(config).model
    cell.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return cell, config  # type: ignore[return-value]


@torch.no_grad()
def score(
    cell: SlotCell,
    stream: TaskStream,
    state: Tensor,
    save: Callable[[Tensor], None] = lambda state: None,
    save_seconds: float = 120.0,
) -> Tally:
    """Run one batch of sequences to its end, from where the stream is, and count the right answers."""
    saved = time.perf_counter()
    for batch in stream:
        outputs, state = unroll(cell, batch.x, state)
        target = batch.target[-1]
        if (target >= 0).all():
            return Tally(0.0, int((outputs[-1].argmax(-1) == target).sum()), len(target))
        if time.perf_counter() - saved >= save_seconds:
            save(state)
            saved = time.perf_counter()
    raise AssertionError("a stream does not end")


def score_long(folder: Path, options: argparse.Namespace) -> dict:
    """Accuracy on sequences of ``options.long_length`` tokens, gone on with from the folder's ``scoring.ckpt``."""
    result, kept = folder / f"accuracy-{options.long_length}.json", folder / "scoring.ckpt"
    if result.exists():
        return json.loads(result.read_text())
    cell, config = trained_cell(folder)
    batch = options.long_sequences
    task = Haystack(options.long_length, batch, seed=EVALUATION_SEED + config.seed, **config.task_options)
    stream, state, seconds = TaskStream(task, options.part), cell.initial_state(batch), 0.0
    if kept.exists():
        saved = load_checkpoint(kept)
        stream.load_state_dict(saved["stream"])
        state, seconds = saved["state"], saved["seconds"]
    began = time.perf_counter() - seconds

    def keep(state: Tensor) -> None:
        done = {"stream": stream.state_dict(), "state": state, "seconds": time.perf_counter() - began}
        save_checkpoint(kept, done)

    tally = score(cell, stream, state, keep)
    accuracy = Accuracy(tally.correct, tally.asked, batch)
    found = {"length": options.long_length, "correct": tally.correct, "sequences": batch, "value": accuracy.value}
    found |= {"interval": list(accuracy.interval), "seconds": time.perf_counter() - began}
    result.write_text(json.dumps(found) + "\n")
    kept.unlink(missing_ok=True)
    return found


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=["rtrl", "tbptt"], default=["rtrl", "tbptt"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--length", type=int, default=110, help="steps at the end of the curriculum")
    parser.add_argument("--segment", type=int, default=8)
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--curriculum-updates", type=int, default=510)
    parser.add_argument("--evaluate-at", type=int, nargs="+", default=[128, 10_000])
    parser.add_argument("--sequences", type=int, default=1000, help="of each of these lengths")
    parser.add_argument("--long-length", type=int, default=1_000_000)
    parser.add_argument("--long-sequences", type=int, default=250)
    parser.add_argument("--part", type=int, default=1000, help="steps of the long sequences that are held at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/haystack_long"), help="folder of the runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs = []
    for seed in options.seeds:
        for method in options.methods:
            folder = options.runs / f"{method}-{seed}"
            settings = {"method": method, "seed": seed, "length": options.length, "segment": options.segment}
            settings |= {"updates": options.updates, "curriculum-updates": options.curriculum_updates}
            train(folder, settings | {"eval-sequences": options.sequences, "evaluate-at": options.evaluate_at})
            results = accuracy_of(folder)
            runs.append({"method": method, "seed": seed, "accuracy": results, "long": score_long(folder, options)})
            told = [f"{accuracy['value']:.1%} at {int(length):,}" for length, accuracy in results.items()]
            told.append(f"{runs[-1]['long']['value']:.1%} at {options.long_length:,}")
            print(f"{method:5} seed {seed}: {', '.join(told)}", flush=True)
            if options.out:  # after every run, so that nothing is lost
                save(options.out, options, runs)
    return runs


if __name__ == "__main__":
    main()
