"""A cell, a training run and a comparison for learners that record their steps."""

import torch
from oracle import gradients_of

from sparse_rtrl import SlotMoECell

BATCH = 3


def new_cell(num_experts=5):
    torch.manual_seed(0)
    sizes = {"slot_size": 4, "num_slots": 5, "top_k": 2, "read_slots": 2, "write_slots": 2}
    return SlotMoECell(input_size=3, output_size=2, num_experts=num_experts, num_heads=2, **sizes).double()


def train(learner, segment, calls=12):
    """Losses at two of three calls, an optimizer step at every fourth, a reset of one stream; ``.grad`` after each."""
    cell, generator, device = learner.cell, torch.Generator().manual_seed(1), learner.state.device
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.01)
    learner.attach(optimizer)
    cell.zero_grad()
    found = []
    for call in range(calls):
        x, c = (torch.randn(segment, BATCH, n, generator=generator, dtype=torch.float64).to(device) for n in (3, 2))
        outputs = learner.unroll(x)
        if call % 3 != 1:
            (outputs * c).sum().backward()
        if call % 4 == 3:
            optimizer.step()
            found.append(gradients_of(cell))
            optimizer.zero_grad()
        if call == 5:
            learner.reset(torch.tensor([False, True, False], device=device))
    return found, learner.influence(), learner.state


def check_equal(expected, found):
    """Compare what two learners returned from :func:`train`."""
    (expected, matrices, state), (found, found_matrices, found_state) = expected, found
    assert len(expected) == 3
    for now, then in zip(found, expected, strict=True):
        for name in then:
            assert float((now[name] - then[name]).norm()) <= 1e-12 * max(float(then[name].norm()), 1e-3), name
    for name in matrices:
        assert float(matrices[name].norm()) > 1e-3
        assert float((found_matrices[name] - matrices[name]).norm()) <= 1e-12 * float(matrices[name].norm()), name
    torch.testing.assert_close(found_state, state, rtol=1e-12, atol=1e-12)
