"""A segment of steps of a one-layer cell, kept as the parts of each step instead of as matrices.

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
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sparse_rtrl.capture.parameters import RecurrentParameter
from sparse_rtrl.capture.segment import Factors, StepJacobian, Term
from sparse_rtrl.cells.slot_cell import Routing

Rows: TypeAlias = tuple[tuple[int, int], ...]
"""State entries that the entries of a tensor reach, as consecutive runs (first entry, length)."""

SCRATCH_BYTES = 16 * 2**20
"""Scratch memory of one block of columns in a commit, about."""


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
    """The Jacobians of a segment, step by step.

    Attributes:
        parts: its steps, oldest first.
        batch_size: ``B``.
        hidden_size: ``H``.
        routing: one slot, read and written.
        parameters: whose Jacobians they are.
    """

    parts: tuple[AlikeSteps, ...]
    batch_size: int
    hidden_size: int
    routing: Routing
    parameters: list[RecurrentParameter]

    @property
    def count(self) -> int:
        """Steps of the segment."""
        return sum(part.count for part in self.parts)

    @property
    def experts(self) -> Tensor:
        """None, ``(B, 0)``."""
        return self.routing.experts

    @classmethod
    def pull_back(cls, window: Sequence[StepChain], v: Tensor, core: Tensor, experts: Tensor) -> Tensor:
        """See :meth:`~sparse_rtrl.captured.Captured.pull_back`."""
        return pull_back(window, v, core)

    @classmethod
    def commit_(cls, window: Sequence[StepChain], core: Tensor, experts: Tensor, num_slots: int, ops: Any) -> None:
        """See :meth:`~sparse_rtrl.captured.Captured.commit_`."""
        commit_(core, window)

    def state_dict(self) -> dict[str, Any]:
        """Not kept: the window is committed before it is saved.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a window of chains cannot be saved: commit it first")

    @cached_property
    def as_step(self) -> StepJacobian:
        """The segment as one step, its factors dense over the state entries."""
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
        none = phi.new_zeros(self.batch_size, 0, self.hidden_size, 0)
        return StepJacobian(phi, self.routing, Factors(torch.cat(deltas, 2), tuple(terms)), Factors(none, ()))

    def total(self) -> Tensor:
        """Sum of all numbers: finite unless one of them is not, or the sum overflows."""
        factors: list[Linear | Diagonal | OneRowTerm] = []
        for part in self.parts:
            factors += [*part.linears, *part.diagonals, *part.terms]
        return torch.stack([factor.d.sum() for factor in factors]).sum()


def pull_back(chains: Sequence[StepChain], v: Tensor, core: Tensor) -> Tensor:
    """Row vectors ``v (B, H)`` behind the last chain, back through all of them.

    Args:
        chains: oldest first.
        v: ``(B, H)``; stays as it is.
        core: gradient of the core parameters at fixed entry state, ``(N_core,)``, added to.

    Returns:
        The row vectors ``(B, H)`` before the first chain.
    """
    for parts in reversed(_alike([part for chain in chains for part in chain.parts])):
        vs = []
        for part in reversed(parts):
            for t in range(part.count - 1, -1, -1):
                vs.append(v)
                v = _through(part, t, v)
        stacked = vs[0].unsqueeze(0) if len(vs) == 1 else torch.stack(vs[::-1])  # (n, B, H)
        cotangents: dict[int, Tensor] = {}  # weight and bias of a map share theirs
        for number, term in enumerate(parts[0].terms):
            if id(term.d) not in cotangents:
                d = torch.cat([part.terms[number].d for part in parts])
                cotangents[id(term.d)] = (_gather(stacked, term.rows) * d).flatten(0, 1)
            delta = cotangents[id(term.d)]
            if term.z is None:
                value = delta.sum(0)
            else:
                zs = [z for part in parts if (z := part.terms[number].z) is not None]
                value = (delta.T @ torch.cat(zs).flatten(0, 1)).flatten()
            core[term.offset : term.offset + value.numel()] += value
    return v


def _through(part: AlikeSteps, t: int, v: Tensor) -> Tensor:
    """``v J_t`` for ``v (B, H)`` or ``(B, L, H)``."""
    rows = v.dim() == 3
    if len(part.linears) == 1 and not part.diagonals and part.linears[0].weight.shape[1] == v.shape[-1]:
        linear = part.linears[0]
        d = linear.d[t].unsqueeze(1) if rows else linear.d[t]
        return (_gather(v, linear.rows) * d) @ linear.weight
    out = torch.zeros_like(v, memory_format=torch.contiguous_format)
    for linear in part.linears:
        d = linear.d[t].unsqueeze(1) if rows else linear.d[t]
        out[..., linear.column : linear.column + linear.weight.shape[1]] += (
            _gather(v, linear.rows) * d
        ) @ linear.weight
    for diagonal in part.diagonals:
        d = diagonal.d[t].unsqueeze(1) if rows else diagonal.d[t]
        out[..., diagonal.column : diagonal.column + d.shape[-1]] += _gather(v, diagonal.rows) * d
    return out


def _alike(parts: Sequence[AlikeSteps]) -> list[list[AlikeSteps]]:
    """Consecutive parts whose terms have the same columns and rows, together."""
    out: list[list[AlikeSteps]] = []
    for part in parts:
        if out and _columns_and_rows(out[-1][0]) == _columns_and_rows(part):
            out[-1].append(part)
        else:
            out.append([part])
    return out


def _columns_and_rows(part: AlikeSteps) -> list[tuple[int, Rows, bool, int]]:
    """Columns and rows of each term, whether its ``z`` is 1, and the first term that has the same ``d``."""
    first: dict[int, int] = {}
    return [
        (term.offset, term.rows, term.z is None, first.setdefault(id(term.d), number))
        for number, term in enumerate(part.terms)
    ]


def commit_(P: Tensor, chains: Sequence[StepChain]) -> None:
    """Move influence matrices through chains, in place: ``P[:, :H] <- Φ P[:, :H] + F``.

    Steps are taken in blocks that are composed backwards, ``Φ_{t-1} = Φ_t J_t``; a block costs ``(H^2 / c + 2 H) N``
    multiply-adds per step at ``c`` steps and keeps ``c`` matrices ``Φ``, about an eighth of ``P``. The columns of
    ``P`` move through scratch of bounded size.

    Args:
        P: ``(B, H + 1, N)``, the loss row last; it stays as it is.
        chains: what is committed, oldest first; all of the same parameters.
    """
    batch, hidden = P.shape[0], P.shape[1] - 1
    steps = _single_steps(chains)
    room = max(1, P.shape[2] // (8 * hidden), SCRATCH_BYTES // (batch * hidden**2 * P.element_size()))
    blocks = -(-len(steps) // room)
    size = -(-len(steps) // blocks)
    scratch = P.new_empty(0)
    for first in range(0, len(steps), size):
        block = steps[first : first + size]
        phi, phis = _phis(block, batch, hidden)
        for group in _sharing_d(block, chains[0].parameters):
            m, width = group[0].outputs, sum(parameter.inputs for parameter in group)
            per_output = (width + len(block)) * batch * hidden * P.element_size()
            outputs = max(1, min(m, SCRATCH_BYTES // per_output))
            if scratch.numel() < batch * hidden * outputs * width:
                scratch = P.new_empty(batch * hidden * outputs * width)
            for low in range(0, m, outputs):
                high = min(m, low + outputs)
                # d does not depend on the parameter: weight and bias of a map share what reaches the new state.
                deltas = [
                    _gather(phis[:, terms.places], _cut(terms.rows, low, high))
                    * terms.d[:, :, low:high].transpose(0, 1).unsqueeze(2)
                    for terms in group[0].terms
                ]  # (B, n, H, high - low)
                for parameter in group:
                    inputs = parameter.inputs
                    columns = slice(parameter.start + low * inputs, parameter.start + high * inputs)
                    count = (high - low) * inputs
                    new = scratch[: batch * hidden * count].view(batch, hidden, count)
                    torch.bmm(phi, P[:, :hidden, columns], out=new)
                    for terms, delta in zip(parameter.terms, deltas, strict=True):
                        if terms.z is None:
                            new += delta.sum(1)
                        else:
                            rows = new.view(batch, hidden * (high - low), inputs)
                            rows.baddbmm_(delta.flatten(2).transpose(1, 2), terms.z.transpose(0, 1))
                    P[:, :hidden, columns] = new


@dataclass(frozen=True)
class _JoinedTerms:
    """Terms of one parameter in the steps ``places`` of a block, ``d (n, B, M)`` and ``z (n, B, J)``."""

    places: slice | list[int]
    rows: Rows
    d: Tensor
    z: Tensor | None


@dataclass(frozen=True)
class _ParameterTerms:
    """What a block adds to the columns of one parameter, ``(outputs, inputs)`` from ``start`` on."""

    start: int
    outputs: int
    inputs: int
    terms: list[_JoinedTerms]


def _sharing_d(
    block: list[tuple[AlikeSteps, int]], parameters: list[RecurrentParameter]
) -> list[list[_ParameterTerms]]:
    """The terms of every parameter in a block; parameters whose terms share every ``d`` stand together."""
    together: dict[tuple[int, ...], list[_ParameterTerms]] = {}
    joined: dict[tuple[int, ...], Tensor] = {}
    for number, parameter in enumerate(parameters):
        terms = _joined_terms(block, parameter.start, joined)
        outputs = rows_count(terms[0].rows) if terms else parameter.shape.numel()
        inputs = parameter.shape.numel() // max(outputs, 1)
        key = tuple(id(t.d) for t in terms) or (-1 - number,)  # without terms it stands alone
        together.setdefault(key, []).append(_ParameterTerms(parameter.start, outputs, inputs, terms))
    return list(together.values())


def _single_steps(chains: Sequence[StepChain]) -> list[tuple[AlikeSteps, int]]:
    """Every step as (its part, number in the part), oldest first."""
    return [(part, t) for chain in chains for part in chain.parts for t in range(part.count)]


def _phis(steps: list[tuple[AlikeSteps, int]], batch: int, hidden: int) -> tuple[Tensor, Tensor]:
    """``dh_end / dh_entry (B, H, H)``, and ``dh_end / dh_t (B, n, H, H)`` of the state after each step."""
    like = steps[0][0].terms[0].d
    phis = like.new_empty(batch, len(steps), hidden, hidden)
    phi = torch.eye(hidden, dtype=like.dtype, device=like.device).expand(batch, -1, -1)
    for position in range(len(steps) - 1, -1, -1):
        phis[:, position] = phi
        part, t = steps[position]
        phi = _through(part, t, phi)
    return phi, phis


def _joined_terms(
    steps: list[tuple[AlikeSteps, int]], offset: int, joined: dict[tuple[int, ...], Tensor]
) -> list[_JoinedTerms]:
    """The terms of a parameter in a block, those of equal rows joined over the steps; ``joined`` keeps shared ones."""
    found: dict[tuple[Rows, int], list[tuple[range, OneRowTerm, slice]]] = {}
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
                found.setdefault((term.rows, nth), []).append((range(position, position + count), term, when))
        position += count
    out = []
    for (rows, _), entries in found.items():
        every = [place for where, _, _ in entries for place in where]
        consecutive = every == list(range(every[0], every[-1] + 1))
        places = slice(every[0], every[-1] + 1) if consecutive else every
        key = tuple(id(term.d) for _, term, _ in entries)
        if key not in joined:
            joined[key] = torch.cat([term.d[when] for _, term, when in entries])
        zs = [term.z[when] for _, term, when in entries if term.z is not None]
        out.append(_JoinedTerms(places, rows, joined[key], torch.cat(zs) if zs else None))
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
