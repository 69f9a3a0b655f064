"""Faults that must be noticed: the gradient is that of BPTT of the same code, or there is an error."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from sparse_rtrl import RTRL, BlockRTRL, Carry, Routing, get_expert_latent_activated
from sparse_rtrl.learners.diagonal_rtrl import DiagonalRTRL

from . import features
from .carry_family import Detach
from .case import Case, Gradients, Way, gradients_of
from .diagonal_cells import INPUTS
from .diagonal_family import step_of
from .draw import Draw
from .faulty import (
    CLIPPED,
    COUPLED,
    DIAGONAL_FAULTS,
    SLOT_FAULTS,
    FaultyDiagonalCell,
    FaultyModule,
    FaultySlotCell,
    HiddenState,
)
from .modules import CellLoop
from .parts import put, take
from .slot_cells import moe_cell
from .slot_family import Stream

LOOP_FAULTS = (
    "hidden state",
    "hidden state, let go",
    "input buffer reused before backward",
    "trainable tensor from outside",
    "first state from outside",
    "older state",
    "streams dropped",
    "streams reordered by the loop",
    "another module",
    "unfrozen later",
    "step without graph",
    "state detached by the loop",
)


def make(draw: Draw) -> Case:
    """A random case."""
    return draw.one_of(modules, modules, loops, loops, slots, slots, diagonal, deferred, block)(draw)


def stream_of(draw: Draw, longest: int = 2) -> Stream:
    stream = Stream(draw, draw.integer(4, 8), draw.integer(2, 4), draw.one_of(1, longest))
    stream.resets = {}
    return stream


def options_of(draw: Draw, front: type = Carry) -> dict[str, Any]:
    return {
        "commit_every": draw.one_of(1, 2, "auto"),
        **features.supported(front.__init__, verify=draw.one_of("sample", "always")),
    }


def verified(options: dict[str, Any]) -> str:
    """How much is compared on the way, for the description of a case."""
    return f", verify: {options['verify']}" if "verify" in options else ""


def modules(draw: Draw) -> Case:
    """A fault inside the module that ``Carry`` holds."""
    stream = stream_of(draw)
    kind, begins = draw.one_of(*COUPLED, *CLIPPED), draw.one_of(0, 0, draw.integer(1, 3))
    model, options = FaultyModule(draw, kind, stream.batch, begins), options_of(draw)

    def run(own: nn.Module, carry: Any) -> Gradients:
        h = carry(own.zeros(stream.batch))
        for start, stop in stream.bounds:
            outputs, h = own(stream.x[start:stop], h)
            h = carry(h)
            if bool(stream.c[start:stop].any()):
                (outputs * stream.c[start:stop]).sum().backward()
        return gradients_of(own)

    def learn(counts: Counter[str]) -> Gradients:
        own = copy.deepcopy(model)
        counts[f"fault: {kind}"] += 1
        return run(own, Carry(own, **options))

    def reference(way: Way) -> Gradients:
        own, data = way.of(model), stream.to(way.dtype)
        h, loss = own.zeros(stream.batch), 0.0
        for start, stop in stream.bounds:
            outputs, h = own(data.x[start:stop], h.detach() if way.truncate else h)
            loss = loss + (outputs * data.c[start:stop]).sum()
        loss.backward()
        return gradients_of(own)

    when = "from the start" if begins == 0 else "later"
    return Case(
        f"fault, carry: {kind}, {when}", learn, reference, False, plain=lambda: run(copy.deepcopy(model), Detach())
    )


def loops(draw: Draw) -> Case:
    """A fault in the loop around ``Carry``, or a second state that the module keeps."""
    stream = stream_of(draw)
    kind, begins = draw.one_of(*LOOP_FAULTS), draw.integer(1, 3)
    hidden = kind.startswith("hidden state")
    model: Any = HiddenState(draw, draw.one_of(0, begins)) if hidden else CellLoop(draw)
    while not hidden and (len(model.cells) > 1 or model.kind == "lstm"):
        model = CellLoop(draw)
    outside = {"offset": 0.5 * draw.normal(model.size), "first": 0.5 * draw.normal(stream.batch, model.size)}
    other = nn.Linear(model.size, model.size)
    keep, order = draw.mask(stream.batch), draw.order(stream.batch)
    at = draw.integer(1, max(1, len(stream.bounds) - 1))
    options = options_of(draw)

    def run(own: Any, carry: Any, data: Stream, truncate: bool) -> Gradients:
        online = carry is not None
        end = carry if online else (lambda h: h.detach()) if truncate else (lambda h: h)
        dtype = data.x.dtype
        tensors = {name: t.to(dtype).clone().requires_grad_() for name, t in outside.items()}
        side = copy.deepcopy(other).to(dtype)
        frozen = next(iter(own.parameters()))
        if kind == "unfrozen later":
            frozen.requires_grad_(False)
        h = end(tensors["first"] * 1.0 if kind == "first state from outside" else own.zeros(data.batch))
        losses, chosen, older = [], torch.arange(data.batch), h
        buffer = torch.empty_like(data.x)
        for number, (start, stop) in enumerate(data.bounds):
            xs, c = data.x[start:stop, chosen], data.c[start:stop, chosen]
            if kind == "input buffer reused before backward" and online:
                xs = buffer[: len(xs)].copy_(xs)
            if number == at:
                if kind == "streams dropped":
                    h, chosen = h[keep], chosen[keep]
                    xs, c = xs[:, keep], c[:, keep]
                elif kind == "streams reordered by the loop":
                    h = h[order]
                elif kind == "unfrozen later":
                    frozen.requires_grad_()
                elif kind == "older state":
                    h = older
            older = h if number + 2 == at else older
            if kind == "step without graph" and number == at:
                with torch.no_grad():
                    outputs, h = own(xs, h)
            else:
                outputs, h = own(xs, h)
            if number >= at and kind == "trainable tensor from outside":
                h = h + 0.3 * torch.tanh(tensors["offset"])
            if number >= at and kind == "another module":
                h = torch.tanh(side(h))
            if number == at and kind == "state detached by the loop":
                h = h.detach()
            h = end(h)
            if hidden and online and kind.endswith("let go"):
                own.let_go()
            loss = (outputs * c).sum()
            if not bool(c.any()) or not loss.requires_grad:
                continue
            if not online:
                losses.append(loss)
            elif kind == "input buffer reused before backward" and number + 1 < len(data.bounds):
                buffer.copy_(data.x)
                loss.backward()
            else:
                loss.backward()
        if losses:
            sum(losses).backward()
        found = gradients_of(own)
        for name, tensor in tensors.items():
            found[name] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        return found | {f"side.{name}": g for name, g in gradients_of(side).items()}

    def learn(counts: Counter[str]) -> Gradients:
        own = copy.deepcopy(model)
        counts[f"fault: {kind}"] += 1
        return run(own, Carry(own, **options), stream, False)

    return Case(
        f"fault, loop: {kind}{verified(options)}",
        learn,
        lambda way: run(way.of(model), None, stream.to(way.dtype), way.truncate),
        False,
        plain=lambda: run(copy.deepcopy(model), Detach(), stream, False),
    )


def slots(draw: Draw) -> Case:
    """A fault inside a slot cell."""
    stream = stream_of(draw)
    kind, begins = draw.one_of(*SLOT_FAULTS), draw.one_of(0, 0, draw.integer(1, 3))
    cell = FaultySlotCell(draw, kind, stream.steps, stream.batch, begins)
    options = {
        "buffer": draw.one_of(2, 4, "auto"),
        "commit_every": draw.one_of(1, 2, "auto"),
        "catch_up": draw.one_of("auto", "eager", "replay", "product"),
        **features.supported(RTRL.__init__, verify=draw.one_of("sample", "always")),
    }
    drawn: dict[int, Tensor] = {}

    def learn(counts: Counter[str]) -> Gradients:
        counts[f"fault: {kind}"] += 1
        own = copy.deepcopy(cell)
        learner = RTRL(own, stream.batch, **options)
        for start, stop in stream.bounds:
            if kind in ("dropout", "noise", "random mask"):
                for t in range(start, stop):
                    own.spoken.clear()
                    output = learner(stream.x[t])
                    written = take(learner.state, cell.pattern[t].write)
                    for new, numbers in own.spoken:
                        if new.shape == written.shape and torch.equal(new, written):
                            drawn[t] = numbers
                    if own.spoken and t not in drawn:
                        raise AssertionError("none of the runs of the cell gave the state that the learner has")
                    if bool(stream.c[t].any()):
                        (output * stream.c[t]).sum().backward()
                continue
            outputs = learner.unroll(stream.x[start:stop])
            loss = (outputs * stream.c[start:stop]).sum()
            if bool(stream.c[start:stop].any()):
                loss.backward()
        learner.flush()
        return gradients_of(own)

    def reference(way: Way) -> Gradients:
        own, data = way.of(cell), stream.to(way.dtype)
        h, loss = own.initial_state(stream.batch), 0.0
        for start, stop in stream.bounds:
            h = h.detach() if way.truncate else h
            for t in range(start, stop):
                r = own.route(data.x[t], h)
                own.told = drawn[t].to(way.dtype) if t in drawn else None
                new, output = own.update(data.x[t], take(h, r.read), take(h, r.write), r)
                h = put(h, r.write, new)
                loss = loss + (output * data.c[t]).sum()
        loss.backward()
        return gradients_of(own)

    when = ("from the start" if begins == 0 else "later") + verified(options)
    return Case(f"fault, slot: {kind}, {when}", learn, reference, False)


def diagonal(draw: Draw) -> Case:
    """A diagonal cell that breaks its contract, through ``RTRL`` or ``Carry``."""
    stream = stream_of(draw)
    stream.x = stream.x[..., :INPUTS].contiguous()
    kind = draw.one_of(*DIAGONAL_FAULTS)
    cell, through_carry = FaultyDiagonalCell(draw, kind), draw.chance(0.4)
    front = Carry if through_carry else DiagonalRTRL
    options = options_of(draw, front)
    if kind == "mixed at large values":  # seen only in the segments that are compared
        options |= features.supported(front.__init__, verify="always")

    def learn(counts: Counter[str]) -> Gradients:
        counts[f"fault: {kind}"] += 1
        own = copy.deepcopy(cell)
        if not through_carry:
            learner = RTRL(own, stream.batch, **options)
            for start, stop in stream.bounds:
                outputs = torch.stack([learner(x) for x in stream.x[start:stop]][-1:])
                if bool(stream.c[stop - 1].any()):
                    (outputs[-1] * stream.c[stop - 1]).sum().backward()
            return gradients_of(own)
        carry = Carry(own, **options)
        h = carry(own.initial_state(stream.batch))
        for start, stop in stream.bounds:
            for x in stream.x[start:stop]:
                output, h = own(x, h)
            h = carry(h)
            if bool(stream.c[stop - 1].any()):
                (output * stream.c[stop - 1]).sum().backward()
        return gradients_of(own)

    def reference(way: Way) -> Gradients:
        own, data = way.of(cell), stream.to(way.dtype)
        h, loss = own.initial_state(stream.batch), 0.0
        for start, stop in stream.bounds:
            h = h.detach() if way.truncate else h
            for t in range(start, stop):
                output, h = step_of(own, data.x[t], h)
            loss = loss + (output * data.c[stop - 1]).sum()
        loss.backward()
        return gradients_of(own)

    name = "carry" if through_carry else "rtrl"
    return Case(f"fault, diagonal {name}: {kind}{verified(options)}", learn, reference, False)


def deferred(draw: Draw) -> Case:
    """Gradients that are deferred when they are clipped, unscaled, or used by an optimizer that was not attached.

    Compared is the parameters' change in one optimizer step at the end. Clipping that changes nothing, because the
    gradient is small until what is deferred arrives, is none: nobody can see that it was tried.
    """
    stream = stream_of(draw)
    cell = moe_cell(draw, draw.one_of("slot moe", "sparse latent moe"))
    cell.requires_grad_(True)
    kind = draw.one_of("clipped", "clipped by value", "scaled", "not attached", "flushed, then clipped")
    most = 10 ** draw.uniform(-3, 0)
    options = {"catch_up": draw.one_of("replay", "product"), "buffer": draw.one_of(2, 4, 16), "commit_every": 1}
    routings: list[Routing] = []
    changed: list[bool] = []

    def change(own: nn.Module) -> None:
        if "clipped by value" in kind:
            nn.utils.clip_grad_value_(own.parameters(), most)
        elif "clipped" in kind:
            nn.utils.clip_grad_norm_(own.parameters(), most)
        elif kind == "scaled":
            for p in own.parameters():
                if p.grad is not None:
                    p.grad.mul_(0.01)

    def learn(counts: Counter[str]) -> Gradients:
        counts[f"fault: deferred, {kind}"] += 1
        own = copy.deepcopy(cell)
        optimizer = torch.optim.SGD(own.parameters(), 1.0)
        learner = RTRL(own, stream.batch, **options)
        if kind != "not attached":
            learner.attach(optimizer)
        for start, stop in stream.bounds:
            outputs = learner.unroll(stream.x[start:stop])
            routings.extend(learner.routings)
            if bool(stream.c[start:stop].any()):
                (outputs * stream.c[start:stop]).sum().backward()
        if kind.startswith("flushed"):
            learner.flush()
        before = gradients_of(own)
        change(own)
        changed.append(not all(map(torch.equal, before.values(), gradients_of(own).values())))
        optimizer.step()
        if kind == "not attached":
            learner(stream.x[-1])
        now = dict(own.named_parameters())
        return {name: (now[name] - p).detach() for name, p in cell.named_parameters()}

    def reference(way: Way) -> Gradients:
        own, data = way.of(cell), stream.to(way.dtype)
        h, loss = own.initial_state(stream.batch), 0.0
        for start, stop in stream.bounds:
            h = h.detach() if way.truncate else h
            for t in range(start, stop):
                r = routings[t]
                new, output = own.update(data.x[t], take(h, r.read), take(h, r.write), r)
                h = put(h, r.write, new)
                loss = loss + (output * data.c[t]).sum()
        loss.backward()
        before = {name: p.detach().clone() for name, p in own.named_parameters()}
        if changed[-1]:
            change(own)
        torch.optim.SGD(own.parameters(), 1.0).step()
        return {name: (p - before[name]).detach() for name, p in own.named_parameters()}

    return Case(f"fault, deferred: {kind}", learn, reference, kind.startswith("flushed"))


def block(draw: Draw) -> Case:
    """``BlockRTRL`` with a router that may draw, with another input, and with streams that start anew."""
    stream = stream_of(draw, 1)
    stream.bounds = [(t, t + 1) for t in range(stream.steps)]
    cell = moe_cell(draw, draw.one_of("slot moe", "sparse latent moe"))
    cell.requires_grad_(True)
    kind = draw.one_of("as it is", "noisy router", "another input", "another state", "a stream reset without a word")
    options = {"len_buffer": draw.one_of(2, 8), "catch_up": draw.one_of("auto", "eager", "replay", "product")}
    reset_at, mask = draw.integer(1, stream.steps - 1), draw.mask(stream.batch)
    routings: list[Routing] = []
    with_info = "info" in features.supported(BlockRTRL.step, info=None)

    def learn(counts: Counter[str]) -> Gradients:
        counts[f"fault: block, {kind}"] += 1
        own = copy.deepcopy(cell)
        if kind == "noisy router":
            ordinary = own.route

            def route(x: Tensor, state: Tensor) -> Routing:
                return ordinary(x + torch.randn_like(x), state)

            own.route = route  # type: ignore[method-assign]
        rtrl = BlockRTRL(own.named_parameters(), stream.batch, own.hidden_size, **options)
        h = own.initial_state(stream.batch)
        for t in range(stream.steps):
            if kind == "a stream reset without a word" and t == reset_at:
                h = torch.where(mask.view(-1, 1, 1), 0.0, h.detach())
            output, info, new = own(stream.x[t], h)
            routings.append(Routing(info["idx_slots_read"], info["idx_slots_write"], info["idx_experts"]))
            active, write, read = get_expert_latent_activated(own, info)
            loss = (output * stream.c[t]).sum() if bool(stream.c[t].any()) else None
            x = stream.x[t] + 0.5 if kind == "another input" and t == reset_at else stream.x[t]
            given = h
            if kind == "another state" and t == reset_at and loss is None:
                given = (h.detach() + 0.1).requires_grad_()
            more = {"info": info} if with_info else {}
            rtrl.step(own, x, given, loss, active, read, write, **more)
            h = new.detach()
        rtrl.flush()
        return gradients_of(own)

    def reference(way: Way) -> Gradients:
        own, data = way.of(cell), stream.to(way.dtype)
        h, loss = own.initial_state(stream.batch), 0.0
        for t, r in enumerate(routings):
            h = h.detach() if way.truncate else h
            if kind == "a stream reset without a word" and t == reset_at:
                h = torch.where(mask.view(-1, 1, 1), 0.0, h)
            new, output = own.update(data.x[t], take(h, r.read), take(h, r.write), r)
            h = put(h, r.write, new)
            loss = loss + (output * data.c[t]).sum()
        loss.backward()
        return gradients_of(own)

    return Case(f"fault, block: {kind}", learn, reference, kind == "as it is")
