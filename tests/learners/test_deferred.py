"""Deferred gradients are paid before they are needed, or an error says so."""

import copy

import pytest
import torch
from oracle import cotangents, gradients_of, inputs
from pattern_cell import PatternCell, make_pattern
from torch import nn

from sparse_rtrl import RTRL, SlotMoECell

STEPS, BATCH = 27, 2


def new_cell(kind="pattern"):
    torch.manual_seed(0)
    if kind == "fused":
        return SlotMoECell(4, 4, 4, 5, 1, 2, 2, 2).double()
    return PatternCell(make_pattern("random", STEPS, BATCH), dense=False).double()


def eager(cell, x, c, update, every=3, factor=1.0):
    """Parameters after a run in which nothing is ever deferred, updated after every few steps by ``update(cell)``."""
    learner = RTRL(cell, BATCH, catch_up="eager")
    for t in range(len(x)):
        (factor * learner(x[t]) * c[t]).sum().backward()
        if t % every == every - 1:
            update(cell)
            cell.zero_grad()
    return [p.detach().clone() for p in cell.parameters()]


def clip(cell):
    nn.utils.clip_grad_norm_(cell.parameters(), 0.3)


CHANGES = {
    "clipped": clip,
    "unscaled": lambda cell: [p.grad.mul_(0.5) for p in cell.parameters() if p.grad is not None],
    "replaced": lambda cell: [setattr(p, "grad", p.grad * 2) for p in cell.parameters() if p.grad is not None],
    "data": lambda cell: [p.grad.data.mul_(2) for p in cell.parameters() if p.grad is not None],
    "one of them": lambda cell: cell.experts.bias.grad.add_(1.0),
}


@pytest.mark.parametrize("kind", ["pattern", "fused"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_gradient_is_not_added_to(change, kind):
    cell, x, c = new_cell(kind), inputs(STEPS, BATCH), cotangents(STEPS, BATCH, density=1.0)
    learner = RTRL(cell, BATCH, commit_every=1, catch_up="replay")
    optimizer = torch.optim.SGD(cell.parameters(), 0.1)
    learner.attach(optimizer)
    for t in range(13):
        (learner(x[t]) * c[t]).sum().backward()
    assert learner._defers()
    before, state = copy.deepcopy(cell.state_dict()), copy.deepcopy(learner.state_dict()["influence"])
    CHANGES[change](cell)
    gradient = gradients_of(cell)
    with pytest.raises(RuntimeError, match=r"\.grad was changed .* call learner\.flush\(\)"):
        optimizer.step()
    for name, value in cell.state_dict().items():
        assert torch.equal(value, before[name])
    for name, value in gradients_of(cell).items():
        assert torch.equal(value, gradient[name])
    assert torch.equal(learner.state_dict()["influence"]["experts"], state["experts"])
    learner.flush()
    optimizer.step()  # the user has taken charge


@pytest.mark.parametrize("clear", ["none", "zeros"])
def test_a_cleared_gradient_is_not_a_changed_one(clear):
    cell, x, c = new_cell(), inputs(STEPS, BATCH), cotangents(STEPS, BATCH, density=1.0)
    learner = RTRL(cell, BATCH, commit_every=1, catch_up="replay")
    optimizer = torch.optim.SGD(cell.parameters(), 0.1)
    learner.attach(optimizer)
    for t in range(13):
        (learner(x[t]) * c[t]).sum().backward()
    cell.zero_grad(set_to_none=clear == "none")
    assert learner._defers()
    before = cell.experts.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, cell.experts.weight) and not learner._defers()


def test_a_changed_gradient_with_nothing_deferred_is_stepped_with():
    cell, x, c = new_cell(), inputs(STEPS, BATCH), cotangents(STEPS, BATCH, density=1.0)
    for catch_up in ("eager", "replay"):
        learner = RTRL(cell, BATCH, commit_every=1, catch_up=catch_up)
        optimizer = torch.optim.SGD(cell.parameters(), 0.1)
        handle = learner.attach(optimizer)
        (learner(x[0]) * c[0]).sum().backward()
        clip(cell)
        optimizer.step()
        handle.remove()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "adam": lambda p: torch.optim.Adam(p, 0.02, foreach=False),
    "fused adam": lambda p: torch.optim.Adam(p, 0.02, fused=True),
}


@pytest.mark.parametrize("kind", ["pattern", "fused"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_flush_everything_is_paid_and_the_clipped_step_is_right(name, kind):
    """Accumulation over three steps, flush, clip, step: the parameters are those of a run that owes nothing."""
    x, c = inputs(STEPS, BATCH), cotangents(STEPS, BATCH, density=1.0)
    cell = new_cell(kind)
    optimizer = OPTIMIZERS["adam" if name == "fused adam" else name](cell.parameters())

    def update(cell):
        clip(cell)
        optimizer.step()

    expected = eager(cell, x, c, update)
    for catch_up in ("replay", "product"):
        cell = new_cell(kind)
        learner, optimizer = RTRL(cell, BATCH, commit_every=1, catch_up=catch_up), OPTIMIZERS[name](cell.parameters())
        learner.attach(optimizer)
        deferred = 0
        for t in range(STEPS):
            (learner(x[t]) * c[t]).sum().backward()
            if t % 3 == 2:
                deferred += learner._defers()
                learner.flush()
                assert not learner._defers()
                clip(cell)
                optimizer.step()
                optimizer.zero_grad()
        assert deferred > 3
        for found, want in zip(cell.parameters(), expected, strict=True):
            torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-11)


def test_gradient_scaler():
    """A scaled loss, flush, unscale_, step, and a step that the scaler skips."""
    x, c = inputs(STEPS, BATCH), cotangents(STEPS, BATCH, density=1.0)
    cell = new_cell()
    plain = torch.optim.SGD(cell.parameters(), 0.05)
    calls = []

    def update(cell):
        calls.append(1)
        clip(cell)
        if len(calls) != 4:
            plain.step()

    expected = eager(cell, x, c, update)
    cell = new_cell()
    learner, optimizer = RTRL(cell, BATCH, commit_every=1, catch_up="replay"), torch.optim.SGD(cell.parameters(), 0.05)
    learner.attach(optimizer)
    scaler, number = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2), 0
    for t in range(STEPS):
        scaler.scale((learner(x[t]) * c[t]).sum()).backward()
        if t % 3 == 2:
            number += 1
            learner.flush()
            if number == 4:
                cell.readout.bias.grad[0] = float("inf")
            scaler.unscale_(optimizer)
            clip(cell)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    for found, want in zip(cell.parameters(), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-11)
    (learner(x[-1]) * c[-1]).sum().backward()
    learner._engine.influence.experts[:, -1] = 1.0  # deferred
    learner._engine.influence._rows_hold_gradients = True
    with pytest.raises(RuntimeError, match="unscaled"):
        scaler.step(optimizer)


@pytest.mark.parametrize("kind", ["pattern", "fused"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_is_not_attached_is_noticed_once(name, kind):
    cell, x, c = new_cell(kind), inputs(STEPS, BATCH), cotangents(STEPS, BATCH, density=1.0)
    learner, optimizer = RTRL(cell, BATCH, commit_every=1, catch_up="replay"), OPTIMIZERS[name](cell.parameters())
    for t in range(13):
        (learner(x[t]) * c[t]).sum().backward()
    assert learner._defers()
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(RuntimeError, match=r"learner\.attach\(optimizer\) once, or learner\.flush\(\).*discard"):
        learner(x[13])
    after = learner.state_dict()
    assert torch.equal(before["state"], after["state"]) and before["steps"] == after["steps"]
    assert torch.equal(before["influence"]["experts"], after["influence"]["experts"])
    (learner(x[13]) * c[13]).sum().backward()
    for pay in (learner.flush, learner.discard):
        pay()
        optimizer.step()
        (learner(x[14]) * c[14]).sum().backward()
    learner.attach(optimizer)
    for t in range(15, STEPS):
        (learner(x[t]) * c[t]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_optimizers_of_other_parameters_are_not_noticed():
    cell, x, c = new_cell(), inputs(STEPS, BATCH), cotangents(STEPS, BATCH, density=1.0)
    learner = RTRL(cell, BATCH, commit_every=1, catch_up="replay")
    optimizer = torch.optim.SGD([p for n, p in cell.named_parameters() if "experts" not in n], 0.1)
    for t in range(STEPS):
        (learner(x[t]) * c[t]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert learner._defers()


def test_optimizers_that_evaluate_the_loss_are_refused():
    cell, x = new_cell(), inputs(2, BATCH)
    learner = RTRL(cell, BATCH)
    with pytest.raises(ValueError, match="one gradient per step, got LBFGS"):
        learner.attach(torch.optim.LBFGS(cell.parameters()))
    optimizer = torch.optim.SGD(cell.parameters(), 0.1)
    learner.attach(optimizer)
    with pytest.raises(RuntimeError, match="step was given a closure"):
        optimizer.step(lambda: learner(x[0]).sum())
    with pytest.raises(RuntimeError, match="step was given a closure"):
        optimizer.step(closure=lambda: learner(x[0]).sum())
    assert learner._engine.steps == 0


def test_experts_that_are_unfrozen_later_are_watched():
    cell, x, c = new_cell(), inputs(STEPS, BATCH), cotangents(STEPS, BATCH, density=1.0)
    cell.experts.requires_grad_(False)
    learner, optimizer = RTRL(cell, BATCH, commit_every=1, catch_up="replay"), torch.optim.SGD(cell.parameters(), 0.1)
    learner.attach(optimizer)
    learner(x[0])
    cell.experts.requires_grad_(True)
    with pytest.warns(UserWarning, match="trainable from now on"):
        learner(x[1])
    for t in range(2, 13):
        (learner(x[t]) * c[t]).sum().backward()
    cell.experts.weight.grad.mul_(0.5)
    with pytest.raises(RuntimeError, match="flush"):
        optimizer.step()
