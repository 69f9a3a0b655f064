"""Optimizer steps on the way. The reference is the dense recursion with the parameters that each step was run with."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_rtrl import RTRL, Carry, Routing, SlotMoECell
from sparse_rtrl.cells.diagonal_cell import Mapped
from sparse_rtrl.learners.diagonal_rtrl import DiagonalRTRL

from . import features
from .carry_family import where
from .case import Case, Gradients, Way, gradients_of
from .diagonal_cells import INPUTS, RandomDiagonalCell, ready_cell
from .draw import Draw
from .modules import COMPLEX, CellLoop, RandomModule
from .parts import put, take
from .recursion import Recursion
from .slot_cells import RandomSlotCell, moe_cell
from .slot_family import Stream, count_events

UPDATES = (
    "sgd", "momentum", "sgd fused", "adam", "adam foreach", "adam fused", "adamw fused", "adagrad fused",
    "data add", "no grad add", "data clamp", "data replaced", "average",
)  # fmt: skip
RATE = 0.02


class Update:
    """One way to change parameters."""

    def __init__(self, kind: str, parameters: list[nn.Parameter]) -> None:
        self.kind, self.parameters = kind, parameters
        self.averages = [p.detach().clone() for p in parameters]
        make: dict[str, Callable[[], torch.optim.Optimizer]] = {
            "sgd": lambda: torch.optim.SGD(parameters, RATE),
            "momentum": lambda: torch.optim.SGD(parameters, RATE, momentum=0.9, nesterov=True),
            "sgd fused": lambda: torch.optim.SGD(parameters, RATE, fused=True),
            "adam": lambda: torch.optim.Adam(parameters, RATE, foreach=False),
            "adam foreach": lambda: torch.optim.Adam(parameters, RATE, foreach=True),
            "adam fused": lambda: torch.optim.Adam(parameters, RATE, fused=True),
            "adamw fused": lambda: torch.optim.AdamW(parameters, RATE, fused=True),
            "adagrad fused": lambda: torch.optim.Adagrad(parameters, RATE, fused=True),
        }
        self.optimizer = make[kind]() if kind in make else None

    def __call__(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
            return
        for p, average in zip(self.parameters, self.averages, strict=True):
            if p.grad is None:
                continue
            if self.kind == "data add":
                p.data.add_(p.grad, alpha=-RATE)
            elif self.kind == "no grad add":
                with torch.no_grad():
                    p.add_(p.grad, alpha=-RATE)
            elif self.kind == "data clamp":
                p.data.add_(p.grad, alpha=-RATE).clamp_(-0.8, 0.8)
            elif self.kind == "data replaced":
                p.data = p.data - RATE * p.grad
            else:
                p.data.add_(p.grad, alpha=-RATE)
                average.lerp_(p.data, 0.3)
                p.data.copy_(average)


def make(draw: Draw) -> Case:
    """A random case."""
    steps, batch = draw.integer(4, 8), draw.integer(1, 2)
    stream = Stream(draw, steps, batch, draw.one_of(1, 1, 1, 2, 3))
    stream.resets = {n: mask for n, mask in stream.resets.items() if draw.chance(0.6)}
    kind = draw.one_of(*UPDATES, "adam fused", "data add")
    every = draw.one_of(1, 1, 2, 3)
    front = draw.one_of("carry", "carry", "slot", "diagonal")
    if front == "carry":
        return carried(draw, stream, kind, every)
    if front == "slot":
        return slots(draw, stream, kind, every)
    return diagonal(draw, stream, kind, every)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def restore(module: nn.Module, values: dict[str, Tensor]) -> None:
    for name, p in module.named_parameters():
        p.data.copy_(values[name])


class Bookkeeping:
    """Updates of one run, and the gradient that each of them used.

    Args:
        own: module that learns.
        kind: how its parameters change.
        every: segments between updates.
        last: number of the last segment.
    """

    def __init__(self, own: nn.Module, kind: str, every: int, last: int) -> None:
        self.own, self.every, self.last = own, every, last
        self.update = Update(kind, [p for p in own.parameters() if p.requires_grad])
        self.path: list[dict[str, Tensor]] = []
        self.used: Gradients = {}
        self.to_none = True

    def due(self, number: int) -> bool:
        return (number + 1) % self.every == 0 or number == self.last

    def step(self, number: int, counts: "Counter[str]") -> None:
        """Note the gradient and change the parameters, where an update is due."""
        if not self.due(number):
            return
        self.used |= {f"{name} in update {number}": g for name, g in gradients_of(self.own).items()}
        self.update()
        self.own.zero_grad(set_to_none=self.to_none)
        counts[f"update: {self.update.kind}"] += 1


def carried(draw: Draw, stream: Stream, kind: str, every: int) -> Case:
    """A module through ``Carry``."""
    while True:
        body = draw.one_of(CellLoop, RandomModule)(draw)
        if not COMPLEX & set(body.names) and not {"dropout", "steps of a layer"} & set(body.names):
            break
    if isinstance(body, RandomModule):
        body.shape = "whole"
    batch_dim = 0
    commit_every = draw.one_of(1, 2, 3, "auto", "auto")
    options = {
        "commit_every": commit_every,
        **features.supported(
            Carry.__init__, verify=draw.one_of("sample", "always"), capture=draw.one_of("auto", "dense")
        ),
    }
    attached, to_none = draw.chance(0.5), draw.chance(0.7)
    last = len(stream.bounds) - 1
    path: list[dict[str, Tensor]] = []

    def learn(counts: Counter[str]) -> Gradients:
        own = copy.deepcopy(body)
        books = Bookkeeping(own, kind, every, last)
        books.to_none, books.path = to_none, path
        carry = Carry(own, **options)
        if attached and books.update.optimizer is not None:
            carry.attach(books.update.optimizer)
        h = carry(own.zeros(stream.batch))
        for number, (start, stop) in enumerate(stream.bounds):
            path.append(snapshot(own))
            if number in stream.resets:
                carry.reset(stream.resets[number])
                h = where(stream.resets[number], own.zeros(stream.batch), h, batch_dim)
            outputs, h = own(stream.x[start:stop], h)
            h = carry(h)
            if bool(stream.c[start:stop].any()):
                (outputs * stream.c[start:stop]).sum().backward()
            books.step(number, counts)
        counts["carries with updates"] += 1
        return books.used

    def reference(way: Way) -> Gradients:
        live = way.of(body)
        data = stream.to(way.dtype)
        zeros, structure = pytree.tree_flatten(live.zeros(stream.batch))
        sizes = [leaf[0].numel() for leaf in zeros]

        def flat(nest: Any) -> Tensor:
            return torch.cat([leaf.flatten(1) for leaf in pytree.tree_leaves(nest)], 1)

        def nest(h: Tensor) -> Any:
            parts = [part.view(leaf.shape) for part, leaf in zip(h.split(sizes, 1), zeros, strict=True)]
            return pytree.tree_unflatten(parts, structure)

        def step(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            output, new = live(x.unsqueeze(0), nest(h))
            return output[0], flat(new), {n: p for n, p in live.named_parameters() if p.requires_grad}

        first = flat(zeros)
        return along_the_path(live, data, path, every, step, first, lambda g: g, way.truncate)

    return Case(f"updates, carry: {kind}, {', '.join(body.names)}", learn, reference)


Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


def along_the_path(
    live: nn.Module,
    stream: Stream,
    path: list[dict[str, Tensor]],
    every: int,
    step: Step,
    first: Tensor,
    pull: Callable[[Gradients], Gradients],
    truncate: bool,
    prepare: Callable[[], None] = lambda: None,
) -> Gradients:
    """Gradients of every update by the dense recursion.

    Args:
        live: module whose parameters are set to those of the path.
        stream: inputs and losses.
        path: parameters that each segment was run with.
        every: segments between updates.
        step: from ``x (B, ...)`` and ``h (B, H)`` to output, new state, and what the influence is of.
        first: state that streams start from, ``(B, H)``.
        pull: from gradients of what the influence is of to those of the parameters, at the current ones.
        truncate: forget the past at every segment.
        prepare: called after the parameters were set.
    """
    recursion = Recursion(*first.shape)
    h = first
    total: Gradients = {}
    out: Gradients = {}
    for number, (start, stop) in enumerate(stream.bounds):
        restore(live, path[number])
        prepare()
        if number in stream.resets:
            h = torch.where(stream.resets[number].unsqueeze(1), first, h)
            recursion.forget(stream.resets[number])
        if truncate:
            recursion.P = {}
        for t in range(start, stop):
            entered = h.detach().requires_grad_()
            output, new, leaves = step(stream.x[t], entered)
            loss = (output * stream.c[t]).sum()
            if bool(stream.c[t].any()):
                for name, g in pull(recursion.gradient(loss, entered, leaves)).items():
                    total[name] = total[name] + g if name in total else g
            recursion.advance(new, entered, leaves)
            h = new.detach()
        if (number + 1) % every == 0 or number == len(stream.bounds) - 1:
            for name, p in live.named_parameters():
                if p.requires_grad:
                    out[f"{name} in update {number}"] = total.get(name, torch.zeros_like(p))
            total = {}
    return out


def slots(draw: Draw, stream: Stream, kind: str, every: int) -> Case:
    """A slot cell through ``RTRL``."""
    name = draw.one_of("random", "random", "slot moe", "slot moe", "sparse latent moe")
    while True:
        cell = RandomSlotCell(draw, stream.steps, stream.batch, False) if name == "random" else moe_cell(draw, name)
        if cell.hidden_size <= 12:
            break
    options = {
        "buffer": draw.one_of(2, 4, "auto"),
        "commit_every": draw.one_of(1, 2, 3, "auto"),
        "catch_up": draw.one_of("auto", "eager", "replay", "product"),
        "backend": draw.one_of("auto", "auto", "reference"),
        **features.supported(RTRL.__init__, verify=draw.one_of("sample", "always")),
    }
    to_none = draw.chance(0.7)
    path: list[dict[str, Tensor]] = []
    routings: list[Routing] = []

    def learn(counts: Counter[str]) -> Gradients:
        own = copy.deepcopy(cell)
        books = Bookkeeping(own, kind, every, len(stream.bounds) - 1)
        books.to_none, books.path = to_none, path
        learner = RTRL(own, stream.batch, **options)
        if books.update.optimizer is not None:
            learner.attach(books.update.optimizer)
        for number, (start, stop) in enumerate(stream.bounds):
            path.append(snapshot(own))
            if number in stream.resets:
                learner.reset(stream.resets[number])
            outputs = learner.unroll(stream.x[start:stop])
            routings.extend(learner.routings)
            if bool(stream.c[start:stop].any()):
                (outputs * stream.c[start:stop]).sum().backward()
            if books.due(number):
                learner.flush()
            books.step(number, counts)
        count_events(learner, counts)
        counts["fused pass"] += learner._engine.fused is not None
        counts["slot learners with updates"] += 1
        return books.used

    def reference(way: Way) -> Gradients:
        live, bare = way.of(cell), way.of(cell)
        effective = isinstance(bare, SlotMoECell)
        if effective:
            bare.core = nn.Linear(cell.slot_size, cell.slot_size, bias=False)  # its effective weight, without the map
        numbers = iter(range(stream.steps))

        def prepare() -> None:
            with torch.no_grad():
                for name, p in bare.named_parameters():
                    owner, _, attribute = name.rpartition(".")
                    p.copy_(getattr(live.get_submodule(owner), attribute))

        def step(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            state = h.view(-1, cell.num_slots, cell.slot_size)
            r = routings[next(numbers)]
            new, output = bare.update(x, take(state, r.read), take(state, r.write), r)
            return (
                output,
                put(state, r.write, new).flatten(1),
                {n: p for n, p in bare.named_parameters() if p.requires_grad},
            )

        def pull(g: Gradients) -> Gradients:
            if effective:
                original = live.core.parametrizations.weight.original
                (pulled,) = torch.autograd.grad(live.core.weight, original, g.pop("core.weight"))
                g["core.parametrizations.weight.original"] = pulled
            return g

        first = cell.initial_state(stream.batch).flatten(1).to(way.dtype)
        data = stream.to(way.dtype)
        return along_the_path(live, data, path, every, step, first, pull, way.truncate, prepare)

    label = f"{name}: {', '.join(cell.operations)}" if isinstance(cell, RandomSlotCell) else name
    return Case(f"updates, slot: {kind}, {label}", learn, reference)


def diagonal(draw: Draw, stream: Stream, kind: str, every: int) -> Case:
    """A diagonal cell of real entries through ``RTRL``."""
    stream.x = stream.x[..., :INPUTS].contiguous()
    while True:
        name = draw.one_of("random", "random", "elstm", "mamba", "retention")
        cell = RandomDiagonalCell(draw) if name == "random" else ready_cell(draw, name)
        if not cell.complex_state and not cell.previous_input and cell.hidden_size <= 12:
            break
    options = {
        "commit_every": draw.one_of(1, 2, 3, "auto"),
        **features.supported(DiagonalRTRL.__init__, verify=draw.one_of("sample", "always")),
    }
    to_none = draw.chance(0.7)
    path: list[dict[str, Tensor]] = []

    def learn(counts: Counter[str]) -> Gradients:
        own = copy.deepcopy(cell)
        books = Bookkeeping(own, kind, every, len(stream.bounds) - 1)
        books.to_none, books.path = to_none, path
        learner = RTRL(own, stream.batch, **options)
        for number, (start, stop) in enumerate(stream.bounds):
            path.append(snapshot(own))
            if number in stream.resets:
                learner.reset(stream.resets[number])
            outputs = learner.unroll(stream.x[start:stop])
            if bool(stream.c[start:stop].any()):
                (outputs * stream.c[start:stop]).sum().backward()
            books.step(number, counts)
        counts["diagonal learners with updates"] += 1
        return books.used

    def reference(way: Way) -> Gradients:
        live = way.of(cell)
        made: dict[str, Tensor] = {}

        def step(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            # The influence is that of the weights and values that project makes of the parameters.
            leaves, values = {}, []
            made.clear()
            for number, projection in enumerate(live.project(x)):
                parts = []
                for place, tensor in enumerate(projection.tensors):
                    if not tensor.requires_grad:
                        parts.append(tensor)
                        continue
                    key = f"{number}.{place} of project"
                    made[key] = tensor
                    leaves[key] = tensor.detach().clone().requires_grad_()
                    parts.append(leaves[key])
                if isinstance(projection, Mapped):
                    value = projection.x @ parts[0].t()
                    value = value + parts[1] if len(parts) > 1 else value
                    values.append(value.reshape(len(x), *projection.shape))
                else:
                    values.append(parts[0] if parts else projection.value)
            state = h.view(-1, *cell.state_shape)
            new = live.step(state, *values)
            output = live.output(x, state, new, *values)
            made.update({n: p for n, p in live.named_parameters() if p.requires_grad})
            return output, new.flatten(1), leaves | {n: p for n, p in live.named_parameters() if p.requires_grad}

        def pull(g: Gradients) -> Gradients:
            named = {n: p for n, p in live.named_parameters() if p.requires_grad}
            pairs = [(made[key], value) for key, value in g.items() if key not in named]
            pulled = torch.autograd.grad(
                [tensor for tensor, _ in pairs], list(named.values()), [v for _, v in pairs], allow_unused=True
            )
            return {n: g[n] + (0 if part is None else part) for n, part in zip(named, pulled, strict=True)}

        first = cell.initial_entries(stream.batch).detach().flatten(1).to(way.dtype)
        return along_the_path(live, stream.to(way.dtype), path, every, step, first, pull, way.truncate)

    label = f"random {cell.template}" if isinstance(cell, RandomDiagonalCell) else name
    return Case(f"updates, diagonal: {kind}, {label}", learn, reference)
