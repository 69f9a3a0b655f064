"""The gradient of a learner against backpropagation through the whole past, finite differences and itself."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import bptt, cotangents, gradients_of, inputs, online, worst_error
from pairs import ALL, pairs
from pattern_cell import PatternCell, make_pattern
from torch.func import functional_call
from tree_oracle import swap_products

from sparse_rtrl import RTRL, SlotMoECell, SparseLatentMoECell
from sparse_rtrl.capture.jacobian import JacobianCapture
from sparse_rtrl.influence.sparse import Influence
from sparse_rtrl.influence.tree import CircularTree
from sparse_rtrl.ops import dispatch

CATCH_UPS = ("eager", "replay", "product", "auto")
EXACT = 1e-12


@pytest.fixture(autouse=True)
def _quiet_dense_path():
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not captured as factors.*")
        yield


def pattern_cell(kind: str, steps: int, batch: int, seed: int = 0, dense: bool = True) -> PatternCell:
    torch.manual_seed(seed)
    return PatternCell(make_pattern(kind, steps, batch, seed=seed), dense=dense).double()


def ready_cell(kind: type, num_experts: int = 6) -> torch.nn.Module:
    torch.manual_seed(0)
    return kind(
        input_size=4,
        slot_size=4,
        num_slots=4,
        num_experts=num_experts,
        top_k=2,
        read_slots=2,
        write_slots=2,
        output_size=2,
    ).double()


@pytest.mark.parametrize(
    ("kind", "size", "catch_up"),
    pairs(
        [SlotMoECell, SparseLatentMoECell],
        [(1, 3), (2, 1), (17, 16), (64, 3), (300, 1), (300, 3)],
        CATCH_UPS,
    ),
)
def test_equals_bptt(kind, size, catch_up):
    length, batch = size
    cell = ready_cell(kind)
    x, c = inputs(length, batch), cotangents(length, batch)
    expected = bptt(cell, x, c)
    for buffer in (3, 64):
        learner = RTRL(cell, batch, buffer=buffer, commit_every=1, catch_up=catch_up)
        assert worst_error(online(learner, x, c), expected) <= EXACT
    if length >= 64:
        assert worst_error(bptt(cell, x, c, truncate=1), expected) > 1e-2


def test_equals_bptt_at_length_300_with_16_streams():
    cell = ready_cell(SlotMoECell)
    x, c = inputs(300, 16), cotangents(300, 16, density=0.1)
    expected = bptt(cell, x, c)
    learner = RTRL(cell, 16, buffer=4, commit_every=1, catch_up="replay")
    assert worst_error(online(learner, x, c), expected) <= EXACT
    assert learner.events["expiries"] > 0


@pytest.mark.parametrize(
    ("window", "kind", "catch_up"),
    pairs(
        [(1, 1), (1, 3), (1, 16), (3, 1), (16, 16), (2, 5)],
        ["random", "overlap", "disjoint", "all", "no_write"],
        CATCH_UPS,
    ),
)
def test_patterns_segments_and_windows(window, kind, catch_up):
    (segment, commit_every), steps, batch = window, 40, 3
    cell = pattern_cell(kind, steps, batch)
    x, c = inputs(steps, batch), cotangents(steps, batch)
    expected = bptt(cell, x, c)
    learner = RTRL(cell, batch, buffer=6, commit_every=commit_every, catch_up=catch_up)
    assert worst_error(online(learner, x, c, segment), expected) <= EXACT
    # Expert 4 is never used, expert 2 sleeps longer than the buffer, expert 1 less.
    assert not expected["experts.weight"][4].any()
    assert expected["experts.weight"][1].any() and expected["experts.weight"][2].any()
    if catch_up in ("replay", "product") and commit_every == segment == 1:
        assert min(learner.events[e] for e in ("wakes", "expiries", "payments")) > 0
        assert learner._engine.influence.commits > 3 * 6  # the ring wrapped around


@pytest.mark.parametrize("catch_up", CATCH_UPS)
@pytest.mark.parametrize(("segment", "commit_every"), [(1, 1), (1, 4), (4, 8)])
def test_resets_of_single_streams(segment, commit_every, catch_up):
    steps, batch = 50, 4
    cell = pattern_cell("random", steps, batch, seed=3)
    x, c = inputs(steps, batch), cotangents(steps, batch)
    resets = {t: torch.tensor([t % 3 == 0, True, t % 2 == 0, False]) for t in (3, 4, 17, 29, 33)}
    expected = bptt(cell, x, c, resets)
    learner = RTRL(cell, batch, buffer=7, commit_every=commit_every, catch_up=catch_up)
    assert worst_error(online(learner, x, c, segment, resets), expected) <= EXACT
    assert worst_error(bptt(cell, x, c), expected) > 1e-2


@pytest.mark.parametrize("catch_up", CATCH_UPS)
@pytest.mark.parametrize(("segment", "commit_every"), [(1, 1), (1, 4), (4, 8)])
def test_resets_of_all_streams(segment, commit_every, catch_up):
    steps, batch = 50, 3
    cell = pattern_cell("random", steps, batch, seed=3)
    x, c = inputs(steps, batch), cotangents(steps, batch)
    resets = {t: torch.ones(batch, dtype=torch.bool) for t in (3, 18, 31, 32)}
    expected = bptt(cell, x, c, resets)
    learner = RTRL(cell, batch, buffer=7, commit_every=commit_every, catch_up=catch_up)
    assert worst_error(online(learner, x, c, segment, resets), expected) <= EXACT
    assert worst_error(bptt(cell, x, c), expected) > 1e-2
    before = learner._engine.influence.commits
    assert learner._engine.influence.window
    learner.reset()  # moves no influence that nobody will ask for
    assert learner._engine.influence.commits == before and not learner._engine.influence.window


@pytest.mark.parametrize("catch_up", CATCH_UPS)
@pytest.mark.parametrize("commit_every", [1, 5])
def test_several_optimizer_steps_during_a_sleep(catch_up, commit_every):
    """With a learning rate of zero, the gradients of many optimizer steps add up to that of BPTT."""
    steps, batch = 45, 3
    cell = pattern_cell("random", steps, batch)
    x, c = inputs(steps, batch), cotangents(steps, batch, density=0.8)
    expected = bptt(cell, x, c)
    learner = RTRL(cell, batch, buffer=20, commit_every=commit_every, catch_up=catch_up)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.0)
    learner.attach(optimizer)
    found = online(learner, x, c, every_step=lambda t: optimizer.step() if t % 2 else None)
    assert worst_error(found, expected) <= EXACT
    if catch_up in ("replay", "product"):
        assert learner.events["payments"] > 10


@pytest.mark.parametrize("catch_up", CATCH_UPS)
@pytest.mark.parametrize("commit_every", [1, 4])
def test_gradient_of_the_path_taken_when_parameters_change(catch_up, commit_every):
    """Each optimizer step gets the gradient of the new losses with respect to every past copy of the parameters."""
    steps, batch, every = 24, 2, 3
    cell = pattern_cell("random", steps, batch, dense=False)
    twin = copy.deepcopy(cell)
    x, c = inputs(steps, batch), cotangents(steps, batch, density=1.0)
    learner = RTRL(cell, batch, buffer=5, commit_every=commit_every, catch_up=catch_up)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
    learner.attach(optimizer)
    copies: list[dict[str, torch.Tensor]] = []
    values = {n: p.detach().clone() for n, p in twin.named_parameters()}
    state = twin.initial_state(batch)
    loss = torch.zeros((), dtype=torch.float64)
    for t in range(steps):
        (learner(x[t]) * c[t]).sum().backward()
        copies.append({n: v.clone().requires_grad_() for n, v in values.items()})
        output, _, state = functional_call(twin, copies[-1], (x[t], state))
        loss = loss + (output * c[t]).sum()
        if t % every == every - 1:
            leaves = [leaf for group in copies for leaf in group.values()]
            flat = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
            expected = {n: torch.zeros_like(v) for n, v in values.items()}
            for (name, _), g in zip((item for group in copies for item in group.items()), flat, strict=True):
                expected[name] += 0 if g is None else g
            learner.flush()
            assert worst_error(gradients_of(cell), expected) <= EXACT
            optimizer.step()
            optimizer.zero_grad()
            values = {n: v - 0.1 * expected[n] for n, v in values.items()}
            loss = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("kind", [SlotMoECell, SparseLatentMoECell])
@pytest.mark.parametrize("commit_every", [1, 3, 16])
def test_gradient_at_every_token(kind, commit_every):
    """The gradient of each single step, not only their sum."""
    cell, steps, batch = ready_cell(kind), 20, 2
    x, c = inputs(steps, batch), cotangents(steps, batch, density=1.0)
    learner = RTRL(cell, batch, commit_every=commit_every)
    for t in range(steps):
        cell.zero_grad()
        (learner(x[t]) * c[t]).sum().backward()
        learner.flush()
        found = gradients_of(cell)
        only = torch.zeros_like(c[: t + 1])
        only[t] = c[t]
        assert worst_error(found, bptt(cell, x[: t + 1], only)) <= EXACT


def test_finite_differences():
    cell = ready_cell(SlotMoECell)
    x, c = inputs(12, 2), cotangents(12, 2)
    routings = []
    state = cell.initial_state(2)
    with torch.no_grad():
        for x_t in x:
            routings.append(cell.route(x_t, state))
            _, _, state = cell(x_t, state, routings[-1])

    def loss() -> float:
        state, total = cell.initial_state(2), 0.0
        with torch.no_grad():
            for x_t, c_t, routing in zip(x, c, routings, strict=True):
                output, _, state = cell(x_t, state, routing)
                total += float((output * c_t).sum())
        return total

    found = online(RTRL(cell, 2, commit_every=1), x, c)
    for name, parameter in cell.named_parameters():
        direction = torch.randn_like(parameter)
        direction /= direction.norm()
        eps = 1e-5
        with torch.no_grad():
            parameter += eps * direction
            above = loss()
            parameter -= 2 * eps * direction
            below = loss()
            parameter += eps * direction
        slope = float((found[name] * direction).sum())
        assert abs((above - below) / (2 * eps) - slope) <= 1e-6 * max(1.0, abs(slope)), name


@pytest.mark.parametrize("catch_up", CATCH_UPS)
@pytest.mark.parametrize("commit_every", [1, 8])
@pytest.mark.parametrize("kind", [SlotMoECell, SparseLatentMoECell])
def test_float32_has_at_most_twice_the_error_of_float32_bptt(kind, commit_every, catch_up):
    steps, batch = 64, 3
    exact = ready_cell(kind)
    x, c = inputs(steps, batch), cotangents(steps, batch)
    routings, state = [], exact.initial_state(batch)
    with torch.no_grad():
        for x_t in x:
            routings.append(exact.route(x_t, state))
            _, _, state = exact(x_t, state, routings[-1])
    expected = bptt(exact, x, c, routings=routings)
    cell = copy.deepcopy(exact).float()
    plain = worst_error(bptt(cell, x.float(), c, routings=routings), expected)
    cell.route = lambda x_t, state: routings[int(x_t[0, -1])]
    learner = RTRL(cell, batch, buffer=6, commit_every=commit_every, catch_up=catch_up)
    error = worst_error(online(learner, x.float(), c, segment=1), expected)
    assert error <= 2 * plain + torch.finfo(torch.float32).eps
    assert plain < 1e-3


@pytest.mark.parametrize("segment", [4, 1] if ALL else [4])
def test_influence_after_5000_tokens(segment):
    """Every way to catch up against the textbook recursion with dense Jacobians by autograd."""
    steps, period = 5000, 45
    cell = PatternCell(make_pattern("random", period, 1), dense=False).double()
    learners = {way: RTRL(cell, 1, buffer=16, commit_every=4, catch_up=way) for way in CATCH_UPS}
    x = inputs(steps, 1)
    x[..., -1] = (torch.arange(steps) % period).unsqueeze(1)
    names = [n for n, _ in cell.named_parameters() if not n.startswith("readout")]
    parameters = [p for n, p in cell.named_parameters() if n in names]
    hidden = cell.hidden_size
    P = [torch.zeros(hidden, p.numel(), dtype=torch.float64) for p in parameters]
    state = cell.initial_state(1)
    eye = torch.eye(hidden, dtype=torch.float64).view(hidden, 1, *state.shape[1:])
    for learner in learners.values():
        for first in range(0, steps, segment):
            learner.unroll(x[first : first + segment])
        assert learner._engine.influence.commits >= steps // 4 - 1
    for x_t in x:
        entry = state.detach().requires_grad_()
        _, _, state = cell(x_t, entry)
        J, *F = torch.autograd.grad(state, [entry, *parameters], eye, is_grads_batched=True, allow_unused=True)
        P = [J.view(hidden, hidden) @ p + (0 if f is None else f.view(hidden, -1)) for p, f in zip(P, F, strict=True)]
    for way, learner in learners.items():
        found = learner.influence()
        for name, expected in zip(names, P, strict=True):
            error = float((found[name].reshape(hidden, -1) - expected).norm() / expected.norm().clamp_min(1e-300))
            assert error <= EXACT, (way, name)
            assert expected.norm() > 1e-6 or name == "experts.bias"


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_random_sequences_of_operations(data):
    """Any order of steps, segments, flushes and resets gives the gradient of BPTT."""
    batch, steps = data.draw(st.integers(1, 3)), data.draw(st.integers(5, 24))
    catch_up = data.draw(st.sampled_from(CATCH_UPS))
    kind = data.draw(st.sampled_from(["random", "overlap", "disjoint", "no_write"]))
    cell = pattern_cell(kind, steps, batch, seed=data.draw(st.integers(0, 9)), dense=False)
    x, c = inputs(steps, batch), cotangents(steps, batch)
    reset_at = data.draw(st.lists(st.integers(1, steps - 1), max_size=3))
    resets = {t: torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch))) for t in reset_at}
    flushes = set(data.draw(st.lists(st.integers(1, steps), max_size=5)))
    learner = RTRL(
        cell,
        batch,
        buffer=data.draw(st.integers(1, 9)),
        commit_every=data.draw(st.integers(1, 6)),
        catch_up=catch_up,
    )
    found = online(
        learner, x, c, data.draw(st.integers(1, 5)), resets, lambda t: learner.flush() if t in flushes else None
    )
    assert worst_error(found, bptt(cell, x, c, resets)) <= EXACT


def _no_write_columns(monkeypatch):
    original = JacobianCapture.step

    def step(self, x, state, routing, *arguments):
        captured = original(self, x, state, routing, *arguments)
        captured.Jh[:, :, routing.read.shape[1] * self.cell.slot_size :] = 0
        return captured

    monkeypatch.setattr(JacobianCapture, "step", step)


def _no_catch_up(monkeypatch):
    def skip(self, pairs):
        self.last_update[tuple(pairs.T)] = self.commits

    monkeypatch.setattr(Influence, "_catch_up", skip)


def _truncated(monkeypatch):
    monkeypatch.setattr(dispatch, "loss_row_", lambda P, u, groups: None)


def _unpaid(monkeypatch):
    monkeypatch.setattr(Influence, "_form_deferred", lambda self, sleeping: None)


@pytest.mark.parametrize(
    "wrong", [_no_write_columns, _no_catch_up, swap_products, _truncated, _unpaid], ids=lambda f: f.__name__
)
def test_wrong_variants_are_seen(wrong, monkeypatch):
    steps, batch = 50, 3
    cell = pattern_cell("random", steps, batch)
    x, c = inputs(steps, batch), cotangents(steps, batch)
    resets = {t: torch.tensor([True, t % 2 == 0, False]) for t in (8, 21, 35)}
    expected = bptt(cell, x, c, resets)
    learner = RTRL(cell, batch, buffer=8, commit_every=1, catch_up="product")
    assert worst_error(online(learner, x, c, 1, resets), expected) <= EXACT
    wrong(monkeypatch)
    learner = RTRL(cell, batch, buffer=8, commit_every=1, catch_up="product", verify="never")
    assert worst_error(online(learner, x, c, 1, resets), expected) > 1e-2


def test_every_trainable_parameter_receives_a_gradient():
    for kind in (SlotMoECell, SparseLatentMoECell):
        cell = ready_cell(kind, num_experts=3)
        x, c = inputs(60, 16), cotangents(60, 16)
        found = online(RTRL(cell, 16), x, c)
        assert {n for n, g in found.items() if not g.any()} == set()


def test_products_of_the_tree_were_used():
    """The merged-product path must really take products of several segments."""
    steps, batch = 60, 2
    cell = pattern_cell("random", steps, batch)
    learner = RTRL(cell, batch, buffer=32, commit_every=1, catch_up="product")
    online(learner, inputs(steps, batch), cotangents(steps, batch))
    tree = learner._engine.influence.tree
    assert isinstance(tree, CircularTree)
    assert learner.events["products"] > 0 and tree.merges > 0 and tree.query_merges > 0
