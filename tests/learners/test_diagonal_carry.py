"""``Carry`` on diagonal cells, and on modules with complex states."""

import copy
import gc
import weakref

import pytest
import torch
from diagonal_oracle import CELLS, bptt, gradients_of, inputs, make_cell, where
from oracle import cotangents, worst_error

from sparse_rtrl import RTRL, Carry

RESETS = {6: torch.tensor([True, False, False]), 12: torch.tensor([False, True, True])}


def carried(carry, cell, x, c, segments, resets=None, start=None):
    """The gradient from ``Carry``, in segments of the given lengths, in turn; steps by ``forward`` and ``unroll``."""
    cell.zero_grad(set_to_none=True)
    state, t, number = carry(cell.initial_state(x.shape[1]) if start is None else start), 0, 0
    while t < len(x):
        if resets and t in resets:
            carry.reset(resets[t])
            state = where(resets[t], cell.initial_state(x.shape[1]), state)
        stop = min([t + segments[number % len(segments)], len(x), *(r for r in (resets or {}) if r > t)])
        output, state = cell(x[t], state)
        loss = (output * c[t]).sum()
        if stop > t + 1:
            outputs, state = cell.unroll(x[t + 1 : stop], state)
            loss = loss + (outputs * c[t + 1 : stop]).sum()
        state = carry(state)
        loss.backward()
        t, number = stop, number + 1
    return gradients_of(cell), state


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("commit_every", ["auto", 3])
def test_gradient_is_that_of_bptt_at_the_memory_of_the_learner(name, commit_every):
    cell, x, c = make_cell(name), inputs(17, 3), cotangents(17, 3)
    expected = bptt(cell, x, c, RESETS)
    carry = Carry(cell, commit_every=commit_every)
    found, _ = carried(carry, cell, x, c, [1, 4, 2], RESETS)
    assert worst_error(found, expected) <= 1e-12
    assert worst_error(bptt(cell, x, c, RESETS, truncate=1), expected) > 1e-2
    assert carry.kept_bytes == RTRL(cell, 3)._engine.influence.kept_bytes
    assert carry.estimate(cell.initial_state(3)).influence_bytes == carry.kept_bytes


@pytest.mark.parametrize("name", CELLS)
def test_losses_of_a_segment_may_go_back_apart(name):
    cell, x, c = make_cell(name), inputs(9, 3), cotangents(9, 3, density=1.0)
    expected = bptt(cell, x, c)
    carry, total = Carry(cell), {n: torch.zeros_like(p) for n, p in cell.named_parameters()}
    state = carry(cell.initial_state(3))
    for t in range(0, 9, 3):
        outputs, state = cell.unroll(x[t : t + 3], state)
        apart = [(outputs[i] * c[t + i]).sum() for i in range(3)]
        state = carry(state)
        names, parameters = zip(*((n, p) for n, p in cell.named_parameters() if p.requires_grad), strict=True)
        for i, loss in enumerate(apart):
            found = torch.autograd.grad(loss, parameters, retain_graph=i < 2, allow_unused=True)
            for name_of, gradient in zip(names, found, strict=True):
                total[name_of] += 0.0 if gradient is None else gradient
    assert worst_error(total, expected) <= 1e-12
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        apart[0].backward()


def test_resuming_is_bit_for_bit():
    cell, x, c = make_cell("lru"), inputs(12, 3), cotangents(12, 3)
    carry = Carry(cell, commit_every=2)
    _, state = carried(carry, cell, x[:5], c[:5], [1])
    other_cell = copy.deepcopy(cell)
    other = Carry(other_cell, commit_every=2)
    saved, entries = carry.state_dict(), state.detach().clone()
    other.load_state_dict(saved)
    carry.load_state_dict(saved)
    one, _ = carried(carry, cell, x[5:], c[5:], [2], start=entries)
    two, _ = carried(other, other_cell, x[5:], c[5:], [2], start=entries)
    assert all(torch.equal(one[n], two[n]) for n in one)
    found, expected = carry.influence(), other.influence()
    assert all(torch.equal(found[n], expected[n]) for n in found) and "nu" in found
    with pytest.raises(ValueError, match="must be of method 'diagonal'"):
        carry.load_state_dict({**saved, "method": "exact"})


def test_misuse_is_named():
    cell, x = make_cell("elstm"), inputs(4, 2)
    carry = Carry(cell)
    state = carry(cell.initial_state(2))
    _, new = cell(x[0], state)
    with pytest.raises(RuntimeError, match="not what the cell made of"):
        carry(new + 1)
    with torch.no_grad():
        cell.forget_peephole.add_(0.1)
    with pytest.raises(RuntimeError, match="a parameter changed before carry was called"):
        carry(new)


def test_parameters_unfrozen_later_join_and_a_stream_may_be_left():
    cell, x, c = make_cell("elstm"), inputs(9, 2), cotangents(9, 2)
    cell.content_peephole.requires_grad_(False)
    carry = Carry(cell)
    carried(carry, cell, x[:3], c[:3], [1])
    carry.reset()
    cell(x[0], carry(cell.initial_state(2)))  # a run that is not closed
    carry.reset()
    cell.content_peephole.requires_grad_(True)
    with pytest.warns(UserWarning, match="content_peephole: unfrozen or added while streams are carried"):
        found, _ = carried(carry, cell, x, c, [2, 1])
    assert worst_error(found, bptt(cell, x, c)) <= 1e-12


def test_a_carry_does_not_keep_its_cell_alive():
    cell = make_cell("lru")
    carry, left = Carry(cell), weakref.ref(cell)
    carry(cell.initial_state(2))
    del cell, carry
    gc.collect()
    assert left() is None


class TwoLayers(torch.nn.Module):
    """An LRU on top of another, each with its complex state."""

    def __init__(self):
        super().__init__()
        self.first, self.second = make_cell("lru"), make_cell("elstm")
        self.between = torch.nn.Linear(2, 3).double()

    def forward(self, x, states):
        y, first = self.first(x, states[0])
        out, second = self.second(torch.tanh(self.between(y)), states[1])
        return out, (first, second)

    def initial_state(self, batch):
        return self.first.initial_state(batch), self.second.initial_state(batch)


@pytest.mark.filterwarnings("ignore:.*is not captured as factors")
def test_a_joint_state_with_complex_entries_is_exact():
    torch.manual_seed(0)
    model, x, c = TwoLayers(), inputs(9, 2), cotangents(9, 2)
    expected = bptt(model, x, c)
    carry = Carry(model)
    state = carry(model.initial_state(2))
    for t in range(9):
        out, state = model(x[t], state)
        state = carry(state)
        (out * c[t]).sum().backward()
    assert worst_error(gradients_of(model), expected) <= 1e-12
    assert worst_error(bptt(model, x, c, truncate=1), expected) > 1e-2
