"""Keeping the engine's own arithmetic out of autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function outside of autocast: influence and Jacobian products keep the precision of the parameters."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        if not devices:
            return function(*args, **kwargs)
        with torch.autocast(devices[0], enabled=False), torch.autocast(devices[-1], enabled=False):
            return function(*args, **kwargs)

    return wrapped
