"""UORO: an unbiased estimate of the influence of rank one."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sparse_rtrl.capture.parameter_uses import SegmentGraph
from sparse_rtrl.capture.parameters import RecurrentParameter
from sparse_rtrl.capture.segment import Factors
from sparse_rtrl.learners.methods.pending import PendingPast
from sparse_rtrl.ops.precision import full_precision

EPSILON = 1e-7
"""Keeps the two scales finite (Tallec & Ollivier 2018, algorithm 1)."""


class _Captured(NamedTuple):
    moved: Tensor
    """``J h̃``, ``(B, H)``."""
    noise: Tensor
    """``ν``, ``(B, H)`` of ±1."""
    immediate: Tensor
    """``ν F``, ``(B, |θ|)``."""


class UORO(PendingPast[_Captured]):
    """Unbiased online recurrent optimization: ``P ≈ h̃ θ̃`` (Tallec & Ollivier 2018, algorithm 1).

    With independent random signs ``ν``::

        h̃ <- ρ0 J h̃ + ρ1 ν
        θ̃ <- θ̃ / ρ0 + ν F / ρ1
        ρ0^2 = ‖θ̃‖ / ‖J h̃‖,  ρ1^2 = ‖ν F‖ / ‖ν‖

    one pair per stream, so that ``E[h̃ θ̃] = P``. The gradient is right on average over the signs; its variance
    grows with the size of the state. Keeps ``B (H + |θ|)`` numbers. No Jacobian is formed: a
    segment costs one more backward pass for ``ν F`` and ``ν J``, and one backward pass through that one for ``J h̃``.
    Modules that torch cannot differentiate twice (compiled functions, fused recurrent layers) are refused.
    """

    name: ClassVar[str] = "uoro"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._state: Tensor | None = None
        self._weights: Tensor | None = None

    def _allocate(self, parameters: list[RecurrentParameter], end: Tensor) -> None:
        weights = end.new_zeros(end.shape[0], sum(p.shape.numel() for p in parameters))
        placed = {p.name: p for p in parameters}
        if self._weights is not None:
            for p in self.parameters:
                weights[:, placed[p.name].columns] = self._weights[:, p.columns]
        self._weights = weights
        if self._state is None:
            self._state = torch.zeros_like(end, requires_grad=False)

    def _close(self, end: Tensor, entry: Tensor | None, graph: SegmentGraph) -> None:
        device = end.device if self.generator is None else self.generator.device
        bits = torch.randint(0, 2, end.shape, generator=self.generator, device=device)
        noise = (2 * bits - 1).to(end)
        back, factors = self._jacobians(end, entry, graph, noise.unsqueeze(0))
        self._settle()
        assert self._state is not None
        if entry is None:
            self._pending = _Captured(torch.zeros_like(noise), noise, self._immediate(factors, end))
            return
        moved = _forward_product(end, entry, self._state)
        tolerance = 0.05 if "ToCopyBackward0" in graph.names else 50 * torch.finfo(end.dtype).eps ** 0.75
        _check_product(noise, moved, back.squeeze(1), self._state, tolerance)
        self._pending = _Captured(moved, noise, self._immediate(factors, end))

    def _immediate(self, factors: Factors, like: Tensor) -> Tensor:
        """``ν F`` of each stream, ``(B, |θ|)``, from factors with a single row."""
        assert self._weights is not None
        out = torch.zeros_like(self._weights)
        for term in factors.terms:
            delta = factors.delta[:, 0, term.delta_slice].unflatten(-1, (term.tau, term.m))
            value = delta.sum(1) if term.z is None else torch.bmm(delta.transpose(1, 2), term.z)
            out[:, term.offset : term.offset + value[0].numel()] += value.flatten(1)
        return out

    def _advance(self, captured: _Captured) -> None:
        moved, noise, immediate = captured
        assert self._weights is not None
        rho0 = (_norm(self._weights) / (_norm(moved) + EPSILON)).sqrt() + EPSILON
        rho1 = (_norm(immediate) / (_norm(noise) + EPSILON)).sqrt() + EPSILON
        self._state = rho0 * moved + rho1 * noise
        self._weights = self._weights / rho0 + immediate / rho1

    def _clear(self, streams: Tensor) -> None:
        if self._state is not None and self._weights is not None:
            self._state[streams] = 0
            self._weights[streams] = 0

    @full_precision
    def _product(self, u: Tensor) -> dict[str, Tensor]:
        assert self._state is not None and self._weights is not None
        total = (u * self._state).sum(1) @ self._weights
        return {p.name: total[p.columns].view(p.shape) for p in self.parameters}

    def influence(self) -> dict[str, Tensor]:
        """See :meth:`Past.influence`; formed from the pair, as large as the exact one."""
        self._settle()
        if self._state is None or self._weights is None:
            return {}
        state, weights = self._state, self._weights
        return {
            p.name: (state.unsqueeze(2) * weights[:, None, p.columns]).unflatten(2, p.shape) for p in self.parameters
        }

    def kept_bytes(self) -> int:
        """See :meth:`Past.kept_bytes`."""
        return sum(t.numel() * t.element_size() for t in (self._state, self._weights) if t is not None)

    def _forget(self) -> None:
        super()._forget()
        self._state = self._weights = None

    def _save(self) -> Any:
        self._settle()
        assert self._state is not None and self._weights is not None
        generator = None if self.generator is None else self.generator.get_state()
        return {"state": self._state.clone(), "weights": self._weights.clone(), "generator": generator}

    def _load(self, kept: Any) -> None:
        self._state, self._weights = kept["state"].clone(), kept["weights"].clone()
        if self.generator is not None and kept["generator"] is not None:
            self.generator.set_state(kept["generator"])


def _norm(rows: Tensor) -> Tensor:
    """Euclidean norm of each row, ``(B, 1)``."""
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def _forward_product(end: Tensor, entry: Tensor, tangent: Tensor) -> Tensor:
    """``J tangent``, ``(B, H)``: the derivative of the backward pass, which is linear in its cotangent."""
    cotangent = torch.zeros_like(end, requires_grad=True)
    try:
        (back,) = torch.autograd.grad(end, entry, cotangent, create_graph=True, retain_graph=True, allow_unused=True)
        if back is None or not back.requires_grad:
            return torch.zeros_like(tangent)
        (moved,) = torch.autograd.grad(back, cotangent, tangent, allow_unused=True)
    except RuntimeError as error:
        if "second time" in str(error) or "modified by an inplace operation" in str(error):
            raise
        raise RuntimeError(f"{_REMEDY} ({error})") from error
    return torch.zeros_like(tangent) if moved is None else moved


def _check_product(noise: Tensor, moved: Tensor, back: Tensor, tangent: Tensor, tolerance: float) -> None:
    """Refuse a ``J h̃`` that does not agree with ``ν J``: some operation hides its second derivative."""
    error = ((noise * moved).sum(1) - (back * tangent).sum(1)).abs()
    scale = (_norm(noise) * _norm(moved) + _norm(back) * _norm(tangent)).squeeze(1)
    if bool((error > tolerance * scale).any()):
        raise RuntimeError(_REMEDY)


_REMEDY = (
    "method 'uoro' needs modules that can be differentiated twice: write the module with plain operations instead of"
    " compiled functions, fused recurrent layers or custom autograd functions, or use another method"
)
