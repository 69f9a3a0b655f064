"""The explicit step interface."""

import pytest
import torch
from oracle import bptt, cotangents, gradients_of, inputs, worst_error

from sparse_rtrl import BlockRTRL, ContractError, NonFiniteError, Routing, SlotMoECell, get_expert_latent_activated
from sparse_rtrl.errors import BackendError
from sparse_rtrl.ops import dispatch


def model(num_experts=5):
    torch.manual_seed(0)
    return SlotMoECell(
        input_size=4,
        slot_size=4,
        num_slots=4,
        num_experts=num_experts,
        top_k=2,
        read_slots=2,
        write_slots=2,
        output_size=2,
    ).double()


def test_info_has_both_index_sets():
    cell = model()
    _, info, _ = cell(inputs(1, 3)[0], cell.initial_state(3))
    for key, k in (("idx_slots_read", 2), ("idx_slots_write", 2), ("idx_experts", 2)):
        assert info[key].shape == (3, k) and info[key].dtype == torch.int64


def test_index_lists_are_those_of_the_batch():
    cell = model()
    info = {
        "idx_slots_read": torch.tensor([[0, 2], [2, 3]]),
        "idx_slots_write": torch.tensor([[1, 0], [0, 1]]),
        "idx_experts": torch.tensor([[4, 1], [1, 2]]),
    }
    active, write, read = get_expert_latent_activated(cell, info)
    assert write == [*range(0, 8)]
    assert read == [*range(0, 4), *range(8, 16)]
    experts = {f"experts.{kind}.{e}" for kind in ("weight", "bias") for e in (1, 2, 4)}
    core = {"slot_table", "query_token.weight", "query_token.bias", "key_value.weight", "control.weight"}
    assert set(active) == experts | core | {"control.bias", "core.weight"}
    assert torch.equal(active["experts.weight.4"], cell.experts.weight[4])


@pytest.mark.parametrize(
    ("catch_up", "backend"),
    [("auto", "auto"), ("auto", "reference"), ("eager", "auto"), ("replay", "auto"), ("product", "auto")],
)
def test_16_step_training_loop_has_the_gradient_of_bptt(catch_up, backend):
    cell, x, c = model(), inputs(16, 3), cotangents(16, 3)
    expected = bptt(cell, x, c)
    rtrl = BlockRTRL(dict(cell.named_parameters()), 3, cell.hidden_size, 4, catch_up, backend)
    h_t = cell.initial_state(3)
    for t in range(16):
        out, info, h_next = cell(x[t], h_t)
        active_params, write_idx, read_idx = get_expert_latent_activated(cell, info)
        loss = (out * c[t]).sum() if bool(c[t].any()) else None
        rtrl.step(cell, x[t], h_t, loss, active_params, read_idx, write_idx)
        h_t = h_next.detach()
    assert worst_error(gradients_of(cell), expected) <= 1e-12
    assert max(float(m.norm()) for m in rtrl.influence().values()) > 1e-3


def test_a_backend_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(dispatch, "compiled_problem", "they were not built")
    cell, x = model(), inputs(1, 2)
    rtrl = BlockRTRL(dict(cell.named_parameters()), 2, cell.hidden_size, backend="cpp")
    state = cell.initial_state(2)
    out, info, _ = cell(x[0], state)
    with pytest.raises(BackendError, match="they were not built"):
        rtrl.step(cell, x[0], state, out.sum(), *(get_expert_latent_activated(cell, info)[i] for i in (0, 2, 1)))


@pytest.mark.parametrize("catch_up", ["auto", "eager", "replay", "product"])
def test_a_loss_on_the_whole_new_state(catch_up):
    """Copied slots of the new state are old content: the loss reaches slots outside the support."""
    cell, x = model(), inputs(12, 2)
    weights = torch.randn(12, 2, 4, 4, dtype=torch.float64)
    state, total = cell.initial_state(2), 0.0
    for t in range(12):
        _, _, state = cell(x[t], state)
        total = total + (state * weights[t]).sum()
    total.backward()
    expected = gradients_of(cell)
    cell.zero_grad()
    rtrl = BlockRTRL(cell.named_parameters(), 2, 16, len_buffer=4, catch_up=catch_up)
    h_t = cell.initial_state(2)
    for t in range(12):
        _, info, h_next = cell(x[t], h_t)
        active, write, read = get_expert_latent_activated(cell, info)
        rtrl.step(cell, x[t], h_t, (h_next * weights[t]).sum(), active, read, write)
        h_t = h_next.detach()
    expected = {n: g for n, g in expected.items() if not n.startswith("readout")}
    found = gradients_of(cell)
    assert worst_error({n: found[n] for n in expected}, expected) <= 1e-12


def test_resume():
    cell, x = model(), inputs(10, 2)

    def loop(rtrl, h_t, steps):
        for t in steps:
            out, info, h_next = cell(x[t], h_t)
            active, write, read = get_expert_latent_activated(cell, info)
            rtrl.step(cell, x[t], h_t, out.sum(), active, read, write)
            h_t = h_next.detach()
        return h_t

    one, two = (BlockRTRL(cell.named_parameters(), 2, 16) for _ in range(2))
    h_t = loop(one, cell.initial_state(2), range(5))
    two.load_state_dict(one.state_dict())
    loop(one, h_t.clone(), range(5, 10))
    loop(two, h_t.clone(), range(5, 10))
    for name, matrix in one.influence().items():
        assert torch.equal(matrix, two.influence()[name])


def test_errors():
    cell, x = model(), inputs(1, 2)[0]
    rtrl = BlockRTRL(cell.named_parameters(), 2, 16)
    h_t = cell.initial_state(2)
    out, info, _ = cell(x, h_t)
    active, write, read = get_expert_latent_activated(cell, info)
    for arguments, error, message in (
        ((h_t, out.sum(), active, read[1:], write), ContractError, "read_idx must hold"),
        ((h_t, out.sum(), active, read, write[:-1]), ContractError, "write_idx must hold"),
        ((h_t, out.sum(), ["core.weight"], read, write, info), ContractError, "active_params must name"),
        ((h_t, out.sum(), list(active), read, write), ValueError, "info must be the dict .* got None"),
        ((h_t[:1], out.sum(), active, read, write), ValueError, "h_t must have shape"),
        ((h_t, out.sum().detach(), active, read, write), ValueError, "loss must depend"),
        ((h_t.detach(), out.sum(), active, read, write), ValueError, "the very tensor"),
        ((h_t * 1, out.sum(), active, read, write), ValueError, "must be detached"),
    ):
        with pytest.raises(error, match=message):
            rtrl.step(cell, x, *arguments)
    with pytest.raises(ValueError, match="H must be the model's"):
        BlockRTRL(cell.named_parameters(), 2, 17).step(cell, x, h_t, None, active, read, write)
    with pytest.raises(ValueError, match=r"missing: .*core\.weight"):
        BlockRTRL({"slot_table": cell.slot_table}, 2, 16).step(cell, x, h_t, None, active, read, write)
    with pytest.raises(ValueError, match="at least one"):
        BlockRTRL({}, 2, 16)


def test_a_failed_step_can_be_repeated():
    cell, x, c = model(), inputs(12, 2), cotangents(12, 2, density=1.0)
    expected = bptt(cell, x, c)
    rtrl = BlockRTRL(cell.named_parameters(), 2, 16, len_buffer=4)
    h_t = cell.initial_state(2)
    for t in range(12):
        for failing in (True, False) if t == 5 else (False,):
            out, info, h_next = cell(x[t], h_t)
            active, write, read = get_expert_latent_activated(cell, info)
            if failing:
                kept = {n: p.grad.clone() for n, p in cell.named_parameters() if p.grad is not None}
                with pytest.raises(NonFiniteError, match="step 5"):
                    rtrl.step(cell, x[t], h_t, (out * float("nan")).sum(), active, read, write)
                for name, gradient in kept.items():
                    cell.get_parameter(name).grad = gradient
                h_t = h_t.detach()
            else:
                rtrl.step(cell, x[t], h_t, (out * c[t]).sum(), active, read, write)
        h_t = h_next.detach()
    assert worst_error(gradients_of(cell), expected) <= 1e-12


def test_freezing_a_parameter_in_mid_stream_and_an_empty_state():
    cell, x = model(), inputs(4, 2)
    rtrl = BlockRTRL(cell.named_parameters(), 2, 16)
    h_t = cell.initial_state(2)
    for t in range(4):
        if t == 2:
            cell.control.weight.requires_grad_(False)
        out, info, h_next = cell(x[t], h_t)
        active, write, read = get_expert_latent_activated(cell, info)
        rtrl.step(cell, x[t], h_t, out.sum(), active, read, write)
        h_t = h_next.detach()
    fresh = BlockRTRL(cell.named_parameters(), 2, 16)
    state = rtrl.state_dict()
    fresh.load_state_dict(state)
    assert fresh.state_dict() is state  # not yet used, not lost
    rtrl.load_state_dict({})
    assert rtrl.influence() == {}


def noisy(cell):
    """Let a router draw: what it would choose when it is asked again is something else."""
    route, generator = cell.route, torch.Generator().manual_seed(0)

    def drawn(x, state):
        routing = route(x, state)
        return Routing(routing.read, routing.write, torch.rand(len(x), 5, generator=generator).topk(2, 1).indices)

    cell.route = drawn


@pytest.mark.parametrize("passed", [True, False])
def test_a_router_that_draws_is_not_asked_again(passed):
    cell, x, c = model(), inputs(12, 3), cotangents(12, 3, density=1.0)
    noisy(cell)
    rtrl, h_t, routings = BlockRTRL(dict(cell.named_parameters()), 3, cell.hidden_size, 4), cell.initial_state(3), []
    for t in range(12):
        out, info, h_next = cell(x[t], h_t)
        routings.append(Routing(info["idx_slots_read"], info["idx_slots_write"], info["idx_experts"]))
        active, write, read = get_expert_latent_activated(cell, info)
        loss = (out * c[t]).sum()
        if passed:
            rtrl.step(cell, x[t], h_t, loss, list(active), read, write, info=info)
        else:
            rtrl.step(cell, x[t], h_t, loss, active, read, write)
        h_t = h_next.detach()
    found = gradients_of(cell)
    assert worst_error(found, bptt(cell, x, c, routings=routings)) <= 1e-12


def test_a_first_step_with_another_state_is_refused():
    """Nothing is known of the step before, but slots that are not written must be those of info['h_next']."""
    torch.manual_seed(0)
    cell, x = model(), inputs(1, 3)
    h_t = torch.randn(3, 4, 4, dtype=torch.float64)
    _, info, _ = cell(x[0], h_t)
    active, write, read = get_expert_latent_activated(cell, info)
    untouched = torch.ones(3, 4, 1, dtype=torch.float64)
    for index in ("idx_slots_write", "idx_slots_read"):
        untouched.scatter_(1, info[index].unsqueeze(-1), 0)
    assert untouched.any()
    rtrl = BlockRTRL(dict(cell.named_parameters()), 3, cell.hidden_size, 4)
    with pytest.raises(ContractError, match="not the state that the model ran with"):
        rtrl.step(cell, x[0], h_t.detach() + 0.1 * untouched, None, active, read, write)


@pytest.mark.parametrize("change", ["x", "state", "unwritten", "weights", "info"])
def test_a_step_with_other_inputs_is_refused(change):
    cell, x = model(), inputs(4, 3)
    rtrl, h_t = BlockRTRL(dict(cell.named_parameters()), 3, cell.hidden_size, 4), cell.initial_state(3)
    for t in range(4):
        out, info, h_next = cell(x[t], h_t)
        active, write, read = get_expert_latent_activated(cell, info)
        if t < 3:
            rtrl.step(cell, x[t], h_t, out.sum(), active, read, write)
            h_t, before = h_next.detach(), info
    x_t, given, influence = x[3], {}, {name: m.clone() for name, m in rtrl.influence().items()}
    if change == "x":
        x_t = x[2]
    elif change == "state":
        h_t = cell.initial_state(3).requires_grad_()
    elif change == "unwritten":
        spared = torch.ones(3, 4, 1, dtype=torch.float64).scatter_(1, info["idx_slots_write"].unsqueeze(-1), 0)
        spared.scatter_(1, info["idx_slots_read"].unsqueeze(-1), 0)
        assert spared.any()
        h_t = (h_t.detach() + 0.1 * spared).requires_grad_()
    elif change == "weights":
        cell.control.bias.data.add_(0.01)
    else:
        given = {"info": before}
        active, write, read = get_expert_latent_activated(cell, before)
    gradients = gradients_of(cell)
    with pytest.raises(ContractError, match=r"not what ran|not the state that the model ran with|differs from the h_"):
        rtrl.step(cell, x_t, h_t, out.sum(), active, read, write, **given)
    assert all(torch.equal(g, gradients[name]) for name, g in gradients_of(cell).items())
    assert all(torch.equal(m, influence[name]) for name, m in rtrl.influence().items())


def test_a_stream_that_starts_anew_needs_a_reset():
    cell, x = model(), inputs(3, 3)
    rtrl, h_t = BlockRTRL(dict(cell.named_parameters()), 3, cell.hidden_size, 4), cell.initial_state(3)
    for t in range(3):
        out, info, h_next = cell(x[t], h_t)
        active, write, read = get_expert_latent_activated(cell, info)
        if t == 2:
            with pytest.raises(ContractError, match=r"h_next of the step before in streams \[1\].* rtrl\.reset"):
                rtrl.step(cell, x[t], h_t, out.sum(), active, read, write)
            rtrl.reset(torch.tensor([False, True, False]))
        rtrl.step(cell, x[t], h_t, out.sum(), active, read, write)
        h_t = h_next.detach()
        if t == 1:
            h_t[1] = 0


def test_the_input_may_be_reused_after_a_step():
    cell, x, c = model(), inputs(9, 3), cotangents(9, 3, density=1.0)
    expected = bptt(cell, x, c)
    rtrl, h_t = BlockRTRL(dict(cell.named_parameters()), 3, cell.hidden_size, 4, "replay"), cell.initial_state(3)
    x_t = torch.empty_like(x[0])
    for t in range(9):
        x_t.copy_(x[t])
        out, info, h_next = cell(x_t, h_t)
        active, write, read = get_expert_latent_activated(cell, info)
        rtrl.step(cell, x_t, h_t, (out * c[t]).sum(), active, read, write)
        x_t.zero_()
        h_t = h_next.detach()
    assert worst_error(gradients_of(cell), expected) <= 1e-12
