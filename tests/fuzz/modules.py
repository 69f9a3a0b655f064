"""Random recurrent modules for ``Carry``, from a grammar of operations on a state ``(B, P, Q)``."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_rtrl import DiagonalStack

from .diagonal_cells import ready_cell
from .draw import Draw
from .parts import Mapped, Scaled, parametrize_weight, spread

INPUTS = 3
"""Input features that carry numbers; after them come a rare flag per stream and the number of the step."""

OPERATIONS: dict[str, Callable[[Draw, int, int], nn.Module]] = {}
"""Makers of operations ``(z (B, P, Q), x (B, INPUTS + 2)) -> (B, P, Q)`` by name."""

BRANCHING = {"embedding", "item assignment", "flagged assignment", "chosen weight", "late branch", "sorted late"}
"""Operations that look at numbers or steps to decide, so that another precision may decide otherwise."""

COMPLEX = {"complex weight", "complex state space"}
"""Operations with complex parameters, which may be refused by name."""


def operation(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a class as an operation."""

    def register(made: type[nn.Module]) -> type[nn.Module]:
        OPERATIONS[name] = made
        return made

    return register


def of_layer(name: str, make: Callable[[Draw, int, int], nn.Module], run: Callable[..., Tensor]) -> None:
    """Register a layer of torch with a way to apply it."""

    class Layer(nn.Module):
        def __init__(self, draw: Draw, p: int, q: int) -> None:
            super().__init__()
            self.layer = make(draw, p, q)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return run(self.layer, z, x)

    Layer.__name__ = Layer.__qualname__ = f"{name.title().replace(' ', '')}Layer"
    globals()[Layer.__name__] = Layer  # so that pickle finds it
    OPERATIONS[name] = Layer


def _whole(layer: nn.Module, z: Tensor, x: Tensor) -> Tensor:
    return layer(z.flatten(1)).view_as(z)


def _plain(layer: nn.Module, z: Tensor, x: Tensor) -> Tensor:
    return layer(z)


def _numbers(x: Tensor, like: Tensor) -> Tensor:
    """Input numbers at every position, ``(B, P, INPUTS)``."""
    return x[:, None, :INPUTS].expand(-1, like.shape[1], -1)


def _mlp(draw: Draw, p: int, q: int) -> nn.Module:
    return nn.Sequential(nn.Linear(p * q, 5), draw.one_of(nn.Tanh(), nn.GELU(), nn.PReLU()), nn.Linear(5, p * q))


of_layer("linear", lambda d, p, q: nn.Linear(q, q, bias=d.chance(0.7)), _plain)
of_layer("whole linear", lambda d, p, q: nn.Linear(p * q, p * q, bias=d.chance(0.7)), _whole)
of_layer("perceptron", _mlp, _whole)
of_layer("conv1d", lambda d, p, q: nn.Conv1d(p, p, 3, padding=1, groups=d.one_of(1, p)), _plain)
of_layer(
    "conv2d", lambda d, p, q: nn.Conv2d(1, 1, (1, 3), padding=(0, 1)), lambda m, z, x: m(z.unsqueeze(1)).squeeze(1)
)
of_layer("conv transpose", lambda d, p, q: nn.ConvTranspose1d(p, p, 3, padding=1), _plain)
of_layer("layer norm", lambda d, p, q: nn.LayerNorm((p, q) if d.chance(0.3) else q), _plain)
of_layer("group norm", lambda d, p, q: nn.GroupNorm(1, p), _plain)
of_layer("rms norm", lambda d, p, q: nn.RMSNorm(q), lambda m, z, x: m(z + 0.1))
of_layer("instance norm", lambda d, p, q: nn.InstanceNorm1d(p, affine=True), _plain)
of_layer("batch norm in eval", lambda d, p, q: nn.BatchNorm1d(p).eval(), _plain)
of_layer(
    "attention",
    lambda d, p, q: nn.MultiheadAttention(q, 1, batch_first=True, bias=d.chance(0.5)),
    lambda m, z, x: m(z, z, z, need_weights=False)[0],
)
of_layer(
    "attention, positions first",
    lambda d, p, q: nn.MultiheadAttention(q, 1),
    lambda m, z, x: m(z.transpose(0, 1), z.transpose(0, 1), z.transpose(0, 1))[0].transpose(0, 1),
)
of_layer("bilinear", lambda d, p, q: nn.Bilinear(q, INPUTS, q), lambda m, z, x: m(z, _numbers(x, z).contiguous()))
of_layer("input linear", lambda d, p, q: nn.Linear(q + INPUTS, q), lambda m, z, x: m(torch.cat((z, _numbers(x, z)), 2)))
of_layer("dropout", lambda d, p, q: nn.Sequential(nn.Linear(q, q), nn.Dropout(0.3)), _plain)
of_layer(
    "embedding",
    lambda d, p, q: nn.Embedding(3, q, padding_idx=d.one_of(None, 1)),
    lambda m, z, x: torch.tanh(z) * m((z[..., 0] > 0).long() + (x[:, None, 0] > 0).long()),
)
of_layer(
    "gated unit",
    lambda d, p, q: nn.Linear(q, 2 * q),
    lambda m, z, x: (lambda a, b: torch.sigmoid(a) * torch.tanh(b))(*m(z).chunk(2, -1)),
)
of_layer(
    "rows of a cell",
    lambda d, p, q: nn.GRUCell(INPUTS, q),
    lambda m, z, x: m(_numbers(x, z).reshape(-1, INPUTS), z.reshape(-1, z.shape[-1])).view_as(z),
)
of_layer(
    "steps of a layer",
    lambda d, p, q: nn.GRU(q, q, batch_first=True),
    lambda m, z, x: m(z)[0],
)


class _Weighted(nn.Module):
    """An operation with one parameter ``w``."""

    def __init__(self, *shape: int, scale: float | None = None) -> None:
        super().__init__()
        scale = (shape[-1] ** -0.5 if len(shape) > 1 else 0.5) if scale is None else scale
        self.w = nn.Parameter(torch.randn(shape) * scale)


@operation("einsum")
class Einsum(_Weighted):
    def __init__(self, draw: Draw, p: int, q: int) -> None:
        form, shape = draw.one_of(
            ("bpq,qr->bpr", (q, q)),
            ("bpq,ps->bsq", (p, p)),
            ("bpq,pqr->bpr", (p, q, q)),
            ("bpq,pqsr->bsr", (p, q, p, q)),
        )
        super().__init__(*shape)
        self.form = form

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.einsum(self.form, z, self.w)


@operation("left product")
class LeftProduct(_Weighted):
    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__(p, p)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.w @ z


@operation("scale")
class Scale(_Weighted):
    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__(*draw.one_of((q,), (p, 1), (p, q), (), (1, 1, q)))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z * (1 + self.w)


@operation("added")
class Added(_Weighted):
    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__(*draw.one_of((q,), (p, 1), (p, q), ()))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return (0.9 * z).add_(self.w).tanh_()  # in place, on tensors that no backward pass needs


@operation("cumsum")
class Cumulated(_Weighted):
    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__(q)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return (z * self.w).cumsum(1) + (z * self.w).cumsum(2) * 0.3


@operation("softmax within")
class SoftmaxWithin(_Weighted):
    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__(q)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return (z * self.w).softmax(2) + (z + self.w).logsumexp(1, keepdim=True) * 0.2


@operation("complex rotation")
class ComplexRotation(nn.Module):
    """Pairs of the whole state turned and shrunk by real parameters."""

    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__()
        self.angle = nn.Parameter(torch.randn(p * q // 2))
        self.decay = nn.Parameter(torch.rand(p * q // 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(z.reshape(len(z), -1, 2))
        turned = pairs * torch.exp(torch.complex(-F.softplus(self.decay), self.angle))
        return torch.view_as_real(turned).reshape(z.shape)


@operation("complex weight")
class ComplexWeight(nn.Module):
    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__()
        size = p * q // 2
        self.w = nn.Parameter(torch.randn(size, size, dtype=torch.complex128) * 0.4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(z.reshape(len(z), -1, 2))
        return torch.view_as_real(pairs @ self.w.t().to(pairs.dtype)).reshape(z.shape)


@operation("complex state space")
class ComplexStateSpace(nn.Module):
    """``λ h + B x`` with complex ``B`` and ``λ``."""

    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__()
        size = p * q // 2
        self.decay = nn.Parameter(torch.randn(size, dtype=torch.complex128) * 0.4)
        self.b = nn.Parameter(torch.randn(size, INPUTS, dtype=torch.complex128) * 0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(z.reshape(len(z), -1, 2))
        new = pairs * self.decay.to(pairs.dtype) + x[:, :INPUTS].to(pairs.dtype) @ self.b.t().to(pairs.dtype)
        return torch.view_as_real(new).reshape(z.shape)


@operation("function")
class OwnFunction(_Weighted):
    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__(q)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return Scaled.apply(z, self.w)


@operation("map function")
class OwnMap(_Weighted):
    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__(q, q)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return Mapped.apply(z, self.w)


class _Sorted(nn.Module):
    """Streams put in order, mapped, and put back."""

    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__()
        self.layer = nn.Linear(q, q)
        self.begins = draw.integer(1, 4)

    def put_in_order(self, z: Tensor, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return torch.tanh(self.layer(z[order]))[order.argsort()]


@operation("sorted")
class Sorted(_Sorted):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.put_in_order(z, x)


@operation("sorted late")
class SortedLate(_Sorted):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.put_in_order(z, x) if float(x[0, -1]) >= self.begins else torch.tanh(self.layer(z))


@operation("masked")
class Masked(nn.Module):
    """Streams whose flag is set keep what they have; at the others padded positions are left out."""

    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__()
        self.layer = nn.Linear(q, q)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.where((x[:, -2] > 0).view(-1, 1, 1), z, torch.tanh(self.layer(z)))


@operation("compacted")
class Compacted(nn.Module):
    """Only the streams whose flag is not set are computed, and written into place."""

    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__()
        self.layer = nn.Linear(q, q)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        active = x[:, -2] <= 0
        new = z.clone()
        new[active] = torch.tanh(self.layer(z[active]))
        return new


@operation("item assignment")
class ItemAssignment(_Weighted):
    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__(q)
        self.way = draw.one_of("slice", "copy", "add")

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        new = 0.9 * z
        if self.way == "slice":
            new[:, 0] = self.w
        elif self.way == "copy":
            new[:, -1].copy_(self.w)
        else:
            new[:, 0].add_(self.w)
        return new


@operation("flagged assignment")
class FlaggedAssignment(_Weighted):
    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__(p, q)
        self.way = draw.one_of("index", "where", "masked scatter", "index put")

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        flag = x[:, -2] > 0
        if self.way == "where":
            return torch.where(flag.view(-1, 1, 1), self.w, z)
        new = 0.9 * z
        if self.way == "index":
            new[flag] = self.w
        elif self.way == "index put":
            new = new.index_put((flag.nonzero().flatten(),), self.w)
        else:
            whole = flag.view(-1, 1, 1).expand_as(new)
            new = new.masked_scatter(whole, self.w.expand(len(z), -1, -1)[flag])
        return new


@operation("late branch")
class LateBranch(nn.Module):
    """A part that runs first at a later step."""

    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__()
        self.layer = nn.Linear(q, q)
        self.w = nn.Parameter(torch.randn(q) * 0.5)
        self.begins = draw.integer(1, 4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(z)) + self.w if float(x[0, -1]) >= self.begins else torch.tanh(z)


@operation("closed gate")
class ClosedGate(nn.Module):
    """A part that is multiplied by zero until a later step."""

    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__()
        self.layer = nn.Linear(q, q)
        self.w = nn.Parameter(torch.randn(q) * 0.5)
        self.begins = draw.integer(1, 4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        gate = (x[:, -1] >= self.begins).to(z.dtype).view(-1, 1, 1)
        return torch.tanh(z) + gate * (torch.tanh(self.layer(z)) + self.w)


@operation("tied")
class Tied(nn.Module):
    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(q, q), nn.Linear(q, q)
        self.other.weight = self.one.weight

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.one(z)))


@operation("parametrized")
class Parametrized(nn.Module):
    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__()
        self.layer = nn.Linear(q, q)
        parametrize_weight(self.layer, draw)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.layer(z)


@operation("weight of weights")
class WeightOfWeights(nn.Module):
    """A weight that is made of others in each step."""

    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__()
        self.way = draw.one_of("product", "normalised", "rotation", "kron", "cat", "stack")
        self.a = nn.Parameter(torch.randn(q, q) * 0.5)
        self.b = nn.Parameter(torch.randn(q, q) * 0.5)
        self.c = nn.Parameter(torch.randn(p, p) * 0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        if self.way == "product":
            return z @ (self.a @ self.b)
        if self.way == "normalised":
            return z @ (self.a / self.a.norm(dim=1, keepdim=True)) + z * self.b.diagonal()
        if self.way == "rotation":
            return z @ torch.linalg.matrix_exp(self.a - self.a.t()) + z * self.b[0]
        if self.way == "kron":
            return (z.flatten(1) @ torch.kron(self.c, self.a)).view_as(z)
        if self.way == "cat":
            return torch.cat((z, z.cos()), 2) @ torch.cat((self.a, self.b), 0)
        return (z.unsqueeze(0) @ torch.stack((self.a, self.b)).unsqueeze(1)).sum(0)


@operation("chosen weight")
class ChosenWeight(_Weighted):
    """Each stream takes the weight that its input chooses."""

    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__(2, q, q)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.bmm(z, self.w[(x[:, 0] > 0).long()])


@operation("sorted entries")
class SortedEntries(_Weighted):
    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__(q)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z.sort(2).values * self.w + z.amax(1, keepdim=True) * 0.3 + z.roll(1, 2) * self.w[0]


@operation("partly detached")
class PartlyDetached(nn.Module):
    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__()
        self.layer = nn.Linear(q, q)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.layer(z) + torch.tanh(self.layer(z)).detach() * z


@operation("addmm")
class Added3(nn.Module):
    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(q, q) * 0.5), nn.Parameter(torch.randn(q))
        self.batched = draw.chance(0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        if self.batched:
            return torch.baddbmm(self.b, z, self.w.expand(len(z), -1, -1), beta=0.5, alpha=0.8)
        return torch.addmm(self.b, z.reshape(-1, z.shape[-1]), self.w, beta=0.5, alpha=0.8).view_as(z)


@operation("outer product")
class OuterProduct(nn.Module):
    """``k vᵀ`` added, as linear attention does."""

    def __init__(self, draw: Draw, p: int, q: int) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(INPUTS, p), nn.Linear(INPUTS, q)
        self.decay = nn.Parameter(torch.rand(p, 1))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        k, v = self.key(x[:, :INPUTS]), self.value(x[:, :INPUTS])
        return torch.sigmoid(self.decay) * z + k.unsqueeze(2) * v.unsqueeze(1)


class RandomModule(nn.Module):
    """``h' = mix(h, tanh(Σ operations(h, x) + W x))`` on a state ``(B, P, Q)``, with a readout.

    Args:
        draw: what it is made of.
        names: operations to use; None for random ones.
    """

    def __init__(self, draw: Draw, names: list[str] | None = None) -> None:
        super().__init__()
        self.p, self.q = draw.one_of((1, 4), (2, 3), (2, 4), (3, 4))
        self.names = names or draw.some_of([n for n in OPERATIONS if n not in COMPLEX or draw.chance(0.4)], 1, 3)
        self.in_series = draw.chance(0.4)
        self.mix = draw.one_of("none", "residual", "gate", "scalar gate")
        self.shape = draw.one_of("whole", "flat", "dict", "pair")
        self.operations = nn.ModuleList([OPERATIONS[name](draw, self.p, self.q) for name in self.names])
        self.input = nn.Linear(INPUTS, self.p * self.q)
        if self.mix == "gate":
            self.gate = nn.Linear(self.q + INPUTS, self.q)
        elif self.mix == "scalar gate":
            self.gate_logit = nn.Parameter(torch.zeros(()))
        self.readout = nn.Linear(self.p * self.q, 2)
        spread(self, draw, 0.15)
        if draw.chance(0.1):
            free = [n for n, _ in self.named_parameters() if not n.startswith(("readout", "input"))]
            for name in draw.some_of(free, 1, 2):
                self.get_parameter(name).requires_grad_(False)
        self.train()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()

    @property
    def smooth(self) -> bool:
        """Whether another precision takes the same path."""
        return not BRANCHING & set(self.names) and "dropout" not in self.names

    def pack(self, z: Tensor) -> Any:
        """The state as it is handed on."""
        if self.shape == "flat":
            return z.flatten(1)
        if self.shape == "dict":
            return {"h": z, "seen": torch.ones(len(z), dtype=torch.long)}
        if self.shape == "pair":
            return z[:, :, :1], (z[:, :, 1:].transpose(1, 2),)
        return z

    def unpack(self, h: Any) -> Tensor:
        if self.shape == "flat":
            return h.view(-1, self.p, self.q)
        if self.shape == "dict":
            return h["h"]
        if self.shape == "pair":
            return torch.cat((h[0], h[1][0].transpose(1, 2)), 2)
        return h

    def zeros(self, batch: int) -> Any:
        like = self.readout.weight
        return self.pack(torch.zeros(batch, self.p, self.q, dtype=like.dtype))

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        driven = self.input(x[:, :INPUTS]).view_as(z)
        if self.in_series:
            mixed = z
            for op in self.operations:
                mixed = torch.tanh(op(mixed, x))
            new = torch.tanh(mixed + driven)
        else:
            new = torch.tanh(sum(op(z, x) for op in self.operations) + driven)
        if self.mix == "residual":
            return 0.5 * z + 0.5 * new
        if self.mix == "gate":
            return torch.lerp(z, new, torch.sigmoid(self.gate(torch.cat((z, _numbers(x, z)), 2))))
        if self.mix == "scalar gate":
            return torch.lerp(z, new, torch.sigmoid(self.gate_logit))
        return new

    def forward(self, xs: Tensor, h: Any) -> tuple[Tensor, Any]:
        z = self.unpack(h)
        outputs = []
        for x in xs:
            z = self.step(z, x)
            outputs.append(self.readout(z.flatten(1)))
        return torch.stack(outputs), self.pack(z)


class CellLoop(nn.Module):
    """A cell of torch, or two of them on top of each other, step by step.

    Args:
        draw: which.
    """

    batch_dim = 0
    smooth = True

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        size = draw.integer(2, 6)
        self.size = size
        self.kind = draw.one_of("rnn", "gru", "lstm", "relu rnn")
        self.names = [self.kind]
        make = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell, "relu rnn": nn.RNNCell}[self.kind]
        options = {"nonlinearity": "relu"} if self.kind == "relu rnn" else {}
        layers = draw.one_of(1, 1, 2)
        bias = draw.chance(0.8)
        self.cells = nn.ModuleList(
            [make(INPUTS if layer == 0 else size, size, bias=bias, **options) for layer in range(layers)]
        )
        self.readout = nn.Linear(size, 2)
        spread(self, draw, 0.1)

    def zeros(self, batch: int) -> Any:
        zero = torch.zeros(batch, self.size, dtype=self.readout.weight.dtype)
        one = (zero, zero.clone()) if self.kind == "lstm" else zero
        return [one for _ in self.cells] if len(self.cells) > 1 else one

    def forward(self, xs: Tensor, h: Any) -> tuple[Tensor, Any]:
        states = list(h) if len(self.cells) > 1 else [h]
        outputs = []
        for x in xs:
            value = x[:, :INPUTS]
            for layer, cell in enumerate(self.cells):
                states[layer] = cell(value, states[layer])
                value = states[layer][0] if self.kind == "lstm" else states[layer]
            outputs.append(self.readout(value))
        return torch.stack(outputs), states if len(self.cells) > 1 else states[0]


class LayerLoop(nn.Module):
    """``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``, whose states have the streams second.

    Args:
        draw: which.
    """

    batch_dim = 1
    smooth = True

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.kind = draw.one_of("rnn", "gru", "lstm", "projected lstm")
        self.names = [f"layers of {self.kind}"]
        make = {"rnn": nn.RNN, "gru": nn.GRU}.get(self.kind, nn.LSTM)
        self.size, self.layers = draw.integer(2, 4), draw.integer(1, 2)
        self.out = self.size - 1 if self.kind == "projected lstm" else self.size
        options = {"proj_size": self.out} if self.kind == "projected lstm" else {}
        self.first_is_batch = draw.chance(0.5)
        self.dropped = draw.chance(0.2) and self.layers > 1
        self.layer = make(
            INPUTS,
            self.size,
            self.layers,
            bias=draw.chance(0.8),
            batch_first=self.first_is_batch,
            dropout=0.3 if self.dropped else 0.0,
            **options,
        )
        self.readout = nn.Linear(self.out, 2)
        spread(self, draw, 0.1)
        self.smooth = not self.dropped

    def zeros(self, batch: int) -> Any:
        dtype = self.readout.weight.dtype
        h = torch.zeros(self.layers, batch, self.out, dtype=dtype)
        return (h, torch.zeros(self.layers, batch, self.size, dtype=dtype)) if "lstm" in self.kind else h

    def forward(self, xs: Tensor, h: Any) -> tuple[Tensor, Any]:
        xs = xs[..., :INPUTS]
        y, h = self.layer(xs.transpose(0, 1).contiguous() if self.first_is_batch else xs, h)
        return self.readout(y.transpose(0, 1) if self.first_is_batch else y), h


class StackLoop(nn.Module):
    """Layers of diagonal cells with mixing between them, as one joint state.

    Args:
        draw: which.
    """

    batch_dim = 0
    smooth = True

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        kinds = [draw.one_of("lru", "elstm", "mamba", "retention") for _ in range(draw.integer(1, 2))]
        self.names = ["stack", *kinds]
        self.smooth = "lru" not in kinds  # its complex state does not follow the dtype of a first state
        self.stack = DiagonalStack(INPUTS, [ready_cell(draw, kind, 2, 2) for kind in kinds], 2)

    def zeros(self, batch: int) -> Any:
        return self.stack.initial_state(batch)

    def forward(self, xs: Tensor, h: Any) -> tuple[Tensor, Any]:
        return self.stack.unroll(xs[..., :INPUTS], h)


class Started(nn.Module):
    """A module with a first state of its own.

    Args:
        body: a module with ``zeros`` and a forward pass.
        draw: how it starts.
    """

    def __init__(self, body: nn.Module, draw: Draw) -> None:
        super().__init__()
        self.body = body
        self.batch_dim = getattr(body, "batch_dim", 0)
        self.start = draw.one_of("zeros", "zeros", "zeros", "fixed", "none", "parameter", "encoder", "none, parameter")
        zeros = body.zeros(1)
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(zeros) if leaf.is_floating_point()]
        self.sizes = [leaf.numel() for leaf in leaves]
        if self.start in ("parameter", "none, parameter", "fixed"):
            content = 0.5 * draw.normal(sum(self.sizes))
            if self.start == "fixed":
                self.register_buffer("content", content)
            else:
                self.content = nn.Parameter(content)
        elif self.start == "encoder":
            self.encode = nn.Linear(INPUTS, sum(self.sizes))

    def first(self, context: Tensor) -> Any:
        """The first state of streams whose first inputs are ``context (B, INPUTS + 2)``."""
        batch = len(context)
        zeros = self.body.zeros(batch)
        if self.start in ("zeros", "none"):
            return zeros
        if self.start == "encoder":
            flat = torch.tanh(self.encode(context[:, :INPUTS]))
        else:
            flat = self.content.expand(batch, -1)
        leaves, structure = torch.utils._pytree.tree_flatten(zeros)
        parts = iter(flat.split(self.sizes, 1))
        out = []
        for leaf in leaves:
            if leaf.is_floating_point():
                shape = leaf.movedim(self.batch_dim, 0).shape
                out.append(next(parts).reshape(shape).movedim(0, self.batch_dim))
            else:
                out.append(leaf)
        return torch.utils._pytree.tree_unflatten(out, structure)

    def forward(self, xs: Tensor, h: Any) -> tuple[Tensor, Any]:
        return self.body(xs, self.first(xs[0]) if h is None else h)
