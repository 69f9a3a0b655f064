"""Slot cells through ``RTRL``: patterns, windows, sleeping experts, losses, resets, reloads, hooks."""

import copy
import pickle
from collections import Counter

import torch
from torch import Tensor

from sparse_rtrl import RTRL, Routing, SlotCell

from . import features
from .case import Case, Gradients, Way, added, gradients_of
from .draw import Draw
from .parts import Doubled, put, take, where
from .slot_cells import INPUTS, RandomSlotCell, moe_cell


class Stream:
    """Inputs, losses and events of one run.

    Attributes:
        x: inputs ``(T, B, INPUTS + 2)``: numbers, a rare flag, the number of the step.
        c: ``dL/doutput (T, B, 2)``, zero where there is no loss.
        bounds: first and last step of each segment.
        resets: streams that start anew before a segment, by its number.
        entry_loss: ``dL/dh (B, S, D)`` of the state that entered a segment, by its number.
    """

    def __init__(self, draw: Draw, steps: int, batch: int, longest: int) -> None:
        self.batch, self.steps = batch, steps
        self.x = draw.normal(steps, batch, INPUTS + 2)
        self.x[..., -2] = (self.x[..., -2] > 1.2).double()
        self.x[..., -1] = torch.arange(steps).unsqueeze(1)
        self.c = draw.normal(steps, batch, 2)
        density = draw.one_of(0.2, 0.5, 1.0)
        for t in range(steps - 1):
            if not draw.chance(density):
                self.c[t] = 0
        lengths = draw.lengths(steps, longest)
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        self.bounds = [(end - n, end) for end, n in zip(ends, lengths, strict=True)]
        self.resets: dict[int, Tensor] = {}
        for number in range(1, len(self.bounds)):
            if draw.chance(0.12):
                self.resets[number] = torch.ones(batch, dtype=torch.bool) if draw.chance(0.2) else draw.mask(batch)
        self.entry_loss: dict[int, Tensor] = {}

    def to(self, dtype: torch.dtype) -> "Stream":
        other = copy.copy(self)
        other.x, other.c = self.x.to(dtype), self.c.to(dtype)
        other.entry_loss = {number: c.to(dtype) for number, c in self.entry_loss.items()}
        return other


def bptt(
    cell: SlotCell, stream: Stream, routings: list[Routing], hook: tuple[int, str, float] | None, truncate: bool
) -> Gradients:
    """Gradient through the whole past; ``hook`` is installed before a segment, on a parameter, with a factor."""
    h = cell.initial_state(stream.batch)
    early: list[Tensor] = []
    late: list[Tensor] = []
    for number, (start, stop) in enumerate(stream.bounds):
        if number in stream.resets:
            h = where(stream.resets[number], cell.initial_state(stream.batch), h)
        if truncate:
            h = h.detach()
        losses = early if hook is not None and number < hook[0] else late
        if number in stream.entry_loss and h.requires_grad:
            losses.append((h * stream.entry_loss[number]).sum())
        for t in range(start, stop):
            r = cell.pattern[t] if isinstance(cell, RandomSlotCell) else routings[t]
            new, output = cell.update(stream.x[t], take(h, r.read), take(h, r.write), r)
            h = put(h, r.write, new)
            losses.append((output * stream.c[t]).sum())
    if early:
        sum(early).backward(retain_graph=True)
    if hook is not None:
        cell.get_parameter(hook[1]).register_hook(Doubled(hook[2]))
    if late:
        sum(late).backward()
    return gradients_of(cell)


def make(draw: Draw) -> Case:
    """A random case."""
    steps, batch = draw.integer(4, 12), draw.integer(1, 3)
    stream = Stream(draw, steps, batch, draw.one_of(1, 1, 2, 4))
    kind = draw.one_of("random", "random", "random", "random", "slot moe", "slot moe", "sparse latent moe")
    if kind == "random":
        cell: SlotCell = RandomSlotCell(draw, steps, batch)
        initial = draw.one_of("zeros", "zeros", "fixed", "trained")
        if initial == "trained" and not features.trained_initial_state("slot"):
            initial = "fixed"
        cell.set_initial(initial)
        label = ", ".join([f"experts: {cell.bank_kind}", *sorted(cell.operations)])
        if cell.parametrization:
            label += f", {cell.parametrization}"
        if cell.frozen:
            label += f", frozen: {cell.frozen}"
        if initial == "trained":
            label += ", trained initial state"
    else:
        cell, label = moe_cell(draw, kind), kind
    single = kind != "random" and draw.chance(0.15)
    options = {
        "buffer": draw.one_of(1, 2, 3, 4, 8, "auto"),
        "commit_every": draw.one_of(1, 1, 2, 3, 5, "auto"),
        "catch_up": draw.one_of("auto", "eager", "replay", "product", "replay", "product"),
        "backend": draw.one_of("auto", "auto", "reference"),
        **features.supported(
            RTRL.__init__,
            verify=draw.one_of("sample", "always", "never", 2),
            capture=draw.one_of("auto", "auto", "auto", "dense"),
        ),
    }
    if draw.chance(0.2):
        for number in range(1, len(stream.bounds)):
            if draw.chance(0.3):
                stream.entry_loss[number] = draw.normal(batch, cell.num_slots, cell.slot_size)
    ways = ["load", "deepcopy", "pickle", "copy"]
    if kind == "random" and cell.parametrization:
        ways.remove("pickle")  # torch cannot pickle a parametrized module
    edits = {n: draw.one_of(*ways) for n in range(1, len(stream.bounds)) if draw.chance(0.05)}
    peeks = {
        n: draw.one_of("influence", "state_dict", "flush", "evaluate", "norms")
        for n in range(len(stream.bounds))
        if draw.chance(0.1)
    }
    hook = None
    if not edits and draw.chance(0.12):
        names = [n for n, p in cell.named_parameters() if p.requires_grad]
        hook = draw.integer(0, len(stream.bounds) - 1), draw.one_of(*names), draw.one_of(2.0, -1.0, 0.5)
        label += ", parameter hook"
    late = isinstance(options["commit_every"], int) and options["commit_every"] > 1 and draw.chance(0.4)
    late &= hook is None
    reused = not late and draw.chance(0.3)
    if single:
        cell, stream, label = cell.float(), stream.to(torch.float32), f"{label}, float32"
    routings: list[Routing] = []

    def learn(counts: Counter[str]) -> Gradients:
        found: Gradients = {}
        own = copy.deepcopy(cell)
        learner = RTRL(own, batch, **options)
        pending: list[Tensor] = []
        waiting = 0
        buffer = torch.empty_like(stream.x[:1])

        def pay() -> None:
            if pending:
                sum(pending).backward()
                pending.clear()

        for number, (start, stop) in enumerate(stream.bounds):
            mask = stream.resets.get(number)
            commits = waiting >= options["commit_every"] if late else True
            if commits or mask is not None or number in edits or number in peeks:
                pay()
                waiting = 0 if commits or mask is not None or number in edits or number in peeks else waiting
            if hook is not None and hook[0] == number:
                learner.flush()
                own.get_parameter(hook[1]).register_hook(Doubled(hook[2]))
                counts["parameter hooks"] += 1
            if number in peeks:
                peek(learner, peeks[number], stream.x[start])
            if number in edits:
                counts[f"reload: {edits[number]}"] += 1
                found = merged(found, learner, edits[number])
                learner, own = edited(learner, edits[number], options)
            if mask is not None:
                counts["resets in mid-window"] += bool(learner._engine.influence.window)
                counts["resets of all streams" if bool(mask.all()) else "resets of some streams"] += 1
                learner.reset(mask)
            xs = stream.x[start:stop]
            if reused:
                xs = buffer.copy_(xs) if len(xs) == 1 else xs.clone()
            outputs = learner(xs[0]).unsqueeze(0) if len(xs) == 1 else learner.unroll(xs)
            routings.extend(Routing(r.read, r.write, r.experts) for r in learner.routings)
            counts[f"segment of {len(xs)}"] += 1
            window = len(learner._engine.influence.window)
            counts[f"window of {window}" if window < 5 else "window of 5 or more"] += 1
            counts["fused pass"] += learner._engine.fused is not None
            loss = (outputs * stream.c[start:stop]).sum()
            if number in stream.entry_loss:
                loss = loss + (learner.entry_state * stream.entry_loss[number]).sum()
                counts["loss of the entry state"] += 1
            if bool(stream.c[start:stop].any()) or number in stream.entry_loss:
                pending.append(loss)
            counts["late losses"] += late and len(pending) > 1
            waiting += len(xs)
            if not late:
                pay()
        pay()
        learner.flush()
        count_events(learner, counts)
        if learner.influence():
            counts["slot learners"] += 1
        return added(gradients_of(own), found) if found else gradients_of(own)

    def reference(way: Way) -> Gradients:
        return bptt(way.of(cell), stream.to(way.dtype), routings, hook, way.truncate)

    reasons = ("too late",) if late else ()
    return Case(f"slot: {label}", learn, reference, reasons=reasons, float32=single)


def count_events(learner: RTRL, counts: "Counter[str]") -> None:
    """Count what the learner went through."""
    counts.update({name: count for name, count in learner.events.items() if isinstance(count, int)})
    influence = learner._engine.influence
    if influence.tree is not None:
        counts["wraps"] += influence.commits > influence.tree.capacity
    counts["commits"] += influence.commits


def peek(learner: RTRL, what: str, x: Tensor) -> None:
    """Look at a learner, which must change nothing."""
    if what == "evaluate":
        learner.evaluate()(x)
    elif what == "norms":
        learner.influence_norms()
    else:
        getattr(learner, what)()


def merged(found: Gradients, learner: RTRL, how: str) -> Gradients:
    """What was found so far, where the parameters change hands."""
    if how in ("load", "copy"):
        return found
    here = gradients_of(learner.cell)
    learner.cell.zero_grad()
    return added(here, found) if found else here


def edited(learner: RTRL, how: str, options: dict) -> tuple[RTRL, SlotCell]:
    """A learner that goes on from where another one is."""
    if how == "load":
        other = RTRL(learner.cell, learner.batch_size, **options)
        other.load_state_dict(learner.state_dict())
    elif how == "copy":
        other = copy.copy(learner)
    elif how == "deepcopy":
        other = copy.deepcopy(learner)
    else:
        other = pickle.loads(pickle.dumps(learner))
    return other, other.cell
