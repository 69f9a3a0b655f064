"""Chunks of ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM`` taken apart into single steps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from sparse_rtrl.capture.calls import Chain

LAYERS = (nn.RNN, nn.GRU, nn.LSTM)


def single_steps(module: nn.Module, chain: Chain) -> Chain:
    """The calls of a recurrent layer as calls of one step each; other chains stay as they are.

    The states between steps are computed again where the layer does not return them. That they lead to the state which
    it returned is checked with every other trace.

    Args:
        module: what was called.
        chain: its calls, with one input ``(T, B, I)`` or ``(B, T, I)``.
    """
    if type(module) not in LAYERS or any(len(inputs) != 1 or inputs[0].dim() != 3 for inputs in chain.inputs):
        return chain
    assert isinstance(module, nn.RNNBase)
    if module.bidirectional or (module.dropout > 0 and module.training):
        return chain
    time = 1 if module.batch_first else 0
    inputs: list[list[Tensor]] = []
    states = [chain.states[0]]
    for (x,), end in zip(chain.inputs, chain.states[1:], strict=True):
        steps = list(x.split(1, time))
        inputs += [[step] for step in steps]
        with torch.no_grad():
            for step in steps[:-1]:
                before = states[-1]
                # Not by a call: hooks are for what the user runs.
                _, after = module.forward(step, tuple(before) if len(before) == 2 else before[0])
                states.append(list(after) if isinstance(after, tuple) else [after])
        states.append(end)
    one = ("tensor", tuple(inputs[0][0].shape), inputs[0][0].dtype)
    leaves = tuple(one if leaf[0] == "tensor" else leaf for leaf in chain.form.leaves)
    return Chain(replace(chain.form, leaves=leaves), inputs, states)
