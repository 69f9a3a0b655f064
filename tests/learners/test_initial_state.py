"""A trained initial state is a segment from nowhere: streams start with its influence, and it trains."""

import copy

import pytest
import torch
from oracle import bptt, cotangents, gradients_of, inputs, online, worst_error
from pattern_cell import PatternCell, make_pattern
from torch import nn

from sparse_rtrl import RTRL, BlockRTRL, ContractError, SlotMoECell, get_expert_latent_activated
from sparse_rtrl.learners.cuda_graph import FixedSteps, run_directly

EXACT = 1e-12
STEPS, BATCH = 24, 3


class Started(PatternCell):
    """Its streams start from a learned state that depends on core, parametrized and experts' parameters."""

    def __init__(self, kind="own", pattern="random"):
        super().__init__(make_pattern(pattern, STEPS, BATCH), dense=False)
        self.kind = kind
        self.h0 = nn.Parameter(torch.randn(4, 3))
        self.each = nn.Parameter(torch.randn(BATCH, 4, 3))
        self.made = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4, bias=False))

    def initial_state(self, batch_size):
        if self.kind == "own":
            return self.h0.expand(batch_size, -1, -1)
        if self.kind == "made":
            return torch.tanh(self.made.weight + self.encode.bias).expand(batch_size, -1, -1)
        if self.kind == "experts":
            return (self.h0 + self.experts.weight[4, :1] * self.experts.bias[2]).expand(batch_size, -1, -1)
        if self.kind == "per stream":
            return torch.sin(self.each[:batch_size]) + self.h0
        if self.kind == "outside":
            return self.outside[0].expand(batch_size, 4, 3)
        if self.kind == "readout":
            return super().initial_state(batch_size) + self.readout.bias[0]
        return super().initial_state(batch_size)


def started(kind="own"):
    torch.manual_seed(0)
    return Started(kind).double()


RESETS = {
    7: torch.tensor([False, True, False]),
    15: torch.tensor([True, True, True]),
    19: torch.tensor([True, False, True]),
}


@pytest.mark.parametrize("kind", ["own", "made", "experts", "per stream"])
@pytest.mark.parametrize("catch_up", ["eager", "replay", "product", "auto"])
def test_it_trains_through_resets(kind, catch_up):
    cell, x, c = started(kind), inputs(STEPS, BATCH), cotangents(STEPS, BATCH)
    expected = bptt(cell, x, c, RESETS)
    for commit_every, segment in ((1, 1), (5, 1), (4, 6)):
        learner = RTRL(cell, BATCH, buffer=4, commit_every=commit_every, catch_up=catch_up)
        assert worst_error(online(learner, x, c, segment, RESETS), expected) <= EXACT
    assert float(expected["h0"].norm()) > 1e-3 or kind == "made"


def test_the_influence_of_the_first_state_is_its_jacobian():
    learner = RTRL(started("own"), BATCH)
    influence = learner.influence()
    assert torch.equal(influence["h0"].flatten(2), torch.eye(12, dtype=torch.float64).expand(BATCH, -1, -1))
    assert torch.equal(learner.state, learner.cell.h0.detach().expand(BATCH, -1, -1))


def test_fused_with_a_learned_start():
    torch.manual_seed(0)
    cell = SlotMoECell(4, 4, 4, 5, 2, 2, 2, 2).double()
    cell.initial_state = lambda batch: torch.tanh(cell.slot_table + cell.experts.bias[3, :4]).expand(batch, -1, -1)
    x, c = inputs(STEPS, BATCH), cotangents(STEPS, BATCH)
    expected = bptt(cell, x, c, RESETS)
    for catch_up in ("eager", "replay", "product"):
        for segment in (1, 5):
            learner = RTRL(cell, BATCH, buffer=4, catch_up=catch_up, verify="always")
            assert learner._engine.fused is not None
            assert worst_error(online(learner, x, c, segment, RESETS), expected) <= EXACT


def test_fixed_steps_with_a_learned_start():
    cell, x, c = started(), inputs(STEPS, BATCH), cotangents(STEPS, BATCH, density=1.0)
    expected = bptt(cell, x, c, RESETS)
    cell.route = lambda x, state, pattern=cell.pattern: pattern[int(x[0, -1])]
    learner = RTRL(cell, BATCH, catch_up="eager")
    learner._fixed = FixedSteps(learner._engine, learner._state, run_directly)
    assert worst_error(online(learner, x, c, 1, RESETS), expected) <= EXACT
    assert learner._fixed is not None


@pytest.mark.parametrize("when", ["built", "reset"])
def test_weights_that_are_loaded_before_the_first_step_count(when):
    cell, x, c = started(), inputs(STEPS, BATCH), cotangents(STEPS, BATCH)
    learner = RTRL(cell, BATCH)
    if when == "reset":
        learner(x[0])
        learner.reset()
    cell.load_state_dict({name: 0.5 * value for name, value in cell.state_dict().items()})
    expected = bptt(cell, x, c)
    assert torch.equal(learner.state[0], cell.h0)
    assert worst_error(online(learner, x, c), expected) <= EXACT


def test_the_influence_is_that_of_the_value_taken():
    """Optimizer steps on the way change nothing in what streams started from."""
    cell, x, c = started(), inputs(8, BATCH), cotangents(8, BATCH, density=1.0)
    learner = RTRL(cell, BATCH, commit_every=2, catch_up="replay")
    optimizer = torch.optim.SGD([cell.h0], 0.1)
    learner.attach(optimizer)
    taken = learner.state
    for t in range(8):
        (learner(x[t]) * c[t]).sum().backward()
        if t < 7:
            optimizer.step()
            cell.zero_grad()
    learner.flush()
    found = cell.h0.grad.clone()
    assert not torch.equal(cell.h0, taken[0])
    leaf = taken.clone().requires_grad_()
    state, routings = leaf, cell.pattern
    for t in range(8):
        output, _, state = cell(x[t], state, routings[t])
    (output * c[7]).sum().backward()
    torch.testing.assert_close(found, leaf.grad.sum(0), rtol=1e-12, atol=1e-14)


def test_a_start_that_is_saved_before_its_first_step():
    cell, x, c = started(), inputs(STEPS, BATCH), cotangents(STEPS, BATCH)
    learner = RTRL(cell, BATCH, commit_every=3)
    learner.unroll(x[:5])
    learner.reset(torch.tensor([True, False, True]))
    other = RTRL(copy.deepcopy(cell), BATCH, commit_every=3)
    other.load_state_dict(learner.state_dict())
    pair = [online(each, x, c) for each in (learner, other)]
    assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])
    assert pair[0]["h0"].any()


def test_a_start_drawn_at_random_stays_as_it_was_shown():
    cell = started("none")
    cell.initial_state = lambda batch: torch.randn(batch, 4, 3, dtype=torch.float64)
    learner = RTRL(cell, BATCH)
    shown = learner.state
    x = inputs(1, BATCH)[0]
    output = learner(x)
    assert torch.equal(output, cell(x, shown)[0])


def test_what_is_not_carried_is_refused_by_name():
    cell = started("outside")
    cell.outside = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True)]
    with pytest.raises(ContractError, match=r"of shape \(4, 3\), from outside"):
        RTRL(cell, BATCH)(inputs(1, BATCH)[0])
    with pytest.raises(ContractError, match=r"readout\.bias reaches the state"):
        RTRL(started("readout"), BATCH)(inputs(1, BATCH)[0])
    cell = started("none")
    cell.initial_state = lambda batch: torch.zeros(batch, 3, 4)
    with pytest.raises(ContractError, match=r"initial_state must return a tensor \(3, 4, 3\), got \(3, 3, 4\)"):
        RTRL(cell, BATCH)


def test_block_rtrl_refuses_what_it_cannot_carry():
    cell, x = started(), inputs(1, BATCH)[0]
    rtrl = BlockRTRL(cell.named_parameters(), BATCH, 12)
    h_t = cell.initial_state(BATCH).detach()
    out, info, _ = cell(x, h_t)
    active, write, read = get_expert_latent_activated(cell, info)
    with pytest.raises(ContractError, match="a trained initial state is carried by RTRL only"):
        rtrl.step(cell, x, h_t, out.sum(), active, read, write)
    cell = started("none")
    h_t = cell.each
    rtrl = BlockRTRL(cell.named_parameters(), BATCH, 12)
    out, info, _ = cell(x, h_t)
    active, write, read = get_expert_latent_activated(cell, info)
    with pytest.raises(ValueError, match="h_t must not be trainable, got parameter each"):
        rtrl.step(cell, x, h_t, out.sum(), active, read, write)
    assert not gradients_of(cell)["each"].any()
