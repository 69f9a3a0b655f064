"""The row tape of a traced step: what carries row vectors back through it, as a short list of two instructions.

A vector-Jacobian product is linear in the row that is sent back. Every value of its graph that depends on the row is
followed symbolically, as a sum of terms ``coefficient * row entry``; views, slices, joins, products with numbers and
sums only change the terms. An instruction is needed where entries have to exist: a *combination* (gather, scale, add)
in front of a matrix product and at the end, and the *product* itself. What does not depend on the row, the
coefficients and matrices, is a second graph, evaluated for all steps and streams of a window at once
(:mod:`sparse_rtrl.capture.linearize`).

A parameter's gradient is such a value too. Where it is a matrix product of a row value ``delta`` and another one ``z``
its immediate Jacobian stays factored, and only ``delta`` is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

COMBINE, PRODUCT = 0, 1


@dataclass(frozen=True)
class Combine:
    """``out[dst[e]] += coefficient[e] * entry[src[e]]``; ``out`` begins with zeros.

    ``dst`` and ``src`` are places by number, ``coefficient`` numbers by number, -1 for ones. In a sorted one equal
    ``dst`` are neighbours and each of ``rows`` occurs.
    """

    out: int
    rows: int
    entries: int
    dst: int
    src: int
    coefficient: int
    sorted: bool


@dataclass(frozen=True)
class Product:
    """``out[p, m] = sum_j entry[p, j] matrix[p / (positions / matrices), j, m]`` for ``p < positions``."""

    out: int
    source: int
    positions: int
    matrices: int
    inner: int
    outer: int
    matrix: int


@dataclass(frozen=True)
class Use:
    """Immediate Jacobian of one parameter: ``F[offset + m * m_stride + j * j_stride] += sum_τ delta[τ, m] z[τ, j]``.

    Attributes:
        parameter: its number.
        row: first entry of ``delta (τ, m)`` on the tape.
        tau, m, j: sizes.
        z: number of the output of the second graph, ``(τ, j)``; -1 for ones, with ``j = 1``.
        offset, m_stride, j_stride: places in the flat parameter.
    """

    parameter: int
    row: int
    tau: int
    m: int
    j: int
    z: int
    offset: int
    m_stride: int
    j_stride: int


@dataclass(eq=False)
class RowTape:
    """The tape of a step.

    Attributes:
        state_size: ``H``.
        instructions: in order.
        rows: entries of the workspace; the row that comes in stands first, at 0.
        before: first entry of the row that goes out.
        uses: immediate Jacobians.
        second: the graph of what does not depend on the row. Its inputs are those of the step without the row; its
            outputs are places, then numbers, every ``z``, and the new state.
        places, numbers: how many of these there are.
        per_step: for each output whether it depends on inputs or state; the others stay the same in every step, as
            long as the parameters do.
        reaches: for each parameter whether it has a path to the new state.
    """

    state_size: int
    instructions: list[Combine | Product]
    rows: int
    before: int
    uses: list[Use]
    second: fx.GraphModule
    places: int
    numbers: int
    per_step: list[bool]
    reaches: list[bool]

    def program(self) -> Tensor:
        """The instructions as numbers, ``(I, 8)`` int64: kind and the seven fields of its class."""
        lines = [
            [COMBINE if isinstance(i, Combine) else PRODUCT, *(int(value) for value in vars(i).values())]
            for i in self.instructions
        ]
        return torch.tensor(lines, dtype=torch.int64, device="cpu").view(-1, 8)

    def taps(self) -> list[int]:
        """``row, τ, m`` of every use, one after the other."""
        return [number for use in self.uses for number in (use.row, use.tau, use.m)]
