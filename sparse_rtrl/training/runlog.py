"""The folder of a run: its configuration, its metrics as JSON lines and TensorBoard events, and what happened to it.

The files of ``runs/NAME/``, where ``NAME`` is also the name of the experiment in ``tensorboard --logdir runs``:

- ``config.json``: the configuration, a ``RunConfig``, and under ``environment`` versions
  and hardware.
- ``metrics.jsonl``: one JSON object per line, see
  :data:`sparse_rtrl.training.metrics.METRICS`. A resumed run cuts off what lies after its
  checkpoint, so that the lines are those of a run without interruption.
- ``events.jsonl``: one JSON object per line, see :data:`EVENTS`; only ever appended to.
- ``events.out.tfevents.*``: the metrics for TensorBoard. The step is the number of updates. A metric that is a number
  has the tag ``train/METRIC``; one that is a list has one tag ``METRIC/INDEX`` per entry; accuracies on fresh sequences
  are ``evaluation/accuracy_length_LENGTH``.
- ``checkpoints/``: see :mod:`sparse_rtrl.training.checkpoint`.
- ``results.json``, ``training.png``, ``model.pt``: written at the end of ``sparse-rtrl train``.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

EVENTS = {
    "started": "the run began",
    "resumed": "the run went on from `checkpoint`; `changed` lists options that differ from before",
    "checkpoint": "`checkpoint` was written, `bytes` large, in `save_seconds`",
    "influence_capped": "the influence was scaled down to `cap`: `times` groups of streams since the last update, the"
    " largest norm being `norm`",
    "interrupted": "`signal` arrived; everything was saved",
    "diverged": "`error` stopped the run at `step`; `checkpoints` are from before it, oldest first",
    "finished": "all updates are done",
}
"""Values of ``event`` in ``events.jsonl``. Every line also has ``update``, ``tokens`` and ``time`` (Unix time)."""

BYTE_CLASSES = 256
"""Classes of a stream whose targets are bytes."""


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
    """Write plain values as indented JSON, whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(new, path)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with equal keys as CSV; nothing if there are none."""
    if not rows:
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; none if it is not there.

    A last line without its end, which a killed process leaves behind, is not read. ``null`` becomes NaN.
    """
    if not path.exists():
        return []
    whole = path.read_text().split("\n")[:-1]
    return [{name: math.nan if value is None else value for name, value in json.loads(line).items()} for line in whole]


def _line(row: dict[str, Any]) -> str:
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return json.dumps(finite) + "\n"


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text("".join(map(_line, rows)))
    os.replace(new, path)


class RunLog:
    """Writes metrics and events of a run while it goes on.

    Args:
        folder: folder of the run.
        resume_at: updates that were done at the checkpoint the run goes on from; later metrics are cut off.
    """

    def __init__(self, folder: Path, resume_at: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        metrics = folder / "metrics.jsonl"
        _write_lines(metrics, (row for row in read_lines(metrics) if row["update"] <= resume_at))
        self._metrics = metrics.open("a")
        self._events = (folder / "events.jsonl").open("a")
        self._board = SummaryWriter(str(folder), purge_step=resume_at + 1 if resume_at else None)

    def metrics(self, row: dict[str, Any]) -> None:
        """Log a line of metrics; its keys are some of :data:`METRICS`."""
        self._metrics.write(_line(row))
        self._metrics.flush()
        update = row["update"]
        for name, value in row.items():
            if isinstance(value, list):
                for index, entry in enumerate(value):
                    self._board.add_scalar(f"{name}/{index}", entry, update)
            elif name != "update" and math.isfinite(value):
                self._board.add_scalar(f"train/{name}", value, update)

    def event(self, event: str, update: int, tokens: int, **details: Any) -> None:
        """Log something that happened; ``event`` is one of :data:`EVENTS`."""
        row = {"event": event, "update": update, "tokens": tokens, "time": time.time(), **details}
        self._events.write(_line(row))
        self._events.flush()

    def evaluation(self, update: int, length: int, accuracy: float) -> None:
        """Log the accuracy on fresh sequences of one length."""
        self._board.add_scalar(f"evaluation/accuracy_length_{length}", accuracy, update)

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._events.close()
        self._board.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
