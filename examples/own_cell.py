"""A cell of your own.

A slot cell says which slots and which experts a step touches. The library then updates the influence of those alone,
and the gradient is still that of BPTT.
"""

# %%
# `route` chooses, and may look at everything: no gradient flows through it. `update` sees only the slots that were
# chosen, and returns what is written into them, and the output. Whatever `route` chooses by must enter `update` as a
# soft weight as well, or it never trains: here the scores of the experts.

import torch
from torch import nn

import sparse_rtrl


class Notebook(sparse_rtrl.SlotCell):
    """Two pages: the sign of the first input says which is written, the other is read; one of two experts runs."""

    def __init__(self, input_size, slot_size, output_size):
        super().__init__(num_slots=2, slot_size=slot_size, num_experts=2)
        self.choose = nn.Linear(input_size, 2)
        self.experts = sparse_rtrl.ExpertBank(2, input_size + slot_size, slot_size)
        self.forget = nn.Linear(input_size, slot_size)
        self.readout = nn.Linear(2 * slot_size, output_size)

    def route(self, x, state):
        """Choose the page to write by a sign, and the expert by a score."""
        expert = self.choose(x).argmax(-1, keepdim=True)
        write = (x[:, :1] > 0).long()
        return sparse_rtrl.Routing(read=1 - write, write=write, experts=expert)

    def update(self, x, h_read, h_write, routing):
        """New content of the written page, and the output."""
        weight = self.choose(x).softmax(-1).gather(1, routing.experts)  # (B, 1)
        seen = torch.cat((x.unsqueeze(1), h_read), -1)  # (B, 1, input_size + D)
        new = weight.unsqueeze(-1) * torch.tanh(self.experts(seen, routing.experts))  # (B, 1, D)
        keep = torch.sigmoid(self.forget(x)).unsqueeze(1)
        page = keep * h_write + (1 - keep) * new  # (B, 1, D)
        return page, self.readout(torch.cat((page, h_read), -1).flatten(1))


# %%
# `check_cell` compares what the cell declares with its dense Jacobians, and raises an error that names the first thing
# that is off.

torch.manual_seed(0)
cell = Notebook(input_size=6, slot_size=8, output_size=3).double()
x, state = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 2, 8, dtype=torch.float64)
sparse_rtrl.check_cell(cell, x, state)

# %%
# What it will cost, before anything is allocated:

print(sparse_rtrl.estimate(cell, batch_size=4, x=x))

# %%
# The gradient of one loss at the end of 100 steps, by `RTRL` in segments of one step, and by plain BPTT:

xs = torch.randn(100, 4, 6, dtype=torch.float64)

learner = sparse_rtrl.RTRL(cell, batch_size=4)
for x_t in xs:
    output = learner(x_t)
output.square().sum().backward()
# The gradients of experts that sleep are deferred until flush; attach(optimizer) calls it before each step.
learner.flush()
ours = {name: parameter.grad.clone() for name, parameter in cell.named_parameters()}

cell.zero_grad()
state = cell.initial_state(4)
for x_t in xs:
    output, _, state = cell(x_t, state)
output.square().sum().backward()

for name, parameter in cell.named_parameters():
    error = float((ours[name] - parameter.grad).norm() / parameter.grad.norm())
    print(f"{name:16} {error:.0e}")
    assert error < 1e-12
