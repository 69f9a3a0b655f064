"""The page with the table of modules, from what a run found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from comparison import EXACT, STEPS, Outcome
from modules import Case

INTRODUCTION = f"""# Modules of other packages

Written by `make test-ecosystem`; do not edit. Recurrent modules of other packages run through `Carry`, each a few
numbers wide, for {STEPS} steps with a loss at every step, in segments of 1 and of 3 steps. Their gradients are compared
with backpropagation through the whole past by plain autograd.

*Error* is the largest relative error of any parameter's gradient. In float64 it may be {EXACT:.0e}. In float32, and in
float64 with casts to float32, it may be twice that of BPTT in the same arithmetic against float64 (in brackets), and a
rounding unit. *Truncated* is that of truncated BPTT, the larger of the two segment lengths. *Path* says how the
segments were captured: by the row tape (tape), by factors, or, for so many of the parameters, by their dense immediate
Jacobian, which is exact, slower, and noted by a warning. *State* is the shape of its tensors, *streams* how many and in
which dimension.

| module | package | state | streams | result | path | error, 1 step | error, 3 steps | truncated | remark |
|---|---|---|---|---|---|---|---|---|---|
"""


@dataclass
class Row:
    """What a run found of one module.

    Attributes:
        case: the module.
        version: of its package; empty if it is not there.
        outcome: of the comparison; None if there was none.
        batch_dim: dimension of the streams.
        absent: why there was no comparison.
    """

    case: Case
    version: str = ""
    outcome: Outcome | None = None
    batch_dim: int = 0
    absent: str = ""


def page(rows: list[Row]) -> str:
    """The whole page, with the messages of refusals below the table."""
    messages: dict[str, int] = {}
    lines = [_line(row, messages) for row in rows]
    text = INTRODUCTION + "\n".join(lines) + "\n"
    if messages:
        text += "\n## Messages\n\n" + "\n".join(f"{number}. {message}" for message, number in messages.items()) + "\n"
    return text + f"\ntorch {torch.__version__}.\n"


def _line(row: Row, messages: dict[str, int]) -> str:
    case, found = row.case, row.outcome
    package = f"{case.package} {row.version}".strip()
    if found is None:
        cells = [case.name, package, "", "", "not run", "", "", "", "", row.absent]
    else:
        result = found.verdict if found.verdict in ("exact", "refused") else f"**{found.verdict}**"
        if found.message:
            result += f" ({messages.setdefault(found.message, len(messages) + 1)})"
        rounding = f" ({found.rounding:.0e})" if case.arithmetic == torch.float32 else ""
        errors = [f"{found.errors[n]:.0e}{rounding}" if n in found.errors else "" for n in (1, 3)]
        streams = f"{found.streams}, dim {row.batch_dim}"
        cells = [case.name, package, f"`{found.state}`", streams, result, _path(found), *errors]
        cells += [f"{found.truncated:.0e}", case.remark]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _path(found: Outcome) -> str:
    if not found.errors:
        return ""
    if not found.dense:
        return ", ".join(sorted(found.paths))
    if len(found.dense) == found.carried:
        return "dense"
    return f"{', '.join(sorted(found.paths))}; dense for {len(found.dense)} of {found.carried}"
