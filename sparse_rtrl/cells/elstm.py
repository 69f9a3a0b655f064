"""The element-wise LSTM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_rtrl.cells.diagonal_cell import DiagonalCell, Learned, Mapped, Projection
from sparse_rtrl.cells.registry import register_cell


class ELSTMReadout(nn.Module):
    """Output gate and linear readout, ``W (σ(O x + W_o c) ⊙ c)``.

    Args:
        input_size: size of the input.
        hidden_size: state entries.
        output_size: size of the output.
    """

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(input_size + hidden_size, hidden_size)
        self.linear = nn.Linear(hidden_size, output_size)

    def forward(self, c: Tensor, x: Tensor) -> Tensor:
        """``c (N, hidden_size)`` and ``x (N, input_size)`` to ``(N, output_size)``."""
        return self.linear(torch.sigmoid(self.gate(torch.cat((x, c), dim=-1))) * c)


@register_cell("elstm", lambda of: {"hidden_size": of.units})
class ELSTMCell(DiagonalCell):
    r"""Element-wise LSTM (Irie, Gopalakrishnan & Schmidhuber 2023, Exploring the Promise and Limits of RTRL).

    .. math::
        f_t = \sigma(F x_t + w^f \odot c_{t-1}), \qquad z_t = \tanh(Z x_t + w^z \odot c_{t-1}), \\
        c_t = f_t \odot c_{t-1} + (1 - f_t) \odot z_t, \qquad o_t = \sigma(O x_t + W^o c_t) \odot c_t,

    followed by a linear readout; every gate has a bias. Influence: ``2 * hidden_size * (input_size + 2)`` numbers per
    stream.

    Args:
        input_size: size of the input of a step.
        hidden_size: state entries.
        output_size: size of the output.
        forget_bias: initial bias of ``f``; the larger, the longer an untrained cell remembers.
    """

    def __init__(self, input_size: int, hidden_size: int, output_size: int, forget_bias: float = 0.0) -> None:
        super().__init__(input_size, (hidden_size,))
        self.output_size = output_size
        self.forget = nn.Linear(input_size, hidden_size)
        self.content = nn.Linear(input_size, hidden_size)
        self.forget_peephole = nn.Parameter(torch.randn(hidden_size) / hidden_size**0.5)
        self.content_peephole = nn.Parameter(torch.randn(hidden_size) / hidden_size**0.5)
        with torch.no_grad():
            self.forget.bias.add_(forget_bias)
        self.readout = ELSTMReadout(input_size, hidden_size, output_size)

    def project(self, x: Tensor) -> tuple[Projection, ...]:
        """``F x``, ``Z x``, ``w^f`` and ``w^z`` of rows ``x (N, input_size)``."""
        return (
            Mapped(x, self.forget.weight, self.state_shape, self.forget.bias),
            Mapped(x, self.content.weight, self.state_shape, self.content.bias),
            Learned(self.forget_peephole),
            Learned(self.content_peephole),
        )

    def step(self, h: Tensor, *values: Tensor) -> Tensor:
        """``f c + (1 - f) z``."""
        forget, content, forget_peephole, content_peephole = values
        f = torch.sigmoid(torch.addcmul(forget, forget_peephole, h))
        z = torch.tanh(torch.addcmul(content, content_peephole, h))
        return torch.lerp(z, h, f)

    def output(self, x: Tensor, before: Tensor, h: Tensor, *values: Tensor) -> Tensor:
        """``W (o ⊙ c)``, ``(N, output_size)``."""
        return self.readout(h, x)
