"""Exponents of maps with known ones, and the regularizer's gradient against finite differences and BPTT."""

import math
from collections import Counter

import pytest
import torch
from oracle import gradients_of, inputs, worst_error
from pattern_cell import PatternCell, make_pattern
from torch import nn

from sparse_rtrl import RTRL, Routing, SlotCell, SlotMoECell
from sparse_rtrl.cells import SparseLatentMoECell
from sparse_rtrl.training.lyapunov import LyapunovRegularizer, step_of, tangent_growth


class MapCell(SlotCell):
    """One slot that a function moves, whatever the input."""

    def __init__(self, slot_size, move):
        super().__init__(1, slot_size)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.move = move

    def route(self, x, state):
        every = torch.zeros(len(x), 1, dtype=torch.int64)
        return Routing(every, every, every[:, :0])

    def update(self, x, h_read, h_write, routing):
        new = self.scale * self.move(h_write)
        return new, new.flatten(1)


def exponent_of(cell, state, steps, start=0):
    regularizer = LyapunovRegularizer(cell, len(state))
    x = torch.zeros(1, len(state), 1)
    for t in range(steps):
        if t == start:
            regularizer._growth.zero_(), regularizer._steps.zero_()
        regularizer.loss(x, state)
        state = step_of(cell)(x[0], state).detach()
    return regularizer.exponent


def test_exponent_of_a_linear_map_is_the_logarithm_of_its_largest_eigenvalue():
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    for largest in (1.3, 0.8):
        matrix = basis @ torch.diag(torch.tensor([0.2, -largest, 0.5, 0.1], dtype=torch.float64)) @ basis.inverse()
        cell = MapCell(4, lambda h, matrix=matrix: h @ matrix.T)
        state = torch.randn(3, 1, 4, generator=generator, dtype=torch.float64)
        # The transient dies out with the ratio of the two largest eigenvalues.
        assert exponent_of(cell, state, 60, start=50) == pytest.approx(math.log(largest), abs=1e-6)


def test_exponent_of_the_logistic_map_is_log_2():
    cell = MapCell(1, lambda h: 4 * h * (1 - h))
    state = torch.rand(2000, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # The variance of log|f'| is pi^2 / 12: the mean over 2000 streams of 100 steps is good to a few thousandths.
    assert exponent_of(cell, state, 120, start=20) == pytest.approx(math.log(2), abs=0.005)


def test_gradient_of_a_scalar_map_is_analytic():
    cell = MapCell(1, lambda h: -1.5 * h)
    regularizer = LyapunovRegularizer(cell, 2, weight=3.0, target=0.1)
    loss = regularizer.loss(torch.zeros(5, 2, 1), torch.ones(2, 1, 1, dtype=torch.float64))
    loss.backward()
    assert loss.item() == pytest.approx(3 * (math.log(1.5) - 0.1) ** 2)
    assert float(cell.scale.grad) == pytest.approx(2 * 3 * (math.log(1.5) - 0.1))  # d log|1.5 s| / ds = 1


def test_a_vector_that_dies_counts_as_the_smallest_number():
    cell = MapCell(2, lambda h: h * 0)
    state = torch.ones(1, 1, 2, dtype=torch.float64)
    growth, tangent = tangent_growth(step_of(cell), torch.zeros(2, 1, 1), state, state / 2**0.5)
    assert float(growth) == pytest.approx(2 * math.log(torch.finfo(torch.float64).tiny)) and not tangent.any()


@pytest.fixture
def problem():
    """A cell of prescribed routing with sleeping experts, inputs of 14 steps, and the steps of the last segment."""
    torch.manual_seed(0)
    cell = PatternCell(make_pattern("random", 14, 2)).double()
    return cell, inputs(14, 2)


WEIGHT, TARGET = 2.0, 0.05


def whole(cell, x, start, tangent, truncate=False):
    """The loss of the segment from ``start`` on as a function of the parameters, through the whole past."""
    state = cell.initial_state(x.shape[1])
    for x_t in x[:start]:
        state = step_of(cell)(x_t, state)
    growth, _ = tangent_growth(step_of(cell), x[start:], state.detach() if truncate else state, tangent)
    return WEIGHT * (growth / len(x[start:]) - TARGET).square().mean()


def online(cell, x, segment, **options):
    """Gradient of the last segment's loss from a learner, and the tangent that entered it."""
    learner = RTRL(cell, batch_size=x.shape[1], buffer=3, **options)
    regularizer = LyapunovRegularizer(cell, x.shape[1], WEIGHT, TARGET)
    for xs in x.split(segment):
        learner.unroll(xs)
        tangent = regularizer._tangent
        loss = regularizer.loss(xs, learner.entry_state)
    cell.zero_grad()
    loss.backward()
    learner.flush()
    return gradients_of(cell), tangent, learner


@pytest.mark.parametrize("segment", [1, 5, 14])
def test_gradient_through_the_whole_past_is_exact(problem, segment):
    cell, x = problem
    start = (len(x) - 1) // segment * segment
    events = Counter()
    for options in ({"commit_every": 1, "catch_up": "replay"}, {"commit_every": 7, "catch_up": "product"}):
        found, tangent, learner = online(cell, x, segment, **options)
        events += learner.events
        cell.zero_grad()
        whole(cell, x, start, tangent).backward()
        expected = gradients_of(cell)
        assert worst_error(found, expected) < 1e-12
    for name, parameter in cell.named_parameters():
        if name.startswith("readout"):
            continue  # it does not reach the state
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-6 * direction
                values.append(whole(cell, x, start, tangent).item())
                parameter -= sign * 1e-6 * direction
        difference = (values[0] - values[1]) / 2e-6
        scale = max(float(g.norm()) for g in expected.values())
        assert float((expected[name] * direction).sum()) == pytest.approx(difference, rel=1e-5, abs=1e-7 * scale), name
    if start:
        assert segment == 5 or events["wakes"]
        cell.zero_grad()
        whole(cell, x, start, tangent, truncate=True).backward()
        assert worst_error(gradients_of(cell), expected) > 1e-2


def test_gradient_of_the_ready_cell_is_exact_with_its_own_front_end():
    torch.manual_seed(0)
    cell = SlotMoECell(
        input_size=4, slot_size=4, num_slots=3, num_experts=3, top_k=2, read_slots=2, write_slots=2, output_size=2
    ).double()
    x = torch.randn(14, 2, 4, dtype=torch.float64)
    found, tangent, _ = online(cell, x, 4, commit_every=4)
    cell.zero_grad()
    whole(cell, x, 12, tangent).backward()
    expected = gradients_of(cell)
    assert worst_error(found, expected) < 1e-12
    cell.zero_grad()
    whole(cell, x, 12, tangent, truncate=True).backward()
    assert worst_error(gradients_of(cell), expected) > 1e-2


def test_it_adds_to_the_loss_of_the_outputs_in_one_backward_pass(problem):
    cell, x = problem

    def gradient(outputs_too, exponent_too):
        learner = RTRL(cell, batch_size=2, buffer=3, commit_every=4)
        regularizer = LyapunovRegularizer(cell, 2, WEIGHT, TARGET)
        cell.zero_grad()
        for xs in x.split(4):
            outputs = learner.unroll(xs)
            loss = regularizer.loss(xs, learner.entry_state) * exponent_too
            (loss + outputs_too * outputs.square().sum()).backward()
        learner.flush()
        return gradients_of(cell)

    both, first, second = gradient(1, 1), gradient(1, 0), gradient(0, 1)
    assert worst_error(both, {name: first[name] + second[name] for name in both}) < 1e-12
    assert worst_error(both, first) > 1e-3


@pytest.mark.parametrize("build", [SlotMoECell, SparseLatentMoECell])
def test_descending_on_it_moves_the_exponent_to_the_target(build):
    torch.manual_seed(0)
    sizes = {"num_slots": 3, "num_experts": 3, "top_k": 2, "read_slots": 2, "write_slots": 2, "output_size": 2}
    cell = build(input_size=4, slot_size=8, **sizes)
    learner = RTRL(cell, batch_size=4, commit_every=8)
    regularizer = LyapunovRegularizer(cell, 4, weight=1.0, target=0.02)
    optimizer = torch.optim.Adam(cell.parameters(), lr=1e-2)
    learner.attach(optimizer)
    losses = []
    for _ in range(24):
        xs = torch.randn(4, 4, 4)
        learner.unroll(xs)
        loss = regularizer.loss(xs, learner.entry_state)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


def test_watching_needs_no_graph_and_resets_and_resumes(problem):
    cell, x = problem
    regularizer = LyapunovRegularizer(cell, 2, seed=5)
    assert math.isnan(regularizer.exponent)
    assert not regularizer.loss(x[:4], cell.initial_state(2)).requires_grad
    kept = regularizer.state_dict()
    regularizer.reset(torch.tensor([True, False]))
    before = kept["tangent"]
    assert torch.equal(regularizer._tangent[1], before[1]) and not torch.equal(regularizer._tangent[0], before[0])
    assert regularizer._tangent.flatten(1).norm(dim=1).tolist() == pytest.approx([1.0, 1.0])
    assert regularizer._steps.tolist() == [0, 4]
    assert regularizer.exponent == pytest.approx(float(kept["growth"][1]) / 4)

    other = LyapunovRegularizer(cell, 2, seed=9)
    other.load_state_dict(kept)
    regularizer.load_state_dict(kept)
    for each in (regularizer, other):
        each.reset(torch.tensor([False, True]))
        each.loss(x[4:8], cell.initial_state(2))
    assert regularizer.exponent == other.exponent
    with pytest.raises(ValueError, match=r"tangent vectors \(3, 4, 3\), got \(2, 4, 3\)"):
        LyapunovRegularizer(cell, 3).load_state_dict(kept)


def test_errors_say_what_was_expected(problem):
    cell, _ = problem
    with pytest.raises(ValueError, match="weight must be finite and at least 0, got -1"):
        LyapunovRegularizer(cell, 2, weight=-1)
    with pytest.raises(ValueError, match="target must be finite, got nan"):
        LyapunovRegularizer(cell, 2, target=math.nan)
    with pytest.raises(ValueError, match="must be a SlotCell for the Lyapunov exponent, got GRU"):
        LyapunovRegularizer(nn.GRU(2, 2), 2)
    with pytest.raises(RuntimeError, match="entry_state is there after a step"):
        RTRL(cell, batch_size=2).entry_state  # noqa: B018
