"""The contract check finds each way to break the contract, and only those."""

from functools import partial

import pytest
import torch
from oracle import inputs
from pattern_cell import PatternCell, make_pattern
from torch import nn

from sparse_rtrl import ContractError, Routing, SlotMoECell, SparseLatentMoECell, check_cell
from sparse_rtrl.cells.slot_cell import scatter_slots

BATCH = 4


def cell_and_state(kind=PatternCell):
    torch.manual_seed(0)
    pattern = make_pattern("random", 1, BATCH)
    pattern[0] = Routing(pattern[0].read, pattern[0].write, torch.tensor([[0, 1], [2, 3], [3, 4], [0, 3]]))
    return kind(pattern), inputs(1, BATCH)[0], torch.randn(BATCH, 4, 3)


def test_good_cells_pass():
    cell, x, h = cell_and_state()
    check_cell(cell, x, h)
    memory = partial(SlotMoECell, write_to="least_used", read_weights="softmax")
    for kind in (SlotMoECell, memory, SparseLatentMoECell):
        torch.manual_seed(0)
        ready = kind(
            input_size=4, slot_size=4, num_slots=4, num_experts=3, top_k=2, read_slots=2, write_slots=2, output_size=2
        )
        check_cell(ready, inputs(1, 16)[0].float(), torch.randn(16, 4, 4))


class Peeking(PatternCell):
    def forward(self, x, state, routing=None):
        self.peek = state.sum(1)
        return super().forward(x, state, routing)

    def update(self, x, h_read, h_write, routing):
        content, output = super().update(x, h_read, h_write, routing)
        return content + 0.1 * self.peek.unsqueeze(1), output


class PeekingOutput(PatternCell):
    def forward(self, x, state, routing=None):
        output, info, new = super().forward(x, state, routing)
        return output + state.sum((1, 2)).unsqueeze(1), info, new


class Changing(PatternCell):
    def forward(self, x, state, routing=None):
        output, info, new = super().forward(x, state, routing)
        return output, info, new * (1 + 1e-9)


class Coupling(PatternCell):
    def update(self, x, h_read, h_write, routing):
        content, output = super().update(x, h_read, h_write, routing)
        return content + content.mean(0), output


class IdleExperts(PatternCell):
    def update(self, x, h_read, h_write, routing):
        content, output = super().update(x, h_read, h_write, routing)
        return content + self.experts.bias.sum(0), output

    def route(self, x, state):
        routing = super().route(x, state)
        return Routing(routing.read, routing.write, routing.experts.clamp(max=1).new_tensor([[0, 1]] * BATCH))


class SoftMixture(PatternCell):
    """Runs every expert, whatever it declares; each expert is declared by some stream."""

    def update(self, x, h_read, h_write, routing):
        content, output = super().update(x, h_read, h_write, routing)
        return content + self.experts.weight.sum((0, 1)), output


class OtherTransition(PatternCell):
    def transition(self, x, h_read, h_write, routing):
        return super().transition(x, h_read, h_write + 1, routing)


class ReadoutInState(PatternCell):
    def update(self, x, h_read, h_write, routing):
        content, output = super().update(x, h_read, h_write, routing)
        return content + self.readout.bias.sum(), output


class Unused(PatternCell):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.forgotten = nn.Parameter(torch.ones(2))


class Duplicates(PatternCell):
    def route(self, x, state):
        routing = super().route(x, state)
        return Routing(routing.read[:, :1].repeat(1, 2), routing.write, routing.experts)


@pytest.mark.parametrize(
    ("kind", "violation"),
    [
        (Peeking, "undeclared columns: written slots"),
        (PeekingOutput, "undeclared columns: output"),
        (Changing, "copied slots .* changed"),
        (Coupling, "rows of the batch influence each other"),
        (IdleExperts, r"inactive experts \[2, 3, 4\] have influence through experts.bias"),
        (SoftMixture, r"inactive experts \[2, 3, 4\] have influence through experts.weight in stream 0"),
        (OtherTransition, "transition differs"),
        (ReadoutInState, r"readout parameter readout\.bias reaches the state"),
        (Unused, "no gradient reaches parameter forgotten"),
        (Duplicates, r"read: duplicates"),
    ],
)
def test_violations_are_named(kind, violation):
    cell, x, h = cell_and_state(kind)
    with pytest.raises(ContractError, match=violation) as caught:
        check_cell(cell, x, h)
    assert caught.value.violations


def test_scatter_slots_copies_bit_for_bit():
    state, content = torch.randn(2, 4, 3), torch.randn(2, 2, 3)
    new = scatter_slots(state, torch.tensor([[1, 3], [0, 2]]), content)
    assert torch.equal(new[0, [0, 2]], state[0, [0, 2]]) and torch.equal(new[0, [1, 3]], content[0])


def test_wrong_state_shape():
    cell, x, h = cell_and_state()
    with pytest.raises(ValueError, match="h must have shape"):
        check_cell(cell, x, h[:, :3])
