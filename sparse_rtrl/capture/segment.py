"""Captured steps as factored Jacobians, and the segment they make: one map with factored ``F``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sparse_rtrl.captured import Moved
from sparse_rtrl.cells.slot_cell import Routing
from sparse_rtrl.ops.precision import full_precision
from sparse_rtrl.ops.reference import slot_entries

ROUTING_PARTS = ("read", "write", "experts")


@dataclass(frozen=True)
class Term:
    """One factored immediate Jacobian: ``F[i, (m, j)] = sum_τ delta[i, τ, m] z[τ, j]``.

    Attributes:
        offset: first column of the parameter in its group.
        delta_start: first entry of this term along the last dimension of :attr:`Factors.delta`.
        tau: number of applications of the map.
        m: output size of the map.
        z: inputs of the map, core ``(B, τ, j)``, expert ``(B, k, τ, j)``; None for ``z = 1``, ``τ = j = 1``.
    """

    offset: int
    delta_start: int
    tau: int
    m: int
    z: Tensor | None

    @property
    def delta_slice(self) -> slice:
        """This term's part of the last dimension of :attr:`Factors.delta`."""
        return slice(self.delta_start, self.delta_start + self.tau * self.m)


@dataclass(frozen=True)
class Factors:
    """The immediate Jacobians of one group kind in one step.

    Attributes:
        delta: all terms side by side: core ``(B, w, Σ τ m)``, experts ``(B, k, w, Σ τ m)``.
        terms: how to read it.
    """

    delta: Tensor
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class StepJacobian:
    """Everything one step contributes to the influence, with the parameters it was run with.

    Attributes:
        Jh: state Jacobian ``dh[write] / dh_entry[support]``, ``(B, w, r)``, columns of ``read`` then of ``write``.
        routing: what the step touched.
        core: immediate Jacobians of the core group.
        expert: immediate Jacobians of the active experts.
    """

    Jh: Tensor
    routing: Routing
    core: Factors
    expert: Factors

    @property
    def count(self) -> int:
        """Steps that it counts as."""
        return 1

    @property
    def experts(self) -> Tensor:
        """Experts that it used, ``(B, k)``."""
        return self.routing.experts

    @classmethod
    def pull_back(cls, window: Sequence[StepJacobian], v: Tensor, core: Tensor, experts: Tensor) -> Tensor:
        """See :meth:`~sparse_rtrl.captured.Captured.pull_back`."""
        for step in reversed(window):
            slot_size = step.Jh.shape[2] // max(step.routing.support.shape[1], 1)
            rows = slot_entries(step.routing.write, slot_size)
            written = v.gather(1, rows)
            step.add_direct_gradient_(written, core, experts)
            gain = torch.bmm(written.unsqueeze(1), step.Jh).squeeze(1)
            v = v.scatter(1, rows, 0.0).scatter_add_(1, slot_entries(step.routing.support, slot_size), gain)
        return v

    @classmethod
    def commit_(cls, window: Sequence[StepJacobian], core: Tensor, experts: Tensor, num_slots: int, ops: Any) -> Moved:
        """See :meth:`~sparse_rtrl.captured.Captured.commit_`."""
        segment = compose(window, len(experts) // len(core), num_slots, (core.shape[1] - 1) // num_slots)
        for P, factors in ((core, segment.core), (experts, segment.expert)):
            ops.influence_update_(
                P,
                segment.Jh,
                segment.write,
                segment.support,
                None,
                factors.streams,
                factors.groups,
                factors.deltas,
                factors.zs,
                factors.offsets,
            )
        return Moved(segment.Jh, segment.write, segment.support, segment.expert.groups)

    @full_precision
    def add_direct_gradient_(self, cotangent: Tensor, core: Tensor, experts: Tensor) -> None:
        """Add the gradient of the parameters at fixed entry state, summed over the streams: ``v F``.

        Args:
            cotangent: ``v = dL/dh[write]``, ``(B, w)``.
            core: ``(N_core,)``, added to.
            experts: ``(E, N_expert)``, added to.
        """
        v = cotangent.unsqueeze(1)
        if self.core.terms:
            rows = torch.bmm(v, self.core.delta).squeeze(1)  # (B, Σ)
            for term in self.core.terms:
                delta = rows[:, term.delta_slice]
                value = delta.sum(0) if term.z is None else delta.reshape(-1, term.m).T @ term.z.flatten(0, 1)
                core[term.offset : term.offset + value.numel()] += value.flatten()
        if self.expert.terms:
            index = self.routing.experts.flatten()
            rows = torch.matmul(v.unsqueeze(1), self.expert.delta).squeeze(2)  # (B, k, Σ)
            for term in self.expert.terms:
                delta = rows[..., term.delta_slice].reshape(-1, term.tau, term.m)
                value = delta.sum(1) if term.z is None else torch.bmm(delta.transpose(1, 2), term.z.flatten(0, 1))
                value = value.flatten(1)
                experts[:, term.offset : term.offset + value.shape[1]].index_add_(0, index, value)

    def state_dict(self) -> dict[str, Any]:
        """Everything in it, as tensors, numbers and containers of them; the tensors are not copied."""
        factors = {
            name: {"delta": kind.delta, "terms": [tuple(getattr(t, f.name) for f in fields(Term)) for t in kind.terms]}
            for name, kind in (("core", self.core), ("expert", self.expert))
        }
        return {"Jh": self.Jh, **{part: getattr(self.routing, part) for part in ROUTING_PARTS}, **factors}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> StepJacobian:
        """Rebuild what :meth:`state_dict` described, on a device."""

        def on_device(values: Iterable[Any]) -> list[Any]:
            return [value.to(device) if isinstance(value, Tensor) else value for value in values]

        core, expert = (
            Factors(state[name]["delta"].to(device), tuple(Term(*on_device(t)) for t in state[name]["terms"]))
            for name in ("core", "expert")
        )
        return cls(state["Jh"].to(device), Routing(*on_device(state[part] for part in ROUTING_PARTS)), core, expert)


@dataclass(frozen=True)
class GroupFactors:
    """Immediate Jacobians of some influence matrices, in the form that ``influence_update_`` takes.

    Attributes:
        streams: stream of each matrix, ``(M,)`` int64.
        groups: row of each matrix in the stacked influence, ``(M,)`` int64, distinct.
        deltas: per parameter ``(M, w, τ, m)``.
        zs: per parameter ``(M, τ, j)``.
        offsets: first column of each parameter.
    """

    streams: Tensor
    groups: Tensor
    deltas: list[Tensor]
    zs: list[Tensor]
    offsets: list[int]


@dataclass(frozen=True)
class Segment:
    """The map of one or more consecutive steps.

    Attributes:
        Jh: ``dh_end[write] / dh_entry[support]``, ``(B, w, r)``.
        write: slots written by any of its steps, ``(B, kw)``.
        support: slots the written content depends on, ``(B, ks)``, containing ``write``.
        core: immediate Jacobians of the core group.
        expert: those of every (stream, expert) pair that was active in any of its steps.
    """

    Jh: Tensor
    write: Tensor
    support: Tensor
    core: GroupFactors
    expert: GroupFactors


def compose(steps: Sequence[StepJacobian], num_experts: int, num_slots: int, slot_size: int) -> Segment:
    """Compose the steps of a segment, over the slots that they touched."""
    Jh, write, support, core, expert = _compose(steps, num_slots, slot_size, every_slot=False)
    return Segment(Jh, write, support, _core_factors(steps, core), _expert_factors(steps, expert, num_experts))


def compose_fixed(
    steps: Sequence[StepJacobian], num_experts: int, num_slots: int, slot_size: int
) -> tuple[Segment, Tensor]:
    """Compose the steps of a segment in shapes that follow from the sizes of a step alone.

    A segment of several steps covers all slots, and its experts are as many as it could use at most: unused ones have
    factors of zero.

    Returns:
        The segment, and the rows of the stacked influence whose experts are not in it, ``(M,)``.
    """
    Jh, write, support, core, expert = _compose(steps, num_slots, slot_size, every_slot=True)
    factors, idle = _fixed_expert_factors(steps, expert, num_experts)
    return Segment(Jh, write, support, _core_factors(steps, core), factors), idle


def _compose(
    steps: Sequence[StepJacobian], num_slots: int, slot_size: int, every_slot: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """``Jh``, ``write``, ``support``, and the deltas of core and experts of each step at the end of the segment.

    With ``Φ_t = dh_end[write] / dh_t``, taken backwards from the identity, step ``t`` contributes
    ``delta_end = Φ_t[:, write_t] delta_t`` at its own ``z``, and ``Φ_{t-1} = Φ_t J_t``.

    Args:
        steps: captured steps, oldest first.
        num_slots: ``S``.
        slot_size: ``D``.
        every_slot: take all slots instead of those that several steps touched.
    """
    first = steps[0]
    if len(steps) == 1:
        core, expert = [first.core.delta], [first.expert.delta]
        Jh, write, support = first.Jh, first.routing.write, first.routing.support
    else:
        batch, hidden = first.Jh.shape[0], num_slots * slot_size
        # One set of slots for all streams: where a stream did not write a slot its rows are those of the identity.
        if every_slot:
            write = support = torch.arange(num_slots, device=first.Jh.device).expand(batch, -1)
        else:
            write = torch.cat([s.routing.write.flatten() for s in steps]).unique().expand(batch, -1)
            support = torch.cat([s.routing.support.flatten() for s in steps]).unique().expand(batch, -1)
        rows = slot_entries(write, slot_size)
        phi = first.Jh.new_zeros(batch, rows.shape[1], hidden).scatter_(2, rows.unsqueeze(2), 1.0)
        core, expert = [], []
        for step in reversed(steps):
            at_write = slot_entries(step.routing.write, slot_size).unsqueeze(1).expand(-1, phi.shape[1], -1)
            at_support = slot_entries(step.routing.support, slot_size).unsqueeze(1).expand(-1, phi.shape[1], -1)
            written = phi.gather(2, at_write)
            core.append(torch.bmm(written, step.core.delta))
            expert.append(torch.matmul(written.unsqueeze(1), step.expert.delta))
            phi = phi.scatter(2, at_write, 0.0).scatter_add_(2, at_support, torch.bmm(written, step.Jh))
        core.reverse()
        expert.reverse()
        Jh = phi.gather(2, slot_entries(support, slot_size).unsqueeze(1).expand(-1, phi.shape[1], -1))
    return Jh, write, support, core, expert


def _core_factors(steps: Sequence[StepJacobian], deltas: list[Tensor]) -> GroupFactors:
    """Join the core's terms over the steps, ``deltas (B, w, Σ)`` one per step."""
    batch = deltas[0].shape[0]
    every = torch.arange(batch, device=deltas[0].device)
    out = GroupFactors(every, every, [], [], [])
    for indices in _alike_steps([step.core.terms for step in steps]):
        joined = torch.stack([deltas[i] for i in indices], 2)
        zs = [torch.stack(z, 1) if z else None for z in _inputs([steps[i].core.terms for i in indices])]
        _extend(out, steps[indices[0]].core.terms, joined, zs)
    return out


def _expert_factors(steps: Sequence[StepJacobian], deltas: list[Tensor], num_experts: int) -> GroupFactors:
    """Collect for every active (stream, expert) pair its uses, padded with zeros; ``deltas (B, k, w, Σ)`` per step."""
    batch, device = deltas[0].shape[0], deltas[0].device
    stream_of = torch.arange(batch, device=device).unsqueeze(1)
    keys = [(stream_of * max(num_experts, 1) + step.routing.experts).flatten() for step in steps]
    if len(steps) == 1:
        return _expert_factors_of_one(steps[0], deltas[0], stream_of, keys[0])
    pairs, place = torch.cat(keys).unique(return_inverse=True)
    counts = torch.tensor([len(key) for key in keys], device=device)
    step_of = torch.arange(len(steps), device=device).repeat_interleave(counts)
    active = torch.zeros(len(steps), len(pairs), dtype=torch.int64, device=device)
    active[step_of, place] = 1
    nth_use = (active.cumsum(0) - 1)[step_of, place]
    uses = int(active.sum(0).max()) if len(pairs) else 0
    streams = torch.div(pairs, max(num_experts, 1), rounding_mode="floor")
    out = GroupFactors(streams, pairs, [], [], [])
    if num_experts == 0 or not len(pairs):
        return GroupFactors(streams[:0], pairs[:0], [], [], [])

    def join(values: list[Tensor], indices: list[int]) -> Tensor:
        """Values ``(B, k, ...)``, one per step, to ``(M, uses, ...)``."""
        joined = values[0].new_zeros(len(pairs), uses, *values[0].shape[2:])
        chosen = torch.isin(step_of, torch.tensor(indices, device=device))
        joined[place[chosen], nth_use[chosen]] = torch.cat([value.flatten(0, 1) for value in values])
        return joined

    _extend_joined(out, steps, deltas, join)
    return out


def _expert_factors_of_one(step: StepJacobian, delta: Tensor, stream_of: Tensor, key: Tensor) -> GroupFactors:
    """The same for one step, which uses every pair once: nothing to join."""
    out = GroupFactors(stream_of.expand_as(step.routing.experts).flatten(), key, [], [], [])
    zs = [None if term.z is None else term.z.flatten(0, 1).unsqueeze(1) for term in step.expert.terms]
    _extend(out, step.expert.terms, delta.flatten(0, 1).unsqueeze(2), zs)
    return out


def _extend_joined(
    out: GroupFactors,
    steps: Sequence[StepJacobian],
    deltas: list[Tensor],
    join: Callable[[list[Tensor], list[int]], Tensor],
) -> None:
    """Add the experts' terms of steps; ``join`` puts values ``(B, k, ...)`` of some steps into ``(M, uses, ...)``."""
    for indices in _alike_steps([step.expert.terms for step in steps]):
        joined = join([deltas[i] for i in indices], indices).transpose(1, 2)  # (M, w, uses, Σ)
        zs = [join(z, indices) if z else None for z in _inputs([steps[i].expert.terms for i in indices])]
        _extend(out, steps[indices[0]].expert.terms, joined, zs)


def _fixed_expert_factors(
    steps: Sequence[StepJacobian], deltas: list[Tensor], num_experts: int
) -> tuple[GroupFactors, Tensor]:
    """As :func:`_expert_factors`, for ``min(E, n k)`` experts of each stream, used ones first; and the other pairs."""
    batch, device = deltas[0].shape[0], deltas[0].device
    every = torch.arange(batch, device=device).unsqueeze(1)
    if num_experts == 0:
        return GroupFactors(every[:0, 0], every[:0, 0], [], [], []), every[:0, 0]
    used = torch.zeros(batch, num_experts, dtype=torch.int64, device=device)
    for step in steps:
        used.scatter_(1, step.routing.experts, 1)
    order = used.argsort(dim=1, descending=True, stable=True)  # (B, E), expert at each place
    place = order.argsort(dim=1)  # (B, E), place of each expert
    count = min(num_experts, sum(step.routing.experts.shape[1] for step in steps))
    pairs = every * num_experts + order
    streams = every.expand(-1, count).flatten()
    out = GroupFactors(streams, pairs[:, :count].flatten(), [], [], [])

    def join(values: list[Tensor], indices: list[int]) -> Tensor:
        """Values ``(B, k, ...)``, one per step, to ``(B * count, n, ...)``."""
        joined = values[0].new_zeros(batch, count, len(indices), *values[0].shape[2:])
        for nth, (value, index) in enumerate(zip(values, indices, strict=True)):
            at = place.gather(1, steps[index].routing.experts).view(batch, -1, *[1] * (value.dim() - 2))
            joined[:, :, nth].scatter_(1, at.expand_as(value), value)
        return joined.flatten(0, 1)

    _extend_joined(out, steps, deltas, join)
    return out, pairs[:, count:].flatten()


def _alike_steps(terms: list[tuple[Term, ...]]) -> list[list[int]]:
    """Indices of the steps with equal columns and sizes of terms; all unless a parameter took the dense path late."""
    groups: dict[tuple[tuple[int, int, int, bool], ...], list[int]] = {}
    for index, step_terms in enumerate(terms):
        columns = tuple((term.offset, term.tau, term.m, term.z is None) for term in step_terms)
        groups.setdefault(columns, []).append(index)
    return list(groups.values())


def _inputs(terms: list[tuple[Term, ...]]) -> list[list[Tensor]]:
    """The inputs of each term over the steps; empty for a term with ``z = 1``."""
    return [[term.z for term in column if term.z is not None] for column in zip(*terms, strict=True)]


def _extend(out: GroupFactors, terms: tuple[Term, ...], deltas: Tensor, zs: list[Tensor | None]) -> None:
    """Add terms to the factors: ``deltas (M, w, n, Σ)``, ``zs (M, n, τ, j)``; sums over ``n`` where ``z = 1``."""
    for term, z in zip(terms, zs, strict=True):
        part = deltas[..., term.delta_slice].unflatten(-1, (term.tau, term.m))  # (M, w, n, τ, m)
        if z is None:
            out.deltas.append(part.sum(2))
            out.zs.append(part.new_ones(len(part), 1, 1))
        else:
            out.deltas.append(part.flatten(2, 3))
            out.zs.append(z.flatten(1, 2))
        out.offsets.append(term.offset)
