"""Segments that are kept as chains of simple steps: when they are, that they are exact, and their memory."""

import itertools

import pytest
import torch
from carry_oracle import EXACT, F64, Stepwise, bptt, carried, data
from oracle import gradients_of, worst_error
from torch import nn

from sparse_rtrl import Carry
from sparse_rtrl.capture import step_chain
from sparse_rtrl.capture.segment import StepJacobian
from sparse_rtrl.capture.step_chain import StepChain


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


class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.readout = nn.LSTMCell(4, 5, **F64), nn.Linear(5, 2, **F64)

    def initial(self, batch):
        return torch.zeros(batch, 5, **F64), torch.zeros(batch, 5, **F64)

    def forward(self, x, h):
        outputs = []
        for x_t in x:
            h = self.cell(x_t, h)
            outputs.append(self.readout(h[0]))
        return torch.stack(outputs), h


class Mixed(nn.Module):
    """Every third step goes a way that only the general capture understands."""

    def __init__(self):
        super().__init__()
        self.cell, self.calls = nn.GRUCell(4, 5, **F64), 0

    def forward(self, x, h):
        self.calls += 1
        h = self.cell(x, h)
        return h if self.calls % 3 else h.flip(1).flip(1)


BUILD = {
    "elman": lambda: Stepwise(nn.RNNCell(4, 5, **F64)),
    "relu": lambda: Stepwise(nn.RNNCell(4, 5, nonlinearity="relu", **F64)),
    "gru": lambda: Stepwise(nn.GRUCell(4, 5, **F64)),
    "no bias": lambda: Stepwise(nn.GRUCell(4, 5, bias=False, **F64)),
    "lstm": LSTM,
    "gated": lambda: Stepwise(Gated()),
}


@pytest.mark.parametrize("kind", BUILD)
def test_one_layer_cells_are_chains_and_exact_in_many_small_blocks(kind, monkeypatch):
    monkeypatch.setattr(step_chain, "SCRATCH_BYTES", 600)  # many blocks of steps and columns
    torch.manual_seed(2)
    model = BUILD[kind]()
    x, c = data(33, 3)
    expected = bptt(model, x, c)
    for lengths, options in (((7, 4), {"commit_every": 2}), ((1,), {"commit_every": 5})):
        found, carry = carried(model, x, c, lengths, **options)
        assert worst_error(found, expected) <= EXACT
        assert carry._past._influence.commits >= 2
        assert all(isinstance(segment, StepChain) for segment in carry._past._influence.window)
        model.zero_grad()
    assert worst_error(bptt(model, x, c, detach=7), expected) > 1e-2


def test_a_chain_as_one_step_is_the_general_capture():
    model = BUILD["lstm"]()
    x, _ = data(6, 3)
    carries = Carry(model), Carry(model)
    _, h = model(x[:2], model.initial(3))
    h = [part.detach() for part in h]
    steps = []
    for carry in carries:
        _, end = model(x[2:], carry(tuple(h)))
        carry(end)
        if carry is carries[1]:
            carry._past._chain_capture.segment = lambda *_: None
            carry.reset()
            _, end = model(x[2:], carry(tuple(h)))
            carry(end)
        (segment,) = carry._past._influence.window
        steps.append(segment.as_step if isinstance(segment, StepChain) else segment)
    assert isinstance(steps[1], StepJacobian)
    assert float((steps[0].Jh - steps[1].Jh).abs().max()) < 1e-14
    matrices = [carry.influence() for carry in carries]
    for name, matrix in matrices[0].items():
        assert float((matrix - matrices[1][name]).abs().max()) < 1e-14
    assert max(float(matrix.norm()) for matrix in matrices[0].values()) > 1e-2


def test_windows_mix_chains_and_general_segments():
    model = Stepwise(Mixed())
    x, c = data(14, 2)
    expected = bptt(model, x, c)
    model.cell.calls = 0
    model.zero_grad()
    carry = Carry(model, commit_every=4)
    h = carry(model.initial(2))
    windows = []
    for t in range(14):
        output, h = model(x[t : t + 1], h)
        h = carry(h)
        (output * c[t]).sum().backward()
        windows.append([type(segment) for segment in carry._past._influence.window])
    grown = [(a, b) for a, b in itertools.pairwise(windows) if len(b) == len(a) + 1 > 1]
    assert any(a[0] is StepChain and b[0] is StepJacobian for a, b in grown)  # what was a chain became a step
    assert worst_error(gradients_of(model), expected) <= EXACT


def test_a_capture_that_disagrees_with_autograd_is_not_used(monkeypatch):
    from sparse_rtrl.capture import chain_capture

    right = chain_capture._factors

    def wrong(name, nodes, batch, attributes):
        return [0.5] if name == "TanhBackward0" else right(name, nodes, batch, attributes)

    monkeypatch.setattr(chain_capture, "_factors", wrong)
    model = BUILD["elman"]()
    x, c = data(12, 2)
    expected = bptt(model, x, c)
    found, carry = carried(model, x, c, (3,))
    assert not any(isinstance(segment, StepChain) for segment in carry._past._influence.window)
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
        matrices.append(carry.influence())
    for name, matrix in matrices[0].items():
        assert float((matrix - matrices[1][name]).abs().max()) < 1e-12
