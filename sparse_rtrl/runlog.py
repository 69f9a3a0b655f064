"""A named folder per run with its configuration, metrics as CSV, and TensorBoard event files."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from sparse_rtrl.training import Progress

METRICS = ("update", "length", "loss", "accuracy", "tokens", "seconds", "tokens_per_second")
"""Columns of ``metrics.csv``."""


def create_run_folder(root: Path, name: str | None, default_name: str) -> Path:
    """Create the folder of a new run.

    Args:
        root: folder that holds all runs.
        name: name of the run; None for ``default_name`` with date and time.
        default_name: first part of the automatic name.

    Raises:
        ValueError: if a run of this name exists already.
    """
    folder = root / (name or f"{default_name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (folder / "config.json").exists():
        raise ValueError(f"name must be new, but {folder} already holds a run")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path: Path, content: Any) -> None:
    """Write plain values as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with equal keys as CSV; nothing if there are none."""
    if not rows:
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


class RunLog:
    """Writes the metrics of a training while it runs.

    Args:
        folder: folder of the run.
        config: its configuration, written to ``config.json``.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        write_json(folder / "config.json", config)
        self._file = (folder / "metrics.csv").open("w", newline="")
        self._csv = csv.DictWriter(self._file, fieldnames=METRICS)
        self._csv.writeheader()
        self._events = SummaryWriter(str(folder))
        self.rows: list[dict[str, float]] = []

    def update(self, progress: Progress) -> None:
        """Log one update."""
        row = {
            "update": progress.update,
            "length": progress.length,
            "loss": progress.tally.mean_loss,
            "accuracy": progress.tally.accuracy,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "tokens_per_second": progress.tokens_per_second,
        }
        self.rows.append(row)
        self._csv.writerow(row)
        self._file.flush()
        for name in ("loss", "accuracy", "length", "tokens_per_second"):
            self._events.add_scalar(f"train/{name}", row[name], progress.update)

    def evaluation(self, update: int, length: int, accuracy: float) -> None:
        """Log the accuracy on fresh sequences of one length."""
        self._events.add_scalar(f"evaluation/accuracy_length_{length}", accuracy, update)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
