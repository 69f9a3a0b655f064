"""A two-layer LSTM that reads the standard library byte by byte, trained with the gradient through the whole past.

``python examples/lstm_language_model.py --help``. Both layers are carried as one joint state, which is exact: the state
is a nest of tensors, and ``Carry`` takes it as it is.
"""

from __future__ import annotations

import argparse
import math

import torch
from char_stream import BYTES, segments
from torch import Tensor, nn

from sparse_rtrl import Carry

LayerState = tuple[Tensor, Tensor]


class LanguageModel(nn.Module):
    """Embedding, two LSTM cells, readout."""

    def __init__(self, hidden_size: int, embedding_size: int = 16) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.embedding = nn.Embedding(BYTES, embedding_size)
        self.layers = nn.ModuleList(nn.LSTMCell(n, hidden_size) for n in (embedding_size, hidden_size))
        self.readout = nn.Linear(hidden_size, BYTES)

    def initial(self, batch: int) -> list[LayerState]:
        """Zeros for ``(h, c)`` of every layer, ``(B, H)`` each."""
        return [(torch.zeros(batch, self.hidden_size), torch.zeros(batch, self.hidden_size)) for _ in self.layers]

    def forward(self, x: Tensor, state: list[LayerState]) -> tuple[Tensor, list[LayerState]]:
        """Bytes ``(n, B)`` and the state to logits ``(n, B, BYTES)`` and the new state."""
        outputs = []
        for value in self.embedding(x):
            new = []
            for layer, old in zip(self.layers, state, strict=True):
                new.append(layer(value, old))
                value = new[-1][0]
            state = new
            outputs.append(value)
        return self.readout(torch.stack(outputs)), state


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the losses of every segment in bits per byte."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--segment", type=int, default=16)
    parser.add_argument("--size", type=int, default=20_000, help="bytes of text")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = LanguageModel(options.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    carry = Carry(model)
    state = carry(model.initial(options.batch))
    losses = []
    for number, (x, y) in enumerate(segments(options.size, options.batch, options.segment)):
        logits, state = model(x, state)
        state = carry(state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()) / math.log(2))
        if number % 50 == 49:
            print(f"segment {number + 1}: {sum(losses[-50:]) / 50:.2f} bits per byte")
    return losses


if __name__ == "__main__":
    main()
