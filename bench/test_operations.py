"""Micro-benchmarks of the operations and of a learning step: ``pytest bench``; CI runs them once, without timing."""

import pytest
import torch

from sparse_rtrl import RTRL, Carry, CircularTree, SlotMoECell
from sparse_rtrl.ops import dispatch

torch.set_num_threads(1)


def slots(batch: int, num_slots: int, k: int) -> torch.Tensor:
    return torch.stack([torch.randperm(num_slots)[:k] for _ in range(batch)])


@pytest.mark.parametrize(("batch", "w", "r", "columns"), [(1, 64, 128, 8192), (16, 32, 64, 4096)])
def test_influence_update(benchmark, batch, w, r, columns):
    """``2 * B * w * (r + τ) * N`` flop."""
    torch.manual_seed(0)
    slot_size = w // 2
    num_slots = r // slot_size
    P = torch.randn(batch, num_slots * slot_size + 1, columns)
    before = P.clone()
    write, read = slots(batch, num_slots, 2), slots(batch, num_slots, num_slots - 2)
    every = torch.arange(batch)
    m, j = 32, columns // 32
    arguments = (
        torch.randn(batch, w, r) / r**0.5,
        write,
        torch.cat((read, write), 1),
        None,
        every,
        every,
        [torch.randn(batch, w, 2, m)],
        [torch.randn(batch, 2, j)],
        [0],
    )
    benchmark(lambda: dispatch.influence_update_(P, *arguments))
    kept = [s for s in range(num_slots) if s not in write[0].tolist()]
    assert not torch.equal(P, before)
    for s in kept:
        assert torch.equal(P[0, s * slot_size : (s + 1) * slot_size], before[0, s * slot_size : (s + 1) * slot_size])


@pytest.mark.parametrize(("batch", "rows", "columns"), [(16, 512, 256), (16, 2**17, 1)])
def test_diagonal_update(benchmark, batch, rows, columns):
    """``2 * itemsize * B * R * J`` bytes."""
    torch.manual_seed(0)
    P = torch.randn(batch, rows, columns, dtype=torch.complex64)
    decay, delta = torch.full((batch, rows), 0.9j), torch.randn(batch, rows, 1, dtype=P.dtype)
    z = torch.randn(batch, 1, columns)
    P[0, 0] = 0
    benchmark(lambda: dispatch.diagonal_update_(P, decay, delta, z))
    # The sum of the powers of 0.9j that went in tells how often the update ran.
    turns = (P[0, 0, 0] / (delta[0, 0, 0] * z[0, 0, 0])).item()
    sums = torch.cumsum(torch.tensor(0.9j, dtype=torch.complex128) ** torch.arange(2000), 0)
    assert (sums - turns).abs().min() < 1e-3


def test_tree_append_and_query(benchmark):
    torch.manual_seed(0)
    tree = CircularTree(64, 4, 16, 8)
    write, read = slots(4, 16, 2), slots(4, 16, 2)
    Jh = torch.randn(4, 16, 32) / 6

    def step() -> None:
        tree.append(Jh, write, torch.cat((read, write), 1))
        tree.suffix(max(0, tree.count - 48))

    benchmark(step)
    assert tree.merges <= tree.count


@pytest.mark.parametrize("commit_every", [1, 8])
def test_learning_step(benchmark, commit_every):
    torch.manual_seed(0)
    cell = SlotMoECell(
        input_size=8, slot_size=16, num_slots=4, num_experts=4, top_k=2, read_slots=2, write_slots=2, output_size=4
    )
    learner = RTRL(cell, 16, commit_every=commit_every)
    x = torch.randn(16, 8)

    def step() -> None:
        learner(x).sum().backward()
        cell.zero_grad()

    benchmark(step)
    assert float(learner.influence()["query_token.weight"].norm()) > 0


def test_learning_unroll(benchmark):
    """A segment of 32 steps with a loss at each, then its commit."""
    torch.manual_seed(0)
    cell = SlotMoECell(
        input_size=8, slot_size=16, num_slots=4, num_experts=4, top_k=2, read_slots=2, write_slots=2, output_size=4
    )
    learner = RTRL(cell, 4, commit_every=32)
    xs = torch.randn(32, 4, 8)

    def segment() -> None:
        learner.unroll(xs).sum().backward()
        cell.zero_grad()

    benchmark(segment)
    assert float(learner.influence()["query_token.weight"].norm()) > 0


@pytest.mark.parametrize("steps", [1, 16])
def test_carry_segment(benchmark, steps):
    """A segment of a plain recurrent cell with a loss at each step."""
    torch.manual_seed(0)
    cell = torch.nn.GRUCell(8, 32)
    carry = Carry(cell)
    x = torch.randn(4, 8)
    last = carry(torch.zeros(4, 32))

    def segment() -> None:
        nonlocal last
        h, loss = last, torch.zeros(())
        for _ in range(steps):
            h = cell(x, h)
            loss = loss + h.sum()
        last = carry(h)
        loss.backward()

    benchmark(segment)
    entered = float(cell.weight_hh.grad.norm())
    segment()
    assert float(cell.weight_hh.grad.norm()) != entered
