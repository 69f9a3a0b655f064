"""The selective state space layer of Mamba."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_rtrl.cells.diagonal_cell import DiagonalCell, Learned, Mapped, Projection
from sparse_rtrl.cells.registry import register_cell


class MambaReadout(nn.Module):
    """``W (silu(Z x) ⊙ (h · C x + D ⊙ u))``.

    Args:
        input_size: size of the input.
        channels: channels ``D``.
        state_size: state entries ``N`` of a channel.
        output_size: size of the output.
    """

    def __init__(self, input_size: int, channels: int, state_size: int, output_size: int) -> None:
        super().__init__()
        self.C = nn.Linear(channels, state_size, bias=False)
        self.skip = nn.Parameter(torch.ones(channels))
        self.gate = nn.Linear(input_size, channels, bias=False)
        self.linear = nn.Linear(channels, output_size)

    def forward(self, h: Tensor, x: Tensor, u: Tensor) -> Tensor:
        """``h (N, D, state_size)``, ``x (N, input_size)`` and ``u (N, D)`` to ``(N, output_size)``."""
        y = torch.matmul(h, self.C(u).unsqueeze(-1)).squeeze(-1) + self.skip * u
        return self.linear(F.silu(self.gate(x)) * y)


@register_cell("mamba", lambda of: {"channels": of.units})
class MambaCell(DiagonalCell):
    r"""Selective state space layer S6 (Gu & Dao 2023, Mamba, algorithm 2 and section 3.6), in its recurrent form.

    With ``u = W_{in} x`` of ``channels`` numbers and a state of ``state_size`` entries per channel ``d``,

    .. math::
        h_t[d] = \exp(\Delta_d A_d) \odot h_{t-1}[d] + \Delta_d B u_d, \qquad
        o_t = W (\mathrm{silu}(Z x_t) \odot (h_t C + D \odot u)), \\
        \Delta = \mathrm{softplus}(W_\Delta u + b_\Delta), \qquad B = W_B u, \qquad C = W_C u, \qquad A = -\exp A_{log},

    ``W_Δ`` of rank ``rank``; ``B`` is discretised by Euler's rule, as in the paper's code. The short convolution in
    front of it and the non-linearity after that are left out: they are not part of S6.

    ``B`` is shared by all channels and ``Δ`` by all entries of a channel, while every entry decays in its own way, so
    the influence takes ``channels * state_size * (3 * input_size + 2)`` numbers per stream.

    Args:
        input_size: size of the input of a step.
        channels: channels ``D``.
        output_size: size of the output.
        state_size: state entries per channel.
        rank: rank of ``W_Δ``; None for ``channels / 16``, rounded up.
        delta_min: least initial ``Δ`` at a zero input.
        delta_max: largest.
    """

    def __init__(
        self,
        input_size: int,
        channels: int,
        output_size: int,
        state_size: int = 16,
        rank: int | None = None,
        delta_min: float = 1e-3,
        delta_max: float = 1e-1,
    ) -> None:
        super().__init__(input_size, (channels, state_size))
        self.output_size = output_size
        rank = math.ceil(channels / 16) if rank is None else rank
        self.input = nn.Linear(input_size, channels, bias=False)
        self.B = nn.Linear(channels, state_size, bias=False)
        self.delta_down = nn.Linear(channels, rank, bias=False)
        self.delta_up = nn.Linear(rank, channels)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state_size + 1)).repeat(channels, 1))
        with torch.no_grad():
            low, high = math.log(delta_min), math.log(delta_max)
            delta = torch.exp(low + (high - low) * torch.rand(channels))
            self.delta_up.bias.copy_(torch.log(torch.expm1(delta)))  # the inverse of softplus
        self.readout = MambaReadout(input_size, channels, state_size, output_size)

    def project(self, x: Tensor) -> tuple[Projection, ...]:
        """``A``, the argument of ``Δ``, ``B`` and ``u`` of rows ``x (N, input_size)``."""
        channels, size = self.state_shape
        B = self.B.weight @ self.input.weight
        delta = self.delta_up.weight @ (self.delta_down.weight @ self.input.weight)
        return (
            Learned(-torch.exp(self.A_log)),
            Mapped(x, delta, (channels, 1), self.delta_up.bias),
            Mapped(x, B, (1, size)),
            Mapped(x, self.input.weight, (channels, 1)),
        )

    def step(self, h: Tensor, *values: Tensor) -> Tensor:
        """``exp(Δ A) h + Δ B u``."""
        A, delta, B, u = values
        delta = F.softplus(delta)
        return torch.exp(delta * A) * h + delta * B * u

    def output(self, x: Tensor, before: Tensor, h: Tensor, *values: Tensor) -> Tensor:
        """``W (silu(Z x) ⊙ (h C + D u))``."""
        return self.readout(h, x, values[3].squeeze(-1))
