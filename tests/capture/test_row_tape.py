"""The row tape: what it understands, that it is exact, when a segment takes it, and what it refuses."""

import copy
import gc
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
from carry_oracle import EXACT, F64, LSTM, Stepwise, bptt, carried, data
from oracle import gradients_of, worst_error
from torch import nn
from torch.func import functional_call
from typer.testing import CliRunner

from sparse_rtrl import Carry
from sparse_rtrl.capture import taped, trace
from sparse_rtrl.capture.linearize import Linearizer
from sparse_rtrl.capture.segment import StepJacobian
from sparse_rtrl.capture.structure import structure_of
from sparse_rtrl.capture.tape import Product
from sparse_rtrl.capture.tape_rules import build_tape
from sparse_rtrl.capture.taped import TapedSteps
from sparse_rtrl.capture.trace import NotTraceable, trace_step
from sparse_rtrl.cli.app import app
from sparse_rtrl.ops import dispatch, reference


class Gated(nn.Module):
    """Splits, a gain, a broadcast input, subtraction from one, ReLU."""

    def __init__(self):
        super().__init__()
        self.into, self.across = nn.Linear(4, 5, **F64), nn.Linear(5, 10, bias=False, **F64)
        self.gain = nn.Parameter(torch.rand(5, **F64))

    def forward(self, x, h):
        a, b = self.across(h).chunk(2, dim=-1)
        gate = torch.sigmoid(a + self.into(x))
        return (1 - gate) * h + gate * torch.relu(b * self.gain - 0.3 * x[:, :1]) - 0.1 * torch.tanh(-h)


class Mixed(nn.Module):
    """Every third step goes on outside of the cell."""

    def __init__(self):
        super().__init__()
        self.cell, self.calls = nn.GRUCell(4, 5, **F64), 0

    def forward(self, x, h):
        self.calls += 1
        h = self.cell(x, h)
        return h if self.calls % 3 else h.flip(1).flip(1)


class Words(nn.Module):
    """An embedding of its input, a residual block with a norm."""

    def __init__(self):
        super().__init__()
        self.words, self.cell, self.norm = nn.Embedding(9, 4), nn.GRUCell(4, 5), nn.LayerNorm(5)
        self.block = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5))

    def forward(self, x, h):
        h = self.cell(self.words((x.abs().sum(-1) * 3).long() % 9), h)
        return h + self.block(self.norm(h))


class Attention(nn.Module):
    """Three slots that a query from the input reads, shared and plain parameters, slots that move on."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.scale, self.mix = nn.Parameter(torch.randn(5)), nn.Parameter(0.3 * torch.randn(5, 5))

    def forward(self, x, h):
        slots = h.view(-1, 3, 5)
        weights = torch.softmax(self.q(x).unsqueeze(1) @ self.k(slots).transpose(1, 2) / 5**0.5, -1)
        slots = torch.tanh(slots * self.scale + weights @ self.v(slots) + slots @ self.mix + self.k(slots))
        return torch.cat((slots[:, 1:], slots[:, :1]), 1).reshape(h.shape)


class Heads(nn.Module):
    """Heads with matrices of their own, a parameter in three dimensions."""

    def __init__(self):
        super().__init__()
        self.heads, self.into = nn.Parameter(0.3 * torch.randn(2, 3, 3)), nn.Linear(4, 6)

    def forward(self, x, h):
        return torch.tanh(torch.einsum("bhi,hij->bhj", h.view(-1, 2, 3), self.heads).reshape(-1, 6) + self.into(x))


class Items(nn.Module):
    """Entries written in place, masks, a clamp, a parameter indexed by hand."""

    def __init__(self):
        super().__init__()
        self.gain, self.into = nn.Parameter(torch.randn(4)), nn.Linear(4, 4)

    def forward(self, x, h):
        new = h.clone()
        new[:, 2:6] = torch.sigmoid(self.into(x)) * self.gain
        new[:, 0] = h[:, 1] * self.gain[0]
        return torch.where(x.sum() > 0, new, 0.5 * h).masked_fill(h > 2, 0.0).clamp(-1, 1)


class Convolution(nn.Module):
    def __init__(self, groups=1, stride=1, dilation=1):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=dilation, stride=stride, dilation=dilation)
        self.two = nn.Conv2d(4, 2 * stride**2, 3, padding=1, groups=groups)

    def forward(self, x, h):
        y = torch.cat((x.view(-1, 1, 2, 2).repeat(1, 1, 2, 2), h.view(-1, 2, 4, 4)), 1)
        return torch.tanh(self.two(torch.relu(self.one(y)))).reshape(h.shape)


class Routed(nn.Module):
    """Parameters, and entries of the state, chosen by data."""

    def __init__(self):
        super().__init__()
        self.experts, self.gate = nn.Parameter(0.3 * torch.randn(5, 6, 6)), nn.Linear(4, 5)
        self.bias = nn.Parameter(torch.randn(5, 6))

    def forward(self, x, h):
        weights, chosen = self.gate(x).topk(2)
        y = (torch.softmax(weights, -1)[0, :, None] * (self.experts[chosen[0]] @ h[0])).sum(0, keepdim=True)
        taken = h.gather(1, chosen)
        return torch.tanh(y + self.bias[chosen[:, 0]]).scatter_add(1, chosen, taken)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(4, 3)

    def forward(self, x, h):
        return torch.cat(self.cell(x, tuple(h.chunk(2, 1))), 1)


STEPS = {
    "elman": (lambda: nn.RNNCell(4, 5), 5),
    "gru": (lambda: nn.GRUCell(4, 5), 5),
    "lstm": (Pair, 6),
    "gated": (Gated, 5),
    "words": (Words, 5),
    "attention": (Attention, 15),
    "heads": (Heads, 6),
    "items": (Items, 8),
    "convolution": (Convolution, 32),
    "grouped convolution": (lambda: Convolution(groups=2), 32),
    "strided convolution": (lambda: Convolution(stride=2), 32),
    "dilated convolution": (lambda: Convolution(dilation=2), 32),
    "routed": (Routed, 6),
}


def built(kind):
    """A step of one stream, its parameters and its tape."""
    torch.manual_seed(3)
    make, size = STEPS[kind]
    module = make().double()
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]

    def step(parameters, inputs, h):
        by_name = dict(zip(names, parameters, strict=True))
        return functional_call(module, by_name, (inputs[0], h.unsqueeze(0))).squeeze(0)

    traced = trace_step(step, values, [torch.randn(1, 4, **F64)], torch.randn(size, **F64))
    return step, values, build_tape(traced, values), size


def ran(step, values, size, steps, batch):
    """Inputs ``(steps * B, 1, 4)``, and the states before and behind every step, ``(steps + 1, B, size)``."""
    x = torch.randn(steps, batch, 1, 4, **F64)
    states = [torch.randn(batch, size, **F64)]
    for t in range(steps):
        states.append(torch.stack([step(values, [x[t, b]], states[-1][b]).detach() for b in range(batch)]))
    return x, torch.stack(states)


def operands(tape, values, x, states):
    """What the tape needs of the steps: places, numbers and every ``z``."""
    linearizer = Linearizer(tape)
    weights, inputs = [v.detach() for v in values], [x.flatten(0, 1)]
    for _ in range(3):  # by vmap, while it is recorded, and as a flat program
        found = linearizer(weights, inputs, states[:-1].flatten(0, 1))
    shared = iter([t.unsqueeze(0) for t in linearizer.shared(weights, inputs)])
    kept = iter(found)
    every = [next(kept) if per_step else next(shared) for per_step in tape.per_step]
    return every[: tape.places], every[tape.places : tape.places + tape.numbers], every[tape.places + tape.numbers :]


@pytest.mark.parametrize("kind", STEPS)
def test_rows_and_factors_are_those_of_autograd(kind):
    step, values, tape, size = built(kind)
    steps, batch, width = 3, 2, 4
    x, states = ran(step, values, size, steps, batch)
    places, numbers, rest = operands(tape, values, x, states)
    *zs, new_state = rest
    assert float((new_state - states[1:].flatten(0, 1)).abs().max()) < 1e-12
    first = torch.randn(batch, width, size, **F64)
    entries = sum(use.tau * use.m for use in tape.uses)
    rows, deltas = first.clone(), torch.empty(steps * batch * entries * width, **F64)
    arguments = (tape.program(), places, numbers, None, tape.taps(), steps, batch, 0, tape.rows, tape.before)
    dispatch.rows_back_(rows, deltas, *arguments)
    again, kept = first.clone(), torch.empty_like(deltas)
    reference.rows_back_(again, kept, *arguments)
    assert float((again - rows).abs().max()) < 1e-12 and float((kept - deltas).abs().max()) < 1e-12

    expected = torch.zeros_like(first)
    gradients = [torch.zeros(width, *v.shape, **F64) for v in values]
    for b in range(batch):
        begin = states[0, b].clone().requires_grad_()
        end = begin
        for t in range(steps):
            end = step(values, [x[t, b]], end)
        for w in range(width):
            got = torch.autograd.grad(end, [begin, *values], first[b, w], retain_graph=True, allow_unused=True)
            expected[b, w] = 0 if got[0] is None else got[0]
            for total, g in zip(gradients, got[1:], strict=True):
                total[w] += 0 if g is None else g
    assert float((rows - expected).abs().max()) < 1e-12 * (1 + float(expected.abs().max()))
    found = [torch.zeros(width, v.numel(), **F64) for v in values]
    at = 0
    for use in tape.uses:
        count = steps * batch * use.tau * use.m * width
        delta = deltas[at : at + count].view(steps, batch, use.tau, use.m, width)
        at += count
        z = torch.ones(steps, batch, use.tau, 1, **F64)
        if use.z >= 0:
            z = zs[use.z].expand(steps * batch, -1, -1).view(steps, batch, use.tau, use.j)
        F = torch.einsum("nbtmw,nbtj->wmj", delta, z)
        m, j = torch.arange(use.m).view(-1, 1), torch.arange(use.j)
        found[use.parameter][:, (use.offset + m * use.m_stride + j * use.j_stride).flatten()] += F.flatten(1)
    for mine, g in zip(found, gradients, strict=True):
        assert float((mine - g.flatten(1)).abs().max()) < 1e-11 * (1 + float(g.abs().max()))
    assert max(float(g.abs().max()) for g in gradients) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float32])
def test_numbers_of_other_dtypes_are_those_of_the_row(dtype):
    values = [torch.rand(5, **F64).requires_grad_()]

    def step(p, i, h):
        x = i[0]
        return torch.tanh((h * x) * x * p[0] + (h * x + h * x) / (x + 1.0) + h / (x + 1))

    given = torch.tensor([1, 0, 100, 20, 1]).to(dtype)
    state = torch.rand(5, **F64)
    if dtype == torch.float32:
        given = given / 64  # so that no tanh is saturated
    else:
        state = state / 1e4
    tape = build_tape(trace_step(step, values, [given], state), values)
    linearizer, weights = Linearizer(tape), [v.detach() for v in values]
    found = iter(linearizer(weights, [given.view(1, 5)], state.view(1, 5)))
    shared = iter([t.unsqueeze(0) for t in linearizer.shared(weights, [given.view(1, 5)])])
    every = [next(found) if per_step else next(shared) for per_step in tape.per_step]
    v, deltas = torch.eye(5, **F64).unsqueeze(0), torch.empty(5 * sum(u.tau * u.m for u in tape.uses), **F64)
    places, numbers = every[: tape.places], every[tape.places : tape.places + tape.numbers]
    dispatch.rows_back_(v, deltas, tape.program(), places, numbers, None, tape.taps(), 1, 1, 0, tape.rows, tape.before)
    expected = torch.autograd.functional.jacobian(lambda h: step(weights, [given], h), state)
    assert float((v[0] - expected).abs().max()) < 1e-12 * float(expected.abs().max())
    assert float(expected.abs().max()) > 1


@pytest.mark.parametrize("kind", ["gru", "attention", "routed"])
@pytest.mark.parametrize("width", [1, 7, 20, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_rows_equal_the_reference(kind, width, dtype):
    step, values, tape, size = built(kind)
    steps, batch = 4, 3
    x, states = ran(step, values, size, steps, batch)
    places, numbers, _ = operands(tape, values, x, states)
    numbers = [n.to(dtype) for n in numbers]
    matrices = {i.matrix for i in tape.instructions if isinstance(i, Product)}
    # A matrix that differs between steps, as one does when an optimizer steps within a window.
    numbers = [
        torch.cat([n * (1 + t / 8) for t in range(steps)]) if k in matrices and len(n) == 1 else n
        for k, n in enumerate(numbers)
    ]
    first = torch.randn(2, width, size, dtype=dtype)
    cotangents = torch.randn(steps, batch, size, dtype=dtype)
    entries = sum(use.tau * use.m for use in tape.uses)
    results = []
    for operations in (reference, dispatch):
        v, deltas = first.clone(), torch.empty(steps * 2 * entries * width, dtype=dtype)
        operations.rows_back_(
            *(v, deltas, tape.program(), places, numbers, cotangents, tape.taps(), steps),
            *(batch, 1, tape.rows, tape.before),
        )
        results.append((v, deltas))
    for a, b in zip(*results, strict=True):
        assert float((a - b).abs().max()) < (1e-4 if dtype == torch.float32 else 1e-12) * (1 + float(a.abs().max()))
    assert float((results[0][0] - first).abs().max()) > 1e-2


def test_wrong_operands_are_refused():
    step, values, tape, size = built("gru")
    x, states = ran(step, values, size, 2, 1)
    places, numbers, _ = operands(tape, values, x, states)
    entries = sum(use.tau * use.m for use in tape.uses)
    v, deltas = torch.zeros(1, 3, size, **F64), torch.empty(2 * entries * 3, **F64)

    def call(**other):
        given = {"v": v, "deltas": deltas, "program": tape.program(), "index": places, "numbers": numbers}
        given |= {"cotangents": None, "taps": tape.taps(), "steps": 2, "batch": 1, "stream": 0}
        dispatch.rows_back_(*({**given, "rows": tape.rows, "before": tape.before, **other}.values()))

    call()
    for message, other in {
        "index must lie in 0": {"index": [p + 1000 for p in places]},
        "numbers must": {"numbers": [n.float() for n in numbers]},
        "program must stay within": {"rows": tape.rows - 1},
        "stream must leave room": {"stream": 1},
        "steps must be at least 1": {"steps": 0},
        "deltas must": {"deltas": deltas[:-1]},
        "name operands": {"numbers": numbers[:1]},
    }.items():
        with pytest.raises((ValueError, IndexError, RuntimeError), match=message):
            call(**other)


def test_the_tape_of_a_gru_has_four_instructions():
    _, _, tape, _ = built("gru")
    assert [type(i).__name__ for i in tape.instructions].count("Product") == 1 and len(tape.instructions) == 4
    assert [(use.parameter, use.tau, use.m, use.j) for use in tape.uses] == [
        *((0, 1, 15, 4), (1, 1, 15, 5), (2, 1, 15, 1), (3, 1, 15, 1)),
    ]


def test_an_embedding_stays_factored():
    _, _, tape, _ = built("words")
    use = next(use for use in tape.uses if use.parameter == 0)
    assert (use.tau, use.m, use.j) == (1, 4, 9)  # one row of the table, chosen by data


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda p, i, h: h * torch.rand(5, **F64) * p[0], "draws random numbers"),
        (lambda p, i, h: nn.functional.dropout(h * p[0]), "draws random numbers"),
        (lambda p, i, h: h * p[0] if h.sum() > 0 else h, "depends on the values of a tensor"),
        (lambda p, i, h: h * p[0] * i[0].mul_(2), "changes one of its inputs in place"),
        (lambda p, i, h: h * p[0] * LOOSE, r"uses a trainable tensor \(5,\)"),
        (lambda p, i, h: h.detach(), "cuts the graph.*detach"),
        (lambda p, i, h: nn.functional.bilinear(h, h, p[0].expand(5, 5, 5)), "there is no rule for"),
        (lambda p, i, h: (h * p[0]).float().double(), "there is no rule for|changes the dtype"),
        (lambda p, i, h: Clip.apply(h * p[0]), "cuts the graph|backward pass of its own"),
        (lambda p, i, h: 1 / 0, "ZeroDivisionError"),
        (lambda p, i, h: h * p[0] * (1 if i[0].tolist()[0] > 0 else 2), "values of a tensor: tolist"),
        (lambda p, i, h: h * p[0] * i[0].numpy()[0], "values of a tensor: numpy"),
        (lambda p, i, h: h * under_no_grad(lambda: p[0].sqrt()), "cuts the graph"),
        (lambda p, i, h: h * p[0] + under_no_grad(lambda: torch.stack([h, h]))[0], "cuts the graph"),
        (lambda p, i, h: h * p[0] + h.new_tensor(h), "cuts the graph"),
    ],
)
def test_what_cannot_be_traced_says_why(step, message):
    values = [torch.rand(5, **F64).requires_grad_()]
    with pytest.raises(NotTraceable, match=message):
        build_tape(trace_step(step, values, [torch.rand(5, **F64)], torch.rand(5, **F64)), values)


def under_no_grad(function):
    with torch.no_grad():
        return function()


LOOSE = torch.rand(5, **F64).requires_grad_()


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.1, 0.1)


def test_a_step_with_too_many_operations_is_refused(monkeypatch):
    monkeypatch.setattr(trace, "MAX_OPERATIONS", 20)
    with pytest.raises(NotTraceable, match="more than 20 operations"):
        built("attention")


def test_memory_that_is_changed_through_other_views_is_followed():
    def step(p, i, h):
        new = h * p[0]
        part = new[1:3]
        part.mul_(p[0][1:3])
        return torch.tanh(new + part.sum())

    values = [torch.rand(5, **F64).requires_grad_()]
    state = torch.rand(5, **F64)
    tape = build_tape(trace_step(step, values, [], state), values)
    linearizer = Linearizer(tape)
    weights = [v.detach() for v in values]
    found = iter(linearizer(weights, [], state.view(1, 5)))
    shared = iter([t.unsqueeze(0) for t in linearizer.shared(weights, [])])
    every = [next(found) if per_step else next(shared) for per_step in tape.per_step]
    v = torch.eye(5, **F64).unsqueeze(0)
    deltas = torch.empty(5 * sum(use.tau * use.m for use in tape.uses), **F64)
    places, numbers = every[: tape.places], every[tape.places : tape.places + tape.numbers]
    dispatch.rows_back_(v, deltas, tape.program(), places, numbers, None, tape.taps(), 1, 1, 0, tape.rows, tape.before)
    expected = torch.autograd.functional.jacobian(lambda h: step(weights, [], h), state)
    assert float((v[0] - expected).abs().max()) < 1e-14


# Carry.

BUILD = {
    "elman": lambda: Stepwise(nn.RNNCell(4, 5, **F64)),
    "relu": lambda: Stepwise(nn.RNNCell(4, 5, nonlinearity="relu", **F64)),
    "gru": lambda: Stepwise(nn.GRUCell(4, 5, **F64)),
    "no bias": lambda: Stepwise(nn.GRUCell(4, 5, bias=False, **F64)),
    "lstm": LSTM,
    "gated": lambda: Stepwise(Gated()),
}


def is_taped(carry):
    return all(isinstance(piece, TapedSteps) for piece in carry._past._influence.window)


@pytest.mark.parametrize("kind", BUILD)
def test_cells_take_the_tape_and_are_exact_in_many_small_blocks(kind, monkeypatch):
    monkeypatch.setattr(taped, "SCRATCH_BYTES", 600)  # many blocks of steps
    torch.manual_seed(2)
    model = BUILD[kind]()
    x, c = data(33, 3)
    expected = bptt(model, x, c)
    for lengths, options in (((7, 4), {"commit_every": 2}), ((1,), {"commit_every": 5})):
        found, carry = carried(model, x, c, lengths, **options)
        assert worst_error(found, expected) <= EXACT
        assert carry._past._influence.commits >= 2
        assert is_taped(carry)
        model.zero_grad()
    assert worst_error(bptt(model, x, c, detach=7), expected) > 1e-2


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_take_the_tape_step_by_step(kind, layers, batch_first):
    torch.manual_seed(4)
    layer = kind(4, 5, num_layers=layers, batch_first=batch_first, **F64)
    x, w = torch.randn(12, 3, 4, **F64), torch.randn(12, 3, 5, **F64)
    zeros = torch.zeros(layers, 3, 5, **F64)
    first = (zeros, zeros) if kind is nn.LSTM else zeros

    def run(end, lengths):
        layer.zero_grad()
        h, at, losses = end(first), 0, []
        for length in lengths:
            chunk, weight = x[at : at + length], w[at : at + length]
            at += length
            out, h = layer(chunk.transpose(0, 1) if batch_first else chunk, h)
            out = out.transpose(0, 1) if batch_first else out
            h = end(h)
            losses.append((out * weight).sum())
            if end is not stay:
                losses[-1].backward()
        if end is stay:
            torch.stack(losses).sum().backward()
        return gradients_of(layer)

    def stay(h):
        return h

    expected = run(stay, [12])
    carry = Carry(layer, batch_dim=1, commit_every=2)
    assert worst_error(run(carry, [3, 1, 4, 4]), expected) <= EXACT
    assert is_taped(carry) and sum(piece.count for piece in carry._past._influence.window) == 8


def test_windows_mix_taped_steps_and_maps_of_graphs():
    model = Stepwise(Mixed())
    x, c = data(14, 2)
    expected = bptt(model, x, c)
    model.cell.calls = 0
    model.zero_grad()
    carry = Carry(model, commit_every=4)
    h = carry(model.initial(2))
    kinds = set()
    for t in range(14):
        output, h = model(x[t : t + 1], h)
        h = carry(h)
        (output * c[t]).sum().backward()
        kinds |= {type(segment) for segment in carry._past._influence.window}
    assert kinds == {TapedSteps, StepJacobian}
    assert worst_error(gradients_of(model), expected) <= EXACT


def test_a_tape_that_disagrees_with_autograd_is_not_used(monkeypatch):
    right = Linearizer.__call__

    def wrong(self, *arguments):
        found = right(self, *arguments)
        for number in found[:-1]:
            if number.is_floating_point():
                number *= 1.001
        return found

    monkeypatch.setattr(Linearizer, "__call__", wrong)
    model = BUILD["elman"]()
    x, c = data(12, 2)
    expected = bptt(model, x, c)
    found, carry = carried(model, x, c, (3,))
    assert not any(isinstance(segment, TapedSteps) for segment in carry._past._influence.window)
    assert worst_error(found, expected) <= EXACT


def test_weights_are_those_of_the_step_although_the_optimizer_changes_them_in_place():
    model = BUILD["gru"]()
    x, c = data(8, 2)
    matrices = []
    for commit_every in (1, 8):  # committed before, and after, the parameters changed
        torch.manual_seed(5)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        carry = Carry(model, commit_every=commit_every)
        h = carry(model.initial(2))
        for t in range(8):
            output, h = model(x[t : t + 1], h)
            h = carry(h)
            (output * c[t]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert is_taped(carry)
        matrices.append(carry.influence())
    for name, matrix in matrices[0].items():
        assert float((matrix - matrices[1][name]).abs().max()) < 1e-12


class Slope(nn.Module):
    """An attribute scales what it computes."""

    def __init__(self):
        super().__init__()
        self.cell, self.slope = nn.RNNCell(4, 5, **F64), 1.0

    def forward(self, x, h):
        slope = self.options.slopes[0] if self.slope is None else self.slope
        return slope * self.cell(x, h)


def as_number(module, value):
    module.slope = value


def in_an_object(module, value):
    module.options = SimpleNamespace(slopes=[value])
    module.slope = None


def as_tensor(module, value):
    module.slope = torch.tensor(value, **F64)


@pytest.mark.parametrize("put", [as_number, in_an_object, as_tensor])
def test_attributes_belong_to_the_kind_of_a_step(put):
    module, (x, c) = Slope(), data(12, 2)
    model = Stepwise(module)

    def run(end):
        model.zero_grad()
        h, total = end(model.initial(2)), 0.0
        for t in range(12):
            put(module, 1.0 if t < 6 else 0.5)
            output, h = model(x[t : t + 1], h)
            h = end(h)
            total = total + (output * c[t]).sum()
            if end is not stay:
                total.backward()
                total = 0.0
        if end is stay:
            total.backward()
        return gradients_of(model)

    def stay(h):
        return h

    carry = Carry(model, verify="never")
    assert worst_error(run(carry), run(stay)) <= EXACT
    assert is_taped(carry)


SCALE = [1.0]


class Global(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 5, **F64)

    def forward(self, x, h):
        return self.cell(x, h) * SCALE[0]


def test_what_ran_is_compared_with_what_the_trace_computes():
    model, (x, c) = Stepwise(Global()), data(12, 2)

    def run(end):
        model.zero_grad()
        h, losses = end(model.initial(2)), []
        for t in range(12):
            SCALE[0] = 1.0 if t < 6 else 0.7  # neither an argument nor an attribute
            output, h = model(x[t : t + 1], h)
            h = end(h)
            losses.append((output * c[t]).sum())
            if end is not stay:
                losses[-1].backward()
        if end is stay:
            sum(losses).backward()
        return gradients_of(model)

    def stay(h):
        return h

    carry = Carry(model, verify="never", commit_every=20)
    assert worst_error(run(carry), run(stay)) <= EXACT
    assert carry._past._influence.commits >= 1  # from taped steps to maps of graphs


class Equal(nn.Module):
    """Quantities that are equal but for rounding, and what looks at the difference."""

    def __init__(self, look):
        super().__init__()
        self.look, self.across = look, nn.Linear(7, 7, **F64)
        self.one, self.other = (nn.Parameter(torch.full((7, 7), 0.1, **F64)) for _ in range(2))
        self.into = nn.Linear(4, 7, **F64)

    def forward(self, x, h):
        difference = h @ self.one.T - (h.unsqueeze(1) * self.other).sum(2)
        looked_at = {
            "relu": lambda: torch.relu(difference),
            "abs": lambda: difference.abs(),
            "maximum": lambda: (h @ self.one.T).amax(1, keepdim=True),
            "choice": lambda: torch.where(difference > 0, h @ self.one.T, h.sin()),
            "first": lambda: self.other.T[(h @ self.one.T).argmax(1)],
        }[self.look]()
        return torch.tanh(self.across(h) + looked_at + self.into(x))


@pytest.mark.parametrize("look", ["relu", "abs", "maximum", "choice", "first"])
def test_steps_in_which_a_decision_hangs_on_rounding_are_captured_from_the_graph(look, caplog):
    for batch in (1, 3, 5):
        torch.manual_seed(batch)
        model, (x, c) = Stepwise(Equal(look), 7), data(16, batch)
        expected = bptt(model, x, c)
        with caplog.at_level(logging.INFO, logger="sparse_rtrl"):
            found, carry = carried(model, x, c, (3,), verify="never")
        assert worst_error(found, expected) <= EXACT
        assert "hangs on rounding" in caplog.text and not is_taped(carry)


class Means(nn.Module):
    """Compares sums of whole numbers that are equal but for rounding; both branches have the same value at first."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 5, **F64)
        self.one, self.other = (nn.Parameter(torch.zeros(1, **F64)) for _ in range(2))

    def forward(self, x, h):
        n = torch.cat([x, 2 * x, 3 * x - 1], 1)
        tenths = torch.full((1, n.shape[1]), 0.1, **F64)
        chosen = torch.where(nn.functional.linear(n, tenths) >= n.sum(1, keepdim=True) / 10, self.one, self.other)
        return self.cell(x, h) + chosen


def test_sums_of_whole_numbers_may_round():
    for seed in range(6):
        torch.manual_seed(seed)
        model, (x, c) = Stepwise(Means()), data(24, 2, seed)
        x = (5 * x).round()
        found, _ = carried(model, x, c, (4,), verify="never")
        assert worst_error(found, bptt(model, x, c)) <= EXACT


class Flags(nn.Module):
    """Decides by whole numbers: flags in its input, a counter in its state."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 5, **F64)

    def forward(self, x, h):
        new = torch.where((x[:, :1] == 1.0) | (h[:, 5:] % 3 == 2), self.cell(x, h[:, :5]), h[:, :5])
        return torch.cat([new, h[:, 5:] + 1], 1)


def test_decisions_by_whole_numbers_do_not_hang_on_rounding():
    torch.manual_seed(0)
    model, (x, c) = Stepwise(Flags(), 6), data(16, 3)
    x = (x > 0).to(x)
    found, carry = carried(model, x, c, (4,))
    assert worst_error(found, bptt(model, x, c)) <= EXACT
    assert is_taped(carry)


def test_attributes_are_after_a_trace_what_they_were_before():
    class Records(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.last, self.seen, self.calls = nn.GRUCell(4, 5, **F64), None, [], 0

        def forward(self, x, h):
            self.calls += 1
            self.last = 2 * h.detach()
            self.seen.append(len(x))
            h = self.cell(x, h)
            return h + 0 * self.last

    module = Records()
    carry = Carry(module)
    h = carry(torch.zeros(3, 5, **F64))
    for t in range(4):
        h = carry(module(torch.randn(3, 4, **F64), h))
        assert module.calls == t + 1 and module.seen == [3] * (t + 1) and module.last.shape == (3, 5)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda m, x, h: torch.atan(m(x, h)), "something made of it"),
        (lambda m, x, h: m(x + 0 * m.cell.bias_hh[0], h), "needs a gradient"),
        (lambda m, x, h: m(x, 1.0 * h), "the state as it was returned"),
    ],
)
def test_what_is_no_chain_is_captured_from_the_graph_and_told_once(step, reason, caplog):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(4, 5, **F64)

        def forward(self, x, h):
            return self.cell(x + 0.0, h + 0.0)

    module, x = Wrapped(), torch.randn(6, 3, 4, **F64)
    carry = Carry(module)
    with caplog.at_level(logging.INFO, logger="sparse_rtrl.capture.tape_capture"):
        h = carry(torch.zeros(3, 5, **F64))
        for t in range(6):
            h = carry(step(module, x[t].clone(), h))
    assert not any(isinstance(piece, TapedSteps) for piece in carry._past._influence.window)
    told = [record.message for record in caplog.records if "autograd graph" in record.message]
    assert len(told) == len(set(told)) and any(reason in line for line in told)


def test_a_copy_of_the_module_has_no_ears():
    module = nn.GRUCell(4, 5, **F64)
    carry = Carry(module)
    other, h = copy.deepcopy(module), carry(torch.zeros(3, 5, **F64))
    other(torch.randn(3, 4, **F64), h)
    (calls, _), *_ = carry._past._traced
    assert calls._noted == []
    h = carry(module(torch.randn(3, 4, **F64), h))
    assert is_taped(carry)


def test_evaluation_between_steps_is_not_a_step():
    module = nn.GRUCell(4, 5, **F64)
    carry = Carry(module)
    h = carry(torch.zeros(3, 5, **F64))
    with torch.no_grad():
        module(torch.randn(3, 4, **F64), h)
    carry(module(torch.randn(3, 4, **F64), h))
    assert is_taped(carry)


# Structure.


class Apart(nn.Module):
    """Two layers, the second of which sees the first, and an element-wise part beside them."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.decay = nn.RNNCell(4, 3), nn.RNNCell(3, 2), nn.Parameter(torch.rand(4))

    def forward(self, x, h):
        one = self.one(x, h[:, :3])
        return torch.cat((one, self.two(one, h[:, 3:5]), self.decay * h[:, 5:]), 1)


def test_structure_is_the_pattern_of_the_jacobian_and_its_closure():
    STEPS["apart"] = (Apart, 9)
    try:
        step, values, tape, size = built("apart")
    finally:
        del STEPS["apart"]
    found = structure_of(tape, [v.numel() for v in values])
    state, x = torch.randn(size, **F64), torch.randn(1, 4, **F64)
    J = torch.autograd.functional.jacobian(lambda h: step([v.detach() for v in values], [x], h), state)
    assert torch.equal(found.state, J != 0)
    blocks = torch.zeros(9, 9, dtype=torch.bool)
    blocks[:3, :3] = blocks[3:5, :5] = True
    blocks[5:, 5:] = torch.eye(4, dtype=torch.bool)
    assert torch.equal(found.closure, blocks)
    # Each number of the decay reaches its own entry, the first layer five of them, the second two.
    reach = [1, *[5] * 4, *[2] * 4]
    assert found.reached == [n * v.numel() for n, v in zip(reach, values, strict=True)]


def test_heads_are_blocks_and_data_has_no_structure():
    _, values, tape, _ = built("heads")
    found = structure_of(tape, [v.numel() for v in values])
    assert float(found.closure.double().mean()) == 0.5
    _, values, tape, _ = built("routed")
    with pytest.raises(NotTraceable, match="depend on data"):
        structure_of(tape, [v.numel() for v in values])


def test_the_command_prints_tapes():
    told = CliRunner().invoke(
        app, ["tape", "--cell", "lstm", "--input-size", "3", "--units", "4"], env={"COLUMNS": "200"}
    )
    assert told.exit_code == 0 and "product, 1 x (16, 4)" in told.output and "weight_hh" in told.output
    assert "state Jacobian: 62% can be non-zero, after any number of steps 100%" in told.output
    assert CliRunner().invoke(app, ["tape", "--cell", "mlp"]).exit_code != 0


def test_a_carry_is_freed_and_leaves_no_hook():
    module = nn.GRUCell(4, 5, **F64)
    carry = Carry(module)
    h = carry(torch.zeros(3, 5, **F64))
    for _ in range(2):
        h = carry(module(torch.randn(3, 4, **F64), h))
    gone = weakref.ref(carry)
    del carry, h
    gc.collect()
    assert gone() is None and not module._forward_hooks


def test_a_trace_leaves_random_numbers_and_hooks_alone():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(4, 5, **F64)

        def forward(self, x, h):
            return nn.functional.dropout(self.cell(x, h), 0.3)

    def draws(end):
        module = Drops()
        learner = end(module)
        torch.manual_seed(3)
        h = learner(torch.zeros(3, 5, **F64))
        for _ in range(3):
            h = learner(module(torch.ones(3, 4, **F64), h))
        return torch.get_rng_state()

    assert torch.equal(draws(Carry), draws(lambda module: lambda h: h))
    layer, calls = nn.GRU(4, 5, **F64), []
    layer.register_forward_hook(lambda *_: calls.append(None))
    carry = Carry(layer, batch_dim=1)
    h = carry(torch.zeros(1, 3, 5, **F64))
    for _ in range(4):
        h = carry(layer(torch.randn(3, 3, 4, **F64), h)[1])
    assert is_taped(carry) and len(calls) <= 4 + 2  # the trace runs it twice


def test_autocast_that_begins_later_is_captured_from_the_graph():
    module = nn.RNNCell(4, 5)
    carry = Carry(module)
    h = carry(torch.zeros(3, 5))
    for t in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=t > 3):
            new = module(torch.randn(3, 4), h)
        h = carry(new.float() if new.dtype != torch.float32 else new)
    assert not isinstance(carry._past._influence.window[-1], TapedSteps)


def test_a_compiled_module_is_traced_and_not_compiled_again():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = torch.compile(nn.GRUCell(4, 5, **F64), backend="eager")
    carry = Carry(module)
    h = carry(torch.zeros(3, 5, **F64))
    for _ in range(3):
        h = carry(module(torch.randn(3, 4, **F64), h))
    assert is_taped(carry)
    assert torch._dynamo.utils.counters["frames"]["total"] <= 2


def test_a_part_of_the_state_without_numbers():
    module = Pair().double()
    outer = _WithEmptyPart(module)
    carry = Carry(outer)
    h = carry((torch.zeros(3, 6, **F64), torch.zeros(3, 0, **F64)))
    for _ in range(3):
        h = carry(outer(torch.randn(3, 4, **F64), h))
    assert all(bool(torch.isfinite(P).all()) for P in carry.influence().values())


class _WithEmptyPart(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, state):
        return self.module(x, state[0]), state[1] + 0
