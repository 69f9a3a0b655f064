"""The cost model against measured and brute-force counts."""

import pytest
import torch

from sparse_rtrl import RTRL, SlotMoECell, estimate
from sparse_rtrl.capture.parameters import ParameterGroups
from sparse_rtrl.influence.estimate import choose_commit_every, tree_bytes


def cell(**changes) -> SlotMoECell:
    sizes = dict(input_size=4, slot_size=32, num_slots=4, num_experts=4, top_k=2, read_slots=2, write_slots=2)
    return SlotMoECell(**{**sizes, "output_size": 2, **changes})


def test_a_small_state_asks_for_longer_windows_than_many_sleeping_experts():
    with torch.no_grad():
        few, many = cell(num_experts=2), cell(num_experts=512, num_slots=16)
        counts = [
            choose_commit_every(c, ParameterGroups.of_cell(c), c.route(torch.zeros(1, 4), c.initial_state(1)))
            for c in (few, many)
        ]
    assert counts[0] > counts[1] == 1


def test_the_size_of_the_design_s_example():
    """At slot size 32, 4 slots and 4 experts the cell has about 10 thousand recurrent parameters: 5 MiB a stream."""
    costs = estimate(cell(), batch_size=1)
    recurrent = [p.numel() for n, p in cell().named_parameters() if not n.startswith("readout")]
    assert costs.recurrent_parameters == sum(recurrent) < 14_000
    assert costs.influence_bytes == 4 * (128 + 1) * costs.recurrent_parameters
    assert 4.0 < costs.influence_bytes / 2**20 < 7.0


@pytest.mark.parametrize("commit_every", [1, 2])
def test_bytes_of_the_tree_are_those_of_its_rings(commit_every):
    """At most what was estimated; exactly that where every segment touches the same number of slots."""
    torch.manual_seed(0)
    small = cell(num_slots=8, slot_size=4, num_experts=9)
    learner = RTRL(small, 3, buffer=5, commit_every=commit_every, catch_up="product")
    with torch.no_grad():
        routing = small.route(torch.zeros(3, 4), small.initial_state(3))
    for _ in range(8):
        learner(torch.randn(3, 4)).sum().backward()
    found = learner._engine.influence.tree.nbytes
    bound = tree_bytes(small, 3, routing, 5, commit_every, 4)
    assert 0 < found <= bound and (commit_every > 1 or found == bound)


def test_bytes_of_bptt_grow_with_the_batch_and_batch_size_is_checked():
    one, four = (estimate(cell(), batch_size=b).bptt_bytes_per_step for b in (1, 4))
    assert 1.5 * one < four < 5 * one
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        estimate(cell(), 0)
