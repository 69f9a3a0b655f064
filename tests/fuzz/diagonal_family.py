"""Diagonal cells through ``RTRL`` and through ``Carry``."""

import copy
import pickle
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_rtrl import RTRL, Carry
from sparse_rtrl.cells.diagonal_cell import DiagonalCell, Mapped
from sparse_rtrl.learners.diagonal_rtrl import DiagonalRTRL

from . import features
from .case import Case, Gradients, Way, added, gradients_of
from .diagonal_cells import INPUTS, READY, RandomDiagonalCell, ready_cell
from .draw import Draw
from .parts import Doubled, detached, where
from .slot_family import Stream, edited, merged, peek

Hook = tuple[int, str, float]


def values_of(cell: DiagonalCell, x: Tensor) -> list[Tensor]:
    """The values that a cell projects, worked out here."""
    out = []
    for projection in cell.project(x):
        if isinstance(projection, Mapped):
            weight = projection.weight
            value = F.linear(projection.x, weight.real if weight.is_complex() else weight, None)
            if weight.is_complex():
                value = torch.complex(value, F.linear(projection.x, weight.imag, None))
            value = value if projection.bias is None else value + projection.bias
            out.append(value.reshape(len(x), *projection.shape))
        else:
            out.append(projection.value)
    return out


def step_of(cell: DiagonalCell, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """One step of a cell by its three functions."""
    if not cell.previous_input:
        values = values_of(cell, x)
        h = cell.step(state, *values)
        return cell.output(x, state, h, *values), h
    before, previous = state
    rows = torch.cat((x, previous), 1)
    values = values_of(cell, rows)
    h = cell.step(before, *values)
    return cell.output(rows, before, h, *values), (h, x)


def bptt(cell: DiagonalCell, stream: Stream, hook: Hook | None, truncate: bool) -> Gradients:
    """Gradient through the whole past, see :func:`slot_family.bptt`."""
    state = cell.initial_state(stream.batch)
    early: list[Tensor] = []
    late: list[Tensor] = []
    for number, (start, stop) in enumerate(stream.bounds):
        if number in stream.resets:
            state = where(stream.resets[number], cell.initial_state(stream.batch), state)
        if truncate:
            state = detached(state)
        losses = early if hook is not None and number < hook[0] else late
        for t in range(start, stop):
            output, state = step_of(cell, stream.x[t], state)
            losses.append((output * stream.c[t]).sum())
    if early:
        sum(early).backward(retain_graph=True)
    if hook is not None:
        cell.get_parameter(hook[1]).register_hook(Doubled(hook[2]))
    sum(late).backward()
    return gradients_of(cell)


def make(draw: Draw) -> Case:
    """A random case."""
    steps, batch = draw.integer(4, 12), draw.integer(1, 3)
    stream = Stream(draw, steps, batch, draw.one_of(1, 1, 2, 4))
    stream.x = stream.x[..., :INPUTS].contiguous()
    kind = draw.one_of("random", "random", *READY)
    if kind == "random":
        cell: DiagonalCell = RandomDiagonalCell(draw)
        initial = draw.one_of("zeros", "fixed", "trained")
        if initial == "trained" and not features.trained_initial_state("diagonal"):
            initial = "fixed"
        cell.set_initial(initial)
        label = f"random {cell.template}" + (", trained initial entries" if initial == "trained" else "")
        label += ", frozen bias" if cell.frozen else ""
    else:
        cell, label = ready_cell(draw, kind), kind
    hook = None
    through_carry = draw.chance(0.4)
    edits = {
        n: draw.one_of("load", "deepcopy", "pickle", "copy") for n in range(1, len(stream.bounds)) if draw.chance(0.05)
    }
    if not edits and draw.chance(0.1):
        names = [n for n, p in cell.named_parameters() if p.requires_grad]
        hook = draw.integer(0, len(stream.bounds) - 1), draw.one_of(*names), draw.one_of(2.0, -1.0, 0.5)
        label += ", parameter hook"
    commit_every = draw.one_of(1, 1, 2, 3, 5, "auto")
    single = kind in ("lru", "elstm", "retention", "mamba") and not through_carry and draw.chance(0.15)
    late = isinstance(commit_every, int) and commit_every > 1 and hook is None and draw.chance(0.4)
    reused = draw.chance(0.3) and not late
    verify = draw.one_of("sample", "always", "never", 2)
    if single:
        cell, stream, label = cell.float(), stream.to(torch.float32), f"{label}, float32"

    def with_rtrl(counts: Counter[str]) -> Gradients:
        own = copy.deepcopy(cell)
        options = {
            "commit_every": commit_every,
            "backend": draw.one_of("auto", "reference"),
            **features.supported(DiagonalRTRL.__init__, verify=verify),
        }
        learner = RTRL(own, batch, **options)
        found: Gradients = {}
        pending: list[Tensor] = []
        waiting = 0
        buffer = torch.empty_like(stream.x[:1])
        for number, (start, stop) in enumerate(stream.bounds):
            mask = stream.resets.get(number)
            full = not late or waiting >= commit_every
            looks = draw.chance(0.05)
            if full or mask is not None or number in edits or looks:
                waiting = 0
                pay(pending)
            if hook is not None and hook[0] == number:
                own.get_parameter(hook[1]).register_hook(Doubled(hook[2]))
                counts["parameter hooks"] += 1
            if looks:
                peek(learner, draw.one_of("influence", "state_dict", "flush", "evaluate"), stream.x[start])
            if number in edits:
                counts[f"reload: {edits[number]}"] += 1
                found = merged(found, learner, edits[number])
                learner, own = edited(learner, edits[number], options)
            if mask is not None:
                counts["resets in mid-window"] += bool(learner._engine.influence.window)
                counts["resets of all streams" if bool(mask.all()) else "resets of some streams"] += 1
                learner.reset(mask)
            xs = stream.x[start:stop]
            if reused and len(xs) == 1:
                xs = buffer.copy_(xs)
                counts["input buffers reused"] += 1
            outputs = learner(xs[0]).unsqueeze(0) if len(xs) == 1 else learner.unroll(xs)
            counts[f"segment of {len(xs)}"] += 1
            if bool(stream.c[start:stop].any()):
                pending.append((outputs * stream.c[start:stop]).sum())
            counts["late losses"] += late and len(pending) > 1
            waiting += len(xs)
            if not late:
                pay(pending)
        pay(pending)
        counts["diagonal learners"] += 1
        return added(gradients_of(own), found) if found else gradients_of(own)

    def with_carry(counts: Counter[str]) -> Gradients:
        own = copy.deepcopy(cell)
        options = {"commit_every": commit_every, **features.supported(Carry.__init__, verify=verify)}
        carry = Carry(own, **options)
        found: Gradients = {}
        state = carry(own.initial_state(batch))
        for number, (start, stop) in enumerate(stream.bounds):
            mask = stream.resets.get(number)
            if hook is not None and hook[0] == number:
                own.get_parameter(hook[1]).register_hook(Doubled(hook[2]))
                counts["parameter hooks"] += 1
            if number in edits:
                counts[f"reload: {edits[number]}"] += 1
                if edits[number] == "load":
                    other = Carry(own, **options)
                    other.load_state_dict(carry.state_dict())
                    carry = other
                elif edits[number] == "copy":
                    carry = copy.copy(carry)
                else:
                    here = gradients_of(own)
                    found = added(here, found) if found else here
                    carry = copy.deepcopy(carry) if edits[number] == "deepcopy" else pickle.loads(pickle.dumps(carry))
                    own = carry.module
                    own.zero_grad()
                state = carry(detached(state))
            if mask is not None:
                if bool(mask.all()) and draw.chance(0.5):
                    carry.reset()
                    state = carry(own.initial_state(batch))
                else:
                    carry.reset(mask)
                    state = where(mask, own.initial_state(batch), state)
                counts["resets of all streams" if bool(mask.all()) else "resets of some streams"] += 1
            xs, c = stream.x[start:stop], stream.c[start:stop]
            if draw.chance(0.5):
                outputs, state = own.unroll(xs, state)
                loss = (outputs * c).sum()
            else:
                loss = torch.zeros(())
                for x_t, c_t in zip(xs, c, strict=True):
                    output, state = own(x_t, state)
                    loss = loss + (output * c_t).sum()
            counts[f"segment of {len(xs)}"] += 1
            state = carry(state)
            if bool(c.any()):
                loss.backward()
        counts["diagonal carries"] += 1
        return added(gradients_of(own), found) if found else gradients_of(own)

    def reference(way: Way) -> Gradients:
        return bptt(way.of(cell), stream.to(way.dtype), hook, way.truncate)

    return Case(
        f"diagonal {'carry' if through_carry else 'rtrl'}: {label}",
        with_carry if through_carry else with_rtrl,
        reference,
        reasons=("too late",) if late else (),
        float32=single,
    )


def pay(pending: list[Tensor]) -> None:
    """Send the losses that wait backwards, together."""
    if pending:
        sum(pending).backward()
        pending.clear()
