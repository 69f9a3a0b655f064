"""Which parameters Carry carries as they are frozen, unfrozen, shared and added; optimizers; costs told in advance."""

import pytest
import torch
from carry_oracle import EXACT, F64, Stepwise, bptt, carried, data
from oracle import gradients_of, worst_error
from torch import nn

from sparse_rtrl import Carry


def gru():
    torch.manual_seed(3)
    return Stepwise(nn.GRUCell(4, 5, **F64))


def with_changes(model, x, c, changes, carry=None):
    """Gradients where ``changes[t]`` is applied to the model before step ``t``: by BPTT, or by ``carry``."""
    model.zero_grad(set_to_none=True)
    h, total = model.initial(x.shape[1]), 0.0
    h = h if carry is None else carry(h)
    for t in range(len(x)):
        if t in changes:
            changes[t](model)
            h = h if carry is None else carry(h + 0.0)  # an empty segment: parameters change between segments
        output, h = model(x[t : t + 1], h)
        loss = (output * c[t]).sum()
        if carry is not None:
            h = carry(h)
            loss.backward()
        total = total + loss
    if carry is None:
        total.backward()
    return gradients_of(model)


def trainable(name, value):
    return lambda model: model.get_parameter(name).requires_grad_(value)


def test_unfrozen_later_starts_with_zero_influence_and_a_notice():
    model, (x, c) = gru(), data(12, 2)
    name = "cell.weight_hh"
    whole = bptt(model, x, c)
    freeze = trainable(name, False)
    freeze(model)
    changes = {5: trainable(name, True)}
    expected = with_changes(model, x, c, changes)
    freeze(model)
    with pytest.warns(UserWarning, match=r"cell\.weight_hh: unfrozen or added while streams are carried"):
        found = with_changes(model, x, c, changes, Carry(model))
    assert worst_error(found, expected) <= EXACT
    assert worst_error(expected, whole) > 1e-2


def test_frozen_for_a_while():
    """The influence of what happened before stays, and nothing of the frozen steps is added."""
    model, (x, c) = gru(), data(12, 2)
    c[:8] = 0.0  # a frozen parameter takes no gradient, so the losses come after it is trainable again
    name = "cell.weight_hh"
    whole = bptt(model, x, c)
    changes = {4: trainable(name, False), 8: trainable(name, True)}
    expected = with_changes(model, x, c, changes)
    with pytest.warns(UserWarning, match="unfrozen or added while streams are carried"):
        found = with_changes(model, x, c, changes, Carry(model, commit_every=3))
    assert worst_error(found, expected) <= EXACT
    assert worst_error(expected, whole) > 1e-2


def test_frozen_later_takes_no_gradient_and_leaves_the_others_exact():
    model, (x, c) = gru(), data(10, 2)
    name = "cell.weight_hh"
    expected = bptt(model, x, c)
    before = with_changes(model, x[:5], c[:5], {}, Carry(model))
    found = with_changes(model, x, c, {5: trainable(name, False)}, Carry(model))
    assert torch.equal(found[name], before[name])
    del found[name]
    assert worst_error(found, {n: expected[n] for n in found}) <= EXACT


def test_every_parameter_frozen_for_a_while():
    model, (x, c) = gru(), data(9, 2)
    c[:6] = 0.0
    changes = {3: lambda m: m.requires_grad_(False), 6: lambda m: m.requires_grad_(True)}
    expected = with_changes(model, x, c, changes)
    carry = Carry(model)

    def without_loss(model, x, c, changes):  # nothing to differentiate while everything is frozen
        h = carry(model.initial(x.shape[1]))
        for t in range(len(x)):
            if t in changes:
                changes[t](model)
                h = carry(h + 0.0)
            output, h = model(x[t : t + 1], h)
            h = carry(h)
            if t >= 6:
                (output * c[t]).sum().backward()
        return gradients_of(model)

    model.zero_grad()
    with pytest.warns(UserWarning, match="unfrozen or added while streams are carried"):
        found = without_loss(model, x, c, changes)
    assert worst_error(found, expected) <= EXACT


def test_unfrozen_where_its_past_is_lost_is_an_error_that_names_it():
    model, (x, c) = gru(), data(6, 2)
    carry = Carry(model)
    h = carry(model.initial(2))
    for t in range(3):
        _, h = model(x[t : t + 1], h)
        h = carry(h)
    model.cell.weight_hh.requires_grad_(False)
    _, h = model(x[3:4], h)
    h = carry(h)
    model.cell.weight_hh.requires_grad_(True)  # after carry returned the state of the next segment
    output, h = model(x[4:5], h)
    with pytest.warns(UserWarning, match="unfrozen or added"):
        h = carry(h)
    with pytest.raises(RuntimeError, match=r"cell\.weight_hh was unfrozen after carry"):
        (output * c[4]).sum().backward()


def test_a_frozen_recurrent_weight_and_a_module_in_eval():
    torch.manual_seed(0)
    cell = nn.Sequential()
    cell.add_module("gru", nn.GRUCell(4, 5, **F64))
    cell.add_module("norm", nn.BatchNorm1d(5, **F64))
    cell.add_module("drop", nn.Dropout(0.5))
    cell.forward = lambda x, h: cell.drop(cell.norm(cell.gru(x, h)))
    model = Stepwise(cell).eval()
    model.cell.gru.weight_hh.requires_grad_(False)
    x, c = data(10, 2)
    expected = bptt(model, x, c)
    found, carry = carried(model, x, c, (2, 1))
    assert worst_error(found, expected) <= EXACT
    assert "cell.gru.weight_hh" not in carry.influence() and "cell.norm.weight" in carry.influence()


class Tied(nn.Module):
    """One linear map as input map, as recurrent map twice, and under two names."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(5, 5, **F64)
        self.other = nn.Linear(5, 5, **F64)
        self.other.weight = self.one.weight

    def forward(self, x, h):
        padded = nn.functional.pad(x, (0, 1))
        return torch.tanh(self.one(padded) + self.other(torch.tanh(self.one(h))))


def test_shared_parameters_are_carried_once():
    torch.manual_seed(0)
    model = Stepwise(Tied())
    x, c = data(10, 2)
    expected = bptt(model, x, c)
    found, carry = carried(model, x, c, (1, 2))
    assert worst_error(found, expected) <= EXACT
    assert sorted(carry.influence()) == ["cell.one.bias", "cell.one.weight", "cell.other.bias"]


def test_parameters_that_are_added_later_join():
    model, (x, c) = gru(), data(8, 2)
    carry = Carry(model)

    def extend(model):
        if not hasattr(model.cell, "extra"):
            model.cell.extra = nn.Parameter(torch.eye(5, **F64))
            plain = model.cell.forward
            model.cell.forward = lambda x, h: plain(x, torch.tanh(h @ model.cell.extra))

    with pytest.warns(UserWarning, match=r"cell\.extra: unfrozen or added"):
        found = with_changes(model, x, c, {4: extend}, carry)
    del model.cell.forward
    model.cell.extra = None
    del model.cell.extra
    expected = with_changes(model, x, c, {4: extend})
    assert worst_error(found, expected) <= EXACT


def test_parametrized_weights_are_exact():
    torch.manual_seed(0)
    cell = nn.utils.parametrizations.weight_norm(nn.RNNCell(4, 5, **F64), "weight_hh")
    model = Stepwise(cell)
    x, c = data(8, 2)
    expected = bptt(model, x, c)
    with pytest.warns(UserWarning, match=r"parametrizations\.weight_hh\.original0"):
        found, _ = carried(model, x, c, (1,))
    assert worst_error(found, expected) <= EXACT


def test_attached_optimizers_stop_before_a_step_in_the_wrong_place():
    model, (x, c) = gru(), data(6, 2)
    carry = Carry(model)
    optimizers = [
        torch.optim.SGD(model.cell.parameters(), lr=0.1),
        torch.optim.Adam(model.readout.parameters()),
    ]
    handles = [carry.attach(optimizer) for optimizer in (*optimizers, optimizers[0])]  # twice does no harm

    def values():
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    h = carry(model.initial(2))
    for t in range(3):  # the right place
        output, h = model(x[t : t + 1], h)
        h = carry(h)
        (output * c[t]).sum().backward()
        before = values()
        for optimizer in optimizers:
            optimizer.step()
        assert not torch.equal(values(), before)
    output, h = model(x[3:4], h)
    (output * c[3]).sum().backward()
    before = values()
    for optimizer in optimizers:
        with pytest.raises(RuntimeError, match="the optimizer would step while a segment is open"):
            optimizer.step()
    assert torch.equal(values(), before)
    handles[1].remove()
    optimizers[1].step()
    assert not torch.equal(values(), before)
    carry.reset()
    carry.flush()


def test_accumulation_over_segments_and_clipping_with_an_attached_optimizer():
    """The step sees the whole gradient, clipped once, and the state and influence of the path taken go on."""
    model, (x, c) = gru(), data(8, 2)
    gradient = bptt(model, x, c)
    norm = torch.stack([g.norm() for g in gradient.values()]).norm()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    carry = Carry(model)
    carry.attach(optimizer)
    h = carry(model.initial(2))
    for t in range(0, 8, 2):
        output, h = model(x[t : t + 2], h)
        h = carry(h)
        (output * c[t : t + 2]).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    moved = {n: start[n] - p.detach() for n, p in model.named_parameters()}
    assert (
        worst_error(moved, {n: 0.5 * g / norm for n, g in gradient.items()}) <= 1e-6
    )  # clipping adds 1e-6 to the norm


def test_estimate():
    model = Stepwise(nn.GRUCell(16, 128))
    carry = Carry(model)
    h0 = torch.zeros(4, 128)
    everything = sum(p.numel() for p in model.parameters())
    assert carry.estimate(h0).parameters == everything
    h = model.cell(torch.randn(4, 16), carry(h0))
    costs = carry.estimate(h)  # the readout does not reach the state
    assert costs.parameters == sum(p.numel() for p in model.cell.parameters()) < everything
    assert costs.kept_bytes == 4 * 4 * 129 * costs.parameters
    assert (costs.batch_size, costs.hidden_size, costs.segment) == (4, 128, 64)
    assert costs.multiply_adds(64) == (2 * 128 + 128**2 / 64) * costs.parameters * 4
    assert "kept: itemsize * B * (H + 1) * |θ|" in str(costs) and "suggested segment = 64" in str(costs)
    carry(h)
    assert carry.kept_bytes == costs.kept_bytes
    uoro = Carry(model, method="uoro").estimate(h0)
    assert uoro.kept_bytes == 4 * 4 * (128 + everything) and uoro.multiply_adds(1) < costs.multiply_adds(1)
    with pytest.raises(ValueError, match="segment must be at least 1, got 0"):
        costs.multiply_adds(0)


def test_influence_that_cannot_fit_is_refused_with_the_numbers():
    cell = nn.RNNCell(1, 1500)
    carry = Carry(cell)
    h = cell(torch.zeros(512, 1), carry(torch.zeros(512, 1500)))
    with pytest.raises(
        MemoryError, match=r"batch_size 512 \* \(hidden_size 1500 \+ 1\) \* 2254500 .* approximate method"
    ):
        carry(h)


def test_a_state_that_changes_its_size_is_refused():
    model, (x, _) = gru(), data(2, 2)
    carry = Carry(model)
    _, h = model(x[:1], carry(model.initial(2)))
    h = carry(h)
    _, h = model(x[1:2], h)
    with pytest.raises(ValueError, match=r"state must keep its size.*\(2, 5\).*this one \(3, 5\)"):
        carry(torch.cat((h, h[:1])))
