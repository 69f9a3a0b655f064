"""The ready cells keep the support contract and train every parameter."""

import pytest
import torch

from sparse_rtrl.cells import SlotMoECell, SparseLatentMoECell
from sparse_rtrl.cells.slot_cell import Routing

SIZES = dict(
    input_size=5,
    slot_size=6,
    num_slots=5,
    num_experts=3,
    top_k=2,
    read_slots=2,
    write_slots=2,
    output_size=4,
)
CELLS = [
    pytest.param(SlotMoECell, {"num_heads": 2}, id="slot_moe"),
    pytest.param(SparseLatentMoECell, {}, id="sparse_latent_moe"),
]
# (top_k, read_slots, write_slots): the usual case, one of each (soft weights must still train), everything.
SELECTIONS = [(2, 2, 2), (1, 1, 1), (3, 5, 5), (1, 3, 1)]


def make_cell(cls, extra, **sizes):
    torch.manual_seed(0)
    return cls(**{**SIZES, **extra, **sizes}).double()


def make_input(cell, batch_size, steps=None, seed=1):
    """Inputs ``(steps, B, input_size)`` or ``(B, input_size)`` and a state ``(B, S, D)`` that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, cell.input_size) if steps is None else (steps, batch_size, cell.input_size)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    h = torch.randn(batch_size, cell.num_slots, cell.slot_size, generator=generator, dtype=torch.float64)
    return x, h


def selected(slots, num_slots):
    """Boolean mask ``(B, S)`` of the slots named in ``slots (B, k)``."""
    return torch.zeros(slots.shape[0], num_slots, dtype=torch.bool).scatter(1, slots, True)


@pytest.mark.parametrize(("cls", "extra"), CELLS)
def test_shapes_and_info(cls, extra):
    cell = cls(**{**SIZES, **extra})
    state = cell.initial_state(7)
    assert state.shape == (7, 5, 6) and not state.any()
    output, info, new_state = cell(torch.randn(7, 5), state)
    assert output.shape == (7, 4) and output.dtype == torch.float32
    assert new_state.shape == state.shape
    assert torch.equal(info.pop("h_next"), new_state)
    assert set(info) == {"idx_slots_read", "idx_slots_write", "idx_experts"}
    assert all(indices.shape == (7, 2) and indices.dtype == torch.int64 for indices in info.values())


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("cls", "extra"), CELLS)
def test_routing_is_distinct_and_in_range(cls, extra, selection):
    top_k, read_slots, write_slots = selection
    cell = make_cell(cls, extra, top_k=top_k, read_slots=read_slots, write_slots=write_slots)
    _, info, _ = cell(*make_input(cell, 64))
    for name, count, limit in (
        ("idx_slots_read", read_slots, 5),
        ("idx_slots_write", write_slots, 5),
        ("idx_experts", top_k, 3),
    ):
        indices = info[name]
        assert indices.shape == (64, count)
        assert indices.min() >= 0 and indices.max() < limit
        assert all(len(set(row)) == count for row in indices.tolist())
        # Different inputs choose differently, unless everything is chosen.
        assert count == limit or len({tuple(sorted(row)) for row in indices.tolist()}) > 1


@pytest.mark.parametrize(("cls", "extra"), CELLS)
def test_routing_differs_from_the_zero_state(cls, extra):
    """Slots have an identity: from the all-zero state, written slots do not tie and end up different."""
    cell = make_cell(cls, extra)
    x, _ = make_input(cell, 3)
    _, info, state = cell(x, cell.initial_state(3).double())
    written = state.gather(1, info["idx_slots_write"].unsqueeze(-1).expand(-1, -1, 6))
    assert (written[:, 0] - written[:, 1]).abs().amax() > 1e-3


@pytest.mark.parametrize(("cls", "extra"), CELLS)
def test_slots_not_written_are_copied_bit_for_bit(cls, extra):
    cell = make_cell(cls, extra)
    x, h = make_input(cell, 32)
    _, info, new_state = cell(x, h)
    written = selected(info["idx_slots_write"], cell.num_slots)
    assert torch.equal(new_state[~written], h[~written])
    assert (new_state[written] != h[written]).any(-1).all()


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("cls", "extra"), CELLS)
def test_jacobian_is_zero_outside_the_support(cls, extra, selection):
    top_k, read_slots, write_slots = selection
    cell = make_cell(cls, extra, top_k=top_k, read_slots=read_slots, write_slots=write_slots)
    x, h = make_input(cell, 1)
    with torch.no_grad():
        routing = cell.route(x, h)

    def step(h):
        output, _, new_state = cell(x, h)
        return new_state[0], output[0]

    by_state, by_output = torch.autograd.functional.jacobian(step, h)  # (S, D, 1, S, D), (O, 1, S, D)
    support = selected(routing.support, cell.num_slots)[0]
    written = selected(routing.write, cell.num_slots)[0]
    by_state = by_state.squeeze(2)[written]  # (kw, D, S, D)
    assert (by_state[:, :, ~support] == 0).all()
    assert (by_output.squeeze(1)[:, ~support] == 0).all()
    # Alive: written content depends on every slot of the support, read slots included, and so does the output.
    assert (by_state[:, :, support].abs().amax((0, 1, 3)) > 1e-6).all()
    assert (by_output.squeeze(1)[:, support].abs().amax((0, 2)) > 1e-6).all()


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("cls", "extra"), CELLS)
def test_every_parameter_that_was_used_gets_a_gradient(cls, extra, selection):
    top_k, read_slots, write_slots = selection
    cell = make_cell(cls, extra, top_k=top_k, read_slots=read_slots, write_slots=write_slots)
    x, _ = make_input(cell, 4, steps=6)
    state = cell.initial_state(4).double()
    used, loss = set(), 0.0
    for x_t in x:
        output, info, state = cell(x_t, state)
        used.update(info["idx_experts"].flatten().tolist())
        loss = loss + (output**2).sum()
    loss.backward()
    for name, parameter in cell.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith("experts."):
            for expert in range(cell.num_experts):
                assert parameter.grad[expert].any() == (expert in used), f"{name}[{expert}]"
        else:
            # The weight behind the orthogonal core is skew-symmetric: only its lower triangle is used.
            grad = parameter.grad.tril(-1) if "parametrizations" in name else parameter.grad
            assert grad.norm() > 1e-9, name


@pytest.mark.parametrize("selection", [(2, 2, 2), (1, 1, 1)])
@pytest.mark.parametrize(("cls", "extra"), CELLS)
def test_every_row_of_the_fused_maps_trains(cls, extra, selection):
    """Fused projections hold several maps; a row without gradient would be a map that never trains."""
    top_k, read_slots, write_slots = selection
    cell = make_cell(cls, extra, top_k=top_k, read_slots=read_slots, write_slots=write_slots)
    x, _ = make_input(cell, 64, steps=12)
    state, loss = cell.initial_state(64).double(), 0.0
    for x_t in x:
        output, _, state = cell(x_t, state)
        loss = loss + (output**2).sum()
    loss.backward()
    for name, parameter in cell.named_parameters():
        if "parametrizations" not in name:
            assert (parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad[:, None]).any(1).all(), name


@pytest.mark.parametrize(("cls", "extra"), CELLS)
def test_readout_parameters_do_not_reach_the_state(cls, extra):
    cell = make_cell(cls, extra)
    x, h = make_input(cell, 3)
    output, _, new_state = cell(x, h)
    parameters = list(cell.readout.parameters())
    assert all(
        g is None for g in torch.autograd.grad(new_state.sum(), parameters, retain_graph=True, allow_unused=True)
    )
    assert all(g.any() for g in torch.autograd.grad((output**2).sum(), parameters))


@pytest.mark.parametrize(("cls", "extra"), CELLS)
def test_inactive_experts_have_no_immediate_jacobian(cls, extra):
    cell = make_cell(cls, extra, top_k=1)
    x, h = make_input(cell, 1)
    with torch.no_grad():
        routing = cell.route(x, h)
    new_state = cell(x, h, routing)[2].flatten()
    for name, parameter in cell.experts.named_parameters():
        rows = [torch.autograd.grad(entry, parameter, retain_graph=True)[0] for entry in new_state]
        by_expert = torch.stack(rows).abs().flatten(2).sum((0, 2))
        assert by_expert.nonzero().flatten().tolist() == routing.experts[0].tolist(), name


@pytest.mark.parametrize(("cls", "extra"), CELLS)
def test_rows_are_independent(cls, extra):
    cell = make_cell(cls, extra)
    x, h = make_input(cell, 6)
    output, _, new_state = cell(x, h)
    for row in range(6):
        one = slice(row, row + 1)
        output_row, _, state_row = cell(x[one], h[one])
        torch.testing.assert_close(output_row, output[one], rtol=0, atol=1e-13)
        torch.testing.assert_close(state_row, new_state[one], rtol=0, atol=1e-13)
    h.requires_grad_()
    output, _, new_state = cell(x, h)
    (grad,) = torch.autograd.grad(output[2].sum() + new_state[2].sum(), h)
    assert grad[2].any() and not grad[[0, 1, 3, 4, 5]].any()


@pytest.mark.parametrize(("cls", "extra"), CELLS)
def test_recorded_routing_is_replayed(cls, extra):
    cell = make_cell(cls, extra)
    x, h = make_input(cell, 2)
    pairs = torch.tensor([[0, 3], [4, 1]])
    routing = Routing(read=pairs, write=pairs.flip(1), experts=torch.tensor([[2, 0], [1, 2]]))
    _, info, new_state = cell(x, h, routing)
    assert torch.equal(info["idx_slots_write"], pairs.flip(1))
    assert torch.equal((new_state != h).any(-1), selected(pairs, 5))


def test_core_is_orthogonal_while_it_trains():
    cell = make_cell(SlotMoECell, {"num_heads": 2})
    start = cell.core.weight.detach().clone()
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
    x, h = make_input(cell, 4)
    for _ in range(5):
        output, _, h = cell(x, h.detach())
        (output**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = cell.core.weight.detach()
    assert (weight - start).abs().max() > 1e-6
    # The parametrization starts from a matrix that is orthogonal in float32.
    torch.testing.assert_close(weight @ weight.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("cls", "extra"), CELLS)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_size", 0, "input_size must be at least 1, got 0"),
        ("output_size", 0, "output_size must be at least 1, got 0"),
        ("slot_size", 0, "slot_size must be at least 1, got 0"),
        ("num_experts", 0, "num_experts must be at least 1, got 0"),
        ("top_k", 4, "top_k must be at most num_experts=3, got 4"),
        ("top_k", 0, "top_k must be at least 1, got 0"),
        ("read_slots", 6, "read_slots must be at most num_slots=5, got 6"),
        ("write_slots", 6, "write_slots must be at most num_slots=5, got 6"),
        ("write_slots", 0, "write_slots must be at least 1, got 0"),
    ],
)
def test_bad_sizes_raise(cls, extra, name, value, message):
    with pytest.raises(ValueError, match=message):
        cls(**{**SIZES, **extra, name: value})


@pytest.mark.parametrize("num_heads", [0, 4])
def test_heads_must_divide_the_slot_size(num_heads):
    with pytest.raises(ValueError, match=f"num_heads must divide slot_size=6, got {num_heads}"):
        SlotMoECell(**SIZES, num_heads=num_heads)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("write_to", "anywhere", "write_to must be 'important' or 'least_used', got 'anywhere'"),
        ("read_weights", "hard", "read_weights must be 'sigmoid' or 'softmax', got 'hard'"),
    ],
)
def test_ways_to_write_and_read_are_checked(argument, value, message):
    with pytest.raises(ValueError, match=message):
        SlotMoECell(**SIZES, **{argument: value})
    with pytest.raises(ValueError, match="read_slots must be at least 2"):
        SlotMoECell(**{**SIZES, "read_slots": 1}, read_weights="softmax")


def test_the_least_used_slots_are_written_in_order():
    cell = SlotMoECell(**SIZES, num_heads=2, write_to="least_used")
    state = torch.zeros(2, cell.num_slots, cell.slot_size)
    x = torch.randn(2, cell.input_size)
    assert cell.route(x, state).write.tolist() == [[0, 1], [0, 1]]  # of equal ones the first
    state[0, 0], state[1, 1:] = 1.0, 2.0
    assert cell.route(x, state).write.tolist() == [[1, 2], [0, 1]]
