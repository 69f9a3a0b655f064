"""Diagonal cells: the online gradient is that of backpropagation through the whole past, in little memory."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diagonal_oracle import CELLS, bptt, gradients_of, inputs, make_cell, online, where
from oracle import cotangents, worst_error

import sparse_rtrl
from sparse_rtrl import (
    RTRL,
    Carry,
    ContractError,
    DiagonalCell,
    ELSTMCell,
    Given,
    Learned,
    LRUCell,
    MambaCell,
    Mapped,
    NonFiniteError,
    RetentionCell,
    RWKVCell,
    check_cell,
    estimate,
)
from sparse_rtrl.influence import diagonal as diagonal_influence
from sparse_rtrl.influence.diagonal import DiagonalInfluence

RESETS = {8: torch.tensor([True, False, False]), 14: torch.tensor([False, True, True])}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    ("segments", "commit_every"), [([1], 1), ([1], 3), ([1], "auto"), ([4, 1, 2], "auto"), ([2, 3], 4)]
)
def test_gradient_is_that_of_bptt(name, segments, commit_every):
    cell, x, c = make_cell(name), inputs(19, 3), cotangents(19, 3)
    expected = bptt(cell, x, c, RESETS)
    learner = RTRL(cell, 3, commit_every=commit_every)
    assert worst_error(online(learner, x, c, segments, RESETS), expected) <= 1e-12
    # Segments of one step, cut off from each other, are far away: the past matters here.
    assert worst_error(bptt(cell, x, c, RESETS, truncate=1), expected) > 1e-2


@pytest.mark.parametrize("name", CELLS)
def test_the_reference_backend_gives_the_same(name):
    cell, x, c = make_cell(name), inputs(9, 3), cotangents(9, 3)
    expected = bptt(cell, x, c)
    assert worst_error(online(RTRL(cell, 3, backend="reference"), x, c, [1, 2]), expected) <= 1e-12


@pytest.mark.parametrize("name", CELLS)
def test_wrong_variants_are_seen(name, monkeypatch):
    cell, x, c = make_cell(name), inputs(19, 3), cotangents(19, 3)
    expected = bptt(cell, x, c, RESETS)
    unreset = RTRL(cell, 3)
    monkeypatch.setattr(DiagonalInfluence, "reset", lambda self, streams=None: self.commit())
    if name != "rwkv":  # whose initial state, an exponent below every key, forgets by itself
        assert worst_error(online(unreset, x, c, [1], RESETS), expected) > 1e-2
    monkeypatch.undo()

    capture = DiagonalInfluence._capture

    def without_decay(self, *forgotten):
        steps = capture(self, *forgotten)
        return replace(steps, decays=torch.ones_like(steps.decays))

    if name != "linear attention":  # which has none
        monkeypatch.setattr(DiagonalInfluence, "_capture", without_decay)
        assert worst_error(online(RTRL(cell, 3), x, c, [1], RESETS), expected) > 1e-2


@pytest.mark.parametrize("name", ["lru", "retention, learned decay", "rwkv"])
def test_influence_is_the_jacobian_of_the_state(name):
    cell, x = make_cell(name), inputs(5, 2)
    learner = RTRL(cell, 2, commit_every=2)
    for x_t in x:
        learner(x_t)
    state = cell.initial_state(2)
    for x_t in x:
        _, state = cell(x_t, state)
    entries = state if isinstance(state, torch.Tensor) else state[0]
    parts = [entries.real, entries.imag] if entries.is_complex() else [entries]
    for parameter, influence in learner.influence().items():
        tensor = cell.get_parameter(parameter)
        found = [influence.real, influence.imag] if entries.is_complex() else [influence]
        for part, own in zip(parts, found, strict=True):
            for place in [(0,) * part.dim(), tuple(size - 1 for size in part.shape)]:
                (expected,) = torch.autograd.grad(part[place], tensor, retain_graph=True)
                torch.testing.assert_close(own[place], expected, rtol=1e-10, atol=1e-12)
        assert bool(influence.abs().max() > 0)


def along_the_path(cell, parameters, x, c, resets):
    """Gradient of the loss at the last step, every step with parameters of its own, added up over the steps."""
    state, leaves = cell.initial_state(x.shape[1]), []
    for step, values in enumerate(parameters):
        if step in resets:
            state = where(resets[step], cell.initial_state(x.shape[1]), state)
        leaves.append({n: p.clone().requires_grad_(cell.get_parameter(n).requires_grad) for n, p in values.items()})
        output, state = torch.func.functional_call(cell, leaves[-1], (x[step], state))
    (output * c).sum().backward()
    return {
        n: sum(torch.zeros_like(p) if own[n].grad is None else own[n].grad for own in leaves)
        for n, p in cell.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("commit_every", [1, 3, 16, "auto"])
@pytest.mark.parametrize("name", ["elstm", "retention, learned decay", "lru", "rwkv"])
def test_every_step_counts_with_the_parameters_it_was_run_with(name, commit_every):
    """Optimizer steps in place after every step, losses and resets anywhere, one buffer for all inputs."""
    cell, x, c = make_cell(name), inputs(27, 3), cotangents(27, 3, density=0.3)
    resets = {5: torch.tensor([True, False, False]), 12: torch.tensor([False, True, True])}
    other = make_cell(name)
    learners = RTRL(cell, 3, commit_every=commit_every), RTRL(other, 3, commit_every=1)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.02, momentum=0.9)
    buffer, parameters, checked = torch.empty_like(x[0]), [], 0
    for t in range(27):
        parameters.append({n: p.detach().clone() for n, p in cell.named_parameters()})
        for learner, x_t in zip(learners, (buffer.copy_(x[t]), x[t]), strict=True):
            if t in resets:
                learner.reset(resets[t])
            output = learner(x_t)
            if bool(c[t].any()):
                (output * c[t]).sum().backward()
        if bool(c[t].any()):
            found = gradients_of(cell)
            assert worst_error(found, gradients_of(other)) <= 1e-12
            # Functions of parameters are differentiated where they are now, so these two are left out here.
            if name not in ("lru", "rwkv"):
                assert worst_error(found, along_the_path(cell, parameters, x, c[t], resets)) <= 1e-12
                if t > 15:  # where the parameters have moved, those of the last step alone give another gradient
                    same = along_the_path(cell, parameters[-1:] * (t + 1), x, c[t], resets)
                    checked += worst_error(same, found) > 1e-2
        optimizer.step()
        other.load_state_dict(cell.state_dict())  # in place
        cell.zero_grad(), other.zero_grad()
    assert checked or name in ("lru", "rwkv")


@pytest.mark.parametrize("order", [[6, 5, 2], [2, 5, 6]])
def test_losses_in_any_order_within_a_window(order):
    cell, x, c = make_cell("lru"), inputs(9, 2), cotangents(9, 2, density=1.0)
    c[[t for t in range(9) if t not in order]] = 0
    expected = bptt(cell, x, c)
    for commit_every in (9, "auto"):
        learner = RTRL(cell, 2, commit_every=commit_every)
        outputs = [learner(x_t) for x_t in x]
        for t in order:
            (outputs[t] * c[t]).sum().backward()
        assert worst_error(gradients_of(cell), expected) <= 1e-12
        cell.zero_grad()


def test_steps_that_no_loss_needs_are_captured_together(monkeypatch):
    cell, x = make_cell("lru"), inputs(40, 2)
    learner, captured = RTRL(cell, 2, verify="never"), []
    derivatives = diagonal_influence.derivatives
    monkeypatch.setattr(
        diagonal_influence, "derivatives", lambda cell, h, *rest: captured.append(len(h)) or derivatives(cell, h, *rest)
    )
    for x_t in x:
        learner(x_t)
    assert captured == [32, 32] and learner._engine.influence.window == [1] * 8
    learner.reset()
    assert captured == [32, 32] and learner._engine.influence.window == []
    for x_t in x[:3]:
        output = learner(x_t)
    output.sum().backward()
    assert captured[2:] == [6] and learner._engine.influence.window == []
    wide = RTRL(RetentionCell(4, 8, 128, 4), 16)._engine.influence
    assert wide.suggested_window() == 1  # a state much larger than the influence


def test_a_derivative_that_is_not_finite_is_named_with_its_step():
    cell = Custom(
        lambda self, h, y, s: s * h + torch.sqrt(y.abs()),
        lambda self, x: (Mapped(x, self.linear.weight, (4,)), Learned(self.scale)),
    ).double()
    x = inputs(5, 2)
    x[2, 1] = 0
    learner = RTRL(cell, 2)
    output = [learner(x_t) for x_t in x][-1]
    before = learner.state.clone()
    with pytest.raises(NonFiniteError, match=r"step 2: .* in the derivative by value 0 of project, streams \[1\]"):
        output.sum().backward()
    influence = learner._engine.influence
    assert influence.window == [1] * 5 and not any(bool(m.any()) for m in influence.matrices)
    assert torch.equal(learner.state, before)
    with pytest.raises(NonFiniteError, match=r"step 2: .* reset these streams"):
        learner.reset(torch.tensor([True, False]))  # not the one with the error
    cell.zero_grad()
    learner.reset(torch.tensor([False, True]))
    c = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for x_t, c_t in zip(x[3:], c, strict=True):
        (learner(x_t) * c_t).sum().backward()
    found = gradients_of(cell)
    cell.zero_grad()
    again = torch.cat((x, x[3:]))
    for stream, begin in ((0, 0), (1, 5)):  # stream 0 as if nothing had happened, stream 1 from its new start
        outputs, _ = cell.unroll(again[begin:, stream : stream + 1], cell.initial_state(1))
        (outputs[-2:] * c[:, stream : stream + 1]).sum().backward()
    assert worst_error(found, gradients_of(cell)) <= 1e-12
    for streams in (None, torch.ones(2, dtype=torch.bool)):
        learner(x[2])
        learner.reset(streams)
    (learner(x[0]) * 2).sum().backward()
    carry = Carry(cell)
    _, h = cell.unroll(x, carry(cell.initial_state(2)))
    carry(h)
    carry.reset()
    assert carry(cell.initial_state(2)).shape == (2, 4)


class Shown(LRUCell):
    """Hands out a value that its state was made of."""

    def output(self, x, before, h, *values):
        return torch.cat((super().output(x, before, h, *values), values[-1].real.flatten(1)), 1)


@pytest.mark.parametrize("name", ["shown", "rwkv", "retention, token shift"])
def test_what_the_caller_changes_afterwards_does_not_matter(name):
    torch.manual_seed(0)
    cell = Shown(3, 4, 2).double() if name == "shown" else make_cell(name)
    x, buffer = inputs(6, 2), torch.empty(2, 3, dtype=torch.float64)
    cell.unroll(x, cell.initial_state(2))[0].sum().backward()
    expected = gradients_of(cell)
    cell.zero_grad()
    learner = RTRL(cell, 2, commit_every=16)
    evaluation = learner.evaluate()
    for x_t in x:
        buffer.copy_(x_t)
        state = learner.state
        output = learner(buffer)
        assert torch.equal(output, evaluation(buffer))
        output.sum().backward()
        for changed in (output.data, *([state] if isinstance(state, torch.Tensor) else state)):
            changed.zero_()
    assert worst_error(gradients_of(cell), expected) <= 1e-12


class Eigenvalue(LRUCell):
    """An LRU whose eigenvalue, input normalisation and maps are parameters themselves, in torch's convention."""

    def __init__(self, eigenvalue, gamma, B, C, D):
        super().__init__(1, 1, 1)
        del self.nu, self.theta, self.gamma, self.B
        self.eigenvalue, self.gain, self.B = (
            torch.nn.Parameter(torch.tensor(value, dtype=dtype))
            for value, dtype in (
                ([eigenvalue], torch.complex128),
                ([gamma], torch.float64),
                ([[B]], torch.complex128),
            )
        )
        self.readout = torch.nn.Module()
        self.readout.C = torch.nn.Parameter(torch.tensor([[C]], dtype=torch.complex128))
        self.readout.D = torch.nn.Parameter(torch.tensor([[D]], dtype=torch.float64))

    def project(self, x):
        return Learned(self.eigenvalue), Learned(self.gain), Mapped(x, self.B, (1,))

    def output(self, x, before, h, *values):
        return (h @ self.readout.C.t()).real + x @ self.readout.D.t()


@pytest.mark.parametrize("segment", [1, 2])
def test_the_published_case_of_the_lru(segment):
    """Zucchet et al. 2023, Online learning of long-range dependencies; there the gradient of λ is the conjugate."""
    cell = Eigenvalue(0.5 + 0j, 1.0, 2 + 2j, 2 + 1j, 0.0)
    learner = RTRL(cell, 1)
    xs = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(3, 1, 1)
    for chunk in xs.split(segment):
        (0.5 * (learner.unroll(chunk) - 1).square().sum()).backward()
    found = {name: complex(gradient) for name, gradient in gradients_of(cell).items()}
    assert found == {
        "eigenvalue": 53 - 159j,
        "gain": 85.75,
        "B": 85.75 - 42.875j,
        "readout.C": 85.75 - 85.75j,
        "readout.D": 31.5,
    }


def test_the_element_wise_lstm_at_the_sizes_of_its_paper_code():
    """Input 3, hidden 5, length 70, batch 10, as IDSIA's code compares its RTRL with BPTT: entry by entry."""
    torch.manual_seed(0)
    cell = ELSTMCell(3, 5, 5).double()
    x, c = inputs(70, 10), cotangents(70, 10, outputs=5, density=1.0)
    expected, found = bptt(cell, x, c), online(RTRL(cell, 10), x, c, [1])
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-11)
    truncated = bptt(cell, x, c, truncate=1)
    assert worst_error(truncated, expected) > 1e-2


@pytest.mark.parametrize("name", ["lru", "retention", "rwkv"])
@pytest.mark.parametrize("commit_every", [1, 3, "auto"])
def test_resuming_is_bit_for_bit(name, commit_every, tmp_path):
    cell, x, c = make_cell(name), inputs(19, 3), cotangents(19, 3)
    c[5:7] = 0
    learner, unsaved = (RTRL(cell, 3, commit_every=commit_every) for _ in range(2))
    for each in (learner, unsaved):
        online(each, x[:7], c[:7], [2, 1])
    assert bool(learner._engine.influence._recorded)  # steps that are not captured yet
    torch.save(learner.state_dict(), tmp_path / "learner.pt")
    other = RTRL(copy.deepcopy(cell), 3)
    other.load_state_dict(torch.load(tmp_path / "learner.pt", weights_only=True))
    copied = copy.deepcopy(learner)
    found = [online(each, x[7:], c[7:], [1, 2], {4: RESETS[8]}) for each in (learner, other, unsaved, copied)]
    assert all(torch.equal(found[0][n], others[n]) for others in found[1:] for n in found[0])
    assert all(
        torch.equal(a, b) for a, b in zip(*(each.influence().values() for each in (learner, other)), strict=True)
    )
    with pytest.raises(ValueError, match="another cell, dtype or batch size"):
        RTRL(cell, 2).load_state_dict(learner.state_dict())
    with pytest.raises(ValueError, match="version 1, got 2"):
        other.load_state_dict({**learner.state_dict(), "version": 2})
    old = {**learner.state_dict(), "diagonal": {**learner.state_dict()["diagonal"], "version": 1}}
    with pytest.raises(ValueError, match="version 2, got 1"):
        other.load_state_dict(old)
    with pytest.raises(ValueError, match=r"lacks \['diagonal'\]"):
        other.load_state_dict({k: v for k, v in learner.state_dict().items() if k != "diagonal"})


@pytest.mark.parametrize(
    ("cell", "numbers", "most"),
    [
        (LRUCell(64, 96, 10), 2 * 96 * (64 + 2), 1.01),
        (ELSTMCell(64, 96, 10), 2 * 96 * (64 + 2), 1.0),
        (RetentionCell(64, 4, 24, 10), 2 * 96 * 64, 1.0),
        (RetentionCell(64, 4, 24, 10, rotation=[[0.1], [0.2], [0.3], [0.4]]), 3 * 96 * 64, 1.5),
        (RetentionCell(64, 4, 24, 10, rotation="xpos", token_shift=True), 96 * (24 + 1) * 64, 12.5),
        (RWKVCell(64, 96, 10), 96 * (6 * 64 + 2), 3.0),
        (MambaCell(64, 96, 10, state_size=4), 4 * 96 * (3 * 64 + 2), 10.0),
    ],
)
def test_memory_is_that_of_the_parameters(cell, numbers, most):
    influence = RTRL(cell, 3)._engine.influence
    recurrent = sum(p.numel() for n, p in cell.named_parameters() if p.requires_grad and not n.startswith("readout."))
    assert influence.kept_bytes == 4 * 3 * numbers <= 4 * 3 * most * recurrent
    matrices = [m for m in influence.matrices if m is not None]
    assert sum(m.untyped_storage().nbytes() for m in matrices) == influence.kept_bytes


def test_outputs_are_those_of_the_cell_and_evaluation_leaves_the_learner():
    for name in CELLS:
        cell, x = make_cell(name), inputs(7, 2)
        learner = RTRL(cell, 2)
        outputs = torch.cat((learner.unroll(x[:3]), learner(x[3])[None], learner.unroll(x[4:])))
        expected, _ = cell.unroll(x, cell.initial_state(2))
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-13)
        copied = learner.evaluate()
        before = learner.state
        evaluated = copied.unroll(x)
        states = [each if isinstance(each, tuple) else (each,) for each in (learner.state, before)]
        assert not evaluated.requires_grad and all(map(torch.equal, *states))
        assert torch.equal(copied(x[0]), cell(x[0], cell.unroll(x, before)[1])[0])


def test_attach_flush_and_discard_change_nothing():
    cell, x, c = make_cell("elstm"), inputs(9, 2), cotangents(9, 2)
    learner = RTRL(cell, 2)
    learner.attach(torch.optim.SGD(cell.parameters(), lr=0.0))
    found = online(learner, x, c, [1])
    learner.flush(), learner.flush(), learner.discard()
    assert all(torch.equal(found[n], g) for n, g in gradients_of(cell).items()) and learner.events == {}


def test_frozen_parameters_carry_nothing_and_unfrozen_ones_start_at_zero():
    cell, x, c = make_cell("elstm"), inputs(12, 2), cotangents(12, 2)
    cell.forget_peephole.requires_grad_(False)
    learner = RTRL(cell, 2)
    assert [m is None for m in learner._engine.influence.matrices] == [False, False, True, False]
    assert worst_error(online(learner, x, c, [1]), bptt(cell, x, c)) <= 1e-12
    cell.forget_peephole.requires_grad_(True)
    learner.reset()
    with pytest.warns(UserWarning, match="value 2 of project: trainable from now on"):
        found = online(learner, x, c, [1])
    assert worst_error(found, bptt(cell, x, c)) <= 1e-12
    learner.reset()
    cell.content_peephole.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "content_peephole" not in online(learner, x, c, [2])


class Custom(DiagonalCell):
    """A cell whose functions are given, for contracts that it keeps or breaks."""

    def __init__(self, step, project=None, state_shape=(4,)):
        super().__init__(3, state_shape)
        self.linear = torch.nn.Linear(3, 4)
        self.scale = torch.nn.Parameter(torch.rand(4))
        self._step, self._project = step, project

    def project(self, x):
        if self._project is not None:
            return self._project(self, x)
        return (Mapped(x, self.linear.weight, self.state_shape, self.linear.bias), Learned(self.scale))

    def step(self, h, *values):
        return self._step(self, h, *values)

    def output(self, x, before, h, *values):
        return h


@pytest.mark.parametrize(
    ("step", "project", "state_shape", "rows"),
    [
        # A decay that is given with the input, the same for all entries, which then share one row.
        (
            lambda self, h, a, y: a * h + y,
            lambda self, x: (Given(torch.sigmoid(x[:, :1])), Mapped(x, self.linear.weight, (4,), self.linear.bias)),
            (4,),
            [None, (1, 1, 4)],
        ),
        # One value for the whole state: a row for each entry where they decay differently, one where they do not.
        (
            lambda self, h, s, y: torch.sigmoid(s) * h + y,
            lambda self, x: (Learned(self.scale), Mapped(x, self.linear.weight[:1], (1,))),
            (4,),
            [(1, 4, 1), (4, 1, 1)],
        ),
        (lambda self, h, y: 0.9 * h + y, lambda self, x: (Mapped(x, self.linear.weight[:1], (1,)),), (4,), [(1, 1, 1)]),
        # Values of both axes, one of which is queried, and a non-linear one, which is kept.
        (
            lambda self, h, s, y, z: torch.tanh(s) * h + torch.tanh(z) * y,
            lambda self, x: (
                Learned(self.scale[:, None, None]),
                Mapped(x, self.linear.weight, (4, 1, 1)),
                Mapped(x, self.linear.weight[:3], (1, 3, 1)),
            ),
            (4, 3, 2),
            [(6, 4, 1), (3, 4, 1), (4, 3, 1)],
        ),
        # Only the state's second half is reached.
        (
            lambda self, h, s, y: torch.sigmoid(s) * h + y * torch.tensor([[0.0], [1.0]], dtype=torch.float64),
            lambda self, x: (Learned(self.scale[None]), Mapped(x, self.linear.weight, (1, 4), self.linear.bias)),
            (2, 4),
            [(2, 4, 1), (1, 4, 1)],
        ),
    ],
)
def test_structures_are_found_and_exact(step, project, state_shape, rows):
    torch.manual_seed(0)
    cell = Custom(step, project, state_shape).double()
    learner = RTRL(cell, 3)
    assert [layout and layout.rows for layout in learner._engine.influence.layouts] == rows
    x, c = inputs(11, 3), torch.randn(11, 3, *state_shape, dtype=torch.float64)
    expected = bptt(cell, x, c)
    assert worst_error(online(learner, x, c, [1, 3]), expected) <= 1e-12
    assert worst_error(online(RTRL(cell, 3, commit_every=4), x, c, [1, 3]), expected) <= 1e-12
    assert worst_error(bptt(cell, x, c, truncate=1), expected) > 1e-2


def test_autocast_and_float32_are_as_close_as_backpropagation():
    for name in CELLS:
        cell = make_cell(name)
        x, c = inputs(15, 2), cotangents(15, 2)
        expected = bptt(cell, x, c)
        single = copy.deepcopy(cell).float()
        found = online(RTRL(single, 2), x.float(), c.float(), [1, 4])
        assert worst_error(found, expected) <= 2 * worst_error(bptt(single, x.float(), c.float()), expected) + 1e-6
        if name not in ("elstm", "mamba"):
            continue
        with torch.autocast("cpu"):
            found = online(RTRL(single, 2), x.float(), c.float(), [1])
            rounded = bptt(single, x.float(), c.float())
        assert worst_error(found, expected) <= 2 * worst_error(rounded, expected) + 1e-6


@pytest.mark.parametrize(
    ("step", "project", "message"),
    [
        (lambda self, h, y, s: s * h.roll(1, -1) + y, None, "not element-wise in the state: entries mix"),
        (lambda self, h, y, s: s * h + y.sum(-1, keepdim=True), None, "not element-wise in value 0"),
        (lambda self, h, y, s: s * h + y - h.mean(0), None, "not element-wise in the state"),
        (lambda self, h, y, s: self.scale * h + y, None, "step uses the parameter scale itself"),
        (lambda self, h, y, s: (s * h + y)[:, :2], None, r"step must return state entries .*\(3, 4\), got"),
        (lambda self, h, y: h + y, lambda self, x: (self.linear(x),), "must return Mapped, Learned or Given"),
        (
            lambda self, h, y: h + y,
            lambda self, x: (Mapped(torch.tanh(self.linear(x)), self.linear.weight[:, :1].expand(4, 4), (4,)),),
            "more than one linear map of the input",
        ),
        (
            lambda self, h, y: h + y,
            lambda self, x: (Mapped(x, self.linear.weight, (2, 2)),),
            r"must be broadcastable to the state \(4,\) .* got \(2, 2\)",
        ),
    ],
)
def test_broken_contracts_are_named(step, project, message):
    with pytest.raises(ContractError, match=message):
        RTRL(Custom(step, project).double(), 2)


def test_a_step_that_branches_on_its_state_is_refused_where_the_structure_changes():
    # One value for all entries, which all decay alike as long as they are small.
    cell = Custom(
        lambda self, h, y: torch.where(h.abs() > 50, 0.5 * h, 0.9 * h) + y,
        lambda self, x: (Mapped(x, self.linear.weight, (4, 1)),),
        state_shape=(4, 2),
    ).double()
    learner = RTRL(cell, 2)
    learner(torch.ones(2, 3, dtype=torch.float64))
    learner._state = learner._state.clone()
    learner._state[0, 0, 0] = 100.0
    with pytest.raises(ContractError, match="must not branch"):
        learner(torch.ones(2, 3, dtype=torch.float64)).sum().backward()


class Raising:
    """Errors that a learning step raises, each leaving the learner as it was."""

    def no_grad(learner, x):
        with torch.no_grad():
            learner(x)

    def batch(learner, x):
        learner(x[:1])

    def features(learner, x):
        learner(x[:, :2])

    def input_gradient(learner, x):
        learner(x.clone().requires_grad_())

    def nan_input(learner, x):
        learner(torch.full_like(x, float("nan")))

    def infinite_parameter(learner, x):
        learner.cell.forget.weight.data[:] = float("inf")
        learner(x)

    def dtype(learner, x):
        learner.cell.float()
        learner(x.float())

    def bad_mask(learner, x):
        learner.reset(torch.tensor([0, 1]))

    def empty_chunk(learner, x):
        learner.unroll(x[None][:0])


@pytest.mark.parametrize("commit_every", [1, 2])
@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (Raising.no_grad, RuntimeError, r"learner\.evaluate\(\)"),
        (Raising.batch, ValueError, r"batch size 2, got shape \(1, 3\)"),
        (Raising.features, ValueError, r"x must have shape \(B, 3\), got \(2, 2\)"),
        (Raising.input_gradient, ValueError, "x must not require a gradient"),
        (Raising.nan_input, NonFiniteError, r"step 3: NaN or infinity in the new state, streams \[0, 1\]"),
        (Raising.infinite_parameter, NonFiniteError, r"step 3: .* in forget.weight"),
        (Raising.dtype, RuntimeError, "was torch.float64 .* is torch.float32 .* now"),
        (Raising.bad_mask, ValueError, "bool mask of shape"),
        (Raising.empty_chunk, ValueError, "n >= 1"),
    ],
)
def test_errors_leave_the_learner_as_it_was(action, error, message, commit_every):
    cell, x = make_cell("elstm"), inputs(4, 2)
    learner = RTRL(cell, 2, commit_every=commit_every)
    for t in range(2):
        learner(x[t]).sum().backward()
    last = learner(x[2])
    influence = learner._engine.influence
    before = [learner.state.clone(), *(m.clone() for m in influence.matrices), torch.tensor(len(influence.window))]
    with pytest.raises(error, match=message):
        action(learner, x[3])
    after = [learner.state, *influence.matrices, torch.tensor(len(influence.window))]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    last.sum().backward()  # the step before is still in time
    with pytest.raises(RuntimeError, match=r"second time|called twice"):
        last.sum().backward()


def test_a_late_backward_says_so():
    cell, x = make_cell("lru"), inputs(3, 2)
    learner = RTRL(cell, 2, commit_every=1)
    first = learner(x[0])
    learner(x[1])
    learner(x[2])
    with pytest.raises(RuntimeError, match="backward came too late"):
        first.sum().backward()


@pytest.mark.parametrize("name", CELLS)
def test_check_cell_passes_and_estimate_counts_what_is_kept(name):
    cell = make_cell(name)
    generator = torch.Generator().manual_seed(0)
    entries = cell.initial_entries(2)
    h = torch.randn(entries.shape, generator=generator, dtype=entries.dtype)
    x = torch.randn(2, cell.input_size * (2 if cell.previous_input else 1), generator=generator)
    check_cell(cell, x, h)
    costs = estimate(cell, 3)
    assert costs.influence_bytes == RTRL(cell, 3)._engine.influence.kept_bytes
    assert costs.bptt_bytes_per_step > 0 and f"{costs.recurrent_parameters} recurrent parameters" in str(costs)


def test_check_cell_names_violations():
    cell = Custom(lambda self, h, y, s: s * h + y, None).double()
    cell.unused = torch.nn.Parameter(torch.ones(2))
    x, h = torch.randn(2, 3), torch.randn(2, 4)
    with pytest.raises(ContractError, match="no gradient reaches parameter unused"):
        check_cell(cell, x, h)
    cell = Custom(lambda self, h, y, s: s * h.flip(-1) + y, None)
    with pytest.raises(ContractError, match="entries mix"):
        check_cell(cell, x, h)
    cell = Custom(lambda self, h, y, s: s * h + y, None)
    cell.output = lambda x, before, h, *values: h - h.mean(0)
    with pytest.raises(ContractError, match="rows of the batch influence each other: output of stream 0"):
        check_cell(cell, x, h)
    cell = Custom(lambda self, h, y: 0.5 * h + y, lambda self, x: (Mapped(x, self.readout.weight, (4,)),))
    cell.readout = torch.nn.Linear(3, 4)
    with pytest.raises(ContractError, match=r"readout parameter readout\.weight reaches the state"):
        check_cell(cell, x, h)
    with pytest.raises(ValueError, match=r"h must have shape \(2, 4\), got \(2, 5\)"):
        check_cell(cell, x, torch.randn(2, 5))


def test_the_cell_of_the_documentation_keeps_its_contract():
    text = (Path(__file__).parents[2] / "docs" / "diagonal.md").read_text()
    code = text.split("```python")[2].split("```")[0]
    names: dict = {"sparse_rtrl": sparse_rtrl, "nn": torch.nn, "torch": torch, "Learned": Learned, "Mapped": Mapped}
    exec(code, names)
    cell = names["Leaky"](3, 5).double()
    x, c = inputs(9, 2), cotangents(9, 2, outputs=4)
    assert worst_error(online(RTRL(cell, 2), x, c, [1]), bptt(cell, x, c)) <= 1e-12
    check_cell(cell, x[0], torch.randn(2, 5))
