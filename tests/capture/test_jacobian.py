"""Captured Jacobians of one step against autograd, entry by entry, whatever a cell does with its parameters."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import bptt, cotangents, inputs, online, worst_error
from pattern_cell import PatternCell, make_pattern
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from sparse_rtrl import RTRL, ExpertBank, Routing, SlotCell, SlotMoECell, SparseLatentMoECell
from sparse_rtrl.capture.factor_capture import FactorCapture
from sparse_rtrl.capture.jacobian import JacobianCapture
from sparse_rtrl.capture.parameters import ParameterGroups
from sparse_rtrl.capture.segment import compose
from sparse_rtrl.cells.slot_cell import gather_slots


def ready_cells():
    sizes = dict(input_size=4, slot_size=4, num_slots=4, num_experts=5, top_k=2, read_slots=2, write_slots=2)
    torch.manual_seed(0)
    pattern = PatternCell(make_pattern("random", 1, 3), dense=False)
    return [SlotMoECell(**sizes, output_size=2), SparseLatentMoECell(**sizes, output_size=2), pattern]


def captured(cell, x, state, routing):
    groups = ParameterGroups.of_cell(cell)
    capture = JacobianCapture(cell, groups)
    with parametrize.cached():
        step = capture.step(x, state, routing, [p.tensor for p in groups.all])
    return step, groups, capture


@pytest.mark.parametrize("cell", ready_cells(), ids=lambda c: type(c).__name__)
def test_every_entry_of_a_step(cell):
    cell = copy.deepcopy(cell).double()
    x, state = inputs(1, 3)[0], torch.randn(3, 4, cell.slot_size, dtype=torch.float64)
    routing = cell.route(x, state)
    step, groups, capture = captured(cell, x, state, routing)
    assert capture.dense == set()
    h = gather_slots(state, routing.support).requires_grad_()
    with parametrize.cached():
        tensors = [p.tensor for p in groups.all]
        content, _ = cell.update(x, h[:, :2], h[:, 2:], routing)
    segment = compose([step], groups.num_experts, cell.num_slots, cell.slot_size)
    for b in range(3):
        for i in range(step.Jh.shape[1]):
            entry = content.flatten(1)[b, i]
            dh, *truth = torch.autograd.grad(entry, [h, *tensors], retain_graph=True, allow_unused=True)
            torch.testing.assert_close(step.Jh[b, i], dh[b].flatten(), rtol=1e-12, atol=1e-14)
            core = torch.zeros(groups.core_columns, dtype=torch.float64)
            for delta, z, offset in zip(segment.core.deltas, segment.core.zs, segment.core.offsets, strict=True):
                block = torch.einsum("tm,tj->mj", delta[b, i], z[b]).flatten()
                core[offset : offset + len(block)] += block
            experts = torch.zeros(groups.num_experts, groups.expert_columns, dtype=torch.float64)
            for pair in (segment.expert.streams == b).nonzero().flatten().tolist():
                e = int(segment.expert.groups[pair]) % groups.num_experts
                factors = segment.expert
                for delta, z, offset in zip(factors.deltas, factors.zs, factors.offsets, strict=True):
                    block = torch.einsum("tm,tj->mj", delta[pair, i], z[pair]).flatten()
                    experts[e, offset : offset + len(block)] += block
            for p, found, true in zip(groups.all, groups.split(core, experts), truth, strict=True):
                expected = torch.zeros_like(p.tensor) if true is None else true
                torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13, msg=p.name)


class CustomProduct(torch.autograd.Function):
    """A product that no torch function shows."""

    @staticmethod
    def forward(ctx, z, weight):
        ctx.save_for_backward(z, weight)
        return z @ weight

    @staticmethod
    def backward(ctx, g):
        z, weight = ctx.saved_tensors
        return g @ weight.T, z.T @ g


class OddCell(SlotCell):
    """Uses parameters in ways that the capture does not know or could misread."""

    def __init__(self, way: str) -> None:
        super().__init__(4, 4, 3)
        self.way = way
        self.encode = nn.Linear(3, 4)
        self.weight = nn.Parameter(0.5 * torch.randn(4, 4))
        self.experts = ExpertBank(3, 4, 4)
        self.norm = nn.RMSNorm(4)
        self.gru = nn.GRUCell(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.readout = nn.Linear(8, 2)

    def route(self, x, state):
        batch = len(x)
        slots = torch.arange(2).expand(batch, -1) + (x[:, -1:] % 2).long()
        return Routing(slots, slots.flip(1), torch.stack((x[:, -1].long() % 3, (x[:, -1].long() + 1) % 3), 1))

    def update(self, x, h_read, h_write, routing):
        z = torch.tanh(self.encode(x[:, :3]))
        if self.way == "matmul":
            z = z @ self.weight + h_read.mean(1)
        elif self.way == "transposed":
            z = F.linear(z, self.weight.T) + h_read.mean(1)
        elif self.way == "tied":
            z = F.linear(torch.tanh(F.linear(z + h_read.mean(1), self.weight)), self.weight)
        elif self.way == "tied_mixed":
            z = torch.tanh(F.linear(z + h_read.mean(1), self.weight)) @ self.weight
        elif self.way == "rows_first":  # the first dimension is not the batch
            z = F.linear((z.unsqueeze(1) + h_read).transpose(0, 1), self.weight).sum(0)
        elif self.way == "flattened":
            z = F.linear((z.unsqueeze(1) + h_read).flatten(0, 1), self.weight).unflatten(0, h_read.shape[:2]).sum(1)
        elif self.way == "stacked":
            z = z + (self.experts.weight[routing.experts] @ h_read.mean(1)[:, None, :, None]).squeeze(-1).sum(1)
        elif self.way == "in_place":
            z = F.linear(z + h_read.mean(1), self.weight).tanh_()
        elif self.way == "constant_input":
            z = z + h_read.mean(1) * torch.sigmoid(F.linear(torch.eye(4).to(z), self.weight)).mean(0)
        elif self.way == "constant_rows":  # as many rows as there are copies of a stream, seen only where h is not zero
            rows = torch.eye(8, 4).to(z)
            z = z + h_read.mean(1) * torch.sigmoid(F.linear(rows, self.weight)).mean(0)
        elif self.way == "custom_function":
            z = z + CustomProduct.apply(h_read.mean(1), self.weight)
        elif self.way == "in_place_state":
            h_write = h_write.mul_(0.9)
            z = torch.tanh(F.linear(z + h_read.mean(1), self.weight))
        elif self.way == "transposed_index":
            z = z + F.embedding(routing.read.T, self.weight).transpose(0, 1).sum(1) * h_read.mean(1)
        elif self.way == "rms":
            z = self.norm(z + h_read.mean(1))
        elif self.way == "gru":
            z = self.gru(z, h_read.mean(1))
        elif self.way == "attention":
            z = self.attention(z.unsqueeze(1), h_read, h_read)[0].squeeze(1)
        elif self.way == "weight_norm":
            z = self.normed(z + h_read.mean(1))
        new = 0.5 * h_write + torch.tanh(z).unsqueeze(1) * torch.sigmoid(h_write)
        if self.way != "stacked":
            new = new + 0.1 * self.experts(z.unsqueeze(1).expand(-1, 2, -1), routing.experts)
        return new, self.readout(torch.cat((h_read.mean(1), new.mean(1)), 1))


WAYS = (
    "matmul transposed tied tied_mixed rows_first flattened stacked in_place constant_input rms gru attention"
    " weight_norm constant_rows custom_function in_place_state transposed_index"
)


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("way", WAYS.split())
def test_any_use_of_a_parameter_is_exact(way, batch):
    torch.manual_seed(0)
    cell = OddCell(way).double()
    x, c = inputs(12, batch), cotangents(12, batch)
    expected = bptt(cell, x, c)
    learner = RTRL(cell, batch, buffer=5, commit_every=2)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        found = online(learner, x, c)
    assert worst_error(found, expected) <= 1e-12
    fast = {"tied", "rms", "weight_norm", "in_place_state"}
    assert bool(learner._engine.capture.dense) != (way in fast)
    assert bool([n for n in notes if "not captured as factors" in str(n.message)]) != (way in fast)


def test_a_misread_factor_is_noticed(monkeypatch):
    """Where the factors of a map are wrong, the check against an ordinary backward pass takes the dense path."""
    torch.manual_seed(0)
    cell = OddCell("tied").double()

    def ones(self, z):
        return torch.ones_like(z.detach()[:: self.copies]).reshape(self.batch, -1, z.shape[-1])

    monkeypatch.setattr(FactorCapture, "once", ones)
    x, c = inputs(6, 2), cotangents(6, 2)
    with pytest.warns(UserWarning, match="weight"):
        found = online(RTRL(cell, 2, commit_every=1), x, c)
    assert worst_error(found, bptt(cell, x, c)) <= 1e-12


class Tokens(SlotCell):
    """Integer inputs through an embedding with a padding row, which never trains."""

    def __init__(self):
        super().__init__(3, 4)
        self.table, self.inner = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 4)
        self.readout = nn.Linear(4, 2)

    def route(self, x, state):
        slots = torch.zeros(len(x), 1, dtype=torch.int64)
        return Routing(slots, slots, slots[:, :0])

    def update(self, x, h_read, h_write, routing):
        new = torch.tanh(self.inner(h_read[:, 0]) + self.table(x)).unsqueeze(1)
        return new, self.readout(new[:, 0])


def test_the_padding_row_of_an_embedding_does_not_train():
    torch.manual_seed(0)
    cell, x, c = Tokens().double(), torch.randint(0, 5, (12, 2)), cotangents(12, 2)
    x[0] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = online(RTRL(cell, 2, commit_every=1), x.unsqueeze(-1)[..., 0], c)
    assert worst_error(found, bptt(cell, x, c)) <= 1e-12
    assert not found["table.weight"][0].any()


def test_gradient_hooks_see_gradients_and_not_jacobians():
    torch.manual_seed(0)
    cell = OddCell("matmul").double()
    x, c = inputs(10, 2), cotangents(10, 2)
    plain = RTRL(cell, 2, commit_every=1)
    online(plain, x, c)
    calls = []

    def clamp(gradient):
        calls.append(gradient)
        return gradient.clamp(-1e-6, 1e-6)

    for name in ("weight", "encode.weight"):
        cell.get_parameter(name).register_hook(clamp)
    hooked = RTRL(cell, 2, commit_every=1)
    for x_t in x:
        hooked(x_t)
    assert not calls
    for name, matrix in plain.influence().items():
        assert torch.equal(matrix, hooked.influence()[name])
    cell.zero_grad(set_to_none=True)
    hooked(x[-1]).sum().backward()
    assert calls and float(cell.weight.grad.abs().max()) <= 2e-6


def test_two_parametrized_weights_of_one_source_are_refused():
    class Shared(OddCell):
        def __init__(self):
            super().__init__("weight_norm")
            self.other = nn.Linear(4, 4)
            for layer in (self.gru_out, self.other):
                parametrize.register_parametrization(layer, "weight", nn.Tanh(), unsafe=True)
            self.other.parametrizations.weight.original = self.gru_out.parametrizations.weight.original

        @property
        def gru_out(self):
            if not hasattr(self, "_gru_out"):
                self._gru_out = nn.Linear(4, 4)
            return self._gru_out

    with pytest.raises(ValueError, match="shares a part of its parameters"):
        RTRL(Shared(), 2)


class Varying(PatternCell):
    """Reads, writes and runs a different number of slots and experts in every step."""

    def route(self, x, state):
        routing, t = super().route(x, state), int(x[0, -1])
        return Routing(routing.read[:, : t % 3], routing.write[:, : 1 + t % 2], routing.experts[:, : (t + 1) % 3])


@pytest.mark.parametrize("commit_every", [1, 2, 7])
@pytest.mark.parametrize("catch_up", ["eager", "auto"])
def test_sizes_that_vary_from_step_to_step(commit_every, catch_up):
    torch.manual_seed(0)
    cell = Varying(make_pattern("random", 30, 3), dense=False).double()
    x, c = inputs(30, 3), cotangents(30, 3)
    found = online(RTRL(cell, 3, buffer=4, commit_every=commit_every, catch_up=catch_up), x, c)
    assert worst_error(found, bptt(cell, x, c)) <= 1e-12


def test_a_captured_step_keeps_no_copies_alive():
    """The inputs of the factors own no more memory than they show."""
    torch.manual_seed(0)
    cell = SlotMoECell(
        input_size=4, slot_size=16, num_slots=4, num_experts=5, top_k=2, read_slots=2, write_slots=2, output_size=2
    )
    x, state = inputs(1, 3)[0].float(), torch.randn(3, 4, 16)
    step, _, _ = captured(cell, x, state, cell.route(x, state))
    for factors in (step.core, step.expert):
        for z in (term.z for term in factors.terms if term.z is not None):
            assert z.untyped_storage().nbytes() == z.numel() * z.element_size()
