"""A plain truncated-BPTT loop, before and after: what changes for the exact gradient.

``python examples/tbptt_loop.py --help``. Before, the state is detached at the top of the loop, in front of the forward
pass. ``carry`` reads the graph that the forward pass leaves behind, so its line moves behind the forward pass, and in
front of ``backward`` and ``step``.
"""

from __future__ import annotations

import argparse

import torch
from char_stream import BYTES, segments
from torch import Tensor, nn

from sparse_rtrl import Carry


class Model(nn.Module):
    """A GRU cell that reads a byte and predicts the next."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(BYTES, hidden_size)
        self.readout = nn.Linear(hidden_size, BYTES)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes ``(n, B)`` and the state ``(B, H)`` to logits ``(n, B, BYTES)`` and the new state."""
        states = []
        for x_t in nn.functional.one_hot(x, BYTES).to(h.dtype):
            h = self.cell(x_t, h)
            states.append(h)
        return self.readout(torch.stack(states)), h


def before(model: Model, options: argparse.Namespace) -> list[float]:
    """The usual loop: the gradient ends where the segment begins."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    losses = []
    h = torch.zeros(options.batch, options.hidden)
    for x, y in segments(options.size, options.batch, options.segment):
        h = h.detach()
        logits, h = model(x, h)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def after(model: Model, options: argparse.Namespace) -> list[float]:
    """The same loop with the gradient through the whole past: ``detach`` gone, ``carry`` behind the forward pass."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    losses = []
    carry = Carry(model)
    h = carry(torch.zeros(options.batch, options.hidden))
    for x, y in segments(options.size, options.batch, options.segment):
        logits, h = model(x, h)
        h = carry(h)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Train twice from the same start; the losses of every segment by loop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--segment", type=int, default=16)
    parser.add_argument("--size", type=int, default=40_000, help="bytes of text")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    options = parser.parse_args(arguments)
    losses = {}
    for loop in (before, after):
        torch.manual_seed(0)
        losses[loop.__name__] = loop(Model(options.hidden), options)
        last = losses[loop.__name__][-20:]
        print(f"{loop.__name__:7} mean loss of the last segments: {sum(last) / len(last):.3f} nats per byte")
    return losses


if __name__ == "__main__":
    main()
