"""A segment: the steps between two influence updates, composed backwards into one map with factored ``F``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_rtrl.jacobian import StepJacobian, Term
from sparse_rtrl.parameters import ParameterGroups
from sparse_rtrl.reference import slot_entries


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


def compose(steps: list[StepJacobian], groups: ParameterGroups, num_slots: int, slot_size: int) -> Segment:
    """Compose the steps of a segment.

    With ``Φ_t = dh_end[write] / dh_t``, taken backwards from the identity, step ``t`` contributes
    ``delta_end = Φ_t[:, write_t] delta_t`` at its own ``z``, and ``Φ_{t-1} = Φ_t J_t``.

    Args:
        steps: captured steps, oldest first.
        groups: the recurrent parameters.
        num_slots: ``S``.
        slot_size: ``D``.
    """
    first = steps[0]
    if len(steps) == 1:
        core, expert = [first.core.delta], [first.expert.delta]
        Jh, write, support = first.Jh, first.routing.write, first.routing.support
    else:
        batch, hidden = first.Jh.shape[0], num_slots * slot_size
        # One set of slots for all streams: where a stream did not write a slot its rows are those of the identity.
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
    return Segment(Jh, write, support, _core_factors(steps, core), _expert_factors(steps, expert, groups.num_experts))


def _core_factors(steps: list[StepJacobian], deltas: list[Tensor]) -> GroupFactors:
    """Join the terms of each parameter over the steps: factored terms side by side along ``τ``, dense ones summed."""
    batch = deltas[0].shape[0]
    every = torch.arange(batch, device=deltas[0].device)
    factored: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    dense: dict[int, Tensor] = {}
    for step, delta in zip(steps, deltas, strict=True):
        for term in step.core.terms:
            part = delta[..., term.delta_slice].unflatten(-1, (term.tau, term.m))
            if term.z is None:
                dense[term.offset] = dense[term.offset] + part if term.offset in dense else part
            else:
                parts, zs = factored.setdefault(term.offset, ([], []))
                parts.append(part)
                zs.append(term.z)
    return GroupFactors(
        every,
        every,
        [torch.cat(parts, 2) for parts, _ in factored.values()] + list(dense.values()),
        [torch.cat(zs, 1) for _, zs in factored.values()] + [part.new_ones(batch, 1, 1) for part in dense.values()],
        [*factored, *dense],
    )


def _expert_factors(steps: list[StepJacobian], deltas: list[Tensor], num_experts: int) -> GroupFactors:
    """Collect for every active (stream, expert) pair the steps in which it was active, padded with zeros."""
    batch = deltas[0].shape[0]
    device = deltas[0].device
    if num_experts == 0:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return GroupFactors(none, none, [], [], [])
    stream_of = torch.arange(batch, device=device).unsqueeze(1)
    keys = [(stream_of * num_experts + step.routing.experts).flatten() for step in steps]
    pairs, place = torch.cat(keys).unique(return_inverse=True)
    places = place.split([len(key) for key in keys])
    active = torch.zeros(len(steps), len(pairs), dtype=torch.int64, device=device)
    for t, at in enumerate(places):
        active[t, at] = 1
    nth_use = active.cumsum(0) - 1
    uses = int(active.sum(0).max()) if len(pairs) else 0
    width = deltas[0].shape[2]
    out_deltas, out_zs, offsets = [], [], []
    layouts = {key: term for step in steps for key, term in _numbered(step.expert.terms)}
    for key, like in layouts.items():
        joined = deltas[0].new_zeros(len(pairs), uses, width, like.tau, like.m)
        j = 1 if like.z is None else like.z.shape[-1]
        z_joined = deltas[0].new_zeros(len(pairs), uses, like.tau, j)
        for t, (step, delta, at) in enumerate(zip(steps, deltas, places, strict=True)):
            term = dict(_numbered(step.expert.terms)).get(key)
            if term is not None:
                part = delta[..., term.delta_slice].unflatten(-1, (term.tau, term.m)).flatten(0, 1)
                joined[at, nth_use[t, at]] = part
                z_joined[at, nth_use[t, at]] = 1.0 if term.z is None else term.z.flatten(0, 1)
        offsets.append(like.offset)
        if like.z is None:
            out_deltas.append(joined.sum(1))
            out_zs.append(z_joined.new_ones(len(pairs), 1, 1))
        else:
            out_deltas.append(joined.transpose(1, 2).flatten(2, 3))
            out_zs.append(z_joined.flatten(1, 2))
    streams = torch.div(pairs, num_experts, rounding_mode="floor")
    return GroupFactors(streams, pairs, out_deltas, out_zs, offsets)


def _numbered(terms: tuple[Term, ...]) -> list[tuple[tuple[int, bool, int, int], Term]]:
    """Terms with a key that tells apart several uses of one parameter in a step, equal from step to step."""
    out: list[tuple[tuple[int, bool, int, int], Term]] = []
    for term in terms:
        nth = sum(other.offset == term.offset for _, other in out)
        out.append(((term.offset, term.z is None, term.tau, nth), term))
    return out
