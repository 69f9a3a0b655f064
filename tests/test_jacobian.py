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
from sparse_rtrl.factor_capture import FactorCapture
from sparse_rtrl.jacobian import JacobianCapture
from sparse_rtrl.parameters import ParameterGroups
from sparse_rtrl.segment import compose
from sparse_rtrl.slot_cell import gather_slots


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
    segment = compose([step], groups, cell.num_slots, cell.slot_size)
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
    " weight_norm"
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
    fast = {"tied", "rms", "weight_norm"}
    assert bool(learner._engine.capture.dense) != (way in fast)
    assert bool([n for n in notes if "not captured as factors" in str(n.message)]) != (way in fast)


def test_a_misread_factor_is_noticed(monkeypatch):
    """Where the factors of a map are wrong, the check against an ordinary backward pass takes the dense path."""
    torch.manual_seed(0)
    cell = OddCell("tied").double()

    def ones(self, z):
        return torch.ones_like(z.detach()[:: self.width]).reshape(self.batch, -1, z.shape[-1])

    monkeypatch.setattr(FactorCapture, "once", ones)
    x, c = inputs(6, 2), cotangents(6, 2)
    with pytest.warns(UserWarning, match="weight"):
        found = online(RTRL(cell, 2, commit_every=1), x, c)
    assert worst_error(found, bptt(cell, x, c)) <= 1e-12
