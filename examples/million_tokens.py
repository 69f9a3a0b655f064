"""A million tokens.

A cell reads 32 endless streams of random symbols, and has to say at every step which symbol it saw 20 steps ago. It
learns in segments of 4 steps, so that no segment ever holds a symbol together with its question, and it begins with a
memory that has faded long before. The exact gradient sees the whole past and teaches the cell to remember; what it
takes stays the same from the first token to the last. Truncated BPTT never sees what a symbol is needed for.
"""

# %%
# The stream, and an LRU cell: a diagonal recurrence, whose exact influence is about as large as its parameters. Its
# eigenvalues begin between 0.5 and 0.8, so that about a hundredth of a symbol, or less, is left after 20 steps.

import sys

import psutil
import torch

import sparse_rtrl

TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000  # steps times streams
STREAMS, SYMBOLS, DELAY, SEGMENT = 32, 4, 20, 4


def stream(tokens):
    """Segments of inputs ``(4, 32, 4)`` and answers ``(4, 32)``, the same random symbols at every call."""
    generator = torch.Generator().manual_seed(0)
    past = torch.randint(SYMBOLS, (DELAY, STREAMS), generator=generator)
    for _ in range(tokens // (SEGMENT * STREAMS)):
        symbols = torch.randint(SYMBOLS, (SEGMENT, STREAMS), generator=generator)
        past = torch.cat((past, symbols))
        yield torch.nn.functional.one_hot(symbols, SYMBOLS).float(), past[:SEGMENT]
        past = past[SEGMENT:]


def new_cell():
    """The same cell with the same parameters at every call."""
    torch.manual_seed(0)
    return sparse_rtrl.LRUCell(SYMBOLS, 64, SYMBOLS, r_min=0.5, r_max=0.8)


# %%
# One loop for both ways: an optimizer step after every segment, while the streams go on. `unroll` runs a segment.


def train(cell, run):
    """Train while the streams go on; the share of right answers at the end."""
    optimizer = torch.optim.Adam(cell.parameters(), lr=3e-3)
    print(" tokens  right answers  resident memory")
    right = asked = 0
    for number, (xs, answers) in enumerate(stream(TOKENS), 1):
        outputs = run(xs)
        torch.nn.functional.cross_entropy(outputs.flatten(0, 1), answers.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        right += int((outputs.argmax(-1) == answers).sum())
        asked += answers.numel()
        if asked >= TOKENS // 8:
            memory = psutil.Process().memory_info().rss / 2**20
            print(f"{number * SEGMENT * STREAMS:7,} {right / asked:14.1%} {memory:12.0f} MiB")
            score, right, asked = right / asked, 0, 0
    return score


# %%
# With the exact gradient:

cell = new_cell()
learner = sparse_rtrl.RTRL(cell, batch_size=STREAMS)
exact = train(cell, learner.unroll)

# %%
# The same cell, the same symbols, the same number of steps of the optimizer, with the state detached between
# segments. Guessing gives 25 %. What it has at the end it owes to the traces that happen to be left in the state.

cell = new_cell()
state = cell.initial_state(STREAMS)


def truncated_run(xs):
    """One segment, cut off from the one before."""
    global state
    outputs, state = cell.unroll(xs, state.detach())
    return outputs


truncated = train(cell, truncated_run)
if TOKENS >= 1_000_000:  # a shorter run has learned too little
    assert exact > 0.9 > 0.6 > truncated
