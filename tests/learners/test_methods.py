"""Approximations of the influence against dense textbook versions of them, written from their equations."""

import warnings

import pytest
import torch
from carry_oracle import EXACT, F64, Stepwise, bptt, carried, data
from oracle import gradients_of, worst_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_rtrl import Carry

H, STEPS, BATCH, LEAK = 4, 9, 2, 0.3


class LeakyCell(nn.Module):
    """Murray's cell: ``h' = (1 - LEAK) h + LEAK tanh(W h + U x)``."""

    def __init__(self):
        super().__init__()
        self.w, self.u = nn.Linear(H, H, bias=False, **F64), nn.Linear(4, H, **F64)

    def forward(self, x, h):
        return (1 - LEAK) * h + LEAK * torch.tanh(self.w(h) + self.u(x))


CELLS = {
    "leaky": LeakyCell,
    "elman": lambda: nn.RNNCell(4, H, **F64),
    "gru": lambda: nn.GRUCell(4, H, **F64),
    "lstm": lambda: nn.LSTMCell(4, H, **F64),
}


def zeros(kind, batch=BATCH):
    h = torch.zeros(batch, H, **F64)
    return (h, h.clone()) if kind == "lstm" else h


def flat(state):
    return torch.cat(state, -1) if isinstance(state, tuple) else state


def unflat(state):
    return tuple(state.split(H, -1)) if state.shape[-1] == 2 * H else state


def structure(kind, name, shape):
    """Which state entries the rows of a parameter reach within a step, ``(entries, rows, 1)``."""
    rows = torch.arange(shape[0])
    entries = torch.arange(2 * H if kind == "lstm" else H)
    own = (entries.view(-1, 1) % H) == rows % H
    if kind == "lstm":  # the output gate reaches h, the first H entries, and not c
        own &= (entries.view(-1, 1) < H) | (rows // H != 3)
    return own.view(len(entries), shape[0], *[1] * (len(shape) - 1)).to(torch.float64)


def leak(kind, cell, x, h):
    """The element-wise part of the state Jacobian, by hand."""
    if kind == "leaky":
        return (1 - LEAK) * torch.eye(H, **F64)
    if kind == "elman":
        return torch.zeros(H, H, **F64)
    gates = cell.weight_ih @ x + cell.bias_ih
    if kind == "gru":
        return torch.diag(torch.sigmoid(gates[H : 2 * H] + (cell.weight_hh @ h + cell.bias_hh)[H : 2 * H]))
    i, f, g, o = (gates + cell.weight_hh @ h[:H] + cell.bias_hh).split(H)
    c = torch.sigmoid(f) * h[H:] + torch.sigmoid(i) * torch.tanh(g)
    out = torch.zeros(2 * H, 2 * H, **F64)
    out[H:, H:] = torch.diag(torch.sigmoid(f))
    out[:H, H:] = torch.diag(torch.sigmoid(o) * (1 - torch.tanh(c) ** 2) * torch.sigmoid(f))
    return out


def textbook(method, kind, cell, x, c, seed=0):
    """Sum of the gradients of ``<h_t, c_t>``, each through its own step exactly and through the past by a method."""
    theta = {name: p.detach() for name, p in cell.named_parameters()}
    total = {name: torch.zeros_like(p) for name, p in theta.items()}
    size = c.shape[-1]
    states = [torch.zeros(size, **F64) for _ in range(BATCH)]
    P = [{n: torch.zeros(size, *p.shape, **F64) for n, p in theta.items()} for _ in range(BATCH)]
    pairs = [(torch.zeros(size, **F64), {n: torch.zeros_like(p) for n, p in theta.items()}) for _ in range(BATCH)]
    generator = torch.Generator().manual_seed(seed)

    def step(theta, h, x_t):
        state = tuple(part.unsqueeze(0) for part in unflat(h)) if kind == "lstm" else h.unsqueeze(0)
        return flat(torch.func.functional_call(cell, theta, (x_t.unsqueeze(0), state))).squeeze(0)

    for t in range(len(x)):
        signs = 2.0 * torch.randint(0, 2, (BATCH, size), generator=generator) - 1.0
        for b in range(BATCH):
            F, J = torch.func.jacrev(step, argnums=(0, 1))(theta, states[b], x[t, b])
            u, nu = c[t, b], signs[b].double()
            for name in theta:
                past = P[b][name]
                if method == "uoro":
                    past = torch.tensordot(pairs[b][0], pairs[b][1][name], 0)
                total[name] += torch.tensordot(u @ J, past, 1) + torch.tensordot(u, F[name], 1)
                if method == "snap1":
                    M = structure(kind, name, theta[name].shape)
                    P[b][name] = M * (torch.tensordot(J, past, 1) + F[name])
                if method == "rflo":
                    P[b][name] = torch.tensordot(leak(kind, cell, x[t, b], states[b]), past, 1) + F[name]
            if method == "uoro":
                moved, weights = J @ pairs[b][0], pairs[b][1]
                immediate = {name: torch.tensordot(nu, F[name], 1) for name in theta}
                norm = {
                    k: sum(float(v.square().sum()) for v in d.values()) ** 0.5
                    for k, d in ((0, weights), (1, immediate))
                }
                rho0 = (norm[0] / (float(moved.norm()) + 1e-7)) ** 0.5 + 1e-7
                rho1 = (norm[1] / (float(nu.norm()) + 1e-7)) ** 0.5 + 1e-7
                new = {name: weights[name] / rho0 + immediate[name] / rho1 for name in theta}
                pairs[b] = (rho0 * moved + rho1 * nu, new)
            states[b] = step(theta, states[b], x[t, b]).detach()
    return {name: g.detach() for name, g in total.items()}


def by_carry(method, kind, cell, x, c, segment=1, **options):
    """The same sum by Carry."""
    cell.zero_grad(set_to_none=True)
    carry = Carry(cell, method=method, **options)
    h = carry(zeros(kind, x.shape[1]))
    for t in range(0, len(x), segment):
        loss = 0.0
        for s in range(t, min(t + segment, len(x))):
            h = cell(x[s], h)
            loss = loss + (flat(h) * c[s]).sum()
        h = carry(h)
        loss.backward()
    return gradients_of(cell), carry


def problem(kind, steps=STEPS, batch=BATCH, seed=0):
    torch.manual_seed(seed)
    cell = CELLS[kind]()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter *= 1.5
    return cell, torch.randn(steps, batch, 4, **F64), torch.randn(steps, batch, 2 * H if kind == "lstm" else H, **F64)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("method", ["snap1", "rflo", "uoro"])
def test_equals_the_textbook(method, kind):
    cell, x, c = problem(kind)
    options = {"generator": torch.Generator().manual_seed(0)} if method == "uoro" else {}
    expected = textbook(method, kind, cell, x, c)
    found, _ = by_carry(method, kind, cell, x, c, **options)
    assert worst_error(found, expected) <= 1e-10
    others = [textbook(other, kind, cell, x, c) for other in ("snap1", "rflo", "uoro", "truncated") if other != method]
    exact, _ = by_carry("exact", kind, cell, x, c)
    assert min(worst_error(other, expected) for other in (*others, exact)) > 1e-2


def test_truncated_is_what_detach_gives():
    model = Stepwise(nn.GRUCell(4, 5, **F64))
    x, c = data(9, 2)
    found, carry = carried(model, x, c, (3,), method="truncated")
    assert worst_error(found, bptt(model, x, c, detach=3)) <= EXACT
    assert worst_error(found, bptt(model, x, c)) > 1e-2
    assert carry.kept_bytes == 0


def test_snap1_is_exact_once_everything_is_reached():
    """Within two steps of an Elman cell every weight reaches every unit."""
    cell, x, c = problem("elman")
    exact, _ = by_carry("exact", "elman", cell, x, c)
    found, _ = by_carry("snap1", "elman", cell, x, c, segment=2)
    assert worst_error(found, exact) <= EXACT
    single, _ = by_carry("snap1", "elman", cell, x, c)
    assert worst_error(single, exact) > 1e-2


def test_pattern_of_a_parameter_with_several_shapes_of_use():
    """A weight, transposed and not, shared by two layers, is kept element by element; a packed one by its rows."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.u = nn.Parameter(torch.randn(H, H, **F64)), nn.Parameter(torch.randn(2 * H, 4, **F64))

        def forward(self, x, h):
            first, second = self.u.chunk(2)
            return torch.tanh(torch.tanh(h @ self.w.T + x @ first.T) @ self.w + x @ second.T)

    torch.manual_seed(0)
    cell, (_, x, c) = Shared(), problem("elman")
    exact, _ = by_carry("exact", "elman", cell, x, c)
    found, carry = by_carry("snap1", "elman", cell, x, c, segment=2)
    assert worst_error(found, exact) <= EXACT
    assert carry.kept_bytes >= 8 * BATCH * H * (H * H)


def test_uoro_is_unbiased():
    """Every stream draws its own signs, so that equal streams are independent estimates."""
    streams = 6000
    cell, x, c = problem("gru", steps=5, batch=1)
    x, c = x.expand(-1, streams, -1), c.expand(-1, streams, -1)
    _, carry = by_carry("uoro", "gru", cell, x, c, generator=torch.Generator().manual_seed(5))
    _, exact = by_carry("exact", "gru", cell, x[:, :1], c[:, :1])
    _, last = by_carry("exact", "gru", cell, x[-1:, :1], c[-1:, :1])  # without the past: a wrong mean must be seen
    for name, sample in carry.influence().items():
        error = sample.std(0) / streams**0.5
        scores = ((sample.mean(0) - exact.influence()[name][0]) / error).flatten()
        assert float(scores.abs().max()) < 5.0  # p < 1e-6 each, about 200 of them
        assert 0.5 < float(scores.square().mean()) < 2.0
        wrong = ((sample.mean(0) - last.influence()[name][0]) / error).flatten()
        assert float(wrong.abs().max()) > 20.0


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // 8)
        return out


def test_what_each_method_keeps():
    size, batch = 40, 2
    cell = nn.GRUCell(4, size, **F64)
    parameters = sum(p.numel() for p in cell.parameters())
    x, c = torch.randn(3, batch, 4, **F64), torch.randn(3, batch, size, **F64)
    kept, largest = {}, {}
    for method in ("exact", "snap1", "rflo", "uoro", "truncated"):
        carry = Carry(cell, method=method)
        h = carry(torch.zeros(batch, size, **F64))
        with LargestTensor() as seen:
            for t in range(3):
                h = cell(x[t], h)
                loss = (h * c[t]).sum()
                h = carry(h)
                loss.backward()
        carry.reset(torch.zeros(batch, dtype=torch.bool))  # brings it up to date
        kept[method], largest[method] = carry.kept_bytes, seen.numel
        estimated = carry.estimate(h).kept_bytes
        assert estimated <= kept[method] <= 1.1 * estimated or method == "truncated"
    assert kept["exact"] == 8 * batch * (size + 1) * parameters
    assert kept["uoro"] == 8 * batch * (size + parameters)
    assert 8 * batch * parameters <= kept["snap1"] == kept["rflo"] <= 8 * batch * parameters * 1.1
    assert kept["truncated"] == 0
    assert largest["uoro"] <= batch * parameters < largest["snap1"]  # neither Jacobian is formed


@pytest.mark.parametrize("method", ["snap1", "rflo", "uoro"])
def test_resets_and_resuming(method):
    cell, x, c = problem("gru")

    def generator():
        return {"generator": torch.Generator().manual_seed(1)} if method == "uoro" else {}

    def run(carry, h, steps):
        cell.zero_grad(set_to_none=True)
        for t in steps:
            h = cell(x[t], h)
            loss = (h * c[t]).sum()
            h = carry(h)
            loss.backward()
        return gradients_of(cell), h

    carry = Carry(cell, method=method, **generator())
    _, h = run(carry, carry(zeros("gru")), range(4))
    other = Carry(cell, method=method, **generator())
    other.load_state_dict(carry.state_dict())
    first, _ = run(carry, h, range(4, STEPS))
    second, _ = run(other, other(h.detach()), range(4, STEPS))
    assert all(torch.equal(g, second[name]) for name, g in first.items())
    carry.reset(torch.tensor([True, False]))
    assert all(not m[0].any() and m[1].any() for m in carry.influence().values())
    with pytest.raises(ValueError, match=f"method 'exact', got '{method}'"):
        Carry(cell).load_state_dict(carry.state_dict())


def test_a_late_backward_and_an_early_one():
    cell, x, _ = problem("gru")
    carry = Carry(cell, method="snap1")
    h, losses = carry(zeros("gru")), []
    for t in range(4):
        h = cell(x[t], h)
        losses.append(h.sum())
        h = carry(h)
    with pytest.raises(RuntimeError, match="backward came too late"):
        losses[1].backward()
    losses[3].backward()


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.detach().numpy() * ctx.saved_tensors[0].cos().detach().numpy())


@pytest.mark.parametrize("method", ["rflo", "uoro"])
def test_modules_that_hide_what_a_method_needs_are_refused(method):
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(H, H, **F64)

        def forward(self, x, h):
            return Opaque.apply(self.w(h)) + x

    cell = Custom()
    carry = Carry(cell, method=method)
    h = carry(zeros("elman"))
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match=f"method '{method}'"):
        warnings.simplefilter("ignore")
        for _ in range(3):
            h = carry(cell(torch.randn(BATCH, H, **F64), h))


def test_bad_arguments():
    cell = nn.GRUCell(4, H)
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'snap2'"):
        Carry(cell, method="snap2")
    with pytest.raises(ValueError, match="generator is for method 'uoro'"):
        Carry(cell, method="rflo", generator=torch.Generator())
