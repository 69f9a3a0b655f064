"""RWKV time mixing with token shift."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_rtrl.cells.diagonal_cell import DiagonalCell, Learned, Mapped, Projection
from sparse_rtrl.cells.registry import register_cell


def shifted(weight: Tensor, mix: Tensor) -> Tensor:
    """The weight ``(M, 2 J)`` that acts on ``[x_t, x_{t-1}]`` as ``weight (M, J)`` on ``μ x_t + (1 - μ) x_{t-1}``."""
    return torch.cat((weight * mix, weight * (1 - mix)), dim=1)


class RWKVReadout(nn.Module):
    """``W_o (σ(r) ⊙ wkv)``, with the bonus ``u`` of the current step.

    Args:
        input_size: size of the input.
        channels: channels ``C``.
        output_size: size of the output.
    """

    def __init__(self, input_size: int, channels: int, output_size: int) -> None:
        super().__init__()
        self.bonus = nn.Parameter(torch.randn(channels) * 0.5)
        self.mix = nn.Parameter(torch.rand(input_size))
        self.receptance = nn.Linear(input_size, channels, bias=False)
        self.linear = nn.Linear(channels, output_size)

    def forward(self, x: Tensor, before: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Rows ``x (N, 2 input_size)``, old state ``(N, 3, C)``, ``key`` and ``value (N, C)`` to the output."""
        numerator, denominator, scale = before.unbind(1)
        bonus = self.bonus + key
        largest = torch.maximum(scale, bonus).detach()
        old, new = torch.exp(scale.detach() - largest), torch.exp(bonus - largest)
        wkv = (old * numerator + new * value) / (old * denominator + new)
        receptance = torch.sigmoid(x @ shifted(self.receptance.weight, self.mix).t())
        return self.linear(receptance * wkv)


@register_cell("rwkv", lambda of: {"channels": of.units})
class RWKVCell(DiagonalCell):
    r"""RWKV-4 time mixing with token shift (Peng et al. 2023, RWKV, section 3.1.2 and appendix D).

    With ``\bar x = μ ⊙ x_t + (1 - μ) ⊙ x_{t-1}``, a ``μ`` each for key, value and receptance,

    .. math::
        k_t = K \bar x, \qquad v_t = V \bar x, \qquad r_t = R \bar x, \qquad
        a_t = e^{-w} a_{t-1} + e^{k_t} v_t, \qquad b_t = e^{-w} b_{t-1} + e^{k_t}, \\
        wkv_t = \frac{a_{t-1} + e^{u + k_t} v_t}{b_{t-1} + e^{u + k_t}}, \qquad o_t = W_o (\sigma(r_t) \odot wkv_t),

    where ``w = exp(decay)`` is positive. The state holds ``a e^{-p}``, ``b e^{-p}`` and the exponent ``p``, the largest
    so far (appendix D), so that nothing overflows. ``wkv`` does not depend on ``p``, so no gradient flows through it
    and the recurrence stays diagonal.

    Influence: ``channels * (6 * input_size + 2)`` numbers per stream: ``K`` reaches two state entries, and ``μ`` is
    trained through weights of both inputs.

    Args:
        input_size: size of the input of a step.
        channels: channels ``C``.
        output_size: size of the output.
    """

    numerator: Tensor
    denominator: Tensor
    exponent: Tensor

    def __init__(self, input_size: int, channels: int, output_size: int) -> None:
        super().__init__(input_size, (3, channels), previous_input=True)
        self.output_size = output_size
        place = torch.arange(channels) / max(channels - 1, 1)
        self.decay = nn.Parameter(-5 + 8 * place**0.9)
        self.key_mix = nn.Parameter(torch.rand(input_size))
        self.value_mix = nn.Parameter(torch.rand(input_size))
        self.key = nn.Linear(input_size, channels, bias=False)
        self.value = nn.Linear(input_size, channels, bias=False)
        # Which of the three numbers of a channel is what.
        for number, name in enumerate(("numerator", "denominator", "exponent")):
            mask = torch.zeros(3, 1)
            mask[number] = 1
            self.register_buffer(name, mask, persistent=False)
        self.readout = RWKVReadout(input_size, channels, output_size)

    def initial_entries(self, batch_size: int) -> Tensor:
        """Empty sums ``(B, 3, C)``, with an exponent below every key."""
        entries = super().initial_entries(batch_size)
        entries[:, 2] = -1e30
        return entries

    def project(self, x: Tensor) -> tuple[Projection, ...]:
        """``-w``, ``k`` and ``v`` of rows ``x (N, 2 * input_size)``."""
        shape = (1, self.state_shape[1])
        return (
            Learned(-torch.exp(self.decay).unsqueeze(0)),
            Mapped(x, shifted(self.key.weight, self.key_mix), shape),
            Mapped(x, shifted(self.value.weight, self.value_mix), shape),
        )

    def step(self, h: Tensor, *values: Tensor) -> Tensor:
        """Decay the sums ``h (N, *state_shape)``, add the new term, and rescale both by the new exponent."""
        log_decay, key, value = values
        exponent = h[..., 2:, :].detach()
        largest = torch.maximum(exponent + log_decay[..., -1:, :], key[..., -1:, :]).detach()
        sums = torch.exp(exponent + log_decay - largest) * h * (self.numerator + self.denominator)
        added = torch.exp(key - largest) * (value * self.numerator + self.denominator)
        return sums + added + largest * self.exponent

    def output(self, x: Tensor, before: Tensor, h: Tensor, *values: Tensor) -> Tensor:
        """``W_o (σ(r) ⊙ wkv)``."""
        _, key, value = values
        return self.readout(x, before, key.squeeze(1), value.squeeze(1))
