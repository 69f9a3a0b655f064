"""How a learner behaves around the gradient: modes, errors, resuming, memory."""

import copy
import gc
import os
import subprocess
import sys

import pytest
import torch
from oracle import bptt, cotangents, gradients_of, inputs, online, worst_error
from pattern_cell import PatternCell, make_pattern
from torch import nn

from sparse_rtrl import RTRL, ContractError, NonFiniteError, Routing, SlotCell, SlotMoECell, estimate


def small_cell(**changes) -> SlotMoECell:
    sizes = dict(input_size=4, slot_size=4, num_slots=4, num_experts=5, top_k=2, read_slots=2, write_slots=2)
    torch.manual_seed(0)
    return SlotMoECell(**{**sizes, "output_size": 2, **changes}).double()


def snapshot(learner):
    influence = learner._engine.influence
    return [
        t.clone()
        for t in (
            learner.state,
            influence.core,
            influence.experts,
            influence.last_update,
            influence.handed_out,
            influence.window_loss_row,
        )
    ] + [torch.tensor([len(influence.window), influence.commits])]


def assert_same(before, after):
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


def run(learner, x, steps):
    for t in steps:
        learner(x[t]).sum().backward()


def test_the_example_of_the_readme_runs_and_state_is_detached():
    cell = small_cell()
    learner = RTRL(cell, batch_size=3)
    optimizer = torch.optim.Adam(cell.parameters())
    learner.attach(optimizer)
    before = [p.clone() for p in cell.parameters()]
    for x in inputs(4, 3):
        learner(x).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert learner.state.shape == (3, 4, 4) and not learner.state.requires_grad
    assert not torch.equal(learner.state, torch.zeros_like(learner.state))
    assert any(not torch.equal(a, b) for a, b in zip(before, cell.parameters(), strict=True))


def test_outputs_and_states_are_those_of_the_cell():
    cell, x = small_cell(), inputs(9, 3)
    learner = RTRL(cell, 3)
    outputs = torch.cat((learner.unroll(x[:4]), torch.stack([learner(x[t]) for t in range(4, 9)])))
    state = cell.initial_state(3)
    for t in range(9):
        expected, _, state = cell(x[t], state)
        torch.testing.assert_close(outputs[t], expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(learner.state, state, rtol=0, atol=1e-14)


def test_flush_is_idempotent_and_discard_drops_what_is_deferred():
    cell = PatternCell(make_pattern("random", 30, 2), dense=False).double()
    x, c = inputs(30, 2), cotangents(30, 2, density=1.0)
    for lose in (False, True):
        learner = RTRL(cell, 2, commit_every=1, catch_up="product")
        cell.zero_grad()
        for t in range(13):
            (learner(x[t]) * c[t]).sum().backward()
        complete_for_active = gradients_of(cell)
        if lose:
            learner.discard()
        learner.flush()
        flushed = gradients_of(cell)
        deferred = worst_error(flushed, complete_for_active) > 1e-6
        assert deferred is not lose  # experts 1 and 2 sleep at step 13
        learner.flush()
        assert_same(flushed.values(), gradients_of(cell).values())


def test_after_backward_the_gradient_of_active_groups_is_complete():
    cell = PatternCell(make_pattern("random", 30, 2), dense=False).double()
    x, c = inputs(30, 2), cotangents(30, 2)
    expected = bptt(cell, x, c)
    learner = RTRL(cell, 2, commit_every=1, catch_up="replay")
    cell.zero_grad()
    for t in range(30):
        output = learner(x[t])
        if bool(c[t].any()):
            (output * c[t]).sum().backward()
    found = gradients_of(cell)
    core = {n for n in expected if not n.startswith("experts")}
    assert worst_error({n: found[n] for n in core}, {n: expected[n] for n in core}) <= 1e-12
    # Expert 0 is active in every step, expert 2 slept at the end.
    for name in ("experts.weight", "experts.bias"):
        torch.testing.assert_close(found[name][0], expected[name][0], rtol=1e-11, atol=1e-13)
        assert not torch.allclose(found[name][2], expected[name][2], rtol=1e-3)


def test_frozen_parameters_carry_no_influence_and_unfrozen_ones_start_at_zero():
    cell, x, c = small_cell(), inputs(20, 2), cotangents(20, 2)
    cell.control.weight.requires_grad_(False)
    learner = RTRL(cell, 2, commit_every=1)
    assert "control.weight" not in learner.influence()
    assert worst_error(online(learner, x[:10], c[:10]), bptt(cell, x[:10], c[:10])) <= 1e-12
    cell.control.weight.requires_grad_(True)
    learner.reset()
    with pytest.warns(UserWarning, match=r"control\.weight: trainable from now on"):
        found = online(learner, x, c)
    assert worst_error(found, bptt(cell, x, c)) <= 1e-12


def test_unfreezing_keeps_the_influence_of_the_others():
    cell, x, c = small_cell(), inputs(20, 2), cotangents(20, 2, density=0.0)
    expected = bptt(cell, x, c)
    cell.key_value.weight.requires_grad_(False)
    learner = RTRL(cell, 2, commit_every=3, buffer=4)
    for t in range(19):
        learner(x[t])
    cell.key_value.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match="key_value"):
        (learner(x[19]) * c[19]).sum().backward()
    learner.flush()
    found = gradients_of(cell)
    found.pop("key_value.weight"), expected.pop("key_value.weight")
    assert worst_error(found, expected) <= 1e-12


def test_a_parameter_frozen_later_gets_no_gradient():
    cell, x = small_cell(), inputs(6, 2)
    learner = RTRL(cell, 2)
    run(learner, x, range(3))
    cell.zero_grad(set_to_none=True)
    cell.control.weight.requires_grad_(False)
    run(learner, x, range(3, 6))
    learner.flush()
    assert cell.control.weight.grad is None and cell.key_value.weight.grad is not None


@pytest.mark.parametrize("catch_up", ["eager", "replay", "product"])
@pytest.mark.parametrize("commit_every", [1, 5])
def test_resuming_is_bit_for_bit(catch_up, commit_every, tmp_path):
    pattern = make_pattern("random", 40, 2)
    cell = PatternCell(pattern, dense=False).double()
    x, c = inputs(40, 2), cotangents(40, 2, density=0.7)
    undisturbed, learner, other = (
        RTRL(copy.deepcopy(cell), 2, buffer=6, commit_every=commit_every, catch_up=catch_up) for _ in range(3)
    )
    for each in (undisturbed, learner):
        online(each, x[:23], c[:23])  # ends in the middle of a window of 5
    torch.save(learner.state_dict(), tmp_path / "learner.pt")
    other.load_state_dict(torch.load(tmp_path / "learner.pt", weights_only=True))
    resets = {9: torch.tensor([True, False])}
    copied = copy.deepcopy(learner)
    assert not {id(p) for p in copied.cell.parameters()} & {id(p) for p in learner.cell.parameters()}
    all_of_them = (undisturbed, learner, other, copied)
    gradients = [online(each, x[23:], c[23:], resets=resets).values() for each in all_of_them]
    for each, mine in zip(all_of_them[1:], gradients[1:], strict=True):
        assert_same(gradients[0], mine)
        assert_same(undisturbed.influence().values(), each.influence().values())
        assert torch.equal(undisturbed.state, each.state)


def test_saving_in_the_middle_of_a_window_does_not_end_it():
    cell, x = small_cell(), inputs(4, 2)
    learner = RTRL(cell, 2, commit_every=4)
    learner(x[0])
    output = learner(x[1])
    state = learner.state_dict()
    assert len(state["influence"]["window"]) == 2 and state["influence"]["commits"] == 0
    output.sum().backward()  # still in time
    other = RTRL(copy.deepcopy(cell), 2, commit_every=4)
    other.load_state_dict(state)
    assert len(other._engine.influence.window) == 2


def test_state_dict_of_another_learner_is_refused_and_changes_nothing():
    learner, x = RTRL(small_cell(), 2, buffer=6, catch_up="replay"), inputs(3, 2)
    run(learner, x, range(3))
    good = learner.state_dict()
    before = snapshot(learner)
    for other, message in (
        (RTRL(small_cell(), 3), "batch size"),
        (RTRL(small_cell(), 2, catch_up="eager"), "with catch_up='eager', this learner has catch_up='replay'"),
        (RTRL(small_cell(), 2, buffer=5, catch_up="replay"), "capacity"),
        (RTRL(small_cell(slot_size=8), 2), "another cell"),
    ):
        with pytest.raises(ValueError, match=message):
            learner.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="version 2, got 1"):
        learner.load_state_dict({**good, "version": 1})
    with pytest.raises(ValueError, match=r"lacks \['influence'\]"):
        learner.load_state_dict({name: value for name, value in good.items() if name != "influence"})
    assert_same(before, snapshot(learner))


def test_evaluate_runs_without_learning():
    cell, x = small_cell(), inputs(8, 2)
    learner = RTRL(cell, 2)
    run(learner, x, range(3))
    before = snapshot(learner)
    evaluation = learner.evaluate()
    with torch.no_grad():
        output = evaluation.unroll(x[3:6])
    assert output.shape == (3, 2, 2) and not output.requires_grad
    assert_same(before, snapshot(learner))
    torch.testing.assert_close(output[0], learner(x[3]).detach(), rtol=0, atol=1e-14)


class Raising:
    """Errors that a learning step raises, each leaving the learner as it was."""

    def no_grad(learner, x):
        with torch.no_grad():
            learner(x)

    def batch(learner, x):
        learner(x[:1])

    def input_gradient(learner, x):
        learner(x.clone().requires_grad_())

    def nan_input(learner, x):
        learner(torch.full_like(x, float("nan")))

    def infinite_parameter(learner, x):
        learner.cell.experts.weight.data[:] = float("inf")
        learner(x)

    def dtype(learner, x):
        learner.cell.float()
        learner(x.float())

    def shape(learner, x):
        learner.cell.key_value.weight = nn.Parameter(torch.zeros(8, 5, dtype=torch.float64))
        learner(x)

    def no_tensor(learner, x):
        learner([1.0, 2.0])

    def scalar(learner, x):
        learner(torch.tensor(3.0))

    def empty_chunk(learner, x):
        learner.unroll(x[None][:0])

    def bad_mask(learner, x):
        learner.reset(torch.tensor([0, 1]))

    def duplicate_slots(learner, x):
        learner.cell.route = lambda x, h: Routing(*(torch.zeros(2, 2, dtype=torch.int64) for _ in range(3)))
        learner(x)

    def slot_out_of_range(learner, x):
        learner.cell.route = lambda x, h: Routing(*(torch.tensor([[0, 4], [0, 1]]) for _ in range(3)))
        learner(x)

    def routing_shape(learner, x):
        learner.cell.route = lambda x, h: Routing(*(torch.tensor([0, 1]) for _ in range(3)))
        learner(x)

    def update_shape(learner, x):
        learner.cell.update = lambda x, r, w, routing: (w[:, :1], w.sum((1, 2)))
        learner(x)


@pytest.mark.parametrize("commit_every", [1, 2])
@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (Raising.no_grad, RuntimeError, r"learner\.evaluate\(\)"),
        (Raising.batch, ValueError, r"batch size 2, got shape \(1, 4\)"),
        (Raising.input_gradient, ValueError, "x must not require a gradient"),
        (Raising.nan_input, NonFiniteError, r"step 3: NaN or infinity in .*streams \[0, 1\]"),
        (Raising.infinite_parameter, NonFiniteError, r"step 3: .* in experts.weight of experts \["),
        (Raising.no_tensor, ValueError, r"x must be a tensor \(B, \.\.\.\), got list"),
        (Raising.scalar, ValueError, r"x must be a tensor \(B, \.\.\.\), got a tensor \(\)"),
        (Raising.dtype, RuntimeError, "was torch.float64 .* is torch.float32 .* now"),
        (Raising.shape, RuntimeError, r"key_value.weight was .*\(8, 4\).* is .*\(8, 5\)"),
        (Raising.empty_chunk, ValueError, "n >= 1"),
        (Raising.bad_mask, ValueError, "bool mask of shape"),
        (Raising.duplicate_slots, ContractError, r"read must be distinct within a row, got \[0, 0\] in stream 0"),
        (Raising.slot_out_of_range, ContractError, r"0 \.\.\. num_slots - 1 = 3, got \[0, 4\] in stream 0"),
        (Raising.routing_shape, ContractError, r"routing\.read must be int64 \(2, k\)"),
        (Raising.update_shape, ContractError, r"shape \(2, 2, 4\), got \(2, 1, 4\)"),
    ],
)
def test_errors_leave_the_learner_as_it_was(action, error, message, commit_every):
    learner, x = RTRL(small_cell(), 2, commit_every=commit_every), inputs(4, 2)
    run(learner, x, range(2))
    last = learner(x[2])
    before = snapshot(learner)
    with pytest.raises(error, match=message):
        action(learner, x[3])
    assert_same(before, snapshot(learner))
    last.sum().backward()  # the step before is still in time


def test_a_non_finite_expert_is_named_with_its_stream():
    pattern = make_pattern("random", 9, 2)
    cell = PatternCell(pattern, dense=False).double()
    cell.experts.weight.data[2] = float("nan")  # first used in step 8
    learner, x = RTRL(cell, 2), inputs(9, 2)
    run(learner, x, range(8))
    with pytest.raises(NonFiniteError) as caught:
        learner(x[8])
    assert caught.value.step == 8 and caught.value.streams == [0, 1]
    assert caught.value.group == "experts.weight of experts [2]"


def test_a_non_finite_step_of_an_unroll_is_numbered():
    learner, x = RTRL(small_cell(), 2), inputs(6, 2)
    learner.unroll(x[:3])
    x[5] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        learner.unroll(x[3:])
    assert caught.value.step == 5


def test_a_non_finite_loss_stops_before_it_reaches_the_influence():
    learner, x = RTRL(small_cell(), 2), inputs(2, 2)
    run(learner, x, range(1))
    output = learner(x[1])
    before = snapshot(learner)
    with pytest.raises(NonFiniteError, match="gradient of the loss"):
        (output * float("nan")).sum().backward()
    assert_same(before, snapshot(learner))


def test_backward_twice_too_late_and_create_graph():
    learner, x = RTRL(small_cell(), 2, commit_every=1), inputs(4, 2)
    output = learner(x[0])
    output.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="called twice"):
        output.sum().backward()
    late = learner(x[1])
    learner(x[2])
    with pytest.raises(RuntimeError, match="backward came too late"):
        late.sum().backward()
    output = learner(x[3])
    with pytest.raises(RuntimeError, match="create_graph"):
        output.sum().backward(create_graph=True)


def test_losses_of_several_steps_of_a_window_in_one_backward():
    cell, x, c = small_cell(), inputs(6, 2), cotangents(6, 2, density=1.0)
    expected = bptt(cell, x, c)
    learner = RTRL(cell, 2, commit_every=6)
    cell.zero_grad()
    sum((learner(x[t]) * c[t]).sum() for t in range(6)).backward()
    learner.flush()
    assert worst_error(gradients_of(cell), expected) <= 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2, "buffer": 0}, "buffer must be 'auto' or at least 1, got 0"),
        ({"batch_size": 2, "commit_every": 0}, "commit_every must be 'auto' or an int of at least 1, got 0"),
        ({"batch_size": 2, "catch_up": "lazy"}, "catch_up must be one of .*, got 'lazy'"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        RTRL(small_cell(), **arguments)


def test_cells_that_cannot_be_carried_are_refused():
    cell = small_cell()
    cell.norm = nn.BatchNorm1d(4)
    cell.drop = nn.Dropout(0.1)
    with pytest.raises(ContractError) as caught:
        RTRL(cell, 2)
    assert len(caught.value.violations) == 2
    cell.eval()
    RTRL(cell, 2)
    with pytest.raises(TypeError, match="SlotCell"):
        RTRL(nn.Linear(2, 2), 2)
    for parameter in cell.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable recurrent parameter"):
        RTRL(cell, 2)


def test_functional_dropout_is_refused():
    class Dropping(PatternCell):
        def update(self, x, h_read, h_write, routing):
            content, output = super().update(x, h_read, h_write, routing)
            return nn.functional.dropout(content, 0.5), output

    learner = RTRL(Dropping(make_pattern("random", 2, 2), dense=False).double(), 2)
    with pytest.raises(ContractError, match="dropout"):
        learner(inputs(1, 2)[0])


def test_influence_that_cannot_fit_is_refused_with_the_numbers():
    cell = SlotMoECell(
        input_size=4, slot_size=64, num_slots=16, num_experts=64, top_k=2, read_slots=2, write_slots=2, output_size=4
    )
    with pytest.raises(MemoryError, match=r"batch_size 100000 \* \(hidden_size 1024 \+ 1\) \* \d+ recurrent param"):
        RTRL(cell, 100_000)


def test_estimate_counts_what_is_allocated():
    cell = small_cell()
    costs = estimate(cell, batch_size=3)
    influence = RTRL(cell, 3)._engine.influence
    allocated = sum(t.numel() * t.element_size() for t in (influence.core, influence.experts))
    assert costs.influence_bytes == allocated == 8 * 3 * 17 * costs.recurrent_parameters
    recurrent = [p for n, p in cell.named_parameters() if not n.startswith("readout")]
    assert costs.recurrent_parameters == sum(p.numel() for p in recurrent)
    assert costs.break_even_length == pytest.approx(costs.influence_bytes / costs.bptt_bytes_per_step)
    assert str(costs.recurrent_parameters) in str(costs)
    with pytest.raises(ValueError, match="x must be given"):
        estimate(PatternCell(make_pattern("random", 1, 2)), 2)
    assert estimate(PatternCell(make_pattern("random", 1, 2)), 2, x=inputs(1, 2)[0].float()).hidden_size == 12


MEMORY_SCRIPT = """
import psutil, sys, torch
from sparse_rtrl import RTRL, SlotMoECell
torch.set_num_threads(1)
torch.manual_seed(0)
cell = SlotMoECell(input_size=8, slot_size=8, num_slots=4, num_experts=6, top_k=2, read_slots=2, write_slots=2,
                   output_size=4)
learner = RTRL(cell, 2, buffer=16, commit_every=4)
optimizer = torch.optim.SGD(cell.parameters(), lr=1e-3)
learner.attach(optimizer)
process, sizes = psutil.Process(), []
for t in range(int(sys.argv[1])):
    output = learner(torch.randn(2, 8))
    if t % 3 == 0:
        output.pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if t + 1 in (int(sys.argv[1]) // 10, int(sys.argv[1])):
        sizes.append(process.memory_info().rss)
print(*sizes)
"""


def test_a_step_leaves_no_tensors_to_the_garbage_collector():
    learner = RTRL(small_cell(), batch_size=2)

    def step():
        learner.unroll(torch.randn(3, 2, 4, dtype=torch.float64)).sum().backward()

    step()  # checks of the first capture
    gc.collect()
    gc.disable()
    try:
        step()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        held = [tuple(left.shape) for left in gc.garbage if isinstance(left, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert held == []


def test_memory_does_not_grow_with_the_stream():
    """Resident size at 20,000 tokens against that at 2,000, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, "10000"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    early, late = map(int, done.stdout.split())  # 2 streams: 2,000 and 20,000 tokens
    assert abs(late - early) <= 0.02 * early, (early, late)


def test_cells_without_experts():
    class Plain(SlotCell):
        def __init__(self):
            super().__init__(3, 2)
            self.inner, self.readout = nn.Linear(6, 2), nn.Linear(2, 2)

        def route(self, x, state):
            slots = (x[:, -1:].long() + torch.arange(2)) % 3
            return Routing(slots[:, :1], slots[:, 1:], slots[:, :0])

        def update(self, x, h_read, h_write, routing):
            new = torch.tanh(self.inner(torch.cat((x[:, :2], h_read[:, 0], h_write[:, 0]), 1)))
            return new.unsqueeze(1), self.readout(new)

    cell, x, c = Plain().double(), inputs(15, 2), cotangents(15, 2)
    for catch_up in ("eager", "auto"):
        found = online(RTRL(cell, 2, commit_every=2, catch_up=catch_up), x, c)
        assert worst_error(found, bptt(cell, x, c)) <= 1e-12


def test_loading_in_mid_window_forgets_the_window():
    cell = PatternCell(make_pattern("random", 40, 2), dense=False).double()
    x, c = inputs(40, 2), cotangents(40, 2, density=1.0)
    saved = RTRL(cell, 2, buffer=6, commit_every=4)
    online(saved, x[:8], c[:8])
    state = copy.deepcopy(saved.state_dict())
    used = RTRL(cell, 2, buffer=6, commit_every=4)
    online(used, x[20:23], c[20:23])
    late = used(x[23])
    used.load_state_dict(state)
    with pytest.raises(RuntimeError, match="too late"):
        late.sum().backward()
    one, two = (online(each, x[8:30], c[8:30]) for each in (saved, used))
    assert_same(one.values(), two.values())


def test_cells_whose_gradient_would_be_wrong_are_refused():
    class OwnForward(PatternCell):
        def forward(self, x, state, routing=None):
            return super().forward(2 * x, state, routing)

    class OtherTransition(PatternCell):
        def transition(self, x, h_read, h_write, routing):
            return super().transition(x, h_read, 0.5 * h_write, routing) + 1

    class Noisy(PatternCell):
        def update(self, x, h_read, h_write, routing):
            content, output = super().update(x, h_read, h_write, routing)
            return content + torch.randn_like(content), output

    class Coupled(PatternCell):
        def update(self, x, h_read, h_write, routing):
            content, output = super().update(x, h_read, h_write, routing)
            return nn.functional.batch_norm(content, None, None, training=True), output

    class AllExperts(PatternCell):
        def update(self, x, h_read, h_write, routing):
            content, output = super().update(x, h_read, h_write, routing)
            return content + self.experts.bias.sum(0), output

    pattern, x = make_pattern("random", 4, 2, num_slots=4), inputs(4, 2)
    for kind, message in (
        (OwnForward, "overrides forward"),
        (OtherTransition, "transition must return"),
        (Noisy, "random numbers"),
        (Coupled, "couples the rows"),
        (AllExperts, r"inactive experts \[.*\] have influence through experts.bias"),
    ):
        with pytest.raises(ContractError, match=message):
            RTRL(kind(pattern, dense=False).double(), 2)(x[0])


def test_under_autocast_the_influence_stays_in_full_precision():
    cell, x, c = small_cell().float(), inputs(20, 3).float(), cotangents(20, 3)
    learner = RTRL(cell, 3, commit_every=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = bptt(cell, x, c)  # rounds alike, so that no top-k flips
        found = online(learner, x, c)
    assert learner._engine.capture.dense == set()
    assert all(m.dtype == torch.float32 for m in learner.influence().values())
    assert learner.state.dtype == torch.float32
    assert worst_error(found, expected) < 0.1


def test_clipping_and_momentum_see_the_same_gradient_as_with_bptt():
    x, c = inputs(18, 2), cotangents(18, 2)
    ends = []
    for use_bptt in (True, False):
        cell = PatternCell(make_pattern("random", 18, 2), dense=False).double()
        torch.manual_seed(0)
        for p in cell.parameters():
            nn.init.normal_(p, std=0.5)
        optimizer = torch.optim.SGD(cell.parameters(), lr=0.1, momentum=0.9)
        learner = RTRL(cell, 2, buffer=4, commit_every=2)
        learner.attach(optimizer)
        for _ in range(3):
            if use_bptt:
                for name, gradient in bptt(cell, x, c).items():
                    cell.get_parameter(name).grad = gradient
            else:
                learner.reset()
                online(learner, x, c)
            nn.utils.clip_grad_norm_(cell.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach().clone() for p in cell.parameters()])
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [50, 10_000])
def test_steps_of_an_unroll_are_captured_together_as_they_are_alone(rows, monkeypatch):
    x, c = inputs(11, 2), cotangents(11, 2)
    windows, calls = [], []
    for most in (1, rows):
        monkeypatch.setattr("sparse_rtrl.capture.jacobian.ROWS_TOGETHER", most)
        learner = RTRL(small_cell(), 2, commit_every=16, backend="reference")  # which has no fused pass
        capture = learner._engine.capture
        step = capture.step
        count = [0]

        def counted(*arguments, step=step, count=count):
            count[0] += 1
            return step(*arguments)

        monkeypatch.setattr(capture, "step", counted)
        found = online(learner, x, c, segment=11)
        windows.append(learner._engine.influence.window)
        calls.append(count[0])
        assert worst_error(found, bptt(small_cell(), x, c)) <= 1e-12
    assert calls == [11, {50: 5, 10_000: 2}[rows]]  # 16 rows a step; the first is captured alone
    assert worst_error(found, bptt(small_cell(), x, c, truncate=4)) > 1e-2
    for alone, together in zip(*windows, strict=True):
        for mine, its in ((alone.core, together.core), (alone.expert, together.expert)):
            assert float((mine.delta - its.delta).abs().max()) < 1e-14
            for term, other in zip(mine.terms, its.terms, strict=True):
                assert term.z is None or float((term.z - other.z).abs().max()) < 1e-14
        assert float((alone.Jh - together.Jh).abs().max()) < 1e-14
    assert float((windows[1][0].Jh - windows[1][1].Jh).abs().max()) > 1e-2


def test_an_unroll_may_change_how_many_slots_a_step_writes():
    class Widening(PatternCell):
        def route(self, x, state):
            routing = super().route(x, state)
            late = float(x[0, -1]) >= 3
            return Routing(routing.read, routing.write[:, : 2 if late else 1], routing.experts)

    torch.manual_seed(0)
    cell = Widening(make_pattern("random", 8, 2), dense=False).double()
    x, c = inputs(8, 2), cotangents(8, 2)
    expected = bptt(cell, x, c)
    assert worst_error(online(RTRL(cell, 2), x, c, segment=8), expected) <= 1e-12
