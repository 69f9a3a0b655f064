"""Pickling of modules with parametrized weights, which ``torch.nn.utils.parametrize`` copies but does not pickle."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def make_picklable(cell: nn.Module) -> None:
    """Let ``pickle`` take the parametrized modules of a cell: each has a class of its own, which is made anew."""
    for module in cell.modules():
        if parametrize.is_parametrized(module):
            type(module).__reduce_ex__ = _reduce  # type: ignore[method-assign, assignment]


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    return _new, (type(module).__bases__[0], list(parametrizations)), dict(vars(module))


def _new(kind: type[nn.Module], names: list[str]) -> nn.Module:
    """A parametrized module without content."""
    module = kind.__new__(kind)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    type(module).__reduce_ex__ = _reduce  # type: ignore[method-assign, assignment]
    return module
