"""Ready cells by name: what the command line offers, and how its sizes become those of a cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import nn

from sparse_rtrl.cells.diagonal_cell import DiagonalCell
from sparse_rtrl.cells.slot_cell import SlotCell


@dataclass(frozen=True)
class CellSizes:
    """Sizes that every cell can be built from.

    Attributes:
        slot_size: numbers per slot ``D``.
        num_slots: slots ``S``.
        num_experts: experts ``E``.
        top_k: experts active in a step.
        read_slots: slots read in a step.
        write_slots: slots written in a step.
    """

    slot_size: int
    num_slots: int
    num_experts: int
    top_k: int
    read_slots: int
    write_slots: int

    @property
    def units(self) -> int:
        """Units of a cell without slots: as many as the state of one with slots has."""
        return self.num_slots * self.slot_size


def of_slots(sizes: CellSizes) -> dict[str, int]:
    """The arguments of a cell with slots and experts."""
    return {field.name: getattr(sizes, field.name) for field in fields(sizes)}


@dataclass(frozen=True)
class ReadyCell:
    """A cell of the library.

    Attributes:
        kind: its class.
        arguments: its arguments for some sizes, beside ``input_size`` and ``output_size``.
        options: further arguments that the command line has an option for.
    """

    kind: type[nn.Module]
    arguments: Callable[[CellSizes], dict[str, int]]
    options: tuple[str, ...] = ()

    def build(self, input_size: int, output_size: int, sizes: CellSizes, **options: Any) -> SlotCell | DiagonalCell:
        """A new cell.

        Args:
            input_size: size of the input of a step.
            output_size: size of the output.
            sizes: of the cell.
            options: further arguments of the cell.
        """
        cell = self.kind(input_size=input_size, output_size=output_size, **self.arguments(sizes), **options)
        assert isinstance(cell, (SlotCell, DiagonalCell))
        return cell


CELLS: dict[str, ReadyCell] = {}
"""Cells by the name they have on the command line."""

Kind = TypeVar("Kind", bound=type[nn.Module])


def register_cell(
    name: str, arguments: Callable[[CellSizes], dict[str, int]] = of_slots, options: tuple[str, ...] = ()
) -> Callable[[Kind], Kind]:
    """Register a class of cells; from then on the command line offers it.

    Args:
        name: on the command line.
        arguments: see :class:`ReadyCell`.
        options: see :class:`ReadyCell`.
    """

    def register(kind: Kind) -> Kind:
        CELLS[name] = ReadyCell(kind, arguments, options)
        return kind

    return register
