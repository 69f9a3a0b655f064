"""How Carry captures what modules do: factors, the dense path, autocast, compiled steps, and what it refuses."""

import contextlib
import warnings

import pytest
import torch
from carry_oracle import EXACT, F64, Stepwise, bptt, carried, data
from oracle import gradients_of, worst_error
from torch import nn

from sparse_rtrl import Carry, ContractError


class Mixer(nn.Module):
    """``h' = tanh(block(h) + U x)`` for a block that works on the state in its own shape."""

    def __init__(self, block: nn.Module, shape: tuple[int, ...], run=None):
        super().__init__()
        self.block, self.shape, self.run = block, shape, run or (lambda block, h: block(h))
        size = int(torch.Size(shape).numel())
        self.u = nn.Linear(4, size, **F64)

    def forward(self, x, h):
        mixed = self.run(self.block, h.view(-1, *self.shape)).reshape(h.shape)
        return torch.tanh(mixed + self.u(x))


class Packed(nn.Module):
    """One parameter cut up in several ways."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(0.5 * torch.randn(2, 6, 6, **F64))
        self.gates = nn.Parameter(torch.rand(12, **F64))
        self.wide = nn.Parameter(0.5 * torch.randn(6, 9, **F64))

    def forward(self, h):
        first, second = self.w.unbind(0)
        gain, shift = self.gates.chunk(2)
        left, right = self.wide.split([6, 3], dim=1)
        gated = h @ first.T * gain + torch.tanh(nn.functional.linear(h, second))
        return gated + (h @ left.T + shift) + h[:, :3] @ right.T


class Attention(nn.Module):
    """Self-attention over the state and cross-attention to a memory."""

    def __init__(self):
        super().__init__()
        self.itself = nn.MultiheadAttention(3, 1, **F64)  # positions first
        self.memory = nn.MultiheadAttention(3, 1, batch_first=True, **F64)

    def forward(self, h):
        z = h.transpose(0, 1)
        own = self.itself(z, z, z, need_weights=False)[0].transpose(0, 1)
        fixed = torch.linspace(-1, 1, 12, **F64).view(1, 4, 3).expand(len(h), -1, -1)
        return own + self.memory(h, fixed, fixed)[0]


def trained(module):
    """Scales and shifts away from one and zero, where a mistake would not show."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


BLOCKS = {
    "attention": lambda: Mixer(Attention(), (2, 3)),
    "packed": lambda: Mixer(Packed(), (6,)),
    "embedding": lambda: Mixer(
        nn.Embedding(3, 6, padding_idx=1, **F64),
        (6,),
        lambda table, h: table((h[:, :2] > 0).long()).sum(1) * torch.tanh(h) + h,
    ),
    "conv1d": lambda: Mixer(nn.Conv1d(2, 2, 3, padding=1, **F64), (2, 3)),
    "conv2d": lambda: Mixer(nn.Conv2d(1, 1, (1, 3), padding=(0, 1), bias=False, **F64), (1, 2, 3)),
    "layer norm": lambda: Mixer(nn.LayerNorm(6, **F64), (6,)),
    "layer norm of two": lambda: Mixer(nn.LayerNorm((2, 3), **F64), (2, 3)),
    "group norm": lambda: Mixer(nn.GroupNorm(2, 4, **F64), (4, 2)),
    "rms norm": lambda: Mixer(nn.RMSNorm(6, **F64), (6,)),
    "batch norm in eval": lambda: Mixer(nn.BatchNorm1d(6, **F64).eval(), (6,)),
    "bias": lambda: Mixer(nn.Linear(6, 6, **F64), (6,)),
    "positions": lambda: Mixer(nn.Linear(3, 3, **F64), (2, 3)),
}


@pytest.mark.parametrize("lengths", [(1,), (3, 1)])
@pytest.mark.parametrize("kind", BLOCKS)
def test_captured_as_factors_and_exact(kind, lengths):
    torch.manual_seed(1)
    cell = trained(BLOCKS[kind]())
    size = int(torch.Size(cell.shape).numel())
    model = Stepwise(cell, size)
    x, c = data(8, 3)
    expected = bptt(model, x, c)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not captured as factors.*")
        found, _ = carried(model, x, c, lengths)
    assert worst_error(found, expected) <= EXACT
    assert worst_error(bptt(model, x, c, detach=1), expected) > 1e-2


def test_dropout_is_that_of_the_masks_that_were_drawn():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.drop = nn.GRUCell(4, 5, **F64), nn.Dropout(0.4)

        def forward(self, x, h):
            return self.drop(self.cell(self.drop(x), h))

    model = Stepwise(Dropped())
    x, c = data(12, 2)
    torch.manual_seed(3)
    expected = bptt(model, x, c)
    torch.manual_seed(3)
    found, _ = carried(model, x, c, (2, 1))
    assert worst_error(found, expected) <= EXACT
    assert worst_error(bptt(model, x, c), expected) > 1e-2  # other masks


class Normed(nn.Module):
    """A GRU cell with a batch norm on its input, or on its state."""

    def __init__(self, on_state: bool):
        super().__init__()
        self.on_state = on_state
        self.cell, self.norm = nn.GRUCell(4, 5, **F64), nn.BatchNorm1d(5 if on_state else 4, **F64)

    def forward(self, x, h):
        return self.cell(x, self.norm(h)) if self.on_state else self.cell(self.norm(x), h)


def test_batch_norm_in_training_is_refused_where_it_couples_the_states():
    model = Stepwise(Normed(on_state=True))
    x, _ = data(3, 4)
    carry = Carry(model)
    h = carry(torch.randn(4, 5, **F64))
    _, h = model(x[:1], h)
    with pytest.raises(ContractError, match=r"influence each other.*cell\.norm is a batch norm"):
        carry(h)
    assert not any(bool(m.any()) for m in carry.influence().values())


def test_batch_norm_in_training_of_the_input_is_exact():
    torch.manual_seed(0)
    model = Stepwise(Normed(on_state=False))
    x, c = data(6, 4)
    expected = bptt(model, x, c)
    with pytest.warns(UserWarning, match=r"cell\.norm\.weight"):  # its gradient needs every stream: dense
        found, _ = carried(model, x, c, (1,))
    assert worst_error(found, expected) <= EXACT


def test_streams_that_influence_each_other_later_are_refused():
    model = Stepwise(nn.GRUCell(4, 5, **F64))
    x, _ = data(4, 3)
    carry = Carry(model)
    h = carry(model.initial(3))
    for t in range(2):
        _, h = model(x[t : t + 1], h)
        h = carry(h)
    _, h = model(x[2:3], h)
    with pytest.raises(ContractError, match="influence each other"):
        carry(h - h.mean(0))


def test_gradient_hooks_of_parameters_see_whole_gradients_only():
    model = Stepwise(nn.GRUCell(4, 5, **F64))
    x, c = data(6, 2)
    expected = bptt(model, x, c)
    seen = []
    model.cell.weight_hh.register_hook(lambda g: seen.append(g) or g.clamp(-1e-3, 1e-3))
    found, carry = carried(model, x, c, (3,))
    assert len(seen) == 2  # one per backward pass
    total = torch.stack([g for g in seen]).sum(0)
    assert worst_error({"w": total}, {"w": expected["cell.weight_hh"]}) <= EXACT
    del found["cell.weight_hh"]
    assert worst_error(found, {n: expected[n] for n in found}) <= EXACT
    assert float(carry.influence()["cell.weight_hh"].abs().max()) > 1e-2


class Single(nn.Module):
    """A GRU cell with a readout, one step at a time, in float32 or float64."""

    def __init__(self, dtype):
        super().__init__()
        self.cell, self.readout = nn.GRUCell(4, 8, dtype=dtype), nn.Linear(8, 2, dtype=dtype)

    def forward(self, x, h):
        h = self.cell(x, h)
        return self.readout(h), h


def test_autocast_keeps_the_influence_in_float32_and_the_factors():
    torch.manual_seed(0)
    model = Single(torch.float32)
    x, c = (part.float() for part in data(24, 3))

    def run(autocast, carried_state, method="exact"):
        model.zero_grad(set_to_none=True)
        h = torch.zeros(3, 8)
        carry = Carry(model, commit_every=3, method=method)
        loss = 0.0
        h = carry(h) if carried_state else h
        for t in range(24):
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                output, h = model(x[t], h)
                if carried_state:
                    h = carry(h)
            step = (output.float() * c[t]).sum()
            if carried_state:
                step.backward()
            loss = loss + step
        if not carried_state:
            loss.backward()
        return gradients_of(model), carry

    exact, _ = run(False, False)
    bptt_autocast, _ = run(True, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, carry = run(True, True)
    assert all(m.dtype == torch.float32 for m in carry.influence().values())
    bound = 2 * worst_error(bptt_autocast, exact) + 2**-8
    assert worst_error(found, exact) <= bound
    assert worst_error(run(True, True, "truncated")[0], exact) > 10 * bound


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_steps(backend, inside):
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Single(torch.float64)
    x, c = data(6, 2)
    h, loss = torch.zeros(2, 8, **F64), 0.0
    for t in range(6):
        output, h = model(x[t], h)
        loss = loss + (output * c[t]).sum()
    loss.backward()
    expected = gradients_of(model)
    model.zero_grad()
    carry = Carry(model)

    def step(x, h):
        output, h = model(x, h)
        return output, carry(h) if inside else h

    compiled = torch.compile(step, backend=backend)
    h = carry(torch.zeros(2, 8, **F64))
    hidden = backend == "aot_eager"  # its backward pass is one node, in which nothing can be seen
    with pytest.warns(UserWarning, match="torch.compile made") if hidden else contextlib.nullcontext():
        for t in range(6):
            output, h = compiled(x[t], h)
            h = h if inside else carry(h)
            (output * c[t]).sum().backward()
    assert torch._dynamo.utils.counters["frames"]["total"] <= 6  # of the step, none of carry's own
    assert worst_error(gradients_of(model), expected) <= EXACT


def test_carry_inside_a_full_graph_is_refused_by_torch():
    torch._dynamo.reset()
    carry = Carry(Single(torch.float64))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda h: carry(h), backend="eager", fullgraph=True)(torch.zeros(2, 8, **F64))
