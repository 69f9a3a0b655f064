"""How operations are taken apart before a step is traced, beside torch's own ways.

Either the result must equal what ATen computes to the last bits, or torch leaves an operation whole that has simple
parts.
A decomposition that does not serve certain arguments returns ``NotImplemented``; the operation then stays whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions

aten = torch.ops.aten

SIXTH = float(torch.tensor(1.0, dtype=torch.float32, device="cpu") / 6.0)
"""What ATen's hardsigmoid multiplies by, also in float64; a captured step must equal what ran."""
MAX_SUMMED = 256
"""Entries up to which a cumulative sum is a product with a triangular matrix."""


def _hardsigmoid_backward(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient * torch.where((x > -3.0) & (x < 3.0), SIXTH, 0.0).to(x.dtype)


def _convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backward pass of a convolution as matrix products of patches, one for each group of channels."""
    if transposed or x.shape[0] != 1:
        return NotImplemented
    dims = range(x.dim() - 2)
    padded = torch.nn.functional.pad(x, [n for d in reversed(dims) for n in (padding[d], padding[d])])
    patches = padded
    for d in dims:
        reach = (weight.shape[2 + d] - 1) * dilation[d] + 1
        patches = patches.unfold(2 + d, reach, stride[d])[..., :: dilation[d]]
    count = len(dims)
    places = gradient.shape[2:]
    of_x, of_weight = [], []
    for delta, w, z in zip(gradient.chunk(groups, 1), weight.chunk(groups, 0), patches.chunk(groups, 1), strict=True):
        rows = delta.reshape(delta.shape[1], places.numel())
        z = z.permute(0, *range(2, 2 + count), 1, *range(2 + count, 2 + 2 * count))
        of_weight.append((rows @ z.reshape(places.numel(), -1)).reshape(w.shape))
        if output_mask[0]:
            back = (rows.t() @ w.reshape(w.shape[0], -1)).reshape(*places, *w.shape[1:])
            of_x.append(_folded(back, list(padded.shape[2:]), stride, dilation))
    grad_x = None
    if output_mask[0]:
        grad_x = torch.cat(of_x, 0).unsqueeze(0)
        for d in dims:
            grad_x = grad_x.narrow(2 + d, padding[d], x.shape[2 + d])
    bias = gradient.sum([0, *range(2, gradient.dim())]) if output_mask[2] else None
    return grad_x, torch.cat(of_weight, 0) if output_mask[1] else None, bias


def _folded(patches: Tensor, sizes: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    """Patches ``(*places, C, *kernel)`` added up where they were taken from, ``(C, *sizes)``."""
    count = len(sizes)
    places, channels, kernel = patches.shape[:count], patches.shape[count], patches.shape[count + 1 :]
    total: Tensor | None = None
    for offset in itertools.product(*(range(k) for k in kernel)):
        part = patches
        for place in reversed(offset):
            part = part.select(-1, place)
        part = part.movedim(-1, 0)  # (C, *places)
        for d in range(count):
            first = offset[d] * dilation[d]
            shape = [channels, *sizes[: d + 1], *places[d + 1 :]]
            last = first + (places[d] - 1) * stride[d] + 1
            part = part.new_zeros(shape).slice_scatter(part, d + 1, first, last, stride[d])
        total = part if total is None else total + part
    assert total is not None
    return total


def _cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    if not x.is_floating_point() or dtype not in (None, x.dtype) or x.dim() == 0 or x.shape[dim] > MAX_SUMMED:
        return NotImplemented
    ones = torch.ones(x.shape[dim], x.shape[dim], dtype=x.dtype, device=x.device)
    return (x.movedim(dim, -1) @ ones.triu()).movedim(-1, dim)


def _shrink_backward(gradient: Tensor, x: Tensor, size: float) -> Tensor:
    return torch.where((x >= -size) & (x <= size), 0.0, gradient)


def _max_pool_backward(gradient: Tensor, x: Tensor, *options: Any) -> Tensor:
    places = options[-1]
    flat = x.new_zeros(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    return flat.scatter_add(-1, places.flatten(-2), gradient.flatten(-2)).view(x.shape)


def _avg_pool_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    """Every output's gradient, shared by the entries of its patch."""
    if ceil_mode or (any(padding) and not count_include_pad):
        return NotImplemented
    kernel, stride, padding = (_both(n) for n in (kernel, stride or kernel, padding))
    shared = gradient.flatten(0, -3) / (divisor or math.prod(kernel))  # (C, *places)
    patches = shared.permute(1, 2, 0)[..., None, None].expand(-1, -1, -1, *kernel)
    sizes = [n + 2 * p for n, p in zip(x.shape[-2:], padding, strict=True)]
    out = _folded(patches, sizes, stride, [1, 1])
    for d in range(2):
        out = out.narrow(1 + d, padding[d], x.shape[d - 2])
    return out.reshape(x.shape)


def _both(numbers: list[int]) -> list[int]:
    """One number for each of two dimensions; a single one stands for both."""
    return list(numbers) * (2 // len(numbers))


def _adaptive_avg_pool_backward(gradient: Tensor, x: Tensor) -> Tensor:
    sizes = list(zip(x.shape[-2:], gradient.shape[-2:], strict=True))
    if any(before % after for before, after in sizes):
        return NotImplemented
    kernel = [before // after for before, after in sizes]
    return _avg_pool_backward(gradient, x, kernel, kernel, [0, 0], False, True, None)


def _upsample_nearest_backward(
    gradient: Tensor, output_size: list[int], input_size: list[int], *scales: float | None
) -> Tensor:
    """Every input's gradient is the sum over the outputs that took it."""
    out = gradient
    for d, (size, scale) in enumerate(zip(output_size, (*scales, None, None), strict=False)):
        numbers = torch.arange(input_size[2 + d], dtype=torch.float64, device=gradient.device).view(1, 1, -1)
        taken = aten.upsample_nearest1d.default(numbers, [size], scale).flatten().long()
        zeros = out.new_zeros(*out.shape[: 2 + d], input_size[2 + d], *out.shape[3 + d :])
        out = zeros.index_add(2 + d, taken, out)
    return out


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **get_decompositions([aten._native_batch_norm_legit_no_training]),
    aten.hardsigmoid_backward.default: _hardsigmoid_backward,
    aten.convolution_backward.default: _convolution_backward,
    aten.cumsum.default: _cumsum,
    aten.hardshrink_backward.default: _shrink_backward,
    aten.softshrink_backward.default: _shrink_backward,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten.avg_pool2d_backward.default: _avg_pool_backward,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_avg_pool_backward,
    aten.upsample_nearest1d_backward.default: _upsample_nearest_backward,
    aten.upsample_nearest2d_backward.default: _upsample_nearest_backward,
}
"""By operation."""
