"""What the library offers, so that cases ask only for what is there. To be removed once all of it is."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

import sparse_rtrl
from sparse_rtrl.cells.diagonal_cell import Mapped


def supported(function: Any, **options: Any) -> dict[str, Any]:
    """Those of the keyword arguments that a function has."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


class _Slot(sparse_rtrl.SlotCell):
    """A slot cell with a trained initial state."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.first = nn.Parameter(torch.zeros(1, 1))

    def initial_state(self, batch_size: int) -> Tensor:
        return self.first.expand(batch_size, 1, 1)


class _Diagonal(sparse_rtrl.DiagonalCell):
    """A diagonal cell with trained initial entries."""

    def __init__(self) -> None:
        super().__init__(1, (1,))
        self.first, self.linear = nn.Parameter(torch.zeros(1)), nn.Linear(1, 1)

    def initial_entries(self, batch_size: int) -> Tensor:
        return self.first.expand(batch_size, 1)

    def project(self, x: Tensor) -> tuple[Mapped]:
        return (Mapped(x, self.linear.weight, (1,)),)

    def step(self, h: Tensor, *values: Tensor) -> Tensor:
        return 0.5 * h + values[0]

    def output(self, x: Tensor, before: Tensor, h: Tensor, *values: Tensor) -> Tensor:
        return h


@functools.cache
def trained_initial_state(kind: str) -> bool:
    """Whether the initial state of a ``"slot"`` or ``"diagonal"`` cell may be trained."""
    try:
        sparse_rtrl.RTRL(_Slot() if kind == "slot" else _Diagonal(), 1)
    except sparse_rtrl.ContractError:
        return False
    return True
