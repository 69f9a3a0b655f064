"""What a trained slot cell does over one sequence: what its slots hold, which are read and which are written."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from sparse_rtrl.cells.slot_cell import SlotCell
from sparse_rtrl.cli.experiment import RunConfig, build_method, build_task, shifted
from sparse_rtrl.training.checkpoint import CheckpointFolder
from sparse_rtrl.training.tasks import IGNORE, TASKS

STEPS = 96
"""Steps of the sequence, or as many as the shortest sequence of the task has."""


@dataclass(frozen=True)
class SlotTrace:
    """One sequence through a slot cell.

    Attributes:
        tokens: what came in at each step, ``(T,)`` int64.
        target: the class asked for, ``(T,)`` int64, ``IGNORE`` where nothing is.
        answer: the class answered, ``(T,)`` int64.
        norms: norm of the content of every slot after each step, ``(T, S)``.
        reads: slots read, ``(T, S)`` bool.
        writes: norm of what each step changed, ``(T, S)``.
    """

    tokens: Tensor
    target: Tensor
    answer: Tensor
    norms: Tensor
    reads: Tensor
    writes: Tensor


def trained_model(folder: Path, config: RunConfig) -> Any:
    """The model of a run as it ended, or as its newest checkpoint has it; None if nothing was saved.

    Raises:
        CheckpointError: if all checkpoints are damaged.
    """
    model = build_method(config).model
    if (folder / "model.pt").is_file():
        model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
        return model
    found = CheckpointFolder(folder / "checkpoints").load_newest()
    if found is None:
        return None
    model.load_state_dict(found[1]["training"]["trainer"]["model"])
    return model


@torch.no_grad()
def trace_slots(folder: Path, settings: dict[str, Any]) -> SlotTrace | None:
    """Run the model of a run over a fresh sequence of its task.

    Args:
        folder: of the run.
        settings: its ``config.json``.

    Returns:
        What happened; None if it has no slot cell, is no run of a task, or saved no model.
    """
    known = {field.name for field in fields(RunConfig)}
    config = RunConfig.from_dict({name: value for name, value in settings.items() if name in known})
    if config.task not in TASKS:
        return None
    cell = trained_model(folder, config)
    if not isinstance(cell, SlotCell):
        return None
    length = max(STEPS, build_task(config, config.length, 1, 0).min_length)
    batch = next(iter(shifted(config, build_task(config, length, 1, config.seed + 1))))
    state = cell.initial_state(1)
    answers, norms, reads, writes = [], [], [], []
    for x in batch.x:
        output, info, new = cell(x, state)
        answers.append(output.argmax(-1))
        norms.append(torch.linalg.vector_norm(new[0], dim=1))
        reads.append(torch.zeros(cell.num_slots, dtype=torch.bool).index_fill(0, info["idx_slots_read"][0], True))
        writes.append(torch.linalg.vector_norm((new - state)[0], dim=1))
        state = new
    width = batch.x.shape[2] // (2 if config.token_shift else 1)
    tokens = batch.x[:, 0, :width].argmax(-1)
    stacked = (torch.stack(values) for values in (norms, reads, writes))
    return SlotTrace(tokens, batch.target[:, 0], torch.cat(answers), *stacked)


def plot_slots(trace: SlotTrace, title: str) -> Figure:
    """Draw a trace: content as colour, writes as circles that grow with the change, answers on top.

    Args:
        trace: the sequence.
        title: of the picture.
    """
    steps, slots = trace.norms.shape
    figure = Figure(figsize=(max(7.0, 0.16 * steps), 1.6 + 0.25 * slots), layout="constrained")
    axes = figure.subplots()
    mesh = axes.imshow(trace.norms.T.numpy(), aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    figure.colorbar(mesh, ax=axes, label="norm of the content")
    size = trace.writes / trace.writes.max().clamp_min(1e-12)
    at, slot = (size > 0.02).nonzero().T.numpy()
    axes.scatter(at, slot, s=60 * size[at, slot], facecolors="none", edgecolors="tab:red", label="written")
    if bool((~trace.reads).any()):
        at, slot = trace.reads.nonzero().T.numpy()
        axes.scatter(at, slot, s=3, color="black", label="read")
    asked = (trace.target != IGNORE).nonzero().flatten().tolist()
    right = 0
    for t in asked:
        correct = bool(trace.answer[t] == trace.target[t])
        right += correct
        axes.axvline(t, color="tab:green" if correct else "tab:orange", linewidth=1, alpha=0.6)
    axes.set(title=f"{title}: {right} of {len(asked)} answers right", xlabel="step, with its token", ylabel="slot")
    axes.set_xticks(range(steps), [str(int(token)) for token in trace.tokens], fontsize=5)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2, fontsize=7)
    return figure
