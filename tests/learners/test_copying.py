"""Learners of slot cells are copied and pickled in mid-stream, alone and inside of modules, and go on bit for bit."""

import copy
import io
import pickle

import pytest
import torch
from oracle import cotangents, gradients_of, inputs, online
from pattern_cell import PatternCell, make_pattern
from torch import nn

from sparse_rtrl import RTRL, BlockRTRL, SlotMoECell, get_expert_latent_activated
from sparse_rtrl.learners.cuda_graph import FixedSteps, run_directly

STEPS, BATCH = 30, 2


def new_cell(kind):
    torch.manual_seed(0)
    if kind == "fused":
        return SlotMoECell(4, 4, 4, 5, 2, 2, 2, 2).double()
    return PatternCell(make_pattern("random", STEPS, BATCH), dense=False).double()


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": pickled, "save": saved}


def tensors_of(learner):
    influence = learner._engine.influence
    return [influence.core, influence.experts, influence.last_update, influence.handed_out, learner._state]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["pattern", "fused"])
@pytest.mark.parametrize("catch_up", ["eager", "replay", "product", "auto"])
def test_a_copy_goes_on_bit_for_bit(kind, catch_up, way):
    x, c = inputs(STEPS, BATCH), cotangents(STEPS, BATCH, density=0.7)
    learner = RTRL(new_cell(kind), BATCH, buffer=5, commit_every=4, catch_up=catch_up, verify=3)
    online(learner, x[:18], c[:18])
    assert learner._engine.influence.window
    copied = WAYS[way](learner)
    assert (copied.cell is learner.cell) == (way == "copy")
    theirs = {t.untyped_storage().data_ptr() for t in tensors_of(learner)}
    assert not theirs & {t.untyped_storage().data_ptr() for t in tensors_of(copied)}
    alone = copy.deepcopy(learner)
    resets = {7: torch.tensor([True, False])}
    found = [online(each, x[18:], c[18:], resets=resets) for each in (alone, copied, learner)]
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])
    assert all(torch.equal(m, copied.influence()[name]) for name, m in learner.influence().items())
    assert torch.equal(learner.state, copied.state) and learner.events == copied.events
    assert learner._engine.verifier.compared == copied._engine.verifier.compared > 0


class Agent(nn.Module):
    """A module that holds its cell and the learner of it."""

    def __init__(self, kind, learner_first):
        super().__init__()
        cell = new_cell(kind)
        if learner_first:
            self.learner = RTRL(cell, BATCH, commit_every=4)
            self.rtrl = BlockRTRL(cell.named_parameters(), BATCH, cell.hidden_size)
        self.cell, self.scale = cell, nn.Parameter(torch.ones(()))
        if not learner_first:
            self.learner = RTRL(cell, BATCH, commit_every=4)
            self.rtrl = BlockRTRL(cell.named_parameters(), BATCH, cell.hidden_size)
        cell.owner = [self]  # and back again


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("kind", ["pattern", "fused"])
@pytest.mark.parametrize("learner_first", [True, False])
def test_a_module_that_holds_a_learner(kind, learner_first, way):
    x, c = inputs(STEPS, BATCH), cotangents(STEPS, BATCH, density=0.7)
    agent = Agent(kind, learner_first)
    online(agent.learner, x[:10], c[:10])
    h_t = block_steps(agent.rtrl, agent.cell, agent.cell.initial_state(BATCH), x[:6])
    agent.cell.zero_grad()
    copied = WAYS[way](agent)
    assert copied.learner.cell is copied.cell and copied.cell.owner[0] is copied
    assert copied.rtrl._engine.cell is copied.cell
    assert all(any(t is p for p in copied.cell.parameters()) for t in copied.rtrl.state_params.values())
    found = []
    for each in (agent, copied):
        found.append(online(each.learner, x[10:], c[10:]))
        each.cell.zero_grad()
        block_steps(each.rtrl, each.cell, h_t.clone(), x[6:12])
        found.append(gradients_of(each.cell))
    for one, other in ((found[0], found[2]), (found[1], found[3])):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def block_steps(rtrl, cell, h_t, x):
    for x_t in x:
        out, info, h_next = cell(x_t, h_t)
        active, write, read = get_expert_latent_activated(cell, info)
        rtrl.step(cell, x_t, h_t, out.sum(), active, read, write)
        h_t = h_next.detach()
    return h_t


@pytest.mark.parametrize("way", WAYS)
def test_block_rtrl_is_copied(way):
    cell, x = new_cell("fused"), inputs(12, BATCH)
    rtrl = BlockRTRL(cell.named_parameters(), BATCH, cell.hidden_size, 4, "replay")
    fresh = WAYS[way](rtrl)
    assert fresh.influence() == {}
    h_t = block_steps(rtrl, cell, cell.initial_state(BATCH), x[:6])
    copied = WAYS[way](rtrl)
    for each in (rtrl, copied):
        block_steps(each, each._engine.cell, h_t.clone(), x[6:])
    assert (copied._engine.cell is cell) == (way == "copy")
    for name, matrix in rtrl.influence().items():
        assert torch.equal(matrix, copied.influence()[name])


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "copy"])
def test_fixed_steps_are_recorded_anew(way, monkeypatch):
    monkeypatch.setattr("sparse_rtrl.learners.cuda_graph.record_graphs", run_directly)
    monkeypatch.setattr(FixedSteps.__init__, "__defaults__", (run_directly,))
    x = inputs(12, BATCH)
    learner = RTRL(new_cell("fused"), BATCH, catch_up="eager")
    learner._fixed = FixedSteps(learner._engine, learner._state)
    for t in range(6):
        learner(x[t]).sum().backward()
    copied = WAYS[way](learner)
    assert copied._fixed is not None and copied._fixed is not learner._fixed
    found = []
    for each in (learner, copied):
        each.cell.zero_grad()
        for t in range(6, 12):
            each(x[t]).sum().backward()
        found.append(gradients_of(each.cell))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert torch.equal(learner.state, copied.state)


def test_a_copy_before_the_first_step_and_with_an_optimizer_attached():
    cell = new_cell("pattern")
    learner, optimizer = RTRL(cell, BATCH), torch.optim.SGD(cell.parameters(), 0.1)
    learner.attach(optimizer)
    for way in WAYS.values():
        copied = way(learner)
        copied(inputs(1, BATCH)[0]).sum().backward()
        assert copied._attachments == () and learner._engine.steps == 0
    assert copy.copy(learner)._attachments == ()
    with pytest.raises(TypeError):
        RTRL()


def test_a_step_whose_backward_is_still_to_come():
    cell, x = new_cell("fused"), inputs(3, BATCH)
    learner = RTRL(cell, BATCH, commit_every=4)
    output = learner(x[0])
    copied = copy.deepcopy(learner)
    output.sum().backward()  # of the original alone
    assert not any(p.grad is not None for p in copied.cell.parameters())
    with pytest.raises(RuntimeError, match="has not taken one"):
        copied.entry_state  # noqa: B018
    copied(x[1]).sum().backward()
    assert any(p.grad is not None for p in copied.cell.parameters())
