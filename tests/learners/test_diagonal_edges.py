"""Diagonal cells at the edges of a stream: trained initial states, reused memory, copies, reloads, broken contracts."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from diagonal_oracle import bptt, gradients_of, inputs, make_cell, online, where
from oracle import cotangents, worst_error

from sparse_rtrl import (
    RTRL,
    Carry,
    ContractError,
    DiagonalCell,
    DiagonalStack,
    ELSTMCell,
    LRUCell,
    PerLayerApproximation,
    RetentionCell,
    RWKVCell,
    check_cell,
    estimate,
)
from sparse_rtrl.cells.diagonal_cell import Given, Learned, Mapped
from sparse_rtrl.errors import DisagreementError
from sparse_rtrl.influence.diagonal import DiagonalInfluence

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
    carry = Carry(cell, commit_every=commit_every)
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
    carry = Carry(cell)
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
            Carry(cell)(first)
    carry = Carry(cell)
    state = carry(cell.initial_state(2))
    state = carry(cell(x[0], state)[1])
    mask = torch.tensor([True, False])
    new = cell(x[1], where(mask, cell.forget_peephole.expand(2, 5), state))[1]
    with pytest.raises(ContractError, match="the state that stream 0 starts from depends on forget_peephole"):
        carry(new)


UPDATES = {
    "fused": lambda cell: torch.optim.Adam(cell.parameters(), 0.02, fused=True).step,
    "plain": lambda cell: torch.optim.Adam(cell.parameters(), 0.02, foreach=False).step,
    "data": lambda cell: lambda: [p.data.add_(p.grad, alpha=-0.05) for p in cell.parameters() if p.grad is not None],
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("name", ["lru", "elstm", "rwkv"])
def test_weights_that_change_without_a_version_are_seen(name, update):
    """Carry and RTRL take the same path, whatever changes the weights."""
    paths = []
    for learns in ("carry", "rtrl"):
        cell, x, c = initial_cell(name), inputs(12, 2), cotangents(12, 2, density=1.0)
        step = UPDATES["plain" if learns == "rtrl" and update == "fused" else update](cell)
        carry, learner, found = Carry(cell), RTRL(cell, 2, commit_every=1), []
        state = carry(cell.initial_state(2)) if learns == "carry" else None
        for x_t, c_t in zip(x, c, strict=True):
            if learns == "carry":
                out, state = cell(x_t, state)
                state = carry(state)
            else:
                out = learner(x_t)
            (out * c_t).sum().backward()
            found.append(gradients_of(cell))
            step()
            cell.zero_grad()
        paths.append(found)
    for one, other in zip(*paths, strict=True):
        assert worst_error(one, other) <= 1e-11


@pytest.mark.parametrize("change", ["data", "in place"])
def test_a_weight_that_changes_before_carry_is_refused_or_does_not_matter(change):
    """A learned value is needed by the segment's own backward pass; a weight of the input is not any more."""
    for name, refused in (("forget_peephole", True), ("forget.weight", False)):
        cell, x = make_cell("elstm"), inputs(3, 2)
        carry = Carry(cell, commit_every=3)
        state = carry(cell(x[0], carry(cell.initial_state(2)))[1])
        out, new = cell(x[1], state)
        parameter = cell.get_parameter(name)
        with torch.no_grad():
            (parameter.data if change == "data" else parameter).add_(0.3)
        if refused:
            with pytest.raises(RuntimeError, match="a parameter changed before carry was called"):
                carry(new)
            continue
        state = carry(new)
        (out.sum() + cell(x[2], state)[0].sum()).backward()
        found = gradients_of(cell)
        other = make_cell("elstm")
        learner = RTRL(other, 2, commit_every=3)
        learner(x[0])
        out = learner(x[1])
        with torch.no_grad():
            other.get_parameter(name).add_(0.3)
        (out.sum() + learner(x[2]).sum()).backward()
        assert worst_error(found, gradients_of(other)) <= 1e-12


class Bare(DiagonalCell):
    """Hands out its state, after a step or before, which a caller may write to."""

    def __init__(self, keep=False):
        super().__init__(3, (4,))
        self.linear, self.scale, self.keep = torch.nn.Linear(3, 4), torch.nn.Parameter(torch.rand(4)), keep
        self.double()

    def project(self, x):
        return Mapped(x, self.linear.weight, (4,), self.linear.bias), Learned(self.scale), Given(x[:, :1])

    def step(self, h, y, s, g):
        return s * h + y * g

    def output(self, x, before, h, *values):
        return before if self.keep else h


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("segment", [1, 2])
def test_outputs_that_are_the_state_may_be_written_to(keep, segment):
    torch.manual_seed(0)
    cell, x = Bare(keep), inputs(6, 2)
    c = cotangents(6, 2, outputs=4, density=1.0)
    expected = bptt(cell, x, c)
    learner = RTRL(cell, 2, commit_every=16)
    for t in range(0, 6, segment):
        outputs = learner.unroll(x[t : t + segment])
        (outputs * c[t : t + segment]).sum().backward()
        outputs.data.zero_()
    assert worst_error(gradients_of(cell), expected) <= 1e-12
    carry = Carry(cell)
    cell.zero_grad()
    state, buffer = carry(cell.initial_state(2)), torch.empty(segment, 2, 3, dtype=torch.float64)
    for t in range(0, 6, segment):
        outputs, state = cell.unroll(buffer.copy_(x[t : t + segment]), state)
        state = carry(state)
        (outputs * c[t : t + segment]).sum().backward()
        outputs.data.zero_(), buffer.zero_()
    assert worst_error(gradients_of(cell), expected) <= 1e-12
    cell.step = lambda h, y, s, g: h
    assert cell(x[0], state)[1].data_ptr() != state.data_ptr()


def test_states_written_to_are_named_or_start_anew():
    cell, x, c = make_cell("elstm"), inputs(6, 3), cotangents(6, 3, density=1.0)
    done = torch.tensor([True, False, True])
    state, loss = cell.initial_state(3), 0
    for t in range(6):
        state = where(done, torch.zeros_like(state), state) if t == 3 else state
        out, state = cell(x[t], state)
        loss = loss + (out * c[t]).sum()
    loss.backward()
    expected = gradients_of(cell)
    cell.zero_grad()
    carry = Carry(cell)
    state = carry(cell.initial_state(3))
    for t in range(6):
        if t == 3:
            state = state.clone()
            state[done] = 0
        out, state = cell(x[t], state)
        state = carry(state)
        (out * c[t]).sum().backward()
    assert worst_error(gradients_of(cell), expected) <= 1e-12
    _, new = cell(x[0], state)
    new.data[0] = 1.0
    with pytest.raises(RuntimeError, match="or a state was written to"):
        carry(new)
    _, new = cell(x[0], state)
    for changed in (new * 2, new + (cell.forget_peephole - cell.forget_peephole.detach()), new.flip(1).flip(1) * 1.5):
        with pytest.raises(RuntimeError, match="is not what the cell made of"):
            carry(changed)
    with pytest.raises(RuntimeError, match="started anew inside a segment"):
        carry(where(done, torch.zeros_like(new), new))


@pytest.mark.parametrize("place", ["entering", "inside", "leaving"])
def test_values_that_stay_while_the_gradient_changes_are_noticed(place):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return h.view_as(h)

        @staticmethod
        def backward(ctx, g):
            return 0.5 * g

    cell, x = make_cell("lru"), inputs(3, 2)
    for scale in (Scaled.apply, lambda h: h.detach().clone().requires_grad_()):
        carry = Carry(cell)
        state = carry(cell(x[0], carry(cell.initial_state(2)))[1])
        state = cell(x[1], scale(state) if place == "entering" else state)[1]
        state = cell(x[2], scale(state) if place == "inside" else state)[1]
        with pytest.raises(RuntimeError, match=r"not what the cell made of|does not depend on|anew inside"):
            carry(scale(state) if place == "leaving" else state)
    carry = Carry(cell)
    state = carry(cell(x[0], carry(cell.initial_state(2)))[1])
    if place == "entering":
        state.register_hook(lambda g: g.clamp(-1, 1))
    state = cell(x[1], state)[1]
    if place != "entering":
        state.register_hook(lambda g: g.clamp(-1, 1))
    if place == "inside":
        state = cell(x[2], state)[1]
    with pytest.raises(ContractError, match="a gradient hook on the state"):
        carry(state)


def test_inputs_made_by_the_cell_itself_are_refused():
    class Embedded(ELSTMCell):
        def __init__(self):
            super().__init__(3, 5, 2)
            self.embedding = torch.nn.Embedding(7, 3)

    cell = Embedded()
    carry = Carry(cell)
    state = carry(cell(torch.randn(2, 3), carry(cell.initial_state(2)))[1])
    _, new = cell(cell.embedding(torch.tensor([1, 2])), state)
    with pytest.raises(ContractError, match="value 0 of project depends on trainable tensors through its input"):
        carry(new)


def test_steps_while_a_parameter_was_frozen_do_not_count():
    """As in autograd: what a parameter did while it was frozen is no part of its gradient."""
    names = ("forget.weight", "content.bias", "forget_peephole")

    def freeze(cell, t):
        if t in (3, 6):
            for name in names:
                cell.get_parameter(name).requires_grad_(t == 6)

    cell, x, c = make_cell("elstm"), inputs(9, 2), cotangents(9, 2, density=1.0)
    state, loss = cell.initial_state(2), 0
    for t in range(9):
        freeze(cell, t)
        out, state = cell(x[t], state)
        loss = loss + (out * c[t]).sum() * (t > 6)
    loss.backward()
    expected = gradients_of(cell)
    for commit_every in (1, 4, 16):
        cell.zero_grad()
        learner = RTRL(cell, 2, commit_every=commit_every)
        for t in range(9):
            freeze(cell, t)
            out = learner(x[t])
            if t > 6:
                (out * c[t]).sum().backward()
        assert worst_error(gradients_of(cell), expected) <= 1e-12


def test_a_state_from_before_the_first_segment_forgets_everything():
    cell, x, c = initial_cell("elstm"), inputs(6, 3), cotangents(6, 3)
    expected = bptt(cell, x, c)
    carry, learner = Carry(cell), RTRL(cell, 3)
    fresh, unstarted = carry.state_dict(), learner.state_dict()
    carried(carry, cell, x, c, [1])
    online(learner, x, c, [1])
    carry.load_state_dict(fresh)
    carry._entry = None  # a loop that starts again
    assert carry.kept_bytes == 0 and carry.influence() == {}
    learner.load_state_dict(unstarted)
    assert worst_error(carried(carry, cell, x, c, [1]), expected) <= 1e-12
    assert worst_error(online(learner, x, c, [1]), expected) <= 1e-12


def test_a_state_of_another_dtype_or_size_is_refused_with_numbers():
    cell, x, c = make_cell("lru"), inputs(4, 3), cotangents(4, 3)
    carry, learner = Carry(cell), RTRL(cell, 3)
    carried(carry, cell, x, c, [1])
    online(learner, x, c, [1])
    for other in (copy.deepcopy(cell).float(), LRUCell(3, 4, 2).double()):
        now, single = Carry(other), RTRL(other, 3)
        before = single.state
        with pytest.raises(ValueError, match=r"\(B, H\) = \(3, 10\) of torch.float64, but H is (10|8) of torch.float"):
            now.load_state_dict(carry.state_dict())
        with pytest.raises(
            ValueError, match=r"state is of another cell, dtype or batch size: its tensors are .*\(3, 5\)"
        ):
            single.load_state_dict(learner.state_dict())
        assert torch.equal(single.state, before) and now.kept_bytes == 0


def test_states_of_older_versions_load():
    cell, x, c = make_cell("elstm"), inputs(12, 3), cotangents(12, 3)
    learner = RTRL(cell, 3, commit_every=8)
    online(learner, x[:5], c[:5] * 0, [1])
    old = learner.state_dict()
    assert old["diagonal"]["recorded"]
    for name in ("fresh", "verifier"):
        del old[name]
    del old["diagonal"]["initial"]
    for part in old["diagonal"]["recorded"]:
        del part["after"], part["trained"]
    other = RTRL(copy.deepcopy(cell), 3)
    other.load_state_dict(old)
    found, expected = (online(each, x[5:], c[5:], [1]) for each in (other, learner))
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    full = bptt(cell, x, torch.cat((c[:5] * 0, c[5:])))
    assert worst_error(found, full) <= 1e-12


COUPLED = {
    "statistics of the batch in project": (
        lambda self, x: (Mapped(x - x.mean(0), self.linear.weight, (4,)), Learned(self.scale)),
        None,
        None,
        "rows of the batch influence each other: what project gives",
    ),
    "a capacity limit in step": (
        None,
        lambda h, y, s: s * h + y * ((y > 0).cumsum(0) <= 2),
        None,
        "rows of the batch influence each other: what step gives",
    ),
    "statistics of the batch in output": (
        None,
        None,
        lambda x, before, h, *values: h - h.mean(0),
        "rows of the batch influence each other: what output gives",
    ),
    "a weight made of the input": (
        lambda self, x: (Mapped(x, self.linear.weight * x.mean(), (4,)), Learned(self.scale)),
        None,
        None,
        "a weight, bias or Learned value of project depends on the input",
    ),
    "random numbers": (
        lambda self, x: (
            Mapped(x, torch.nn.functional.dropout(self.linear.weight, 0.5), (4,)),
            Learned(self.scale),
        ),
        None,
        None,
        "project gives something else when it is called again",
    ),
}


class Custom(DiagonalCell):
    """A cell whose functions are given."""

    def __init__(self, project=None, step=None, output=None):
        torch.manual_seed(0)
        super().__init__(3, (4,))
        self.linear, self.scale = torch.nn.Linear(3, 4), torch.nn.Parameter(0.5 + 0.3 * torch.rand(4))
        self.functions = project, step, output
        self.double()

    def project(self, x):
        project = self.functions[0]
        if project is not None:
            return project(self, x)
        return Mapped(x, self.linear.weight, (4,), self.linear.bias), Learned(self.scale)

    def step(self, h, *values):
        step = self.functions[1]
        y, s = values
        return s * h + y if step is None else step(h, *values)

    def output(self, x, before, h, *values):
        output = self.functions[2]
        return h + 0 if output is None else output(x, before, h, *values)


@pytest.mark.parametrize("name", COUPLED)
def test_rows_that_influence_each_other_from_the_start_are_named(name):
    *functions, message = COUPLED[name]
    with pytest.raises(ContractError, match=message):
        RTRL(Custom(*functions), 4)
    carry, x = Carry(Custom(*functions)), inputs(1, 4)
    state = carry(carry.module.initial_state(4))
    with pytest.raises(ContractError, match=message):
        carry(carry.module(x[0], state)[1])


LATER = {
    "rows": (lambda self, h, y, s: s * h + y - 0.1 * h.mean(0), "not element-wise: .* MeanBackward1"),
    "entries": (lambda self, h, y, s: s * h + y - 0.1 * h.mean(1, keepdim=True), "not element-wise"),
    "values of other rows": (lambda self, h, y, s: s * h + y - 0.1 * y.flip(0), "not element-wise"),
    "entries where a value is large": (
        lambda self, h, y, s: torch.where(y > -1e3, s * h.roll(1, 1), s * h) + y,
        "not element",
    ),
    "another derivative": (lambda self, h, y, s: s * h + (h * y - (h * y).detach()) + y, None),
    "a parameter": (lambda self, h, y, s: s * h + y + self.linear.bias, "step uses the parameter linear.bias itself"),
    "a parameter behind a gate": (
        lambda self, h, y, s: torch.where(h > 1e9, self.scale * h, s * h) + y,
        "step uses the parameter scale itself",
    ),
    "a tensor from outside": (lambda self, h, y, s: s * h + y + self.outside, r"trainable tensor of shape \(4,\)"),
    "random numbers": (lambda self, h, y, s: s * h + y + 0.1 * torch.rand_like(y), "gives? the states that it gave"),
    "a state of its own": (lambda self, h, y, s: s * h + y + self.count(), "gives? the states that it gave"),
}


class Later(Custom):
    """Breaks its contract from the third call of a learner on."""

    def __init__(self, broken):
        super().__init__()
        self.broken, self.now, self.calls = broken, False, 0
        self.outside = [torch.ones(4, dtype=torch.float64, requires_grad=True)][0]

    def count(self):
        self.calls += 1
        return self.calls

    def step(self, h, *values):
        return self.broken(self, h, *values) if self.now else super().step(h, *values)


@pytest.mark.parametrize("name", ["rows", "entries", "values of other rows", "entries where a value is large"])
def test_entries_that_mix_later_are_proven_and_not_sampled(name):
    cell, x = Later(LATER[name][0]), inputs(6, 3)
    learner = RTRL(cell, 3, verify="never", commit_every=1)
    for x_t in x[:3]:
        learner(x_t).sum().backward()
    cell.now = True
    before = gradients_of(cell)
    with pytest.raises(ContractError, match="not element-wise"):
        learner(x[3]).sum().backward()
    assert all(torch.equal(before[n], g) for n, g in gradients_of(cell).items())


@pytest.mark.parametrize("learns", ["rtrl", "carry"])
@pytest.mark.parametrize("name", LATER)
def test_what_begins_later_is_noticed(name, learns):
    broken, message = LATER[name]
    cell, x = Later(broken), inputs(6, 3)
    learner = RTRL(cell, 3, verify="always", commit_every=1) if learns == "rtrl" else Carry(cell, verify="always")
    state = learner(cell.initial_state(3)) if learns == "carry" else None

    def advance(x_t):
        nonlocal state
        if learns == "rtrl":
            return learner(x_t)
        out, new = cell(x_t, state)
        state = learner(new)
        return out

    for x_t in x[:3]:
        advance(x_t).sum().backward()
    cell.now = True
    before = gradients_of(cell)
    if message is None:  # a step that is as diagonal as before, only another one
        advance(x[3]).sum().backward()
        return
    engine = learner._engine if learns == "rtrl" else learner._past._engine
    window, kept = list(engine.influence.window), [m.clone() for m in engine.influence.matrices]
    with pytest.raises((ContractError, RuntimeError), match=message):
        advance(x[3]).sum().backward()
    assert all(torch.equal(before[n], g) for n, g in gradients_of(cell).items())
    assert engine.influence.window == window and all(map(torch.equal, engine.influence.matrices, kept))


@pytest.mark.parametrize("name", ["lru", "elstm", "retention, token shift", "rwkv"])
@pytest.mark.parametrize("fault", ["decay", "derivative", "input", "bias"])
def test_planted_faults_are_noticed(name, fault, monkeypatch):
    """Each quantity that is captured is wrong in turn."""
    if fault == "bias" and name != "elstm":
        fault = "derivative"
    capture = DiagonalInfluence.capture

    def wrong(self, *arguments):
        steps = capture(self, *arguments)
        if fault == "decay":
            return replace(steps, decays=1.01 * steps.decays)
        if fault == "derivative":
            return replace(steps, deltas=[*steps.deltas[:-1], 0.99 * steps.deltas[-1]])
        zs = [None if z is None else z.clone() for z in steps.zs]
        for z in zs:
            if z is not None:
                z[..., -1 if fault == "bias" else 0] *= 1.01
        return replace(steps, zs=zs)

    cell, x = make_cell(name), inputs(8, 2)
    learner, carry = RTRL(cell, 2, verify=1), Carry(cell, verify="always")
    state = carry(cell.initial_state(2))
    learner.unroll(x[:4])
    state = carry(cell.unroll(x[:4], state)[1])
    assert learner._verifier.compared == carry._past.verifier.compared == 1
    monkeypatch.setattr(DiagonalInfluence, "capture", wrong)
    with pytest.raises(DisagreementError, match="step 4, stream"):
        learner.unroll(x[4:])
    with pytest.raises(DisagreementError, match="step 4, stream"):
        carry(cell.unroll(x[4:], state)[1])


def test_verifying_changes_nothing_and_resumes():
    results = []
    for verify in ("never", 3, "always"):
        cell, x, c = initial_cell("lru"), inputs(12, 3), cotangents(12, 3)
        learner = RTRL(cell, 3, verify=verify)
        draws = torch.get_rng_state()
        first = online(learner, x[:6], c[:6], [1])
        other = RTRL(copy.deepcopy(cell), 3, verify=verify)
        other.load_state_dict(learner.state_dict())
        second = online(learner, x[6:], c[6:], [1])
        online(other, x[6:], c[6:], [1])
        assert learner._verifier.compared == other._verifier.compared
        assert learner._verifier.compared in {"never": [0], "always": [12], 3: range(1, 9)}[verify]
        assert torch.equal(draws, torch.get_rng_state())
        results.append({**first, **{f"{n} again": g for n, g in second.items()}})
    assert all(torch.equal(results[0][n], other[n]) for other in results[1:] for n in results[0])


def test_options_for_other_cells_are_named():
    cell = make_cell("lru")
    with pytest.raises(ValueError, match="capture='dense' is for slot cells, got a LRUCell"):
        RTRL(cell, 2, capture="dense")
    with pytest.raises(ValueError, match="cuda_graph=True is for slot cells, got a LRUCell"):
        RTRL(cell, 2, cuda_graph=True)
    with pytest.raises(ValueError, match="verify must be"):
        RTRL(cell, 2, verify=0)


def test_messages_name_the_argument():
    cell, x = make_cell("elstm"), inputs(2, 2)
    learner = RTRL(cell, 2)
    for streams in ([0], torch.tensor([0]), torch.ones(3).bool()):
        with pytest.raises(ValueError, match=r"streams must be a bool mask of shape \(2,\), got"):
            learner.reset(streams)
    for wrong, message in (
        (x[0, 0], r"x must have batch size 2, got shape \(3,\)"),
        (x[0].float(), "x must be torch.float64, as the parameters of the cell are, got torch.float32"),
        (x[0, :, :2], r"x must have shape \(B, 3\), got \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            learner(wrong)
    cell.forget.weight.data = torch.zeros(6, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"parameter forget.weight was torch.float64 \(5, 3\) .* \(6, 3\)"):
        learner(x[0])
    cell.forget.register_parameter("weight", None)
    with pytest.raises(RuntimeError, match=r"parameter forget.weight was taken out of the cell"):
        learner(x[0])
    lazy = Custom()
    lazy.linear = torch.nn.LazyLinear(4)
    with pytest.raises(ValueError, match=r"\['linear.weight', 'linear.bias'\] are lazy: run the cell once"):
        RTRL(lazy, 2)

    class Empty(DiagonalCell):
        def project(self, x):
            return (Given(x),)

        def step(self, h, y):
            return h + y

    with pytest.raises(ValueError, match="cell must have parameters, got a Empty without any"):
        RTRL(Empty(3, (3,)), 2)
    with pytest.raises(ContractError, match=r"output must return a tensor \(.*a row per input row, got tuple"):
        RTRL(Custom(output=lambda x, before, h, *values: (h, h)), 2)(x[0])


class Agent(torch.nn.Module):
    """A module that holds the learner of its own cell."""

    def __init__(self, commit_every):
        super().__init__()
        self.cell = initial_cell("retention, token shift")
        self.learner = RTRL(self.cell, 3, commit_every=commit_every)
        self.cell.learner = self.learner  # a cycle


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda each: pickle.loads(pickle.dumps(each)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("commit_every", [1, 5, "auto"])
def test_modules_that_hold_a_learner_are_copied_in_mid_stream(how, commit_every):
    agent, x, c = Agent(commit_every), inputs(19, 3), cotangents(19, 3)
    online(agent.learner, x[:7], c[:7], [1, 2])
    other = COPIES[how](agent)
    assert other.learner.cell is other.cell is not agent.cell and other.cell.learner is other.learner
    found = [online(each.learner, x[7:], c[7:], [2], {3: RESETS[6]}) for each in (agent, other)]
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0]) and bool(found[0]["start"].any())


def test_a_shallow_copy_goes_its_own_way_with_the_same_cell():
    cell, x, c = initial_cell("lru"), inputs(12, 3), cotangents(12, 3, density=1.0)
    learner = RTRL(cell, 3, commit_every=4)
    online(learner, x[:5], c[:5], [1])
    other = copy.copy(learner)
    assert other.cell is cell
    before = learner.state
    online(other, 2 * x[5:9], c[5:9], [1])
    assert torch.equal(before, learner.state)
    expected = bptt(cell, x, torch.cat((0 * c[:5], c[5:])))
    assert worst_error(online(learner, x[5:], c[5:], [1]), expected) <= 1e-12


@pytest.mark.parametrize("how", [*COPIES, "shallow"])
def test_the_past_of_carry_is_copied_in_mid_stream(how):
    """The copy hears of the runs of its own cell; with the same cell both do, and each keeps to its own."""
    cell, x, c = initial_cell("lru"), inputs(12, 3), cotangents(12, 3)
    carry = Carry(cell, commit_every=3)
    state = carry(cell.initial_state(3))
    for t in range(4):
        state = carry(cell(x[t], state)[1])
    past = carry._past
    modules = {id(module): module for module in cell.modules()}
    copied = copy.deepcopy(past, modules) if how == "shallow" else COPIES[how](past)
    assert (copied.cell is cell) == (how == "shallow") and copied._engine.cell is copied.cell
    other = Carry(copied.cell, commit_every=3)
    other._past = copied
    found, entries = [], state.detach()
    for each in (carry, other):
        each._entry = None
        own = each._past.cell
        own.zero_grad()
        state = each(entries.clone())
        for t in range(4, 12):
            out, state = own(x[t], state)
            state = each(state)
            (out * c[t]).sum().backward()
        found.append(gradients_of(own))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0]) and bool(found[0]["start"].any())
    assert len(carry._past._runs) <= 1  # of a carry that is left alone, while its cell runs on


def test_the_per_layer_approximation_trains_initial_states_and_is_copied():
    def make():
        torch.manual_seed(0)
        cells = [LRUCell(4, 3, 4, r_min=0.5), InitialELSTM(4, 3, 4)]
        stack = DiagonalStack(3, cells, 2).double()
        cells[1].make_initial()
        return stack

    def learn(learner, x, c):
        learner.stack.zero_grad()
        for x_t, c_t in zip(x, c, strict=True):
            (learner(x_t) * c_t).sum().backward()
        return gradients_of(learner.stack)

    stack, x, c = make(), inputs(9, 3), cotangents(9, 3, density=1.0)
    expected = bptt(stack, x, c)
    learner = PerLayerApproximation(stack, 3)
    stack.cells[1].start.data.add_(0.2)
    expected = bptt(stack, x, c)
    upper = {n: g for n, g in expected.items() if n.startswith(("cells.1.", "mixings.1.", "head."))}
    assert "cells.1.start" in upper
    found = learn(learner, x, c)
    assert worst_error({n: found[n] for n in upper}, upper) <= 1e-12
    learner.reset()
    found = learn(learner, x[:5], c[:5])
    others = [copy.deepcopy(learner), pickle.loads(pickle.dumps(learner)), copy.copy(learner)]
    loaded = PerLayerApproximation(copy.deepcopy(stack), 3)
    loaded.load_state_dict(learner.state_dict())
    for state in learner.state:
        state.zero_()  # a copy
    first, *rest = [learn(each, x[5:], c[5:]) for each in (learner, *others, loaded)]
    assert all(torch.equal(first[n], other[n]) for other in rest for n in first)
    with pytest.raises(ValueError, match=r"state is of another stack, dtype or batch size"):
        PerLayerApproximation(copy.deepcopy(stack), 2).load_state_dict(learner.state_dict())


class ComplexWeights(LRUCell):
    """An LRU whose eigenvalues and map are complex parameters."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(3, 4, 2, r_min=0.5)
        self.eigenvalue = torch.nn.Parameter(self.eigenvalues().detach().to(torch.complex128))
        self.map = torch.nn.Parameter(torch.view_as_complex(self.B.detach()).to(torch.complex128))
        del self.nu, self.theta, self.B

    def project(self, x):
        return Learned(self.eigenvalue), Learned(torch.exp(self.gamma)), Mapped(x, self.map, self.state_shape)


@pytest.mark.parametrize("segments", [[1], [3, 2]])
def test_complex_parameters_are_exact_in_carry_and_rtrl(segments):
    cell, x, c = ComplexWeights().double(), inputs(9, 3), cotangents(9, 3)
    for name in ("eigenvalue", "map"):
        cell.get_parameter(name).data = cell.get_parameter(name).data.to(torch.complex128)

    def real(gradients):
        return {n: torch.view_as_real(g) if g.is_complex() else g for n, g in gradients.items()}

    expected = real(bptt(cell, x, c))
    learner, carry = RTRL(cell, 3, verify="always"), Carry(cell, verify="always")
    assert worst_error(real(online(learner, x, c, segments)), expected) <= 1e-12
    assert worst_error(real(carried(carry, cell, x, c, segments)), expected) <= 1e-12
    for name, influence in learner.influence().items():
        torch.testing.assert_close(carry.influence()[name], influence, rtol=1e-12, atol=1e-14)


def test_carry_saves_what_verifies_it():
    cell, x, c = make_cell("elstm"), inputs(12, 3), cotangents(12, 3)
    carry = Carry(cell, verify=3)
    carried(carry, cell, x[:6], c[:6], [1])
    other = Carry(copy.deepcopy(cell), verify=3)
    other.load_state_dict(carry.state_dict())
    for each in (carry, other):
        each.reset()
        carried(each, each.module, x, c, [1])
    assert carry._past.verifier.compared == other._past.verifier.compared > 0
    old = carry.state_dict()
    del old["verifier"]
    other.load_state_dict(old)


@pytest.mark.parametrize("name", INITIAL)
def test_check_and_estimate_know_initial_states(name):
    cell = initial_cell(name)
    entries = cell.zero_entries(2)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(entries.shape, generator=generator, dtype=entries.dtype)
    check_cell(cell, inputs(1, 2, cell.input_size * (2 if cell.previous_input else 1))[0], h)
    assert estimate(cell, 3).influence_bytes == RTRL(cell, 3)._engine.influence.kept_bytes
