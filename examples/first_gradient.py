"""A first gradient against BPTT.

Three ways to the gradient of one loss over one stream: backpropagation through all of it, truncated backpropagation,
and `Carry`. The first two differ by what truncation throws away. The first and the last agree to the last digits.
"""

# %%
# A GRU cell in double precision, so that rounding hides nothing, and a stream of 200 steps that is cut into segments
# of 5. The loss weighs every state of the way with random numbers.

import torch
from torch import nn

from sparse_rtrl import Carry

torch.manual_seed(0)
cell = nn.GRUCell(8, 16).double()
stream = torch.randn(200, 4, 8, dtype=torch.float64)  # steps, streams, inputs
weights = torch.randn(200, 4, 16, dtype=torch.float64)
SEGMENT = 5


# %%
# One loop for all three. After each segment the state goes through `cut`: for BPTT it is left alone, truncated BPTT
# detaches it, and `Carry` carries the influence of the parameters over the cut.


def gradient(cut, one_backward_pass=False):
    """The gradient of the sum of all losses, by the name of the parameter."""
    cell.zero_grad()
    h = cut(torch.zeros(4, 16, dtype=torch.float64))
    losses = []
    for start in range(0, len(stream), SEGMENT):
        loss = 0
        for t in range(start, start + SEGMENT):
            h = cell(stream[t], h)
            loss = loss + (weights[t] * h).sum()
        h = cut(h)
        losses.append(loss)
        if not one_backward_pass:
            loss.backward()
    if one_backward_pass:
        torch.stack(losses).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in cell.named_parameters()}


# %%
# The graph of BPTT holds all 200 steps. Those of the other two never hold more than 5.

full = gradient(lambda h: h, one_backward_pass=True)
truncated = gradient(lambda h: h.detach())
carried = gradient(Carry(cell))

# %%
# The relative error of each parameter's gradient:


def error(found, name):
    """Relative error of one parameter's gradient."""
    return float((found[name] - full[name]).norm() / full[name].norm())


print(f"{'':10}  truncated  Carry")
for name in full:
    print(f"{name:10}  {error(truncated, name):9.0e}  {error(carried, name):.0e}")
assert all(error(carried, name) < 1e-12 < 1e-3 < error(truncated, name) for name in full)

# %%
# What that costs is memory for the influence, which does not depend on how long the stream is. `estimate` says how
# much, and what it takes per step, before anything is allocated.

print(Carry(cell).estimate(torch.zeros(4, 16, dtype=torch.float64)))
