"""What the pattern of a tape says: which state entries a step lets reach each other, and a parameter ever reach."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_rtrl.capture.tape import Product, RowTape
from sparse_rtrl.capture.trace import NotTraceable
from sparse_rtrl.ops import reference


@dataclass(frozen=True)
class Structure:
    """Patterns of a step, whatever its numbers are.

    Attributes:
        state: which entry of the old state each entry of the new one depends on, ``(H, H)`` bool.
        closure: the same for any number of steps, none included, ``(H, H)`` bool.
        reached: for each parameter how many pairs of a number of it and a state entry it ever reaches there are.
    """

    state: Tensor
    closure: Tensor
    reached: list[int]


def structure_of(tape: RowTape, sizes: list[int]) -> Structure:
    """The structure of a step, from its tape.

    Args:
        tape: the tape.
        sizes: how many numbers each parameter has.

    Raises:
        NotTraceable: if places of the tape depend on data, so that there is no pattern.
    """
    if any(tape.per_step[: tape.places]):
        raise NotTraceable("places of its tape depend on data")
    size = tape.state_size
    places = [getattr(tape.second, str(node.target)).unsqueeze(0) for node in _results(tape)[: tape.places]]
    shapes = [tuple(node.meta["val"].shape) for node in _results(tape)[tape.places : tape.places + tape.numbers]]
    # Paths are counted: every coefficient is one, so that none of them cancel.
    numbers = [torch.ones(1, *shape, dtype=torch.float64, device="cpu") for shape in shapes]
    rows = torch.eye(size, dtype=torch.float64, device="cpu").unsqueeze(0)
    entries = [use.tau * use.m * size for use in tape.uses]
    deltas = rows.new_empty(sum(entries))
    reference.rows_back_(
        rows, deltas, tape.program(), places, numbers, None, tape.taps(), 1, 1, 0, tape.rows, tape.before
    )
    state = rows[0] > 0
    closure = state | torch.eye(size, dtype=torch.bool, device="cpu")
    for _ in range(size.bit_length()):
        closure = (closure.double() @ closure.double()) > 0
    reached = [0] * len(sizes)
    touched = [torch.zeros(n, size, dtype=torch.bool, device="cpu") for n in sizes]
    for use, delta in zip(tape.uses, deltas.split(entries), strict=True):
        of_m = (delta.view(use.tau, use.m, size) > 0).any(0)  # (m, H)
        m, j = torch.arange(use.m).view(-1, 1), torch.arange(use.j)
        index = (use.offset + m * use.m_stride + j * use.j_stride).flatten()
        touched[use.parameter][index] |= of_m.repeat_interleave(use.j, 0)
    for number, pattern in enumerate(touched):
        reached[number] = int(((pattern.double() @ closure.double().T) > 0).sum())
    return Structure(state, closure, reached)


def multiply_adds(tape: RowTape) -> int:
    """Multiply-adds that take one row back through one step."""
    return sum(i.positions * i.inner * i.outer if isinstance(i, Product) else i.entries for i in tape.instructions)


def _results(tape: RowTape) -> list[torch.fx.Node]:
    (output,) = (node for node in tape.second.graph.nodes if node.op == "output")
    return list(output.args[0])  # type: ignore[arg-type]
