"""DNA: predict every next base of FASTA files, each sequence from a fresh start.

``python examples/dna.py genome.fa.gz``; without a file it writes a small one to learn from, in which a motif comes
again and again among random bases. Bases that are not known (``N``) are inputs but are not asked for; at the border of
two sequences the stream that meets it starts anew.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from sparse_rtrl import RTRL, SlotMoECell
from sparse_rtrl.training.corpora import fasta_corpus
from sparse_rtrl.training.streams import CorpusStream
from sparse_rtrl.training.tasks import IGNORE


def write_example(path: Path, sequences: int = 8, motifs: int = 60) -> None:
    """Write sequences of a motif with random bases between, in lines of 60."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(sequences):
            bases = "".join("GATTACA" + "".join(draw.choices("ACGT", k=3)) for _ in range(motifs))
            lines = [bases[start : start + 60] for start in range(0, len(bases), 60)]
            file.write(f">sequence {number}\n" + "\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the loss of every segment in bits per base."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, nargs="?", help="FASTA file or folder, plain or gzip")
    parser.add_argument("--tokens", type=int, default=40_000, help="bases to read, of all streams together")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--segment", type=int, default=8, help="steps per segment, and per update")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as folder:
        path = options.corpus or Path(folder, "example.fa")
        if options.corpus is None:
            write_example(path)
        corpus = fasta_corpus(path)
    stream = CorpusStream(corpus, options.streams, options.segment, reset_at_borders=True)
    cell = SlotMoECell(
        input_size=stream.input_size,
        output_size=stream.output_size,
        slot_size=16,
        num_slots=4,
        num_experts=4,
        top_k=2,
        read_slots=2,
        write_slots=2,
    )
    learner = RTRL(cell, options.streams, commit_every=options.segment)
    optimizer = torch.optim.Adam(cell.parameters(), lr=1e-2)
    learner.attach(optimizer)

    losses: list[float] = []
    for batch in stream:
        learner.reset(batch.reset)  # streams that begin a new sequence
        outputs = learner.unroll(batch.x)
        asked = batch.target.flatten()
        if (asked != IGNORE).any():
            loss = cross_entropy(outputs.flatten(0, 1), asked, ignore_index=IGNORE)
            loss.backward()
            learner.flush()
            torch.nn.utils.clip_grad_norm_(cell.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item() / math.log(2))
        if len(losses) % 50 == 0:
            print(f"{len(losses):5} updates: {sum(losses[-50:]) / 50:.3f} bits per base; 2 for guessing")
        if len(losses) * options.segment * options.streams >= options.tokens:
            return losses
    return losses


if __name__ == "__main__":
    main()
