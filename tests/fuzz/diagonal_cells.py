"""Ready diagonal cells of random sizes, and random ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_rtrl
from sparse_rtrl.cells.diagonal_cell import DiagonalCell, Given, Learned, Mapped, Projection

from .draw import Draw
from .parts import spread

INPUTS = 3


class RandomDiagonalCell(DiagonalCell):
    """An element-wise recurrence from a few templates, with values made from parameters in many ways.

    Args:
        draw: what it is made of.
    """

    def __init__(self, draw: Draw) -> None:
        shape = draw.one_of((3,), (4,), (2, 3), (3, 2))
        self_complex = draw.chance(0.25)
        super().__init__(INPUTS, shape, complex_state=self_complex, previous_input=draw.chance(0.25))
        width = INPUTS * (2 if self.previous_input else 1)
        if self_complex:
            self.template = draw.one_of("rotation", "driven rotation", "quadratic")
        else:
            self.template = draw.one_of("leaky", "gated", "tanh", "outer", "selective", "given reset", "sine")
        needed = {
            "rotation": 2, "driven rotation": 3, "quadratic": 2, "leaky": 2, "gated": 4, "tanh": 2, "outer": 2,
            "selective": 3, "given reset": 2, "sine": 2,
        }[self.template]  # fmt: skip
        self.ways: list[str] = []
        self.shapes: list[tuple[int, ...]] = []
        self.p = nn.ParameterDict()
        for number in range(needed):
            self.make_value(draw, number, width)
        self.use_values, self.use_before = draw.chance(0.3), draw.chance(0.3)
        size = self.hidden_size * (2 if self_complex else 1)
        self.readout = nn.Linear(size * (2 if self.use_before else 1) + INPUTS, 2)
        if draw.chance(0.2):
            self.out_scale = nn.Parameter(torch.ones(2))
        else:
            self.out_scale = None
        spread(self, draw, 0.1)
        self.initial = "zeros"
        self.frozen = False
        names = [name for name in self.p if name.endswith("b")]
        if names and draw.chance(0.15):
            self.frozen = True
            self.p[names[0]].requires_grad_(False)

    def make_value(self, draw: Draw, number: int, width: int) -> None:
        """Parameters of one value, and the shape it has."""
        shape = tuple(size if draw.chance(0.6) else 1 for size in self.state_shape)
        if self.template == "outer":
            shape = tuple(s if (a == number % len(self.state_shape)) else 1 for a, s in enumerate(self.state_shape))
        rotates = self.complex_state and number == 0
        way = "learned" if rotates else draw.one_of("mapped", "mapped", "product", "scaled", "softplus", "learned")
        if self.template == "selective" and number == 2:
            way = "learned"
        if self.complex_state and number == 1:
            way = "complex mapped"
        count = torch.Size(shape).numel()
        if way == "learned":
            self.p[f"{number}a"] = nn.Parameter(torch.randn(shape) * 0.5)
            if rotates:
                self.p[f"{number}c"] = nn.Parameter(torch.randn(shape))
        elif way == "product":
            self.p[f"{number}a"] = nn.Parameter(torch.randn(count, 2) * 0.6)
            self.p[f"{number}c"] = nn.Parameter(torch.randn(2, width) * 0.6)
        elif way == "complex mapped":
            self.p[f"{number}a"] = nn.Parameter(torch.randn(count, width, 2) * 0.4)
        else:
            self.p[f"{number}a"] = nn.Parameter(torch.randn(count, width) / width**0.5)
            if way == "scaled":
                self.p[f"{number}c"] = nn.Parameter(torch.randn(width) * 0.3 + 1)
        if way != "learned" and way != "complex mapped" and draw.chance(0.5):
            self.p[f"{number}b"] = nn.Parameter(torch.randn(count) * 0.3)
        self.ways.append(way)
        self.shapes.append(shape)

    def set_initial(self, kind: str) -> None:
        self.initial = kind
        parts = (2,) if self.complex_state else ()
        content = 0.5 * torch.randn(*self.state_shape, *parts)
        if kind == "fixed":
            self.register_buffer("first", content)
        elif kind == "trained":
            self.first = nn.Parameter(content)

    def initial_entries(self, batch_size: int) -> Tensor:
        if self.initial == "zeros":
            return super().initial_entries(batch_size)
        first = torch.view_as_complex(self.first) if self.complex_state else self.first
        first = first.expand(batch_size, *self.state_shape)
        return first.clone() if self.initial == "fixed" else first

    def project(self, x: Tensor) -> tuple[Projection, ...]:
        values: list[Projection] = []
        for number, (way, shape) in enumerate(zip(self.ways, self.shapes, strict=True)):
            a = self.p[f"{number}a"]
            bias = self.p[f"{number}b"] if f"{number}b" in self.p else None
            if way == "learned":
                if self.complex_state and number == 0:
                    a = torch.exp(torch.complex(-F.softplus(a), self.p["0c"]))
                values.append(Learned(a))
                continue
            if way == "product":
                a = a @ self.p[f"{number}c"]
            elif way == "scaled":
                a = a * self.p[f"{number}c"]
            elif way == "softplus":
                a = F.softplus(a) - 0.5
            elif way == "complex mapped":
                a = torch.view_as_complex(a)
            values.append(Mapped(x, a, shape, bias))
        if self.template == "given reset":
            values.append(Given(torch.sigmoid(4 * x[:, :1]).view(-1, *[1] * len(self.state_shape))))
        return tuple(values)

    def step(self, h: Tensor, *values: Tensor) -> Tensor:
        a, b, *rest = values
        if self.template == "leaky":
            return torch.sigmoid(a) * h + b
        if self.template == "gated":
            f = torch.sigmoid(a + rest[0] * h)
            return f * h + (1 - f) * torch.tanh(b + rest[1] * h)
        if self.template == "tanh":
            return torch.tanh(a * h + b)
        if self.template == "outer":
            return 0.8 * h + a * b
        if self.template == "selective":
            delta = F.softplus(a)
            return torch.exp(-delta * torch.exp(rest[0])) * h + delta * b
        if self.template == "given reset":
            return rest[0] * torch.sigmoid(a) * h + b
        if self.template == "sine":
            return torch.sin(a * h) + b
        if self.template == "rotation":
            return a * h + b
        if self.template == "driven rotation":
            return a * h + b * rest[0]
        return a * h + 0.05 * h * h + b  # quadratic

    def output(self, x: Tensor, before: Tensor, h: Tensor, *values: Tensor) -> Tensor:
        parts = [h, before] if self.use_before else [h]
        parts = [torch.view_as_real(part) if part.is_complex() else part for part in parts]
        out = self.readout(torch.cat([*(part.flatten(1) for part in parts), x[:, :INPUTS]], 1))
        if self.use_values and self.ways[1] not in ("learned", "complex mapped"):
            out = out + torch.tanh(values[1]).flatten(1).sum(1, keepdim=True)
        return out if self.out_scale is None else out * self.out_scale


READY = ("lru", "elstm", "retention", "rotated retention", "mamba", "rwkv")


def ready_cell(draw: Draw, name: str, inputs: int = INPUTS, outputs: int = 2) -> DiagonalCell:
    """A ready cell of random sizes."""
    size = draw.integer(2, 5)
    if name == "lru":
        cell: DiagonalCell = sparse_rtrl.LRUCell(inputs, size, outputs, r_min=0.4, r_max=0.95)
    elif name == "elstm":
        cell = sparse_rtrl.ELSTMCell(inputs, size, outputs, forget_bias=draw.uniform(-1, 1))
    elif name == "retention":
        learn = draw.chance(0.5)
        cell = sparse_rtrl.RetentionCell(
            inputs, 2, draw.integer(2, 3), outputs, decay=[0.9, 0.7], learn_decay=learn, token_shift=draw.chance(0.3)
        )
    elif name == "rotated retention":
        learn = draw.chance(0.5)
        rotation = [[0.4], [1.5]]
        cell = sparse_rtrl.RetentionCell(
            inputs, 2, 2, outputs, [0.9, 0.7], draw.chance(0.5), rotation, learn, token_shift=draw.chance(0.3)
        )
    elif name == "mamba":
        channels = draw.integer(2, 3)
        cell = sparse_rtrl.MambaCell(inputs, channels, outputs, draw.integer(1, 3), 1, delta_min=0.1, delta_max=1.0)
    else:
        cell = sparse_rtrl.RWKVCell(inputs, size, outputs)
    cell = cell.double()
    with torch.no_grad():
        for p in cell.parameters():
            if p.requires_grad:
                p += 0.05 * draw.normal(*p.shape)
    return cell
