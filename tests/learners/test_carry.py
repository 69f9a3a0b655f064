"""Carry against backpropagation through the whole past, for modules written in the usual ways."""

import warnings

import pytest
import torch
from carry_oracle import EXACT, F64, Stepwise, bptt, carried, data
from oracle import gradients_of, worst_error
from torch import nn

from sparse_rtrl import Carry, NonFiniteError
from sparse_rtrl.learners.methods.exact import Exact


class TwoLayerLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LSTMCell(4, 3, **F64), nn.LSTMCell(3, 3, **F64)
        self.norm, self.readout = nn.LayerNorm(3, **F64), nn.Linear(3, 2, **F64)

    def initial(self, batch):
        return {"layers": [tuple(torch.zeros(batch, 3, **F64) for _ in range(2)) for _ in range(2)]}

    def forward(self, x, h):
        one, two = h["layers"]
        outputs = []
        for x_t in x:
            one = self.first(x_t, one)
            two = self.second(self.norm(one[0]), two)
            outputs.append(self.readout(two[0]))
        return torch.stack(outputs), {"layers": [one, two]}


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.readout = nn.LSTM(4, 3, 2, **F64), nn.Linear(3, 2, **F64)

    def initial(self, batch):
        return tuple(torch.zeros(2, batch, 3, **F64) for _ in range(2))

    def forward(self, x, h):
        output, h = self.lstm(x, h)
        return self.readout(output), h


class NoBatchingRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(g.detach().numpy() * x.cos().detach().numpy())


class OwnCell(nn.Module):
    """Two weight matrices, one of them used twice, and maps written by hand."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.w = nn.Parameter(0.5 * torch.randn(5, 5, **F64))
        self.u = nn.Parameter(0.5 * torch.randn(5, 4, **F64))
        self.bias = nn.Parameter(torch.randn(5, **F64))
        self.gain = nn.Parameter(torch.rand(5, **F64))
        self.table = nn.Embedding(3, 5, **F64)
        self.filter = nn.Parameter(torch.randn(1, 1, 3, **F64))

    def forward(self, x, h):
        z = x @ self.u.T + self.bias + self.table((x[:, 0] > 0).long())
        if self.way == "shared":
            return torch.tanh(h @ self.w + torch.tanh(z @ self.w) * self.gain)
        if self.way == "left":
            return torch.tanh((self.w @ h.T).T - self.gain * z)
        if self.way == "einsum":
            return torch.tanh(torch.einsum("ij,bj->bi", self.w, h) + z * self.gain)
        if self.way == "convolution":
            return torch.tanh(nn.functional.conv1d(h.unsqueeze(1), self.filter, padding=1).squeeze(1) + z * self.gain)
        if self.way == "no_batching_rule":
            return NoBatchingRule.apply(h @ self.w) + torch.tanh(z * self.gain)
        if self.way == "positions":  # (B, 3, 5) through one weight
            return torch.tanh(nn.functional.linear(h.unsqueeze(1) + z.view(-1, 1, 5) * self.gain, self.w).sum(1))
        raise AssertionError(self.way)


BUILD = {
    "elman": lambda: Stepwise(nn.RNNCell(4, 5, **F64)),
    "gru": lambda: Stepwise(nn.GRUCell(4, 5, **F64)),
    "lstm": TwoLayerLSTM,
    "nn.LSTM": Fused,
    **{
        way: (lambda way=way: Stepwise(OwnCell(way)))
        for way in ("shared", "left", "einsum", "convolution", "no_batching_rule", "positions")
    },
}


@pytest.mark.parametrize(
    ("lengths", "commit_every", "batch"),
    [((1,), 1, 3), ((3,), 1, 1), ((16,), 1, 3), ((1, 5, 2), 1, 3), ((1,), 4, 1), ((2,), "auto", 3)],
)
@pytest.mark.parametrize("kind", BUILD)
def test_equals_bptt(kind, lengths, commit_every, batch):
    torch.manual_seed(1)
    model = BUILD[kind]()
    x, c = data(40, batch)
    expected = bptt(model, x, c)
    dim = 1 if kind == "nn.LSTM" else 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not captured as factors.*")
        found, carry = carried(model, x, c, lengths, commit_every=commit_every, batch_dim=dim)
    assert worst_error(found, expected) <= EXACT
    assert max(float(m.norm()) for m in carry.influence().values()) > 1e-2
    if lengths == (3,):
        assert worst_error(bptt(model, x, c, detach=3), expected) > 1e-2


@pytest.mark.parametrize("kind", ["elman", "gru", "lstm", "nn.LSTM", "shared", "left", "positions"])
def test_usual_modules_are_captured_as_factors(kind):
    model = BUILD[kind]()
    x, c = data(6, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        carried(model, x, c, (2,), batch_dim=1 if kind == "nn.LSTM" else 0)


def test_dense_fallback_is_noted_by_name(monkeypatch):
    monkeypatch.setattr(Exact, "trace", lambda *_: None)  # the tape would understand it
    model = BUILD["einsum"]()
    x, c = data(4, 2)
    with pytest.warns(UserWarning, match=r"cell\.w: used in a way"):
        carried(model, x, c, (2,))


@pytest.mark.parametrize("kind", ["elman", "gru"])
def test_gradient_of_each_single_step(kind):
    model = BUILD[kind]()
    x, c = data(14, 2)
    carry = Carry(model, commit_every=3)
    h = carry(model.initial(2))
    for t in range(14):
        model.zero_grad()
        output, h = model(x[t : t + 1], h)
        h = carry(h)
        (output * c[t]).sum().backward()
        found = gradients_of(model)
        only = torch.zeros_like(c[: t + 1])
        only[t] = c[t]
        assert worst_error(found, bptt(model, x[: t + 1], only)) <= EXACT


def test_streams_restart_separately():
    model = BUILD["gru"]()
    x, c = data(30, 3)
    resets = {t: torch.tensor([t % 2 == 0, True, False]) for t in (4, 11, 12, 25)}
    expected = bptt(model, x, c, resets)
    for tell in (True, False):  # telling carry is not needed where the new state does not depend on the old one
        model.zero_grad()
        carry = Carry(model, commit_every=2)
        h = carry(model.initial(3))
        for t in range(30):
            if t in resets:
                if tell:
                    carry.reset(resets[t])
                h = torch.where(resets[t].unsqueeze(1), model.initial(3), h)
            output, h = model(x[t : t + 1], h)
            h = carry(h)
            (output * c[t]).sum().backward()
        assert worst_error(gradients_of(model), expected) <= EXACT


def test_reset_of_all_streams_starts_anew():
    model = BUILD["gru"]()
    x, c = data(8, 2)
    carry = Carry(model)
    for _ in range(2):
        model.zero_grad()
        h = carry(model.initial(2))
        for t in range(8):
            output, h = model(x[t : t + 1], h)
            h = carry(h)
            (output * c[t]).sum().backward()
        assert worst_error(gradients_of(model), bptt(model, x, c)) <= EXACT
        carry.reset()


def test_gradient_accumulation_and_clipping_see_the_whole_gradient():
    model = BUILD["lstm"]()
    x, c = data(12, 2)
    expected = bptt(model, x, c)
    carried(model, x, c, (4,))
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    assert float(norm) == pytest.approx(float(torch.stack([g.norm() for g in expected.values()]).norm()))


def test_resuming_is_bit_for_bit(tmp_path):
    model = BUILD["lstm"]()
    x, c = data(20, 2)
    carry = Carry(model, commit_every=3)
    h = carry(model.initial(2))
    for t in range(10):
        _, h = model(x[t : t + 1], h)
        h = carry(h)
    other = Carry(model, commit_every=3)
    torch.save(carry.state_dict(), tmp_path / "carry.pt")
    other.load_state_dict(torch.load(tmp_path / "carry.pt", weights_only=True))
    start = torch.utils._pytree.tree_map(torch.Tensor.detach, h)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no notice: nothing joins
        resumed = other(start)
    for each, begin in ((carry, h), (other, resumed)):
        model.zero_grad()
        h = begin
        for t in range(10, 20):
            output, h = model(x[t : t + 1], h)
            h = each(h)
            (output * c[t]).sum().backward()
        results.append(gradients_of(model))
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name])
    with pytest.raises(ValueError, match="does not have or not carry"):
        Carry(BUILD["gru"]()).load_state_dict(carry.state_dict())
    with pytest.raises(ValueError, match="version 1"):
        carry.load_state_dict({"version": 7})


def test_include_and_exclude():
    model = BUILD["gru"]()
    x, c = data(10, 2)
    expected, truncated = bptt(model, x, c), bptt(model, x, c, detach=1)
    found, carry = carried(model, x, c, (1,), exclude=["cell.weight_ih"])
    assert "cell.weight_ih" not in carry.influence()
    assert worst_error({"w": found["cell.weight_hh"]}, {"w": expected["cell.weight_hh"]}) <= EXACT
    assert worst_error({"w": found["cell.weight_ih"]}, {"w": truncated["cell.weight_ih"]}) <= EXACT
    model.zero_grad()
    _, carry = carried(model, x, c, (1,), include=["cell.weight_hh"])
    assert list(carry.influence()) == ["cell.weight_hh"]
    with pytest.raises(ValueError, match=r"include names \['cel'\]"):
        Carry(model, include=["cel"])


def test_only_parameters_that_reach_the_state_are_carried_and_later_ones_join():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.readout = nn.RNNCell(4, 5, **F64), nn.RNNCell(4, 5, **F64), nn.Linear(5, 2, **F64)

        def initial(self, batch):
            return torch.zeros(batch, 5, **F64)

        def forward(self, x, h):
            late = float(x[0, 0, 0]) > 100
            h = (self.two if late else self.one)(x[0] / (1000 if late else 1), h)
            return self.readout(h).unsqueeze(0), h

    model = Late()
    x, c = data(12, 2)
    x[6:, 0, 0] += 1000
    expected = bptt(model, x, c)
    found, carry = carried(model, x, c, (1,))
    assert worst_error(found, expected) <= EXACT
    assert not [name for name in carry.influence() if name.startswith("readout")]


def test_misplaced_calls_name_the_remedy_and_leave_the_influence_alone():
    model = BUILD["gru"]()
    x, c = data(8, 2)
    carry = Carry(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    h = carry(model.initial(2))
    for t in range(3):
        output, h = model(x[t : t + 1], h)
        h = carry(h)
        (output * c[t]).sum().backward()

    def attempt(action):
        before = {n: m.clone() for n, m in carry.influence().items()}
        output, new = model(x[3:4], h)
        with pytest.raises(RuntimeError) as caught:
            action(output, new)
        after = carry.influence()
        assert all(torch.equal(m, after[n]) for n, m in before.items())
        return str(caught.value)

    def after_backward(output, new):
        output.sum().backward()
        carry(new)

    def after_step(output, new):
        model.cell.weight_hh.grad = torch.ones_like(model.cell.weight_hh)
        optimizer.step()
        carry(new)

    assert "before the optimizer's step" in attempt(after_step)
    assert "after backward" in attempt(after_backward)
    assert "with its graph" in attempt(lambda output, new: carry(new.detach()))
    with torch.no_grad(), pytest.raises(RuntimeError, match="leave it out when evaluating"):
        carry(h)


def test_backward_too_late():
    model = BUILD["gru"]()
    x, _ = data(8, 2)
    carry = Carry(model, commit_every=1)
    h = carry(model.initial(2))
    outputs = []
    for t in range(4):
        output, h = model(x[t : t + 1], h)
        outputs.append(output)
        h = carry(h)
    with pytest.raises(RuntimeError, match="backward came too late"):
        outputs[1].sum().backward()


def test_trainable_tensors_outside_the_module_are_refused():
    model = BUILD["gru"]()
    encoder = nn.Linear(4, 4, **F64)
    x, _ = data(2, 2)
    carry = Carry(model)
    h = carry(model.initial(2))
    _, h = model(encoder(x[:1]), h)
    with pytest.raises(RuntimeError, match=r"shape \(4, 4\)|shape \(4,\)"):
        carry(h)


def test_non_finite_states_stop():
    model = BUILD["gru"]()
    x, _ = data(2, 3)
    carry = Carry(model)
    h = carry(model.initial(3))
    x[0, 1] = float("nan")
    _, h = model(x[:1], h)
    with warnings.catch_warnings(), pytest.raises(NonFiniteError, match=r"the state, streams \[1\]"):
        warnings.simplefilter("error")
        carry(h)


def test_bad_arguments():
    model = BUILD["gru"]()
    with pytest.raises(ValueError, match="commit_every must be 'auto' or an int of at least 1, got 0"):
        Carry(model, commit_every=0)
    carry = Carry(model)
    with pytest.raises(ValueError, match="floating-point"):
        carry(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="agree in dimension"):
        carry((torch.zeros(3, 2), torch.zeros(4, 2)))
    carry(model.initial(2))
    x, _ = data(1, 2)
    carry = Carry(model)
    _, h = model(x, carry(model.initial(2)))
    carry(h)
    with pytest.raises(ValueError, match="bool mask of shape"):
        carry.reset(torch.tensor([1, 0]))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        Carry(model)
