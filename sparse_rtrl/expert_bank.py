"""Expert parameters stacked along a leading expert dimension, and the linear map through the active ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function


def expert_linear(z: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
    """Apply to each stream the linear maps of its active experts: ``y[b, i] = weight[experts[b, i]] z[b, i] + bias``.

    The Jacobian capture recognises this function, so an expert layer built on it keeps a factored immediate Jacobian.

    Args:
        z: inputs ``(B, k, ..., in_features)``, one per stream and active expert.
        weight: stacked weights ``(E, out_features, in_features)``.
        bias: stacked biases ``(E, out_features)`` or None.
        experts: active experts ``(B, k)`` int64.

    Returns:
        Outputs ``(B, k, ..., out_features)``.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    if experts.dim() != 2 or z.dim() < 3 or z.shape[:2] != experts.shape or z.shape[-1] != weight.shape[-1]:
        expected = f"({', '.join(map(str, experts.shape))}, ..., {weight.shape[-1]})"
        raise ValueError(
            f"z must have shape {expected}, one input per stream and active expert, for experts (B, k) ="
            f" {tuple(experts.shape)}; got {tuple(z.shape)}"
        )
    if has_torch_function((z, weight)):
        return handle_torch_function(expert_linear, (z, weight), z, weight, bias, experts)
    batch, k = experts.shape
    # index_select: its backward is an index_add, far cheaper than that of advanced indexing.
    active = weight.index_select(0, experts.reshape(-1)).unflatten(0, (batch, k))
    positions = z.shape[2:-1].numel()
    y = torch.matmul(z.reshape(batch, k, positions, z.shape[-1]), active.transpose(-1, -2))
    if bias is not None:
        y = y + bias.index_select(0, experts.reshape(-1)).view(batch, k, 1, weight.shape[1])
    return y.reshape(*z.shape[:-1], weight.shape[1])


class ExpertBank(nn.Module):
    """A bank of ``num_experts`` parameter groups of equal shape, stored as stacked ``(E, ...)`` parameters.

    Every parameter of this module, and of a subclass, must have the expert as its first dimension: expert ``e`` owns
    ``parameter[e]``, and the influence of the streams on it moves only while ``e`` is active. The module itself is one
    linear layer per expert; subclass it and register more stacked parameters for deeper experts.

    Args:
        num_experts: number of experts ``E``.
        in_features: input size of each expert.
        out_features: output size of each expert.
        bias: whether each expert has a bias.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        self.num_experts = num_experts
        bound = 1.0 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features).uniform_(-bound, bound)) if bias else None

    def forward(self, z: Tensor, experts: Tensor) -> Tensor:
        """Run the active experts on their inputs.

        Args:
            z: ``(B, k, ..., in_features)``, one input per stream and active expert.
            experts: ``(B, k)`` int64.

        Returns:
            ``(B, k, ..., out_features)``.
        """
        return expert_linear(z, self.weight, self.bias, experts)
