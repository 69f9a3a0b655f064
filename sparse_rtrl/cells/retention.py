"""Retention, and linear attention as retention without decay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_rtrl.diagonal_cell import DiagonalCell, Learned, Mapped, Projection


class RetentionReadout(nn.Module):
    """Query, normalisation per head, gate and linear readout of matrix-valued states.

    Args:
        input_size: size of the input.
        num_heads: heads ``H``.
        key_size: key size ``K`` of a head.
        value_size: value size ``V`` of a head.
        output_size: size of the output.
    """

    def __init__(self, input_size: int, num_heads: int, key_size: int, value_size: int, output_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(input_size, num_heads * key_size, bias=False)
        self.gate = nn.Linear(input_size, num_heads * value_size, bias=False)
        self.norm = nn.GroupNorm(num_heads, num_heads * value_size)
        self.linear = nn.Linear(num_heads * value_size, output_size)

    def forward(self, S: Tensor, x: Tensor) -> Tensor:
        """``S (N, H, K, V)`` and ``x (N, input_size)`` to ``(N, output_size)``."""
        query = self.query(x).unflatten(-1, (self.num_heads, 1, -1))
        retained = self.norm(torch.matmul(query, S).flatten(1))
        return self.linear(F.silu(self.gate(x)) * retained)


class RetentionCell(DiagonalCell):
    r"""Multi-scale retention in its recurrent form (Sun et al. 2023, Retentive Network, section 2).

    Per head, with a matrix as state,

    .. math::
        S_t = \gamma S_{t-1} + k_t v_t^T, \qquad o_t = W (\mathrm{swish}(G x_t) \odot \mathrm{GroupNorm}(q_t S_t)), \\
        q_t = Q x_t, \qquad k_t = K x_t / \sqrt{d_k}, \qquad v_t = V x_t.

    The rotation of queries and keys by their position (xPos) is left out. With ``decay=1.0`` this is linear attention
    without feature map (Katharopoulos et al. 2020, Transformers are RNNs). The influence of ``K`` is the same for every
    key and that of ``V`` for every value, so it takes ``2 * num_heads * head_size * input_size`` numbers per stream, as
    many as ``K`` and ``V`` have, where the state has ``num_heads * head_size²`` entries.

    Args:
        input_size: size of the input of a step.
        num_heads: heads.
        head_size: key and value size of a head.
        output_size: size of the output.
        decay: ``γ`` of all heads or of each; None for ``1 - 2^{-5-i}`` of head ``i``, as in the paper.
        learn_decay: whether ``γ`` is trained; its influence takes a number per state entry.

    Raises:
        ValueError: if ``decay`` has another length than ``num_heads`` or leaves ``(0, 1]``.
    """

    def __init__(
        self,
        input_size: int,
        num_heads: int,
        head_size: int,
        output_size: int,
        decay: float | Sequence[float] | None = None,
        learn_decay: bool = False,
    ) -> None:
        super().__init__(input_size, (num_heads, head_size, head_size))
        self.output_size = output_size
        if decay is None:
            decay = [1 - 2.0 ** (-5 - head) for head in range(num_heads)]
        decays = [decay] * num_heads if isinstance(decay, (int, float)) else list(decay)
        if len(decays) != num_heads or not all(0 < value <= 1 for value in decays):
            raise ValueError(f"decay must be one number or {num_heads} numbers in (0, 1], got {decay}")
        self.decay = nn.Parameter(torch.tensor(decays), requires_grad=learn_decay)
        self.key = nn.Linear(input_size, num_heads * head_size, bias=False)
        self.value = nn.Linear(input_size, num_heads * head_size, bias=False)
        self.readout = RetentionReadout(input_size, num_heads, head_size, head_size, output_size)

    def project(self, x: Tensor) -> tuple[Projection, ...]:
        """``γ``, ``k`` without its scale, and ``v``."""
        heads, size, _ = self.state_shape
        return (
            Learned(self.decay.view(heads, 1, 1)),
            Mapped(x, self.key.weight, (heads, size, 1)),
            Mapped(x, self.value.weight, (heads, 1, size)),
        )

    def step(self, h: Tensor, *values: Tensor) -> Tensor:
        """``γ S + k v^T``."""
        decay, key, value = values
        scale = self.state_shape[1] ** -0.5  # of the keys; here it costs less than on their weight
        return torch.addcmul(key * (scale * value), decay, h)

    def output(self, x: Tensor, before: Tensor, h: Tensor, *values: Tensor) -> Tensor:
        """``W (swish(G x) ⊙ GroupNorm(q S))``."""
        return self.readout(h, x)
