"""The sample of calls that is compared with an ordinary backward pass, for slot cells."""

import copy

import pytest
import torch
from oracle import bptt, cotangents, gradients_of, inputs, online, worst_error
from pattern_cell import PatternCell, make_pattern

from sparse_rtrl import RTRL, ContractError, SlotMoECell
from sparse_rtrl.capture.fused import FusedCapture
from sparse_rtrl.capture.jacobian import JacobianCapture
from sparse_rtrl.errors import DisagreementError
from sparse_rtrl.learners.cuda_graph import FixedSteps, run_directly

STEPS, BATCH = 20, 3


def new_cell(kind):
    torch.manual_seed(0)
    if kind == "fused":
        return SlotMoECell(4, 4, 4, 5, 2, 2, 2, 2).double()
    return PatternCell(make_pattern("random", STEPS, BATCH), dense=kind == "dense").double()


@pytest.mark.filterwarnings("ignore:scale. used in a way")
@pytest.mark.parametrize("kind", ["factors", "dense", "fused"])
@pytest.mark.parametrize("segment", [1, 7])
def test_always_finds_nothing_where_all_is_right(kind, segment):
    cell, x, c = new_cell(kind), inputs(STEPS, BATCH), cotangents(STEPS, BATCH)
    learner = RTRL(cell, BATCH, verify="always")
    assert (learner._engine.fused is not None) == (kind == "fused")
    assert worst_error(online(learner, x, c, segment), bptt(cell, x, c)) <= 1e-12
    assert learner._engine.verifier.compared == -(-STEPS // segment)


def wrong_factors(monkeypatch, part, scale):
    """Captured steps whose state Jacobian or deltas are wrong from the fifth one on."""
    original, count = JacobianCapture.steps, [0]

    def steps(self, *arguments):
        captured = original(self, *arguments)
        count[0] += 1
        if count[0] > 4:
            for step in captured:
                value = {"state": step.Jh, "core": step.core.delta, "experts": step.expert.delta}[part]
                value *= scale
        return captured

    monkeypatch.setattr(JacobianCapture, "steps", steps)


@pytest.mark.parametrize("part", ["state", "core", "experts"])
def test_a_fault_that_begins_later_is_found_and_nothing_is_changed(part, monkeypatch):
    wrong_factors(monkeypatch, part, 1 + 1e-6)
    cell, x = new_cell("factors"), inputs(STEPS, BATCH)
    learner = RTRL(cell, BATCH, verify="always", commit_every=2)
    for t in range(4):
        learner(x[t]).sum().backward()
    before, gradients = copy.deepcopy(learner.state_dict()), gradients_of(cell)
    name = {"state": "the state", "core": r"encode\.weight", "experts": r"experts\.weight"}[part]
    with pytest.raises(DisagreementError, match=rf"step 4, stream \d: .*{name}.*capture='dense'") as caught:
        learner(x[4])
    assert caught.value.step == 4
    after = learner.state_dict()
    assert before["steps"] == after["steps"] and torch.equal(before["state"], after["state"])
    for key in ("core", "experts", "window_loss_row"):
        assert torch.equal(before["influence"][key], after["influence"][key])
    for key, gradient in gradients_of(cell).items():
        assert torch.equal(gradient, gradients[key])


def test_a_sample_finds_it_in_the_end(monkeypatch):
    wrong_factors(monkeypatch, "state", 1.01)
    cell, x = new_cell("factors"), inputs(STEPS, BATCH)
    with pytest.raises(DisagreementError):
        learner = RTRL(cell, BATCH, verify=8)
        for t in range(200):
            learner(x[t % STEPS])
    learner = RTRL(cell, BATCH, verify="never")
    for t in range(200):
        learner(x[t % STEPS])


@pytest.mark.parametrize("name", ["saved", "weights", "state"])
@pytest.mark.parametrize("segment", [1, 9])
def test_a_fault_of_the_fused_pass_is_found(name, segment, monkeypatch):
    run = FusedCapture.run

    def wrong(self, *arguments):
        steps, slots, state = run(self, *arguments)
        if name == "saved":
            steps.saved.mul_(1.001)
        elif name == "weights":
            steps.weights[1].mul_(1.001)
        else:
            state = state + 1e-3
        return steps, slots, state

    cell, x = new_cell("fused"), inputs(STEPS, BATCH)
    learner = RTRL(cell, BATCH, verify="always")
    learner.unroll(x[:3]).sum().backward()
    monkeypatch.setattr(FusedCapture, "run", wrong)
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(ContractError, match="another state than update" if name == "state" else "disagrees"):
        learner.unroll(x[3 : 3 + segment])
    after = learner.state_dict()
    assert before["steps"] == after["steps"] and torch.equal(before["state"], after["state"])


def test_the_draws_are_saved_and_old_states_load():
    cell, x = new_cell("factors"), inputs(STEPS, BATCH)
    learner = RTRL(cell, BATCH, verify=3)
    for t in range(7):
        learner(x[t])
    state = learner.state_dict()
    other = RTRL(cell, BATCH, verify=3)
    other.load_state_dict(state)
    drawn = [[each._engine.verifier.due() for _ in range(40)] for each in (learner, other)]
    assert drawn[0] == drawn[1] and 1 < sum(drawn[0]) < 39
    for key in ("verifier", "starting"):
        state.pop(key)
    RTRL(cell, BATCH).load_state_dict(state)


@pytest.mark.filterwarnings("ignore:scale. used in a way")
@pytest.mark.parametrize("kind", ["factors", "dense", "fused"])
def test_dense_capture_is_exact(kind):
    cell, x, c = new_cell(kind), inputs(STEPS, BATCH), cotangents(STEPS, BATCH)
    learner = RTRL(cell, BATCH, capture="dense", commit_every=3, catch_up="replay", buffer=4)
    assert worst_error(online(learner, x, c, 2), bptt(cell, x, c)) <= 1e-12
    assert learner._engine.fused is None
    assert learner._engine.capture.dense == {p.name for p in learner._engine.groups.all}


def test_bad_options():
    cell = new_cell("factors")
    with pytest.raises(ValueError, match=r"verify must be 'sample', .*got 'often'"):
        RTRL(cell, BATCH, verify="often")
    with pytest.raises(ValueError, match=r"capture must be one of .*got 'sparse'"):
        RTRL(cell, BATCH, capture="sparse")


def test_a_kink_within_rounding_is_no_disagreement():
    """float32, rectified units that are zero within rounding: a second comparison from a state nearby decides."""

    class Kinked(PatternCell):
        def update(self, x, h_read, h_write, routing):
            new, output = super().update(x, h_read, h_write, routing)
            y = (new - h_write).relu() if self.on else new
            return torch.tanh(y), output

    torch.manual_seed(0)
    cell = Kinked(make_pattern("overlap", STEPS, BATCH), dense=False)
    cell.on = True
    learner, x = RTRL(cell, BATCH, verify="always"), inputs(STEPS, BATCH).float()
    compare, calls = JacobianCapture.compare, []

    def once_wrong(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise DisagreementError(2, 0, ["the state"], "rounding")
        return compare(self, *arguments)

    learner._engine.capture.compare = once_wrong.__get__(learner._engine.capture)
    for t in range(STEPS):
        learner(x[t])
    assert len(calls) == STEPS + 1


def test_recorded_steps_report_one_call_late():
    class Late(SlotMoECell):
        def transition(self, x, h_read, h_write, routing):
            new = super().transition(x, h_read, h_write, routing)
            return new + 0.1 * self.mixing * h_write.mean(0)

    torch.manual_seed(0)
    cell = Late(4, 4, 4, 5, 2, 2, 2, 2).double()
    cell.register_buffer("mixing", torch.zeros((), dtype=torch.float64))
    learner = RTRL(cell, BATCH, catch_up="eager")
    learner._fixed = FixedSteps(learner._engine, learner._state, run_directly)
    x = inputs(6, BATCH)
    learner(x[0]).sum().backward()
    learner(x[1]).sum().backward()
    cell.mixing.fill_(1.0)
    learner(x[2]).sum().backward()
    with pytest.raises(ContractError, match=r"was not what was captured.*influence each other"):
        learner(x[3])
    learner(x[3])
    with pytest.raises(ContractError, match="was not what was captured"):
        learner.state_dict()


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("way", ["not linear", "batch"])
def test_backward_passes_that_are_no_derivative_of_their_rows(way, late):
    """One that is not linear in its gradient is seen in every step, one that counts rows at the first capture."""

    class Bent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h, now):
            ctx.now = now
            return h.clone()

        @staticmethod
        def backward(ctx, g):
            factor = g.abs() if way == "not linear" else float(len(g) > BATCH)
            return g * (1 + ctx.now * factor), None

    class Cell(PatternCell):
        def update(self, x, h_read, h_write, routing):
            now = float(x[0, -1] >= late)
            return super().update(x, Bent.apply(h_read, now), Bent.apply(h_write, now), routing)

    torch.manual_seed(0)
    cell = Cell(make_pattern("random", 4, BATCH), dense=False).double()
    learner, x = RTRL(cell, BATCH, verify="always"), inputs(4, BATCH)
    for t in range(late):
        learner(x[t])
    message = "backward pass inside of update is not linear" if way == "not linear" else "disagrees with"
    with pytest.raises(ContractError, match=message):
        learner(x[late])
