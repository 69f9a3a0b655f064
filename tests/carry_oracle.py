"""Modules and loops that compare Carry with backpropagation through the whole past."""

import torch
from oracle import gradients_of
from torch import nn

from sparse_rtrl import Carry

F64 = {"dtype": torch.float64}
EXACT = 1e-12


class Stepwise(nn.Module):
    """One cell, a readout, a loop over the steps."""

    def __init__(self, cell: nn.Module, hidden_size: int = 5) -> None:
        super().__init__()
        self.cell, self.readout, self.hidden_size = cell, nn.Linear(hidden_size, 2, **F64), hidden_size

    def initial(self, batch):
        return torch.zeros(batch, self.hidden_size, **F64)

    def forward(self, x, h):
        outputs = []
        for x_t in x:
            h = self.cell(x_t, h)
            outputs.append(self.readout(h))
        return torch.stack(outputs), h


class LSTM(nn.Module):
    """Its state is a pair."""

    def __init__(self):
        super().__init__()
        self.cell, self.readout = nn.LSTMCell(4, 5, **F64), nn.Linear(5, 2, **F64)

    def initial(self, batch):
        return torch.zeros(batch, 5, **F64), torch.zeros(batch, 5, **F64)

    def forward(self, x, h):
        outputs = []
        for x_t in x:
            h = self.cell(x_t, h)
            outputs.append(self.readout(h[0]))
        return torch.stack(outputs), h


def data(steps, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(steps, batch, n, generator=generator, **F64) for n in (4, 2))


def bptt(model, x, c, resets=None, detach=None):
    model.zero_grad(set_to_none=True)
    h, loss = model.initial(x.shape[1]), 0.0
    for t in range(len(x)):
        if resets and t in resets:
            h = torch.where(resets[t].unsqueeze(1), model.initial(x.shape[1]), h)
        if detach and t % detach == 0:
            h = torch.utils._pytree.tree_map(torch.Tensor.detach, h)
        output, h = model(x[t : t + 1], h)
        loss = loss + (output * c[t]).sum()
    loss.backward()
    found = gradients_of(model)
    model.zero_grad(set_to_none=True)
    return found


def carried(model, x, c, lengths, **options):
    carry = Carry(model, **options)
    h, t = carry(model.initial(x.shape[1])), 0
    while t < len(x):
        for n in lengths:
            output, h = model(x[t : t + n], h)
            h = carry(h)
            if len(output):
                (output * c[t : t + n]).sum().backward()
            t += n
            if t >= len(x):
                break
    return gradients_of(model), carry
