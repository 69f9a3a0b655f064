"""What the library offers, so that cases ask only for what is there. To be removed once all of it is."""

import functools
import inspect
from typing import Any

import torch
from torch import nn

import sparse_rtrl


def supported(function: Any, **options: Any) -> dict[str, Any]:
    """Those of the keyword arguments that a function has."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


@functools.cache
def trained_initial_state() -> bool:
    """Whether a cell's initial state may be trained."""

    class Cell(sparse_rtrl.SlotCell):
        def __init__(self) -> None:
            super().__init__(1, 1)
            self.first = nn.Parameter(torch.zeros(1, 1))

        def initial_state(self, batch_size: int) -> torch.Tensor:
            return self.first.expand(batch_size, 1, 1)

    try:
        sparse_rtrl.RTRL(Cell(), 1)
    except sparse_rtrl.ContractError:
        return False
    return True
