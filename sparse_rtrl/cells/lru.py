"""The linear recurrent unit."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparse_rtrl.cells.diagonal_cell import DiagonalCell, Learned, Mapped, Projection
from sparse_rtrl.cells.registry import register_cell


class LRUReadout(nn.Module):
    """``Re(C h) + D x``.

    Args:
        input_size: size of the input.
        hidden_size: complex state entries.
        output_size: size of the output.
    """

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        scale = 1 / math.sqrt(hidden_size)
        self.real = nn.Parameter(scale * torch.randn(output_size, hidden_size))
        self.imag = nn.Parameter(scale * torch.randn(output_size, hidden_size))
        self.skip = nn.Parameter(torch.randn(output_size, input_size) / math.sqrt(input_size))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """``h (N, hidden_size)`` complex and ``x (N, input_size)`` to ``(N, output_size)``."""
        return h.real @ self.real.t() - h.imag @ self.imag.t() + x @ self.skip.t()


@register_cell("lru", lambda of: {"hidden_size": of.units})
class LRUCell(DiagonalCell):
    r"""Linear recurrent unit (Orvieto et al. 2023, Resurrecting Recurrent Neural Networks for Long Sequences).

    .. math::
        h_t = \lambda \odot h_{t-1} + \gamma \odot (B x_t), \qquad o_t = \mathrm{Re}(C h_t) + D x_t, \\
        \lambda = \exp(-\exp \nu + i \exp \theta), \qquad \gamma = \exp \gamma_{log},

    with complex ``h``, ``B`` and ``C`` (section 3). ``|λ|`` starts uniformly on a ring,
    ``γ = sqrt(1 - |λ|²)``. Influence: ``hidden_size * (input_size + 2)`` complex numbers per stream.

    Args:
        input_size: size of the input of a step.
        hidden_size: complex state entries.
        output_size: size of the output.
        r_min: least initial ``|λ|``.
        r_max: largest initial ``|λ|``.
        max_phase: largest initial phase of ``λ``.

    Raises:
        ValueError: unless ``0 <= r_min < r_max < 1``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
    ) -> None:
        super().__init__(input_size, (hidden_size,), complex_state=True)
        if not 0 <= r_min < r_max < 1:
            raise ValueError(f"r_min and r_max must be 0 <= r_min < r_max < 1, got {r_min} and {r_max}")
        self.output_size = output_size
        radius_squared = r_min**2 + (r_max**2 - r_min**2) * torch.rand(hidden_size)
        # The interval without zero: exp(theta) is positive.
        phase = max_phase * (1 - torch.rand(hidden_size))
        self.nu = nn.Parameter(torch.log(-0.5 * torch.log(radius_squared)))
        self.theta = nn.Parameter(torch.log(phase))
        self.gamma = nn.Parameter(0.5 * torch.log1p(-radius_squared))
        # Real and imaginary parts side by side, so that the complex weight is a view.
        self.B = nn.Parameter(torch.randn(hidden_size, input_size, 2) / math.sqrt(2 * input_size))
        self.readout = LRUReadout(input_size, hidden_size, output_size)

    def eigenvalues(self) -> Tensor:
        """``λ (hidden_size,)``, complex."""
        return torch.exp(torch.complex(-torch.exp(self.nu), torch.exp(self.theta)))

    def project(self, x: Tensor) -> tuple[Projection, ...]:
        """``λ``, ``γ`` and ``B x`` of rows ``x (N, input_size)``."""
        B = torch.view_as_complex(self.B)
        # A complex gamma saves the second backward pass that a real value in a complex state needs.
        gamma = torch.exp(self.gamma).to(B.dtype)
        return Learned(self.eigenvalues()), Learned(gamma), Mapped(x, B, self.state_shape)

    def step(self, h: Tensor, *values: Tensor) -> Tensor:
        """``λ h + γ (B x)``."""
        eigenvalues, gamma, Bx = values
        return torch.addcmul(gamma * Bx, eigenvalues, h)

    def output(self, x: Tensor, before: Tensor, h: Tensor, *values: Tensor) -> Tensor:
        """``Re(C h) + D x``."""
        return self.readout(h, x)
