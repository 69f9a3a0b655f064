"""``sparse-rtrl tape``: the row tape of a cell, its uses of parameters, its structure and its cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

from sparse_rtrl.capture.structure import multiply_adds, structure_of
from sparse_rtrl.capture.tape import Combine, RowTape
from sparse_rtrl.capture.tape_rules import build_tape
from sparse_rtrl.capture.trace import NotTraceable, trace_step


class _Pair(nn.Module):
    """An LSTM cell whose state is one tensor, ``(B, 2 H)``: hidden and cell state side by side."""

    def __init__(self, input_size: int, units: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(input_size, units)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """The new state, ``(B, 2 H)``, from ``x (B, I)``."""
        h, c = state.chunk(2, 1)
        return torch.cat(self.cell(x, (h, c)), 1)


@dataclass(frozen=True)
class TapedCell:
    """A cell that the command knows.

    Attributes:
        build: from input size and units to the module, ``(x (B, I), h (B, H)) -> h``.
        state_size: from units to ``H``.
    """

    build: Callable[[int, int], nn.Module]
    state_size: Callable[[int], int]


TAPED: dict[str, TapedCell] = {
    "elman": TapedCell(lambda i, h: nn.RNNCell(i, h), lambda units: units),
    "gru": TapedCell(lambda i, h: nn.GRUCell(i, h), lambda units: units),
    "lstm": TapedCell(_Pair, lambda units: 2 * units),
}
"""Cells by the name they have on the command line."""


def tape_of(module: nn.Module, input_size: int, state_size: int) -> tuple[RowTape, dict[str, nn.Parameter]]:
    """The tape of a module ``(x (B, I), h (B, H)) -> h``, and its parameters by name.

    Raises:
        NotTraceable: saying why it has none.
    """
    named = dict(module.named_parameters())

    def step(values: list[Tensor], inputs: list[Tensor], state: Tensor) -> Tensor:
        by_name = dict(zip(named, values, strict=True))
        return functional_call(module, by_name, (inputs[0], state.unsqueeze(0))).squeeze(0)

    values = list(named.values())
    traced = trace_step(step, values, [torch.randn(1, input_size)], torch.randn(state_size))
    return build_tape(traced, values), named


def show(console: Console, cell: str, input_size: int, units: int) -> None:
    """Print the tape of a cell.

    Args:
        console: where.
        cell: its name in :data:`TAPED`.
        input_size: size ``I`` of the input.
        units: its units.
    """
    size = TAPED[cell].state_size(units)
    tape, named = tape_of(TAPED[cell].build(input_size, units), input_size, size)
    lines = Table("", "instruction", "entries", "from", "to", title=f"one row back through {cell}, H = {size}")
    for number, step in enumerate(tape.instructions):
        out = (
            f"{step.out} ... {step.out + (step.rows if isinstance(step, Combine) else step.positions * step.outer) - 1}"
        )
        if isinstance(step, Combine):
            lines.add_row(str(number), "combination", str(step.entries), "gathered", out)
        else:
            source = f"{step.source} ... {step.source + step.positions * step.inner - 1}"
            what = f"product, {step.matrices} x ({step.inner}, {step.outer})"
            lines.add_row(str(number), what, str(step.positions * step.inner * step.outer), source, out)
    console.print(lines)
    names = list(named)
    uses = Table("parameter", "shape", "delta (τ, m)", "z (τ, j)", title="where parameters enter")
    for use in tape.uses:
        shape = str(tuple(named[names[use.parameter]].shape))
        z = "ones" if use.z < 0 else f"({use.tau}, {use.j})"
        uses.add_row(names[use.parameter], shape, f"({use.tau}, {use.m})", z)
    console.print(uses)
    total = sum(p.numel() for p in named.values())
    deltas = sum(tau * m for _, tau, m in {(use.row, use.tau, use.m) for use in tape.uses})
    console.print(
        f"a row costs {multiply_adds(tape):,} multiply-adds per step, all {size} rows {size * multiply_adds(tape):,};"
        f" the workspace has {tape.rows:,} entries, {deltas:,} of which are kept per step"
    )
    try:
        structure = structure_of(tape, [p.numel() for p in named.values()])
    except NotTraceable as reason:
        console.print(f"no structure: {reason}")
        return
    console.print(
        f"state Jacobian: {float(structure.state.double().mean()):.0%} can be non-zero, after any number of steps"
        f" {float(structure.closure.double().mean()):.0%}; influence: {sum(structure.reached) / (total * size):.0%} of"
        f" {total * size:,} numbers per stream"
    )
