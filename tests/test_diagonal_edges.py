"""Diagonal cells at the edges of a stream: trained initial states, reused memory, copies, reloads, broken contracts."""

import copy
import pickle

import pytest
import torch
from diagonal_oracle import bptt, gradients_of, inputs, make_cell, online, where
from oracle import cotangents, worst_error

from sparse_rtrl import RTRL, Carry, ContractError, DiagonalCell, ELSTMCell, LRUCell, RetentionCell, RWKVCell
from sparse_rtrl.parameter_uses import walk

RESETS = {6: torch.tensor([True, False, False]), 11: torch.tensor([False, True, True]), 15: torch.ones(3).bool()}


class Initial(DiagonalCell):
    """Starts streams from a function of two parameters, one of which is used for nothing else."""

    def make_initial(self):
        torch.manual_seed(1)
        size = (*self.state_shape, 2) if self.complex_state else self.state_shape
        self.start = torch.nn.Parameter(torch.randn(size))
        self.gain = torch.nn.Parameter(torch.rand(self.state_shape[-1:]) + 0.5)
        return self.double()

    def initial_entries(self, batch_size):
        entries = torch.view_as_complex(self.start) if self.complex_state else self.start
        return (torch.tanh(entries) * self.gain).expand(batch_size, *self.state_shape)


class InitialLRU(Initial, LRUCell):
    pass


class InitialELSTM(Initial, ELSTMCell):
    pass


class InitialRetention(Initial, RetentionCell):
    pass


class InitialRWKV(Initial, RWKVCell):
    def initial_entries(self, batch_size):
        numerator, denominator, _ = super().initial_entries(batch_size).unbind(1)
        return torch.stack((numerator, torch.exp(denominator), torch.zeros_like(numerator)), 1)


INITIAL = {
    "lru": lambda: InitialLRU(3, 5, 2, r_min=0.5, r_max=0.95),
    "elstm": lambda: InitialELSTM(3, 5, 2),
    "retention": lambda: InitialRetention(3, 2, 4, 2, decay=[0.9, 0.7]),
    "retention, token shift": lambda: InitialRetention(
        3, 2, 4, 2, decay=[0.9, 0.7], rotation=[[0.4], [1.5]], learn_rotation=True, token_shift=True
    ),
    "rwkv": lambda: InitialRWKV(3, 5, 2),
}


def initial_cell(name):
    torch.manual_seed(0)
    return INITIAL[name]().make_initial()


def entries_of(state):
    return state if isinstance(state, torch.Tensor) else state[0]


def without_initial(cell, x, c, resets):
    """The gradient of BPTT through initial states that are taken as given."""
    kept = cell.initial_entries
    cell.initial_entries = lambda batch_size: kept(batch_size).detach()
    try:
        return bptt(cell, x, c, resets)
    finally:
        del cell.initial_entries


@pytest.mark.parametrize("name", INITIAL)
@pytest.mark.parametrize(
    ("segments", "commit_every"), [([1], 1), ([1], "auto"), ([1], 16), ([4, 1, 2], "auto"), ([2, 3], 4)]
)
def test_a_trained_initial_state_is_exact(name, segments, commit_every):
    cell, x, c = initial_cell(name), inputs(19, 3), cotangents(19, 3)
    expected = bptt(cell, x, c, RESETS)
    learner = RTRL(cell, 3, commit_every=commit_every)
    assert worst_error(online(learner, x, c, segments, RESETS), expected) <= 1e-12
    own = {"start": expected["start"], "gain": expected["gain"]}
    assert min(float(g.norm()) for g in own.values()) > 1e-2
    cut = bptt(cell, x, c, RESETS, truncate=1)
    assert worst_error({n: cut[n] for n in own}, own) > 1e-2


@pytest.mark.parametrize("commit_every", [1, 3, "auto"])
def test_influence_of_the_initial_state_is_its_jacobian(commit_every):
    cell, x = initial_cell("lru"), inputs(5, 2)
    learner = RTRL(cell, 2, commit_every=commit_every)
    state = cell.initial_state(2)
    for x_t in x:
        learner(x_t)
        _, state = cell(x_t, state)
    found = learner.influence()
    for name in ("start", "gain", "nu"):
        for part, own in ((state.real, found[name].real), (state.imag, found[name].imag)):
            (expected,) = torch.autograd.grad(part[1, 2], cell.get_parameter(name), retain_graph=True)
            torch.testing.assert_close(own[1, 2], expected, rtol=1e-11, atol=1e-13)
            assert bool(expected.any())


@pytest.mark.parametrize("commit_every", [1, 4, "auto"])
def test_a_cell_that_trains_its_initial_state_alone(commit_every):
    cell, x, c = initial_cell("elstm"), inputs(9, 3), cotangents(9, 3)
    for name, p in cell.named_parameters():
        p.requires_grad_(name in ("start", "gain"))
    expected = bptt(cell, x, c)
    learner = RTRL(cell, 3, commit_every=commit_every)
    assert worst_error(online(learner, x, c, [1, 2]), expected) <= 1e-12 and set(expected) == {"start", "gain"}
    assert set(learner.influence()) == {"start", "gain"}
    norms, _ = learner.influence_norms()
    assert learner.cap_influence(float(norms.max()) / 2) == (int((norms > norms.max() / 2).sum()), float(norms.max()))


@pytest.mark.parametrize("name", INITIAL)
def test_streams_start_from_the_initial_state_as_it_is_at_their_first_step(name):
    cell, x, c = initial_cell(name), inputs(8, 3), cotangents(8, 3)
    learner = RTRL(cell, 3)
    weights = copy.deepcopy(cell.state_dict())
    weights["start"] += 0.3
    cell.load_state_dict(weights)  # after construction
    expected = bptt(cell, x, c)
    assert torch.equal(entries_of(learner.state), cell.initial_entries(3))
    assert torch.equal(learner.evaluate().unroll(x), cell.unroll(x, cell.initial_state(3))[0])
    assert worst_error(online(learner, x, c, [1]), expected) <= 1e-12
    learner.reset()
    cell.start.data.add_(0.1)  # after a reset
    assert torch.equal(entries_of(learner.state), cell.initial_entries(3))
    expected = bptt(cell, x, c)
    assert worst_error(online(learner, x, c, [2]), expected) <= 1e-12
    mask = torch.tensor([True, False, False])
    learner.reset(mask)
    mask[:] = True  # the caller's own
    assert not torch.equal(entries_of(learner.state)[1], cell.initial_entries(3)[1])


def test_after_an_update_the_initial_state_counts_to_first_order():
    """The gradient of the path taken: the first state as it was, and its derivative where the parameters are now."""
    cell, x = initial_cell("elstm"), inputs(3, 2)
    learner = RTRL(cell, 2)
    with torch.no_grad():
        first = cell.initial_state(2)
    learner(x[0])
    with torch.no_grad():
        _, state = cell(x[0], first)
    cell.start.data.mul_(0.5)
    learner(x[1]).sum().backward()
    found = cell.start.grad.clone()
    cell.zero_grad()
    first = first.requires_grad_()
    output, _ = cell(x[1], cell(x[0], first)[1])
    (u,) = torch.autograd.grad(output.sum(), first)
    cell.initial_entries(2).backward(u)
    torch.testing.assert_close(found, cell.start.grad, rtol=1e-12, atol=1e-14)
    assert state.shape == first.shape


def test_an_initial_state_that_is_unfrozen_counts_from_the_next_reset():
    cell, x, c = initial_cell("elstm"), inputs(9, 3), cotangents(9, 3)
    cell.start.requires_grad_(False), cell.gain.requires_grad_(False)
    learner = RTRL(cell, 3)
    online(learner, x[:3], c[:3], [1])
    cell.start.requires_grad_(True), cell.gain.requires_grad_(True)
    with pytest.warns(UserWarning, match="initial_entries: trainable from now on"):
        online(learner, x[3:6], c[3:6], [1])
    assert not bool(learner._engine.influence.initial.any())
    learner.reset()
    assert worst_error(online(learner, x, c, [1]), bptt(cell, x, c)) <= 1e-12


def test_initial_states_that_cannot_be_trained_are_named():
    cell, outside = make_cell("elstm"), torch.zeros(5, dtype=torch.float64, requires_grad=True)

    class Outside(ELSTMCell):
        def initial_entries(self, batch_size):
            return outside.expand(batch_size, 5)

    cell.__class__ = Outside
    with pytest.raises(ContractError, match=r"trainable tensor of shape \(5,\) that is no parameter of the cell"):
        RTRL(cell, 2)

    class Wrong(ELSTMCell):
        def initial_entries(self, batch_size):
            return super().initial_entries(batch_size)[:, :4]

    cell.__class__ = Wrong
    with pytest.raises(ContractError, match=r"initial_entries\(2\) must be torch.float64 \(2, 5\), got .* \(2, 4\)"):
        RTRL(cell, 2)

    class State(ELSTMCell):
        def initial_state(self, batch_size):
            return super().initial_state(batch_size) + self.forget_peephole

    cell.__class__ = State
    with pytest.raises(ContractError, match="State overrides initial_state, which a learner relies on"):
        RTRL(cell, 2)


@pytest.mark.parametrize("name", ["lru", "retention, token shift"])
@pytest.mark.parametrize("commit_every", [1, 3, "auto"])
def test_resuming_with_a_trained_initial_state_is_bit_for_bit(name, commit_every, tmp_path):
    cell, x, c = initial_cell(name), inputs(19, 3), cotangents(19, 3)
    learner = RTRL(cell, 3, commit_every=commit_every)
    online(learner, x[:7], c[:7], [2, 1])
    learner.reset(RESETS[6])
    torch.save(learner.state_dict(), tmp_path / "learner.pt")
    other = RTRL(copy.deepcopy(cell), 3)
    other.load_state_dict(torch.load(tmp_path / "learner.pt", weights_only=True))
    copies = [copy.deepcopy(learner), pickle.loads(pickle.dumps(learner)), copy.copy(learner)]
    found = [online(each, x[7:], c[7:], [1, 2], {4: RESETS[11]}) for each in (learner, other, *copies)]
    assert all(torch.equal(found[0][n], others[n]) for others in found[1:] for n in found[0])
    assert bool(found[0]["start"].any())


class HookedCarry(Carry):
    """Tells the past of a first state that has a graph."""

    def __call__(self, state):
        leaves, _ = torch.utils._pytree.tree_flatten(state)
        end = self._flat(leaves)
        if self._entry is None and end.requires_grad:
            self._past.begin(end, walk(end, None), self._selected())
        return super().__call__(state)


def carried(carry, cell, x, c, segments, resets=None, forget=True):
    """The gradient from ``Carry``; streams are started anew with or without telling it."""
    cell.zero_grad(set_to_none=True)
    state, t, number = carry(cell.initial_state(x.shape[1])), 0, 0
    while t < len(x):
        if resets and t in resets:
            if forget and bool(resets[t].all()):
                carry.reset()
                state = carry(cell.initial_state(x.shape[1]))
            else:
                if forget:
                    carry.reset(resets[t])
                state = where(resets[t], cell.initial_state(x.shape[1]), state)
        stop = min([t + segments[number % len(segments)], len(x), *(r for r in (resets or {}) if r > t)])
        outputs, state = cell.unroll(x[t:stop], state)
        state = carry(state)
        (outputs * c[t:stop]).sum().backward()
        t, number = stop, number + 1
    return gradients_of(cell)


@pytest.mark.parametrize("name", INITIAL)
@pytest.mark.parametrize(("segments", "commit_every"), [([1], "auto"), ([3, 1], 4)])
@pytest.mark.parametrize("forget", [True, False])
def test_carry_trains_the_initial_state_of_a_diagonal_cell(name, segments, commit_every, forget):
    cell, x, c = initial_cell(name), inputs(19, 3), cotangents(19, 3)
    expected = bptt(cell, x, c, RESETS)
    carry = HookedCarry(cell, commit_every=commit_every)
    assert worst_error(carried(carry, cell, x, c, segments, RESETS, forget), expected) <= 1e-12
    given = without_initial(cell, x, c, RESETS)
    assert worst_error({n: given[n] for n in ("start", "gain")}, {n: expected[n] for n in ("start", "gain")}) > 1e-2


def test_streams_may_start_from_the_initial_state_or_from_a_constant():
    cell, x, c = initial_cell("elstm"), inputs(9, 3), cotangents(9, 3)
    some, restart = torch.tensor([True, False, True]), torch.tensor([False, True, True])

    def first():
        return where(some, cell.initial_state(3), torch.ones(3, 5, dtype=torch.float64))

    def again(state):
        return where(restart, where(some, cell.initial_state(3), torch.zeros_like(state)), state)

    state, loss = first(), 0
    for t in range(9):
        state = again(state) if t == 4 else state
        out, state = cell(x[t], state)
        loss = loss + (out * c[t]).sum()
    loss.backward()
    expected = gradients_of(cell)
    cell.zero_grad()
    carry = HookedCarry(cell)
    state = carry(first())
    for t in range(9):
        state = again(state) if t == 4 else state
        out, state = cell(x[t], state)
        state = carry(state)
        (out * c[t]).sum().backward()
    assert worst_error(gradients_of(cell), expected) <= 1e-12


def test_other_first_states_with_a_graph_are_named():
    cell, x = initial_cell("elstm"), inputs(3, 2)
    for first in (
        cell.initial_state(2) * 2,
        cell.initial_state(2) + cell.forget_peephole,
        cell(x[0], cell.initial_state(2))[1],
        cell(x[0], torch.zeros(2, 5, dtype=torch.float64))[1],
    ):
        with pytest.raises(ContractError, match=r"otherwise than initial_entries .* call h = carry\(h0\) before"):
            HookedCarry(cell)(first)
    carry = HookedCarry(cell)
    state = carry(cell.initial_state(2))
    state = carry(cell(x[0], state)[1])
    mask = torch.tensor([True, False])
    new = cell(x[1], where(mask, cell.forget_peephole.expand(2, 5), state))[1]
    with pytest.raises(ContractError, match="the state that stream 0 starts from depends on forget_peephole"):
        carry(new)
