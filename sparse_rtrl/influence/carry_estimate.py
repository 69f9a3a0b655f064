"""What ``Carry`` costs for a given module and state: memory, operations, and how long a segment should be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SEGMENTS = (1, 4, 16, 64, 256)
"""Segment lengths that are printed."""


@dataclass(frozen=True)
class CarryEstimate:
    """Costs of carrying a module's past.

    Attributes:
        method: what is kept of the past.
        batch_size: streams ``B``.
        hidden_size: state size ``H``, all tensors of the state together.
        parameters: carried parameters ``|θ|``.
        kept_bytes: kept between segments, constant in the length of the stream; for ``snap1`` and ``rflo`` the least,
            with one state entry per parameter.
        captured_bytes_per_step: immediate Jacobians of one step, held until the segment is committed.
        segment: suggested steps per segment: the longest power of two up to ``H``, where the cost levels off, whose
            captured Jacobians take no more than the influence itself.
    """

    method: str
    batch_size: int
    hidden_size: int
    parameters: int
    kept_bytes: int
    captured_bytes_per_step: int
    segment: int

    def multiply_adds(self, segment: int) -> float:
        """Multiply-adds per step of all streams together, for segments of ``segment`` steps.

        Capture and update of the exact method: ``(2 H + H^2 / n) |θ| B`` (Schmidhuber 1992).
        """
        if segment < 1:
            raise ValueError(f"segment must be at least 1, got {segment}")
        hidden = self.hidden_size
        per_parameter = {
            "exact": 2 * hidden + hidden**2 / segment,
            "snap1": hidden + 1 + 1 / segment,
            "rflo": hidden + 1 + 1 / segment,
            "uoro": 4 + 2 / segment,
            "truncated": 0,
        }
        return per_parameter[self.method] * self.parameters * self.batch_size

    def __str__(self) -> str:
        formula = {
            "exact": "itemsize * B * (H + 1) * |θ|",
            "snap1": "at least itemsize * B * |θ|",
            "rflo": "at least itemsize * B * |θ|",
            "uoro": "itemsize * B * (H + |θ|)",
            "truncated": "nothing",
        }[self.method]
        costs = ", ".join(f"{n}: {self.multiply_adds(n):.3g}" for n in SEGMENTS)
        return (
            f"method {self.method}, kept: {formula} with B = {self.batch_size}, H = {self.hidden_size},"
            f" |θ| = {self.parameters}: {self.kept_bytes / 2**20:.1f} MiB, at any length\n"
            f"captured: {self.captured_bytes_per_step / 2**20:.2f} MiB per step of a segment\n"
            f"multiply-adds per step, by steps per segment: {costs}; suggested segment = {self.segment}"
        )


def estimate_carry(method: str, shapes: list[torch.Size], state: Tensor) -> CarryEstimate:
    """Costs of carrying parameters of the given shapes.

    Args:
        method: what is kept of the past.
        shapes: shapes of the parameters that reach the state.
        state: the flat state ``(B, H)``, for its sizes and dtype.
    """
    batch, hidden = state.shape
    item, count = state.element_size(), sum(shape.numel() for shape in shapes)
    kept = {"exact": (hidden + 1) * count, "uoro": hidden + count, "truncated": 0}.get(method, count)
    outputs = sum(shape[0] for shape in shapes if len(shape) > 1)  # of the maps, one delta each
    rows = {"uoro": 1, "truncated": 0}.get(method, hidden)
    segment = 1
    while 2 * segment <= hidden and 2 * segment * outputs <= count:
        segment *= 2
    return CarryEstimate(
        method=method,
        batch_size=batch,
        hidden_size=hidden,
        parameters=count,
        kept_bytes=item * batch * kept,
        captured_bytes_per_step=item * batch * rows * outputs,
        segment=segment,
    )
