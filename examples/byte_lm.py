"""Byte-level language modelling: predict every next byte of any file, online, in memory that does not grow.

``python examples/byte_lm.py`` reads the source of Python's standard library, ``--corpus`` any other file or folder.
Every byte is predicted before it is learned from, and every gradient goes through the whole past of its stream.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from sparse_rtrl import RTRL, SlotMoECell
from sparse_rtrl.training.corpora import byte_corpus
from sparse_rtrl.training.streams import CorpusStream


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the loss of every segment in bits per byte."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, help="file or folder; the standard library's source if absent")
    parser.add_argument("--tokens", type=int, default=100_000, help="bytes to read, of all streams together")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--segment", type=int, default=8, help="steps per segment, and per update")
    parser.add_argument("--slot-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    stream = CorpusStream(byte_corpus(options.corpus), options.streams, options.segment)
    cell = SlotMoECell(
        input_size=stream.input_size,
        output_size=stream.output_size,
        slot_size=options.slot_size,
        num_slots=4,
        num_experts=4,
        top_k=2,
        read_slots=2,
        write_slots=2,
    )
    learner = RTRL(cell, options.streams, commit_every=options.segment)
    optimizer = torch.optim.Adam(cell.parameters(), lr=options.learning_rate)
    learner.attach(optimizer)

    losses: list[float] = []
    for batch in stream:
        outputs = learner.unroll(batch.x)
        loss = cross_entropy(outputs.flatten(0, 1), batch.target.flatten())
        loss.backward()
        learner.flush()  # before clipping: gradients of sleeping experts
        torch.nn.utils.clip_grad_norm_(cell.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / math.log(2))
        tokens = len(losses) * options.segment * options.streams
        if len(losses) % 50 == 0:
            print(f"{tokens:9,} bytes: {sum(losses[-50:]) / 50:.3f} bits per byte")
        if tokens >= options.tokens:
            return losses
    return losses


if __name__ == "__main__":
    main()
