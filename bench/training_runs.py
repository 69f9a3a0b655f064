"""Trainings by ``sparse-rtrl train``, each in a process and a folder of its own, that go on where they were stopped."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from sparse_rtrl.cli.environment import describe_environment


def train(folder: Path, settings: dict[str, object], environment: dict[str, str] | None = None) -> dict:
    """Carry out one training with its scores, or what is left of it.

    Args:
        folder: folder of the run; nothing is done if it holds results.
        settings: options of ``sparse-rtrl train`` without their dashes; True for a flag, a list for a repeated option.
        environment: further variables of the process.

    Returns:
        The settings, and the commit of the code that began the training.

    Raises:
        ValueError: if the folder is of a training with other settings.
    """
    kept = folder.with_name(f"{folder.name}-settings.json")
    wanted = json.loads(json.dumps(settings, default=str))
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"settings": wanted, "commit": commit()}, indent=1) + "\n")
    begun = json.loads(kept.read_text())
    if begun["settings"] != wanted:
        raise ValueError(f"runs must be a folder for these settings: {folder} was trained with {begun['settings']}")
    if (folder / "results.json").exists():
        return begun
    command = [sys.executable, "-m", "sparse_rtrl.cli.app", "train"]
    if (folder / "config.json").exists():
        command += ["--resume", str(folder)]
    else:
        for name, value in {**settings, "runs": folder.parent, "name": folder.name}.items():
            for one in value if isinstance(value, list) else [value]:
                command += [f"--{name}"] if one is True else [f"--{name}", str(one)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    subprocess.run(command, check=True, env=variables, stdout=subprocess.DEVNULL)
    return begun


def commit() -> str:
    """The commit of the code here; nothing outside of a repository."""
    here = Path(__file__).parent
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()


def accuracy_of(folder: Path) -> dict[str, dict]:
    """Accuracies of a finished run by the length they were scored at, as a string."""
    return json.loads((folder / "results.json").read_text())["accuracy"]


def save(path: Path, options: argparse.Namespace, runs: list[dict]) -> None:
    """Write results with the machine, the commit and the options they came from."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    content = {"machine": describe_environment(), "commit": commit(), "options": settings}
    path.write_text(json.dumps(content | {"runs": runs}, indent=1) + "\n")
