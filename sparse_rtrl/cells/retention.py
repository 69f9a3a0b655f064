"""Retention, and linear attention as retention without decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_rtrl.cells.diagonal_cell import DiagonalCell, Learned, Mapped, Projection
from sparse_rtrl.cells.registry import register_cell


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
        """``S (N, H, K, V)``, or complex ``(N, H, K / 2, V)``, and ``x (N, input_size)`` to ``(N, output_size)``."""
        if S.is_complex():  # Re(q S), with the parts of q side by side
            S = torch.cat((S.real, -S.imag), dim=-2)
        query = self.query(x).unflatten(-1, (self.num_heads, 1, -1))
        retained = self.norm(torch.matmul(query, S).flatten(1))
        return self.linear(F.silu(self.gate(x)) * retained)


@register_cell("retention", lambda of: {"num_heads": of.num_slots, "head_size": of.slot_size}, ("decay", "token_shift"))
class RetentionCell(DiagonalCell):
    r"""Multi-scale retention in its recurrent form (Sun et al. 2023, Retentive Network, section 2).

    Per head, with a matrix as state,

    .. math::
        S_t = \gamma S_{t-1} + k_t v_t^T, \qquad o_t = W (\mathrm{swish}(G x_t) \odot \mathrm{GroupNorm}(q_t S_t)), \\
        q_t = Q x_t, \qquad k_t = K x_t / \sqrt{d_k}, \qquad v_t = V x_t.

    With ``decay=1.0`` this is linear attention without feature map (Katharopoulos et al. 2020, Transformers are RNNs).
    The influence of ``K`` is the same for every key and that of ``V`` for every value, so it takes
    ``2 * num_heads * head_size * input_size`` numbers per stream, as many as ``K`` and ``V`` have, where the state has
    ``num_heads * head_size²`` entries.

    ``rotation`` turns queries and keys by their position (xPos in the paper). A head's queries and keys are then
    ``head_size / 2`` complex numbers, number ``j`` with the rows ``j`` and ``j + head_size / 2`` of the head as its
    parts, and so is a column of the state:

    .. math::
        S_t = \gamma e^{i \theta} \odot S_{t-1} + \bar k_t v_t^T, \qquad
        q_t S_t \to \mathrm{Re}(q_t S_t)
        = \sum_{s \le t} \gamma^{t-s} \mathrm{Re}(q_t e^{i t \theta} \overline{k_s e^{i s \theta}}) v_s^T.

    The state is as large. Where the keys of a head have angles of their own, the influence of ``K`` differs between
    keys as between values and takes ``num_heads * head_size² * input_size`` numbers; with one angle per head it takes
    twice as many as without rotation.

    Args:
        input_size: size of the input of a step.
        num_heads: heads.
        head_size: key and value size of a head.
        output_size: size of the output.
        decay: ``γ`` of all heads or of each; None for ``1 - 2^{-5-i}`` of head ``i``, as in the paper.
        learn_decay: whether ``γ`` is trained; its influence takes a number per state entry.
        rotation: angles ``θ`` in radians per step, ``(num_heads, head_size / 2)``, or ``(num_heads, 1)`` for one angle
            per head; ``"xpos"`` for ``10000^{-2 j / head_size}`` of number ``j``; None for no rotation.
        learn_rotation: whether ``θ`` is trained; its influence takes a number per state entry.
        token_shift: make the keys from the input of the step before, so that the state keeps what followed what:
            ``k_t = K x_{t-1} / sqrt(d_k)``.

    Raises:
        ValueError: if ``decay`` has another length than ``num_heads`` or leaves ``(0, 1]``, if ``rotation`` has another
            shape, is not finite or meets an odd ``head_size``, or if there is no rotation to train.
    """

    def __init__(
        self,
        input_size: int,
        num_heads: int,
        head_size: int,
        output_size: int,
        decay: float | Sequence[float] | None = None,
        learn_decay: bool = False,
        rotation: Literal["xpos"] | Sequence[Sequence[float]] | Tensor | None = None,
        learn_rotation: bool = False,
        token_shift: bool = False,
    ) -> None:
        rotated = rotation is not None
        keys = head_size // 2 if rotated else head_size
        super().__init__(input_size, (num_heads, keys, head_size), complex_state=rotated, previous_input=token_shift)
        self.output_size = output_size
        if decay is None:
            decay = [1 - 2.0 ** (-5 - head) for head in range(num_heads)]
        decays = [decay] * num_heads if isinstance(decay, (int, float)) else list(decay)
        if len(decays) != num_heads or not all(0 < value <= 1 for value in decays):
            raise ValueError(f"decay must be one number or {num_heads} numbers in (0, 1], got {decay}")
        self.decay = nn.Parameter(torch.tensor(decays, dtype=torch.get_default_dtype()), learn_decay)
        if rotation is None and learn_rotation:
            raise ValueError("learn_rotation=True needs a rotation to start from, got rotation=None")
        self.angle = None if rotation is None else nn.Parameter(_angles(rotation, num_heads, head_size), learn_rotation)
        self.key = nn.Linear(input_size, num_heads * head_size, bias=False)
        self.value = nn.Linear(input_size, num_heads * head_size, bias=False)
        self.readout = RetentionReadout(input_size, num_heads, head_size, head_size, output_size)

    def project(self, x: Tensor) -> tuple[Projection, ...]:
        """``γ`` or ``γ e^{i θ}``, ``k`` without its scale, and ``v``, of rows ``x (N, input_size)``."""
        heads, keys, values = self.state_shape
        current, before = x[:, : self.input_size], x[:, -self.input_size :]  # the same without token shift
        decay = self.decay.view(heads, 1, 1)
        key, value = self.key.weight, self.value.weight
        if self.angle is not None:
            decay = torch.polar(decay, self.angle.unsqueeze(-1))
            parts = key.unflatten(0, (heads, 2, keys))
            key = torch.complex(parts[:, 0], -parts[:, 1]).flatten(0, 1)
            value = value.to(key.dtype)  # saves the second backward pass that a real value in a complex state needs
        return (
            Learned(decay),
            Mapped(before, key, (heads, keys, 1)),
            Mapped(current, value, (heads, 1, values)),
        )

    def step(self, h: Tensor, *values: Tensor) -> Tensor:
        """``γ S + k v^T``, ``(N, *state_shape)``, with ``γ e^{i θ}`` and conjugate keys if they are rotated."""
        decay, key, value = values
        scale = self.state_shape[2] ** -0.5  # of the keys; here it costs less than on their weight
        return torch.addcmul(key * (scale * value), decay, h)

    def output(self, x: Tensor, before: Tensor, h: Tensor, *values: Tensor) -> Tensor:
        """``W (swish(G x) ⊙ GroupNorm(q S))``."""
        return self.readout(h, x[:, : self.input_size])


def _angles(rotation: Literal["xpos"] | Sequence[Sequence[float]] | Tensor, heads: int, head_size: int) -> Tensor:
    """Angles ``(heads, head_size / 2)`` or ``(heads, 1)`` in radians per step."""
    if head_size % 2:
        raise ValueError(f"head_size must be even with rotation, got {head_size}")
    if isinstance(rotation, str):
        if rotation != "xpos":
            raise ValueError(f"rotation must be 'xpos', angles or None, got {rotation!r}")
        return (10000.0 ** (-2 * torch.arange(head_size // 2) / head_size)).repeat(heads, 1)
    angles = torch.as_tensor(rotation, dtype=torch.get_default_dtype()).clone()
    if tuple(angles.shape) not in ((heads, head_size // 2), (heads, 1)) or not bool(angles.isfinite().all()):
        raise ValueError(
            f"rotation must be finite angles of shape ({heads}, {head_size // 2}) or ({heads}, 1), got"
            f" {rotation if angles.numel() < 20 else tuple(angles.shape)}"
        )
    return angles
