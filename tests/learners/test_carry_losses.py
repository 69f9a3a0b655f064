"""Several losses of one segment: each has its own gradient, and they are all of the same parameters."""

import pytest
import torch
from carry_oracle import F64, LSTM, Stepwise, data
from oracle import gradients_of, worst_error
from torch import nn

from sparse_rtrl import Carry

BUILD = {
    "gru": lambda: Stepwise(nn.GRUCell(4, 5, **F64)),
    "lstm": LSTM,
    "relu": lambda: Stepwise(nn.RNNCell(4, 5, nonlinearity="relu", **F64)),
}


def run_segment(model, x, carry, h, n):
    """What comes out of ``n`` steps, and the state that is carried on."""
    outputs, h = model(x[:n], h)
    return outputs, carry(h)


@pytest.mark.parametrize("method", ["exact", "snap1", "rflo", "uoro", "truncated"])
@pytest.mark.parametrize("kind", ["gru", "lstm", "relu"])
def test_losses_of_a_segment_may_go_back_apart(kind, method):
    torch.manual_seed(3)
    model = BUILD[kind]()
    x, c = data(12, 3)
    parameters = list(model.parameters())
    carry = Carry(model, method=method)
    h = carry(model.initial(3))
    for t in range(0, 12, 2):
        outputs, h = run_segment(model, x[t:], carry, h, 2)
        losses = [(outputs * c[t : t + 2]).sum(), outputs.square().sum(), outputs[1, 0].sum()]
        apart = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        again = torch.autograd.grad(losses[0], parameters, retain_graph=True)
        together = torch.autograd.grad(sum(losses), parameters)
        for n, total in enumerate(together):
            assert torch.equal(again[n], apart[0][n])
            torch.testing.assert_close(sum(g[n] for g in apart), total, rtol=1e-12, atol=1e-12)
    if method == "exact":
        h, kept = model.initial(3), []
        for t in range(12):
            output, h = model(x[t : t + 1], h)
            kept.append(output)
        last = torch.cat(kept[-2:])
        for loss, found in zip([(last * c[10:]).sum(), last.square().sum(), last[1, 0].sum()], apart, strict=True):
            for wanted, mine in zip(torch.autograd.grad(loss, parameters, retain_graph=True), found, strict=True):
                torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


def test_losses_of_a_segment_at_other_parameters_are_refused():
    model = BUILD["gru"]()
    x, c = data(8, 2)
    carry = Carry(model)
    h = carry(model.initial(2))
    outputs, h = run_segment(model, x, carry, h, 3)
    (outputs * c[:3]).sum().backward(retain_graph=True)
    model.cell.weight_hh.data.mul_(1.01)  # as fused optimizers do, unnoticed by autograd
    before = gradients_of(model)
    with pytest.raises(RuntimeError, match=r"weight_hh changed between two calls of backward"):
        outputs.sum().backward()
    outputs, h = run_segment(model, x[3:], carry, h, 2)
    outputs.sum().backward()  # the next segment is one of its own
    assert worst_error(gradients_of(model), before) > 0


class Shift(nn.Module):
    """A step that keeps nothing for its backward pass."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(3, **F64))

    def forward(self, h):
        return h + self.shift


def test_a_loss_after_one_that_freed_the_graph_is_refused():
    model = Shift()
    carry = Carry(model)
    h = carry(model(carry(torch.zeros(2, 3, **F64))))
    one, other = h + 1.0, h + 2.0
    carry(model(h))
    one.sum().backward()
    before = gradients_of(model)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        other.sum().backward()
    assert worst_error(gradients_of(model), before) == 0.0
