"""Modules and cells with something that cannot be carried stream by stream, from the start or from a later step on."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_rtrl import ExpertBank, Routing, SlotCell
from sparse_rtrl.cells.diagonal_cell import DiagonalCell, Given, Learned, Mapped, Projection

from .draw import Draw
from .modules import INPUTS
from .parts import spread

COUPLED = (
    "batch mean",
    "batch norm",
    "batch norm of a part",
    "softmax over the batch",
    "capacity",
    "soft capacity",
    "coupling matrix",
    "trained coupling",
    "beams",
    "doubled beams",
    "rolled streams",
    "largest of the batch",
    "batch variance",
)
CLIPPED = (
    "clipped state",
    "clipped activation",
    "clipped by norm",
    "clipped by batch norm",
    "clipping function",
    "sign of gradient",
    "linear hook",
    "reversed gradient",
)


class Clip(torch.autograd.Function):
    """The identity, with a clipped backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return g.clamp(-ctx.limit, ctx.limit), None


class Reversed(torch.autograd.Function):
    """The identity, with the gradient times a negative number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return -ctx.factor * g, None


def hooked(x: Tensor, kind: str, limit: float) -> Tensor:
    """A tensor whose gradient a hook changes."""
    if kind == "clipping function":
        return Clip.apply(x, limit)
    if kind == "reversed gradient":
        return Reversed.apply(x, limit)
    hooks = {
        "clipped by norm": lambda g: g * (limit / g.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0),
        "clipped by batch norm": lambda g: g * (limit / g.norm().clamp_min(1e-30)).clamp_max(1.0),
        "sign of gradient": lambda g: g.sign() * limit,
        "linear hook": lambda g: g * limit,
    }
    y = x * 1.0
    if y.requires_grad:
        y.register_hook(hooks.get(kind, lambda g: g.clamp(-limit, limit)))
    return y


def coupled(h: Tensor, kind: str, x: Tensor, weight: Tensor) -> Tensor:
    """Streams ``h (B, ...)`` that influence each other; ``weight (B, B)``."""
    batch, flat = len(h), h.flatten(1)
    if kind == "batch mean":
        flat = flat - 0.5 * flat.mean(0)
    elif kind == "batch variance":
        flat = flat / (1 + flat.var(0, correction=0))
    elif kind == "batch norm":
        flat = F.batch_norm(flat, None, None, training=True)
    elif kind == "batch norm of a part":
        flat = torch.cat((F.batch_norm(flat[:, :1], None, None, training=True), flat[:, 1:]), 1)
    elif kind == "softmax over the batch":
        flat = flat * flat.softmax(0)
    elif kind == "largest of the batch":
        flat = flat - 0.5 * flat.amax(0)
    elif kind == "capacity":  # decided by the other streams, but no gradient goes there
        chosen = (flat[:, 0] > 0).long()
        kept = chosen * chosen.cumsum(0) <= 1
        flat = torch.where(kept.unsqueeze(1), flat, 0.5 * flat)
    elif kind == "soft capacity":
        score = torch.sigmoid(flat[:, :1])
        flat = flat * torch.clamp(1.5 - 0.3 * (score.cumsum(0) - score), 0, 1)
    elif kind in ("coupling matrix", "trained coupling"):
        flat = weight @ flat
    elif kind in ("beams", "doubled beams"):
        order = x[:, 0].argsort(descending=True)
        flat = flat[order if kind == "beams" else order.clamp_max(max(0, batch - 2))]
    elif kind == "rolled streams":
        flat = flat.roll(1, 0)
    return flat.view(h.shape)


class FaultyModule(nn.Module):
    """A recurrent cell with a fault in its step.

    Args:
        draw: what it is made of.
        kind: the fault.
        batch: streams.
        begins: step from which on the fault is there.
    """

    def __init__(self, draw: Draw, kind: str, batch: int, begins: int) -> None:
        super().__init__()
        self.kind, self.begins, self.size = kind, begins, draw.integer(2, 5)
        self.cell = draw.one_of(nn.GRUCell, nn.RNNCell)(INPUTS, self.size)
        self.lin, self.readout = nn.Linear(self.size, self.size), nn.Linear(self.size, 2)
        self.limit = 10 ** draw.uniform(-2.5, 0.5)
        mixing = 0.5 * torch.eye(batch) + 0.5 * torch.softmax(draw.normal(batch, batch), 1)
        self.register_buffer("coupling", mixing)
        if kind == "trained coupling":
            self.weight = nn.Parameter(mixing.clone())
        spread(self, draw, 0.2)

    def zeros(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.size, dtype=self.readout.weight.dtype)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        now = float(x[0, -1]) >= self.begins
        if now and self.kind in COUPLED:
            h = coupled(h, self.kind, x, self.weight if self.kind == "trained coupling" else self.coupling)
        elif self.kind == "trained coupling":
            h = torch.eye(len(h), dtype=h.dtype) @ h
        if now and self.kind == "clipped state":
            h = hooked(h, self.kind, self.limit)
        new = self.cell(x[:, :INPUTS], h)
        inner = torch.tanh(self.lin(new))
        if now and self.kind in CLIPPED and self.kind != "clipped state":
            inner = hooked(inner, self.kind, self.limit)
        return 0.5 * new + 0.5 * inner

    def forward(self, xs: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for x in xs:
            h = self.step(x, h)
            outputs.append(self.readout(h))
        return torch.stack(outputs), h


class HiddenState(nn.Module):
    """A module that keeps a second state to itself.

    Args:
        draw: what it is made of.
    """

    def __init__(self, draw: Draw, begins: int) -> None:
        super().__init__()
        self.size, self.begins = draw.integer(2, 4), begins
        self.cell, self.inner = nn.GRUCell(INPUTS + self.size, self.size), nn.Linear(self.size, self.size)
        self.readout = nn.Linear(self.size, 2)
        self.where = draw.one_of("attribute", "list", "buffer")
        self.memory: Any = None
        if self.where == "buffer":
            self.register_buffer("kept", torch.zeros(()), persistent=False)
        spread(self, draw, 0.2)

    def zeros(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.size, dtype=self.readout.weight.dtype)

    def get(self, like: Tensor) -> Tensor:
        if self.where == "buffer":
            return self.kept if self.kept.dim() else torch.zeros_like(like)
        kept = self.memory[0] if self.where == "list" and self.memory is not None else self.memory
        return torch.zeros_like(like) if kept is None else kept

    def put(self, value: Tensor) -> None:
        if self.where == "buffer":
            self.kept = value
        else:
            self.memory = [value] if self.where == "list" else value

    def let_go(self) -> None:
        """Cut the second state from its graph, as a loop with truncation does."""
        if self.where == "buffer":
            self.kept = self.kept.detach()
        elif self.memory is not None:
            self.put(self.get(torch.empty(0)).detach())

    def forward(self, xs: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for x in xs:
            memory = self.get(h)
            used = memory if float(x[0, -1]) >= self.begins else torch.zeros_like(memory)
            h = self.cell(torch.cat((x[:, :INPUTS], used), 1), h)
            self.put(torch.tanh(self.inner(h) + 0.5 * memory))
            outputs.append(self.readout(h))
        return torch.stack(outputs), h


SLOT_FAULTS = (
    *COUPLED,
    "clipped state",
    "clipped activation",
    "clipping function",
    "clipped by batch norm",
    "dropout",
    "noise",
    "random mask",
    "undeclared slots",
    "readout in the state",
    "every expert",
    "hidden state",
)


class FaultySlotCell(SlotCell):
    """A slot cell with a fault in its step.

    Args:
        draw: what it is made of.
        kind: the fault.
        steps: number of steps.
        batch: streams.
        begins: step from which on the fault is there.
    """

    def __init__(self, draw: Draw, kind: str, steps: int, batch: int, begins: int) -> None:
        super().__init__(draw.integer(2, 3), 3, 3)
        self.kind, self.begins = kind, begins
        self.encode, self.mix, self.readout = nn.Linear(INPUTS, 3), nn.Linear(3, 3), nn.Linear(6, 2)
        self.inner = nn.Linear(3, 3)
        self.experts = ExpertBank(3, 3, 3)
        self.limit = 10 ** draw.uniform(-2.5, 0.5)
        self.register_buffer("coupling", 0.5 * torch.eye(batch) + 0.5 * torch.softmax(draw.normal(batch, batch), 1))
        if kind == "trained coupling":
            self.weight = nn.Parameter(self.coupling.clone())
        self.spoken: list[tuple[Tensor, Tensor]] = []
        self.told: Tensor | None = None
        self.cache: Tensor | None = None
        self.memory: Tensor | None = None
        spread(self, draw, 0.2)
        self.pattern = [
            Routing(
                torch.stack([draw.order(self.num_slots)[:1] for _ in range(batch)]),
                torch.stack([draw.order(self.num_slots)[:2] for _ in range(batch)]),
                torch.stack([draw.order(3)[:1] for _ in range(batch)]),
            )
            for _ in range(steps)
        ]

    def route(self, x: Tensor, state: Tensor) -> Routing:
        self.cache = state
        return self.pattern[int(x[0, -1])]

    def random(self, like: Tensor) -> Tensor:
        """Random numbers of one call; an oracle may say which."""
        if self.told is not None:
            return self.told
        return torch.rand_like(like)

    def update(self, x: Tensor, h_read: Tensor, h_write: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        now = float(x[0, -1]) >= self.begins
        token = torch.tanh(self.encode(x[:, :INPUTS]))
        mixed = token + self.mix(h_read.sum(1) + h_write.sum(1))
        old = h_write
        if now and self.kind in COUPLED:
            old = coupled(old, self.kind, x, self.weight if self.kind == "trained coupling" else self.coupling)
        elif self.kind == "trained coupling":
            mixed = mixed + 0.0 * self.weight.sum()
        if now and self.kind in CLIPPED:
            old = hooked(old, self.kind, self.limit)
        z = mixed.unsqueeze(1).expand(-1, routing.experts.shape[1], -1)
        mixed = mixed + torch.tanh(self.experts(z, routing.experts)).sum(1)
        if self.kind == "every expert" and now:
            mixed = mixed + 0.5 * torch.tanh(mixed @ self.experts.weight.mean(0).t())
        if self.kind == "readout in the state" and now:
            mixed = mixed + torch.tanh(self.readout(torch.cat((token, token), 1))).sum(1, keepdim=True)
        if self.kind == "undeclared slots" and now and self.cache is not None:
            mixed = mixed + 0.5 * self.cache.mean(1)
        if self.kind == "hidden state":
            memory = torch.zeros_like(mixed) if self.memory is None else self.memory
            if now:
                mixed = mixed + memory
            self.memory = torch.tanh(self.inner(mixed) + 0.5 * memory)
        candidate = mixed.unsqueeze(1) + self.inner(old)
        drawn = None
        if now and self.kind in ("dropout", "noise", "random mask"):
            if self.kind == "dropout" and self.told is None:
                drawn = F.dropout(torch.ones_like(candidate), 0.5) / 2
            elif self.kind == "random mask" and self.told is None:
                drawn = torch.bernoulli(torch.full_like(candidate, 0.5))
            else:
                drawn = self.random(candidate)
            candidate = candidate * (0.5 + drawn)
        new = 0.5 * old + 0.5 * torch.tanh(candidate)
        if drawn is not None:
            self.spoken.append((new.detach().clone(), drawn.detach().clone()))
        return new, self.readout(torch.cat((token, new.sum(1)), 1))


DIAGONAL_FAULTS = (
    "mixed entries",
    "mixed at large values",
    "parameter in step",
    "batch mean",
    "batch mean late",
    "map of a map",
    "given with gradient",
    "not holomorphic",
    "clipped state",
    "clipped by batch norm",
    "readout in the state",
    "batch mean in the output",
)


class FaultyDiagonalCell(DiagonalCell):
    """A diagonal cell that breaks its contract.

    Args:
        draw: what it is made of.
        kind: how.
    """

    def __init__(self, draw: Draw, kind: str) -> None:
        size = draw.integer(2, 4)
        super().__init__(INPUTS, (size,), complex_state=kind == "not holomorphic")
        self.kind = kind
        self.lin, self.decay = nn.Linear(INPUTS, size), nn.Parameter(torch.randn(size))
        self.extra = nn.Parameter(torch.randn(size) * 0.5 + 1)
        self.deep = nn.Linear(INPUTS, INPUTS)
        self.readout = nn.Linear(size, 2)
        self.limit = 10 ** draw.uniform(-2.5, 0.5)
        self.threshold = draw.uniform(0.5, 1.5)
        spread(self, draw, 0.2)

    def project(self, x: Tensor) -> tuple[Projection, ...]:
        inner = torch.tanh(self.deep(x)) if self.kind == "map of a map" else x
        weight, bias = self.lin.weight, self.lin.bias
        if self.kind == "readout in the state":
            weight = weight * (1 + self.readout.weight.sum())
        values: list[Projection] = [Mapped(inner, weight, self.state_shape, bias), Learned(torch.sigmoid(self.decay))]
        if self.kind == "given with gradient":
            values.append(Given((x[:, :1] * self.extra).view(len(x), -1)))
        return tuple(values)

    def step(self, h: Tensor, *values: Tensor) -> Tensor:
        y, decay, *rest = values
        if self.kind == "mixed entries":
            h = h + 0.3 * h.roll(1, -1)
        elif self.kind == "mixed at large values":
            h = torch.where(y > self.threshold, h.roll(1, -1), h)
        elif self.kind == "parameter in step":
            y = y * self.extra
        elif self.kind == "batch mean" or (self.kind == "batch mean late" and float(y.detach().abs().max()) > 2.0):
            h = h - 0.5 * h.mean(0)
        elif self.kind == "not holomorphic":
            h = torch.complex(h.real.tanh(), 0.5 * h.imag)
        elif self.kind in CLIPPED:
            h = hooked(h, self.kind, self.limit)
        return decay * h + y + (rest[0] if rest else 0)

    def output(self, x: Tensor, before: Tensor, h: Tensor, *values: Tensor) -> Tensor:
        seen = h.real + h.imag if h.is_complex() else h
        if self.kind == "batch mean in the output":
            seen = seen - seen.mean(0)
        if self.kind == "parameter in step":
            return self.readout(torch.tanh(seen))
        return self.readout(torch.tanh(seen * self.extra))
