"""Kill a run with SIGKILL at random moments, resume it each time, and compare with a run that nobody disturbed.

Everything that decides the outcome is compared bit for bit: parameters, optimizer, influence, tree, random states,
position in the stream, and the metrics. The killed run saves every 0.05 s, in the middle of batches and of windows, the
other one at its beginning and end only.

    python tools/kill_resume.py             # 20 kills, every life a process of its own: `sparse-rtrl train --resume`
    python tools/kill_resume.py --fork --kills 4   # lives forked from this process: no start-up time
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparse_rtrl.cli import commands
from sparse_rtrl.cli.experiment import RunConfig
from sparse_rtrl.training import runlog
from sparse_rtrl.training.checkpoint import SUFFIX, load_checkpoint

# Segments of 4 steps, commits every 12, sequences that are no multiple of either, and a tree of 3 commits: checkpoints
# fall into the middle of batches and windows, while experts sleep, expire and wake.
CONFIG = RunConfig(
    slot_size=8,
    num_slots=3,
    num_experts=8,
    top_k=1,
    task_options={"min_distance": 5},
    length=37,
    start_length=9,
    batch_size=3,
    segment=4,
    commit_every=12,
    buffer=3,
    catch_up="replay",
    weight_decay=0.01,
    log_every=3,
)
SAVE_SECONDS = 0.05
OF_THE_CLOCK = ("seconds", "tokens_per_second", "memory_bytes")


class Life:
    """A process that trains the run in a folder until it is done, or dead."""

    def __init__(self, folder: Path, fork: bool) -> None:
        self.folder = folder
        self.events = len(runlog.read_lines(folder / "events.jsonl"))
        arguments = [sys.executable, "-m", "sparse_rtrl.cli.app", "train", "--resume", str(folder)]
        self.process: Any
        if fork:
            self.process = multiprocessing.get_context("fork").Process(target=_live, args=(folder,))
            self.process.start()
        else:
            self.process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.is_alive() if hasattr(self.process, "is_alive") else self.process.poll() is None

    def wait_for_training(self) -> None:
        """Wait until it has begun or resumed."""
        while self.alive() and len(runlog.read_lines(self.folder / "events.jsonl")) <= self.events:
            time.sleep(0.002)

    def end(self) -> int:
        """Wait for its end; its exit status."""
        if hasattr(self.process, "join"):
            self.process.join()
            return self.process.exitcode
        self.process.communicate()
        return self.process.returncode


def _live(folder: Path) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        commands.resume(folder, {})


def make_run(folder: Path, config: RunConfig) -> Path:
    """Write the folder of a run that has not begun."""
    folder.mkdir(parents=True)
    commands.write_config(folder, config)
    return folder


def differences(one: Any, two: Any, where: str = "") -> list[str]:
    """Where two nested containers differ in any bit, what the clock says apart."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return [d for k in one if k not in OF_THE_CLOCK for d in differences(one[k], two[k], f"{where}/{k}")]
    if isinstance(one, (list, tuple)) and type(one) is type(two) and len(one) == len(two):
        return [d for i, (a, b) in enumerate(zip(one, two, strict=True)) for d in differences(a, b, f"{where}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        same = one.dtype == two.dtype and torch.equal(one, two)
    else:
        same = one == two or (one != one and two != two)
    return [] if same else [where]


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a finished run has come to."""
    newest = sorted((folder / "checkpoints").glob(f"update-*{SUFFIX}"))[-1]
    state = load_checkpoint(newest)
    metrics = runlog.read_lines(folder / "metrics.jsonl")
    model = torch.load(folder / "model.pt", weights_only=True)
    return {"training": state["training"], "interval": state["interval"], "metrics": metrics, "model": model}


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fork", action="store_true", help="fork the lives instead of starting processes")
    options = parser.parse_args(arguments)
    draw = random.Random(options.seed)
    config = replace(CONFIG, updates=options.updates, checkpoint_minutes=1e6)
    with tempfile.TemporaryDirectory() as root:
        undisturbed = make_run(Path(root) / "undisturbed", config)
        life = Life(undisturbed, options.fork)
        life.wait_for_training()
        began = time.perf_counter()
        if status := life.end():
            raise RuntimeError(f"the undisturbed run ended with status {status}")
        seconds = time.perf_counter() - began

        killed = make_run(Path(root) / "killed", replace(config, checkpoint_minutes=SAVE_SECONDS / 60))
        half_written = 0
        for number in range(1, options.kills + 1):
            life = Life(killed, options.fork)
            life.wait_for_training()
            # Half of the run in all, on average: it must not end before the last kill.
            time.sleep(draw.uniform(0, seconds / options.kills))
            if life.alive():
                os.kill(life.process.pid, signal.SIGKILL)
            if (status := life.end()) != -signal.SIGKILL:
                raise RuntimeError(f"kill {number}: the run had ended with status {status}; more --updates are needed")
            left_over = list((killed / "checkpoints").glob(f".*{SUFFIX}.new"))
            half_written += bool(left_over)
            newest = max((killed / "checkpoints").glob(f"update-*{SUFFIX}"), default=None)
            print(f"kill {number}: newest checkpoint {newest and newest.name}" + ", one half written" * bool(left_over))
        life = Life(killed, options.fork)
        if status := life.end():
            raise RuntimeError(f"the last life ended with status {status}")
        expected, found = outcome(undisturbed), outcome(killed)
        assert math.isfinite(expected["metrics"][-1]["loss"])
        wrong = differences(expected, found)
    print(f"{options.kills} kills, {half_written} while a checkpoint was written: {len(wrong)} differences {wrong[:5]}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
