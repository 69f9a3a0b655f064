"""Carry on published checks, on what other implementations get wrong without a word, and on the slot cells."""

import warnings

import pytest
import torch
from carry_oracle import EXACT, F64, Stepwise, bptt, carried, data
from oracle import bptt as slot_bptt
from oracle import gradients_of, worst_error
from torch import nn

from sparse_rtrl import Carry, SlotMoECell, SparseLatentMoECell


class ElementwiseLSTM(nn.Module):
    """The recurrence of the eLSTM (Irie, Gopalakrishnan & Schmidhuber 2023, section 3.1), without its output layer."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        for gate in ("f", "z"):
            for name, shape in (
                ("weight", (hidden_size, input_size)),
                ("vector", (hidden_size,)),
                ("bias", (hidden_size,)),
            ):
                self.register_parameter(f"{name}_{gate}", nn.Parameter(torch.rand(shape, **F64)))

    def gates(self, x, c):
        f = torch.sigmoid(nn.functional.linear(x, self.weight_f) + self.vector_f * c + self.bias_f)
        z = torch.tanh(nn.functional.linear(x, self.weight_z) + self.vector_z * c + self.bias_z)
        return f, z

    def forward(self, x, c):
        f, z = self.gates(x, c)
        return f * c + (1 - f) * z


@torch.no_grad()
def diagonal_rtrl(cell, x, weights, c):
    """The paper's own recursion (section 3.2): one influence per parameter, ``P <- λ P + F``."""
    names = [n for n, _ in cell.named_parameters()]
    P = {n: torch.zeros(*c.shape, *p.shape[1:], **F64) for n, p in cell.named_parameters()}
    gradient = {n: torch.zeros_like(p) for n, p in cell.named_parameters()}
    for x_t, w_t in zip(x, weights, strict=True):
        f, z = cell.gates(x_t, c)
        through = {"f": (c - z) * f * (1 - f), "z": (1 - f) * (1 - z**2)}
        decay = f + through["f"] * cell.vector_f + through["z"] * cell.vector_z
        for name in names:
            kind, gate = name.split("_")
            if kind == "weight":
                P[name] = decay.unsqueeze(-1) * P[name] + through[gate].unsqueeze(-1) * x_t.unsqueeze(1)
                gradient[name] += (w_t.unsqueeze(-1) * P[name]).sum(0)
            else:
                P[name] = decay * P[name] + through[gate] * (c if kind == "vector" else 1.0)
                gradient[name] += (w_t * P[name]).sum(0)
        c = f * c + (1 - f) * z
    return gradient


@pytest.mark.parametrize("segment", [1, 16])
def test_elementwise_lstm_entry_by_entry(segment):
    torch.manual_seed(123)
    cell = ElementwiseLSTM(3, 5)
    x, weights = torch.rand(70, 10, 3, **F64), torch.rand(70, 10, 5, **F64) + 0.1  # every entry of the loss differs
    start = torch.full((10, 5), 0.5, **F64)
    c, loss = start, 0.0
    for t in range(70):
        c = cell(x[t], c)
        loss = loss + (c * weights[t]).sum()
    loss.backward()
    expected = gradients_of(cell)
    recursion = diagonal_rtrl(cell, x, weights, start)
    cell.zero_grad()
    carry = Carry(cell)
    c = carry(start)
    for t in range(0, 70, segment):
        loss = 0.0
        for s in range(t, min(t + segment, 70)):
            c = cell(x[s], c)
            loss = loss + (c * weights[s]).sum()
        c = carry(c)
        loss.backward()
    for name, found in gradients_of(cell).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-10, atol=0)
        torch.testing.assert_close(recursion[name], expected[name], rtol=1e-10, atol=0)
    swapped = diagonal_rtrl(cell, x, weights.flip(1), start)  # losses of the wrong streams must be seen
    assert worst_error(swapped, expected) > 1e-3


def per_gate(gradients, gates):
    """Gradients of the weights of each gate by itself."""
    return {
        f"{name}[{k}]": part
        for name, g in gradients.items()
        if name.startswith("cell.")
        for k, part in enumerate(g.chunk(gates))
    }


class LSTMStep(nn.Module):
    """An LSTM cell on a flat state."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(4, 3, **F64)

    def forward(self, x, h):
        return torch.cat(self.cell(x, tuple(h.split(3, 1))), 1)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_every_gate_by_itself(kind):
    """The candidate weight of a GRU, every gate of an LSTM, input and recurrent weights, and the biases."""
    torch.manual_seed(2)
    model = Stepwise(nn.GRUCell(4, 6, **F64) if kind == "gru" else LSTMStep(), 6)
    x, c = data(20, 2)
    gates = 3 if kind == "gru" else 4
    expected = per_gate(bptt(model, x, c), gates)
    found = per_gate(carried(model, x, c, (1,))[0], gates)
    truncated = per_gate(bptt(model, x, c, detach=1), gates)
    for name, g in expected.items():
        assert worst_error({"g": found[name]}, {"g": g}) <= EXACT
        assert worst_error({"g": truncated[name]}, {"g": g}) > 1e-2


class Stacked(nn.Module):
    """Two GRU layers, with one joint state or one per layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.GRUCell(4, 3, **F64), nn.GRUCell(3, 3, **F64)

    def forward(self, x, h):
        first = self.first(x, h[:, :3])
        return torch.cat((first, self.second(first, h[:, 3:])), 1)


def test_the_first_of_two_layers_and_a_readout_beside_them():
    torch.manual_seed(2)
    model = Stepwise(Stacked(), 6)
    with torch.no_grad():  # a loss on the second layer alone: the first is seen through it only
        model.readout.weight[:, :3] = 0
    x, c = data(16, 2)
    expected = bptt(model, x, c)
    found, _ = carried(model, x, c, (1, 3))
    assert worst_error(found, expected) <= EXACT
    assert float(expected["cell.first.weight_hh"].norm()) > 1e-2 and float(expected["readout.weight"].norm()) > 1e-2

    def per_layer(x, h):  # each layer forgets how the other one's past reaches it
        first = model.cell.first(x, h[:, :3])
        return torch.cat((first, model.cell.second(first.detach(), h[:, 3:])), 1)

    model.cell.forward = per_layer
    assert worst_error(carried(model, x, c, (1,))[0], expected) > 1e-2


class Matrices(nn.Module):
    """Two weight matrices, used by a plain ``@`` on either side."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(0.6 * torch.randn(5, 5, **F64)) for _ in range(2))
        self.u = nn.Parameter(torch.randn(4, 5, **F64))

    def forward(self, x, h):
        return torch.tanh(h @ self.a + torch.sigmoid((self.b @ h.T).T) * (x @ self.u))


def test_plain_products_with_two_matrices():
    torch.manual_seed(2)
    model = Stepwise(Matrices())
    x, c = data(16, 2)
    expected = bptt(model, x, c)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, carry = carried(model, x, c, (1,))
    assert worst_error(found, expected) <= EXACT
    assert sorted(carry.influence()) == ["cell.a", "cell.b", "cell.u"]
    truncated = bptt(model, x, c, detach=1)
    assert all(worst_error({"g": truncated[n]}, {"g": expected[n]}) > 1e-2 for n in ("cell.a", "cell.b", "cell.u"))


@pytest.mark.parametrize("lengths", [(1,), (3,), (16,), (1, 5, 2)])
@pytest.mark.parametrize("kind", [SlotMoECell, SparseLatentMoECell])
def test_slot_cells_with_separate_resets(kind, lengths):
    torch.manual_seed(4)
    sizes = dict(slot_size=4, num_slots=3, num_experts=3, top_k=2, read_slots=1, write_slots=2, output_size=2)
    cell = kind(input_size=4, **sizes).double()
    x, c = data(20, 3)
    resets = {t: torch.tensor([t == 7, True, False]) for t in (7, 13)}
    expected = slot_bptt(cell, x, c, resets)
    ends, cycle = {7, 13, 20}, 0  # segments end where a stream starts anew
    while cycle < 20:
        for n in lengths:
            cycle += n
            ends.add(min(cycle, 20))
    carry = Carry(cell)
    h, loss = carry(cell.initial_state(3)), torch.zeros((), **F64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not captured as factors.*")
        for t in range(20):
            if t in resets:
                carry.reset(resets[t])
                h = torch.where(resets[t].view(-1, 1, 1), cell.initial_state(3), h)
            output, _, h = cell(x[t], h)
            loss = loss + (output * c[t]).sum()
            if t + 1 in ends:
                h = carry(h)
                loss.backward()
                loss = torch.zeros((), **F64)
    assert worst_error(gradients_of(cell), expected) <= EXACT
    assert worst_error(slot_bptt(cell, x, c, resets, truncate=1), expected) > 1e-2
    assert worst_error(slot_bptt(cell, x, c), expected) > 1e-2
