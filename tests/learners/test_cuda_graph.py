"""The step of fixed shapes against the ordinary one, run on the CPU without recording; recording needs a GPU."""

import pytest
import torch
from oracle import gradients_of
from recorded_steps import BATCH, check_equal, new_cell, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_rtrl import RTRL, NonFiniteError, Routing, SlotCell
from sparse_rtrl.learners.cuda_graph import FixedSteps, run_directly


def fixed_learner(cell, record=run_directly):
    """A learner as ``cuda_graph=True`` builds it, for the CPU."""
    learner = RTRL(cell, BATCH, catch_up="eager")
    learner._fixed = FixedSteps(learner._engine, learner._state, record)
    return learner


class NoLookAtValues(TorchDispatchMode):
    """Refuses what waits for the device, and what has a shape that depends on values."""

    refused = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.refused or masked:
            raise AssertionError(f"{func} looks at values")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("segment", "num_experts"), [(1, 5), (1, 2), (3, 5)])
def test_equals_the_ordinary_step(segment, num_experts):
    ordinary = RTRL(new_cell(num_experts), BATCH, commit_every=segment, catch_up="eager")
    check_equal(train(ordinary, segment), train(fixed_learner(new_cell(num_experts)), segment))


def test_a_segment_without_loss_that_is_not_committed_shows(monkeypatch):
    expected = train(RTRL(new_cell(), BATCH, commit_every=1, catch_up="eager"), 1)[0]
    monkeypatch.setattr(FixedSteps, "finish", lambda self: setattr(self, "_pending", None))
    found = train(fixed_learner(new_cell()), 1)[0]
    worst = max(
        float((f[n] - e[n]).norm() / e[n].norm().clamp(1e-9)) for f, e in zip(found, expected, strict=True) for n in e
    )
    assert worst > 1e-2


@pytest.mark.parametrize("segment", [1, 3])
def test_no_look_at_values_once_recorded(segment):
    learner = fixed_learner(new_cell())
    x = torch.randn(segment, BATCH, 3, dtype=torch.float64)
    learner.unroll(x).sum().backward()
    with NoLookAtValues():
        learner.unroll(x).sum().backward()
        learner.unroll(x)
        learner.unroll(x).sum().backward()
        learner.flush()
    ordinary = RTRL(new_cell(), BATCH, commit_every=segment, catch_up="eager", backend="reference")
    ordinary.unroll(x).sum().backward()
    with pytest.raises(AssertionError, match="looks at values"), NoLookAtValues():
        ordinary.unroll(x).sum().backward()


class ElementWise(SlotCell):
    """Uses a parameter in a way that has no factors."""

    def __init__(self):
        super().__init__(2, 3)
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.readout = nn.Linear(3, 2, dtype=torch.float64)

    def route(self, x, state):
        slots = torch.arange(2).expand(len(x), -1)
        return Routing(slots[:, :1], slots[:, 1:], slots[:, :0])

    def update(self, x, h_read, h_write, routing):
        new = torch.tanh(h_write * self.scale + x[:, None] + h_read)
        return new, self.readout(new[:, 0])


@pytest.mark.filterwarnings("ignore:scale. used in a way")
def test_falls_back_with_the_reason():
    learners = [fixed_learner(ElementWise()), RTRL(ElementWise(), BATCH, commit_every=1, catch_up="eager")]
    learners[1].cell.load_state_dict(learners[0].cell.state_dict())
    x = torch.randn(4, BATCH, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="cannot be recorded: scale: their dense"):
        learners[0](x[0]).sum().backward()
    learners[1](x[0]).sum().backward()
    for x_t in x[1:]:
        for learner in learners:
            learner(x_t).sum().backward()
    assert learners[0]._fixed is None
    for found, expected in zip(*(gradients_of(learner.cell).values() for learner in learners), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_falls_back_in_the_middle_when_recording_fails():
    def record(functions):
        if fail:
            raise RuntimeError("operation not permitted when stream is capturing")
        return functions

    cells = new_cell(), new_cell()
    fail, learner = False, fixed_learner(cells[0], record)
    ordinary = RTRL(cells[1], BATCH, commit_every=1, catch_up="eager")
    x = torch.randn(3, BATCH, 3, dtype=torch.float64)
    for each in (learner, ordinary):
        each(x[0])
        each(x[1]).sum().backward()
    fail = True
    ordinary.commit_every = 2
    with pytest.warns(UserWarning, match="operation not permitted"):
        learner.unroll(x[1:]).sum().backward()
    ordinary.unroll(x[1:]).sum().backward()
    for found, expected in zip(*(gradients_of(cell).values() for cell in cells), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_hook_is_an_obstacle():
    cell = new_cell()
    cell.query_token.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="module query_token has a hook"):
        fixed_learner(cell)(torch.zeros(BATCH, 3, dtype=torch.float64))


def test_backward_at_the_wrong_time():
    learner = fixed_learner(new_cell())
    x = torch.randn(BATCH, 3, dtype=torch.float64)
    first, second = learner(x), learner(x)
    with pytest.raises(RuntimeError, match="too late or twice"):
        first.sum().backward()
    second.sum().backward()


def test_a_parameter_that_changes_between_a_step_and_its_backward():
    """The gradient is that of the parameters the step ran with, whether a version counter shows the change or not."""
    x, found = torch.randn(2, BATCH, 3, dtype=torch.float64), []
    for change in (False, True):
        learner = fixed_learner(new_cell())
        learner(x[0]).sum().backward()
        output = learner(x[1])
        learner.cell.zero_grad()
        if change:
            for parameter in learner.cell.parameters():
                parameter.data.add_(0.1)
        output.sum().backward()
        found.append(gradients_of(learner.cell))
    found = [{n: g for n, g in each.items() if not n.startswith("core")} for each in found]
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_what_is_not_finite_is_reported_at_the_reset():
    learner = fixed_learner(new_cell())
    x = torch.randn(BATCH, 3, dtype=torch.float64)
    learner(x).sum().backward()
    learner(x * torch.nan).sum().backward()
    with pytest.raises(NonFiniteError):
        learner.reset()
    learner.reset()
    learner(x).sum().backward()
    assert all(bool(torch.isfinite(matrix).all()) for matrix in learner.influence().values())


def test_needs_a_cuda_device():
    with pytest.raises(ValueError, match="cuda_graph=True needs a cell on a CUDA device, got one on cpu"):
        RTRL(new_cell(), BATCH, cuda_graph=True)
    with pytest.raises(ValueError, match="catch_up must be 'eager' or 'auto' with cuda_graph=True, got 'replay'"):
        RTRL(new_cell(), BATCH, catch_up="replay", cuda_graph=True)
