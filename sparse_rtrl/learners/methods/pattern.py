"""Influence that is kept only where a parameter reaches the state at once."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_rtrl.capture.parameter_uses import SegmentGraph
from sparse_rtrl.capture.parameters import RecurrentParameter
from sparse_rtrl.capture.segment import Factors, Term
from sparse_rtrl.learners.methods.pending import PendingPast
from sparse_rtrl.ops.precision import full_precision

MAX_BLOCK_NUMBERS = 1 << 22
"""An update gathers at most this many entries of the state Jacobian at a time."""


@dataclass
class PatternInfluence:
    """Influence of one parameter, where it may differ from zero.

    The parameter is cut into ``M`` groups of ``j`` consecutive elements that reach the same state entries: the rows of
    a weight matrix, or single elements.

    Attributes:
        entries: state entries that each group reaches, ascending, ``(M, q)`` int64; the rest repeats entry 0.
        valid: which of them count, ``(M, q)`` bool.
        values: influence of the group's elements on them, ``(B, M, q, j)``.
    """

    entries: Tensor
    valid: Tensor
    values: Tensor

    @classmethod
    def empty(cls, batch: int, size: int, like: Tensor) -> PatternInfluence:
        """No influence of ``size`` elements, in one group, in the dtype of ``like``, any shape."""
        none = torch.zeros(1, 0, dtype=torch.int64, device=like.device)
        return cls(none, none.bool(), like.new_zeros(batch, 1, 0, size))

    @property
    def group_size(self) -> int:
        """Elements of a group, ``j``."""
        return self.values.shape[3]

    def cut(self, group_size: int) -> None:
        """Cut the groups into smaller ones of ``group_size`` elements."""
        pieces = self.group_size // group_size
        if pieces > 1:
            self.entries = self.entries.repeat_interleave(pieces, 0)
            self.valid = self.valid.repeat_interleave(pieces, 0)
            self.values = self.values.unflatten(-1, (pieces, -1)).transpose(2, 3).flatten(1, 2).contiguous()

    def grow(self, reached: Tensor) -> None:
        """Add state entries to the pattern; their influence so far is zero.

        Args:
            reached: ``(M, H)`` bool.
        """
        group, old_place = self.valid.nonzero().T
        old = torch.zeros_like(reached)
        old[group, self.entries[group, old_place]] = True
        union = reached | old
        if bool((union == old).all()):
            return
        count = int(union.sum(1).max())
        order = union.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
        valid = union.gather(1, order)
        place = union.cumsum(1).sub(1).clamp(min=0).gather(1, self.entries)  # where each old entry is now
        values = self.values.new_zeros(*self.values.shape[:2], count, self.group_size)
        values[:, group, place[group, old_place]] = self.values[:, group, old_place]
        self.entries, self.valid, self.values = order.masked_fill(~valid, 0), valid, values

    def advance(self, J: Tensor, immediate: Tensor) -> None:
        """Move through a segment: ``P <- J P + F`` on the pattern, everything outside of it dropped.

        Args:
            J: state Jacobian ``(B, H, H)``.
            immediate: ``F`` on the pattern, ``(B, M, q, j)``.
        """
        batch, groups, q, _ = self.values.shape
        if q == J.shape[1] and bool(self.valid.all()):  # every entry is reached: no need to gather
            self.values = torch.matmul(J.unsqueeze(1), self.values) + immediate
            return
        chunk = max(1, MAX_BLOCK_NUMBERS // max(1, batch * q * q))
        for start in range(0, groups, chunk):
            part = slice(start, start + chunk)
            entries, valid = self.entries[part], self.valid[part]
            block = J[:, entries.unsqueeze(2), entries.unsqueeze(1)]  # (B, chunk, q, q)
            moved = torch.matmul(block, self.values[:, part]) + immediate[:, part]
            self.values[:, part] = moved * valid.unsqueeze(-1)

    def product(self, u: Tensor) -> Tensor:
        """``u (B, H)`` times the influence, summed over the streams, one number per element."""
        weights = u[:, self.entries] * self.valid  # (B, M, q)
        return torch.einsum("bmq,bmqj->mj", weights, self.values).flatten()

    def dense(self, hidden: int) -> Tensor:
        """The influence with its zeros, ``(B, H, elements)``."""
        batch, groups, _, size = self.values.shape
        out = self.values.new_zeros(batch, groups, hidden, size)
        index = self.entries.view(1, groups, -1, 1).expand_as(self.values)
        out.scatter_add_(2, index, self.values * self.valid.unsqueeze(-1))
        return out.transpose(1, 2).reshape(batch, hidden, groups * size)


class PatternPast(PendingPast[tuple[Tensor, Factors]]):
    """Influence on the pattern of the immediate Jacobian: ``P <- M ⊙ (D P + F)``.

    An entry ``(i, θ)`` belongs to the pattern ``M`` once ``δ_i``, the derivative of state entry ``i`` with respect to
    the output of the map that holds ``θ``, has differed from zero in some stream. Keeps ``B q |θ|`` numbers, with ``q``
    the most state entries that an element reaches within one segment: 1 for Elman and GRU cells and segments of one
    step, 2 for an LSTM; a map before the cell, such as an embedding or a first layer, reaches every unit and keeps
    everything. A subclass says what ``D`` is.

    A loss goes back through its own segment exactly and meets ``P`` at the entry of that segment; the sources drop what
    lies outside of ``M`` there too, so that this gradient has one more factor ``J`` right.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: dict[str, PatternInfluence] = {}

    def _allocate(self, parameters: list[RecurrentParameter], end: Tensor) -> None:
        for p in parameters:
            if p.name not in self._kept:
                self._kept[p.name] = PatternInfluence.empty(end.shape[0], p.shape.numel(), end)

    def _close(self, end: Tensor, entry: Tensor | None, graph: SegmentGraph) -> None:
        J, factors = self._jacobians(end, entry, graph)
        D = J if entry is None else self._kept_part(J, end, entry, graph)
        self._settle()
        self._pending = (D, factors)

    @abstractmethod
    def _kept_part(self, J: Tensor, end: Tensor, entry: Tensor, graph: SegmentGraph) -> Tensor:
        """What the method keeps of the state Jacobian ``J (B, H, H)``."""

    def _advance(self, captured: tuple[Tensor, Factors]) -> None:
        D, factors = captured
        for p in self.parameters:
            terms = [t for t in factors.terms if p.start <= t.offset < p.columns.stop]
            kept = self._kept[p.name]
            size = p.shape.numel()
            kept.cut(math.gcd(kept.group_size, *(n for t in terms for n in (_inputs(t), t.offset - p.start))))
            groups = size // kept.group_size
            hidden = D.shape[1]
            uses = [_immediate_use(t, p.start, kept.group_size, factors) for t in terms]
            reached = torch.zeros(groups, hidden, dtype=torch.bool, device=D.device)
            for first, delta, _ in uses:
                reached[first : first + delta.shape[1]] |= delta.ne(0).any(0).any(2)
            kept.grow(reached)
            immediate = torch.zeros_like(kept.values)
            for first, delta, z in uses:
                part = slice(first, first + delta.shape[1])
                entries = kept.entries[part].unsqueeze(-1).expand(*delta.shape[:2], -1, delta.shape[3])
                chosen = delta.gather(2, entries).unflatten(1, (-1, z.shape[1]))  # (B, m, pieces, q, τ)
                immediate[:, part] += torch.matmul(chosen, z.unsqueeze(1)).flatten(1, 2)
            kept.advance(D, immediate)

    def _clear(self, streams: Tensor) -> None:
        for kept in self._kept.values():
            kept.values[streams] = 0

    @full_precision
    def _product(self, u: Tensor) -> dict[str, Tensor]:
        return {p.name: self._kept[p.name].product(u).view(p.shape) for p in self.parameters}

    def influence(self) -> dict[str, Tensor]:
        """See :meth:`Past.influence`."""
        self._settle()
        if self.like is None:
            return {}
        batch, hidden, _ = self.like.shape
        return {p.name: self._kept[p.name].dense(hidden).view(batch, hidden, *p.shape) for p in self.parameters}

    def kept_bytes(self) -> int:
        """See :meth:`Past.kept_bytes`; indices included."""
        tensors = [t for kept in self._kept.values() for t in (kept.entries, kept.valid, kept.values)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _forget(self) -> None:
        super()._forget()
        self._kept = {}

    def _save(self) -> Any:
        self._settle()
        return {name: [t.clone() for t in (k.entries, k.valid, k.values)] for name, k in self._kept.items()}

    def _load(self, kept: Any) -> None:
        self._kept = {name: PatternInfluence(*(t.clone() for t in tensors)) for name, tensors in kept.items()}


def _inputs(term: Term) -> int:
    """Consecutive columns of a term that belong to one output of its map."""
    return 1 if term.z is None else term.z.shape[2]


def _immediate_use(term: Term, start: int, group_size: int, factors: Factors) -> tuple[int, Tensor, Tensor]:
    """A term by groups of ``group_size`` columns: its first group, ``delta`` and ``z``.

    Returns:
        First group, ``delta (B, groups, H, τ)``, and ``z (B, pieces, τ, group_size)`` with ``pieces`` the groups that
        one output of the map is cut into.
    """
    delta = factors.delta[..., term.delta_slice].unflatten(-1, (term.tau, term.m)).permute(0, 3, 1, 2)
    if term.z is None:
        return (term.offset - start) // group_size, delta, delta.new_ones(delta.shape[0], 1, 1, 1)
    z = term.z.unflatten(-1, (-1, group_size)).transpose(1, 2)
    return (term.offset - start) // group_size, delta.repeat_interleave(z.shape[1], 1), z
