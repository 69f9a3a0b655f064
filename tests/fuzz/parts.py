"""Small modules and functions that random cells and modules are made of."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from .draw import Draw


class Symmetric(nn.Module):
    """A parametrization: the symmetric part."""

    def forward(self, w: Tensor) -> Tensor:
        return (w + w.transpose(-1, -2)) / 2

    def right_inverse(self, w: Tensor) -> Tensor:
        return w


class Softplus(nn.Module):
    """A parametrization: positive entries."""

    def forward(self, w: Tensor) -> Tensor:
        return nn.functional.softplus(w) - 0.5


class Scaled(torch.autograd.Function):
    """``x * p`` with a backward pass of its own; ``p`` broadcast over rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(x, p)
        return x * p

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, p = ctx.saved_tensors
        return g * p, (g * x).sum_to_size(p.shape)


class Mapped(torch.autograd.Function):
    """``x Wᵀ`` with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return g @ w, g.flatten(0, -2).t() @ x.flatten(0, -2)


class Doubled:
    """A linear gradient hook."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, g: Tensor) -> Tensor:
        return g * self.factor


def spread(module: nn.Module, draw: Draw, size: float = 0.3) -> None:
    """Move parameters away from ones, zeros and each other, where a mistake would not show."""
    with torch.no_grad():
        for p in module.parameters():
            noise = draw.normal(*p.shape, *((2,) if p.is_complex() else ())).to(p.dtype.to_real())
            p += size * (torch.view_as_complex(noise) if p.is_complex() else noise)


def parametrize_weight(linear: nn.Module, draw: Draw) -> str:
    """Give a square weight a parametrization; returns which."""
    kind = draw.one_of("symmetric", "softplus", "weight norm", "orthogonal")
    if kind == "symmetric":
        parametrize.register_parametrization(linear, "weight", Symmetric())
    elif kind == "softplus":
        parametrize.register_parametrization(linear, "weight", Softplus())
    elif kind == "weight norm":
        parametrizations.weight_norm(linear)
    else:
        parametrizations.orthogonal(linear, orthogonal_map=draw.one_of("cayley", "matrix_exp"))
    return kind


def take(state: Tensor, slots: Tensor) -> Tensor:
    """Content of slots ``(B, k)`` of a state ``(B, S, D)``."""
    return state[torch.arange(len(state)).unsqueeze(1), slots]


def put(state: Tensor, slots: Tensor, content: Tensor) -> Tensor:
    """A state with the content of slots replaced."""
    rows = torch.arange(len(state)).unsqueeze(1).expand_as(slots)
    return state.index_put((rows, slots), content)


def where(mask: Tensor, new: Any, old: Any) -> Any:
    """Streams of a nest of states replaced, streams first."""
    return torch.utils._pytree.tree_map(lambda a, b: torch.where(mask.view(-1, *[1] * (b.dim() - 1)), a, b), new, old)


def detached(nest: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, nest)
