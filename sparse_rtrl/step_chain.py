"""A segment of steps of a one-layer cell, kept as what each step is made of instead of as matrices.

Where every state entry of a step is an element-wise function of a few linear maps of the state before it, as in Elman,
GRU and LSTM cells, an output of a map reaches the new state through one entry per tensor of the state. The Jacobians of
the step are then diagonal matrices times weights,

    J = sum_l S_l diag(d_l) W_l + diagonals,      F[rows(m), (m, j)] = d[m] z[j],

and a segment needs a few vectors per step instead of ``H x H`` and ``H x M`` matrices, until it is committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from sparse_rtrl.jacobian import Factors, Term
from sparse_rtrl.parameters import ParameterGroups
from sparse_rtrl.slot_cell import Routing

Rows: TypeAlias = tuple[tuple[int, int], ...]
"""State entries that the entries of a tensor reach, as consecutive runs (first entry, length)."""

SCRATCH_BYTES = 16 * 2**20
"""Most scratch for one block of columns of a commit."""


@dataclass(frozen=True)
class Linear:
    """``J[rows(m), column + k] += d[m] weight[m, k]``.

    Attributes:
        rows: state entries of the map's outputs.
        d: ``dh/dy``, ``(n, B, M)``.
        weight: as it was used, ``(M, K)``.
        column: first state entry that the map reads.
    """

    rows: Rows
    d: Tensor
    weight: Tensor
    column: int


@dataclass(frozen=True)
class Diagonal:
    """``J[rows(i), column + i] += d[i]``.

    Attributes:
        rows: state entries that are reached.
        d: ``(n, B, width)``.
        column: first state entry of the source.
    """

    rows: Rows
    d: Tensor
    column: int


@dataclass(frozen=True)
class OneRowTerm:
    """``F[rows(m), (m, j)] += d[m] z[j]`` of one parameter.

    Attributes:
        parameter: number of the parameter.
        offset: its first column.
        rows: state entries of the map's outputs.
        d: ``(n, B, M)``.
        z: ``(n, B, J)``; None for ``z = 1``.
    """

    parameter: int
    offset: int
    rows: Rows
    d: Tensor
    z: Tensor | None


@dataclass(frozen=True)
class AlikeSteps:
    """Consecutive steps that ran the same code, oldest first."""

    count: int
    linears: tuple[Linear, ...]
    diagonals: tuple[Diagonal, ...]
    terms: tuple[OneRowTerm, ...]


@dataclass(frozen=True)
class StepChain:
    """The Jacobians of a segment, step by step; reads like a :class:`~sparse_rtrl.jacobian.StepJacobian`.

    Attributes:
        parts: its steps, oldest first.
        batch_size: ``B``.
        hidden_size: ``H``.
        routing: one slot, read and written.
    """

    parts: tuple[AlikeSteps, ...]
    batch_size: int
    hidden_size: int
    routing: Routing

    @property
    def count(self) -> int:
        """Steps of the segment."""
        return sum(part.count for part in self.parts)

    @cached_property
    def _composed(self) -> tuple[Tensor, Factors]:
        phi, phis = _phis(_single_steps([self]), self.batch_size, self.hidden_size)
        terms: list[Term] = []
        deltas: list[Tensor] = []
        start = position = 0
        for part in self.parts:
            for term in part.terms:
                for t in range(part.count):
                    delta = _gather(phis[:, position + t], term.rows) * term.d[t].unsqueeze(1)
                    z = None if term.z is None else term.z[t].unsqueeze(1)
                    terms.append(Term(term.offset, start, 1, delta.shape[2], z))
                    deltas.append(delta)
                    start += delta.shape[2]
            position += part.count
        joined = torch.cat(deltas, 2) if deltas else phi.new_zeros(self.batch_size, self.hidden_size, 0)
        return phi, Factors(joined, tuple(terms))

    @property
    def Jh(self) -> Tensor:
        """State Jacobian ``dh_end / dh_entry``, ``(B, H, H)``."""
        return self._composed[0]

    @property
    def core(self) -> Factors:
        """Immediate Jacobians of the segment, dense over the state entries."""
        return self._composed[1]

    @property
    def expert(self) -> Factors:
        """No experts."""
        first = self.parts[0].terms[0].d
        return Factors(first.new_zeros(self.batch_size, 0, self.hidden_size, 0), ())

    def total(self) -> Tensor:
        """Sum of all numbers: finite unless one of them is not, or the sum overflows."""
        numbers = [e.d.sum() for part in self.parts for e in (*part.linears, *part.diagonals, *part.terms)]
        return torch.stack(numbers).sum()


def pull_back(chains: Sequence[StepChain], v: Tensor, groups: ParameterGroups) -> tuple[Tensor, Tensor]:
    """Row vectors ``v (B, H)`` behind the last chain, back through all of them.

    Returns:
        Gradient of the core parameters at fixed entry state, ``(N_core,)``, summed over the streams, and the row
        vectors ``(B, H)`` before the first chain.
    """
    core = v.new_zeros(groups.core_columns)
    pending: dict[tuple[int, int, int], list[tuple[Tensor, Tensor | None]]] = {}
    for chain in reversed(chains):
        for part in reversed(chain.parts):
            vs = []
            for t in range(part.count - 1, -1, -1):
                vs.append(v)
                before = torch.zeros_like(v)
                for linear in part.linears:
                    reached = (_gather(v, linear.rows) * linear.d[t]) @ linear.weight
                    before[:, linear.column : linear.column + reached.shape[1]] += reached
                for diagonal in part.diagonals:
                    width = diagonal.d.shape[2]
                    before[:, diagonal.column : diagonal.column + width] += _gather(v, diagonal.rows) * diagonal.d[t]
                v = before
            stacked = torch.stack(vs[::-1])  # (n, B, H)
            cotangents: dict[int, Tensor] = {}  # weight and bias of a map share theirs
            for term in part.terms:
                key = id(term.d)
                if key not in cotangents:
                    cotangents[key] = (_gather(stacked, term.rows) * term.d).flatten(0, 1)
                z = None if term.z is None else term.z.flatten(0, 1)
                columns = 1 if z is None else z.shape[1]
                slot = (term.offset, cotangents[key].shape[1], columns)
                pending.setdefault(slot, []).append((cotangents[key], z))
    for (offset, m, columns), uses in pending.items():
        delta = uses[0][0] if len(uses) == 1 else torch.cat([d for d, _ in uses])
        if uses[0][1] is None:
            value = delta.sum(0)
        else:
            value = delta.T @ (uses[0][1] if len(uses) == 1 else torch.cat([z for _, z in uses if z is not None]))
        core[offset : offset + m * columns] += value.flatten()
    return core, v


def commit_(P: Tensor, chains: Sequence[StepChain], groups: ParameterGroups) -> None:
    """Move influence matrices through chains, in place: ``P[:, :H] <- Φ P[:, :H] + F``.

    Steps are taken in blocks that are composed backwards, ``Φ_{t-1} = Φ_t J_t``; a block costs ``(H^2 / c + 2 H) N``
    multiply-adds per step at ``c`` steps and keeps ``c`` matrices ``Φ``, at most a quarter of ``P``. The columns of
    ``P`` move through scratch of bounded size.

    Args:
        P: ``(B, H + 1, N)``, the loss row last; it stays as it is.
        chains: what is committed, oldest first.
        groups: whose core columns ``P`` has.
    """
    batch, hidden = P.shape[0], P.shape[1] - 1
    steps = _single_steps(chains)
    room = max(1, P.shape[2] // (4 * hidden), SCRATCH_BYTES // (batch * hidden**2 * P.element_size()))
    blocks = -(-len(steps) // room)
    size = -(-len(steps) // blocks)
    scratch = P.new_empty(0)
    for first in range(0, len(steps), size):
        block = steps[first : first + size]
        phi, phis = _phis(block, batch, hidden)
        for parameter in groups.core:
            uses = _uses(block, parameter.start)
            m = max((rows_count(use.rows) for use in uses), default=parameter.shape.numel())
            width = parameter.shape.numel() // max(m, 1)
            per_output = (width + (len(block) if uses else 0)) * batch * hidden * P.element_size()
            outputs = max(1, min(m, SCRATCH_BYTES // per_output))
            if scratch.numel() < batch * hidden * outputs * width:
                scratch = P.new_empty(batch * hidden * outputs * width)
            for low in range(0, m, outputs):
                high = min(m, low + outputs)
                columns = slice(parameter.start + low * width, parameter.start + high * width)
                count = (high - low) * width
                new = scratch[: batch * hidden * count].view(batch, hidden, count)
                torch.bmm(phi, P[:, :hidden, columns], out=new)
                for use in uses:
                    _add_immediate(new, use, phis[:, use.places], low, high)
                P[:, :hidden, columns] = new


def _add_immediate(new: Tensor, use: _Use, phis: Tensor, low: int, high: int) -> None:
    """``new (B, H, columns) += sum_t Φ_t F_t`` for the outputs ``low ... high - 1`` of a map; ``phis (B, n, H, H)``."""
    batch, hidden = new.shape[:2]
    d = use.d[:, :, low:high].transpose(0, 1).unsqueeze(2)  # (B, n, 1, m)
    delta = _gather(phis, _cut(use.rows, low, high)) * d  # (B, n, H, m)
    if use.z is None:
        new += delta.sum(1)
    else:
        rows = new.view(batch, hidden * (high - low), -1)
        rows.baddbmm_(delta.flatten(2).transpose(1, 2), use.z.transpose(0, 1))


def _single_steps(chains: Sequence[StepChain]) -> list[tuple[AlikeSteps, int]]:
    """Every step as (its part, number in the part), oldest first."""
    return [(part, t) for chain in chains for part in chain.parts for t in range(part.count)]


def _phis(steps: list[tuple[AlikeSteps, int]], batch: int, hidden: int) -> tuple[Tensor, Tensor]:
    """``dh_end / dh_entry (B, H, H)``, and ``dh_end / dh_t (B, n, H, H)`` of the state after each step."""
    like = steps[0][0].terms[0].d
    phis = like.new_empty(batch, len(steps), hidden, hidden)
    phi = torch.eye(hidden, dtype=like.dtype, device=like.device).expand(batch, -1, -1)
    for position in range(len(steps) - 1, -1, -1):
        part, t = steps[position]
        phis[:, position] = phi
        before = like.new_zeros(batch, hidden, hidden)
        for linear in part.linears:
            reached = (_gather(phi, linear.rows) * linear.d[t].unsqueeze(1)) @ linear.weight
            before[:, :, linear.column : linear.column + reached.shape[2]] += reached
        for diagonal in part.diagonals:
            width = diagonal.d.shape[2]
            before[:, :, diagonal.column : diagonal.column + width] += _gather(phi, diagonal.rows) * diagonal.d[
                t
            ].unsqueeze(1)
        phi = before
    return phi, phis


@dataclass(frozen=True)
class _Use:
    """Terms of one parameter in the steps ``places`` of a block, ``d (n, B, M)`` and ``z (n, B, J)``."""

    places: slice | list[int]
    rows: Rows
    d: Tensor
    z: Tensor | None


def _uses(steps: list[tuple[AlikeSteps, int]], offset: int) -> list[_Use]:
    """The terms of a parameter in a block, those of equal rows joined over the steps."""
    found: dict[tuple[Rows, int], list[tuple[range, Tensor, Tensor | None]]] = {}
    position = 0
    while position < len(steps):
        part, first = steps[position]
        count = 1
        while position + count < len(steps) and steps[position + count][0] is part:
            count += 1
        when = slice(first, first + count)
        repeats: dict[Rows, int] = {}
        for term in part.terms:
            if term.offset == offset:
                nth = repeats[term.rows] = repeats.get(term.rows, 0) + 1
                entry = (range(position, position + count), term.d[when], None if term.z is None else term.z[when])
                found.setdefault((term.rows, nth), []).append(entry)
        position += count
    out = []
    for (rows, _), entries in found.items():
        places: slice | list[int] = [place for where, _, _ in entries for place in where]
        if places == list(range(places[0], places[-1] + 1)):
            places = slice(places[0], places[-1] + 1)
        d = torch.cat([d for _, d, _ in entries])
        zs = [z for _, _, z in entries if z is not None]
        out.append(_Use(places, rows, d, torch.cat(zs) if zs else None))
    return out


def rows_count(rows: Rows) -> int:
    """How many entries a tensor with these rows has."""
    return sum(length for _, length in rows)


def _cut(rows: Rows, low: int, high: int) -> Rows:
    """Rows of the entries ``low ... high - 1``."""
    out = []
    for first, length in rows:
        a, b = max(low, 0), min(high, length)
        if a < b:
            out.append((first + a, b - a))
        low, high = low - length, high - length
    return tuple(out)


def _gather(values: Tensor, rows: Rows) -> Tensor:
    """The entries ``rows`` of the last dimension."""
    if len(rows) == 1:
        return values[..., rows[0][0] : rows[0][0] + rows[0][1]]
    return torch.cat([values[..., first : first + length] for first, length in rows], dim=-1)
