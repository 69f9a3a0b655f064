"""The baselines against each other in float64, and against a BPTT written out by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparse_rtrl.cells import SlotMoECell, SparseLatentMoECell
from sparse_rtrl.training.baselines import BPTT, TBPTT, DenseJacobianRTRL, RecurrentNetwork
from sparse_rtrl.training.tasks import IGNORE, Batch, Haystack, MultiQueryRecall


@pytest.fixture(autouse=True)
def _float64_and_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def build_cell(kind=SlotMoECell, **sizes):
    defaults = {
        "input_size": 8,
        "slot_size": 4,
        "num_slots": 3,
        "num_experts": 3,
        "top_k": 1,
        "read_slots": 2,
        "write_slots": 1,
        "output_size": 4,
    }
    return kind(**(defaults | sizes))


def gradient(method, batch):
    method.model.zero_grad()
    tallies = list(method.segments(batch))
    flat = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter in method.model.parameters()
    ]
    return torch.cat([part.flatten() for part in flat]), sum(tallies[1:], tallies[0])


def difference(got, expected):
    assert expected.norm() > 0
    return ((got - expected).norm() / expected.norm()).item()


def every_step_asked(length=7, batch_size=3):
    x = functional.one_hot(torch.randint(8, (length, batch_size)), 8).to(torch.get_default_dtype())
    target = torch.randint(4, (length, batch_size))
    target[2, 1] = IGNORE
    return Batch(x, target)


BATCHES = {"last step": lambda: Haystack(9, 3).sample(), "every step": every_step_asked}


@pytest.mark.parametrize("batch", BATCHES)
def test_bptt_is_the_gradient_of_the_mean_loss(batch):
    cell, batch = build_cell(), BATCHES[batch]()
    got, tally = gradient(BPTT(cell), batch)
    state, losses = cell.initial_state(3), []
    for x, target in zip(batch.x, batch.target, strict=True):
        output, _, state = cell(x, state)
        losses.append(functional.cross_entropy(output, target, ignore_index=IGNORE, reduction="none"))
    asked = batch.target != IGNORE
    loss = torch.stack(losses).sum() / asked.sum()
    cell.zero_grad()
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in cell.parameters()])
    assert difference(got, expected) < 1e-14
    assert tally.asked == asked.sum()
    assert tally.mean_loss == pytest.approx(loss.item())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", [SlotMoECell, SparseLatentMoECell])
@pytest.mark.parametrize("sizes", [{}, {"top_k": 2, "write_slots": 2}, {"write_slots": 3, "num_experts": 1}])
def test_dense_jacobian_rtrl_is_bptt(kind, sizes, batch):
    cell, batch = build_cell(kind, **sizes), BATCHES[batch]()
    expected, expected_tally = gradient(BPTT(cell), batch)
    got, tally = gradient(DenseJacobianRTRL(cell), batch)
    assert difference(got, expected) < 1e-13
    assert (tally.correct, tally.asked) == (expected_tally.correct, expected_tally.asked)
    assert tally.loss == pytest.approx(expected_tally.loss)


def test_dense_jacobian_rtrl_without_influence_is_wrong(monkeypatch):
    cell, batch = build_cell(), Haystack(9, 3).sample()
    expected, _ = gradient(BPTT(cell), batch)
    monkeypatch.setattr(DenseJacobianRTRL, "_update_influence", lambda *args: None)
    got, _ = gradient(DenseJacobianRTRL(cell), batch)
    assert difference(got, expected) > 1e-2


def test_dense_jacobian_rtrl_leaves_frozen_parameters_alone():
    cell, batch = build_cell(), Haystack(9, 3).sample()
    cell.slot_table.requires_grad_(False)
    expected, _ = gradient(BPTT(cell), batch)
    got, _ = gradient(DenseJacobianRTRL(cell), batch)
    assert cell.slot_table.grad is None
    assert difference(got, expected) < 1e-13


@pytest.mark.parametrize("batch", BATCHES)
def test_tbptt_of_the_whole_sequence_is_bptt_and_of_less_is_not(batch):
    cell, batch = build_cell(), BATCHES[batch]()
    expected, expected_tally = gradient(BPTT(cell), batch)
    whole, _ = gradient(TBPTT(cell, segment=100), batch)
    assert difference(whole, expected) < 1e-14
    truncated, tally = gradient(TBPTT(cell, segment=2), batch)
    assert difference(truncated, expected) > 1e-2
    # The forward pass is the same: only the gradient is cut.
    assert tally.loss == pytest.approx(expected_tally.loss)


def test_tbptt_is_bptt_from_the_detached_state():
    cell, batch = build_cell(), every_step_asked(length=6)
    got, _ = gradient(TBPTT(cell, segment=3), batch)
    cell.zero_grad()
    state, asked = cell.initial_state(3), (batch.target != IGNORE).sum()
    for step, (x, target) in enumerate(zip(batch.x, batch.target, strict=True)):
        state = state.detach() if step == 3 else state
        output, _, state = cell(x, state)
        loss = functional.cross_entropy(output, target, ignore_index=IGNORE, reduction="sum")
        (loss / asked).backward(retain_graph=True)
    assert difference(got, torch.cat([parameter.grad.flatten() for parameter in cell.parameters()])) < 1e-13


def test_mean_per_segment_divides_by_the_answers_of_the_segment():
    cell = build_cell(input_size=8)
    batch = MultiQueryRecall(12, 3, num_pairs=2, num_keys=3).sample()  # recall has 7 tokens; answers at steps 9, 11
    per_batch, _ = gradient(TBPTT(cell, segment=10), batch)
    cell.zero_grad()
    for _ in TBPTT(cell, segment=10).segments(batch, mean_per_segment=True):
        pass
    per_segment = torch.cat([parameter.grad.flatten() for parameter in cell.parameters()])
    assert difference(per_segment, 2 * per_batch) < 1e-13


@pytest.mark.parametrize("kind", ["gru", "rnn"])
def test_recurrent_network_carries_its_state(kind):
    network = RecurrentNetwork(kind, 8, 5, 4)
    x = torch.randn(6, 3, 8)
    whole, end = network(x, network.initial_state(3))
    first, state = network(x[:2], network.initial_state(3))
    second, last = network(x[2:], state)
    assert whole.shape == (6, 3, 4)
    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(last, end)
    assert isinstance(network.recurrence, {"gru": nn.GRU, "rnn": nn.RNN}[kind])


def test_errors_name_argument_and_value():
    with pytest.raises(ValueError, match=r"kind must be one of .*gru.*got 'lstm'"):
        RecurrentNetwork("lstm", 8, 5, 4)
    with pytest.raises(ValueError, match="segment must be at least 1, got 0"):
        TBPTT(build_cell(), segment=0)
