"""The CUDA operations on a GPU: the comparisons of the CPU, and a CUDA graph replayed at different counts."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_cell import pick
from recorded_steps import BATCH, check_equal, new_cell, train
from ring_problem import check_tree_operations
from torch.nn.utils import parametrize

from sparse_rtrl import RTRL, CircularTree
from sparse_rtrl.ops import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(bool(dispatch.cuda_problem), reason=f"no CUDA operations: {dispatch.cuda_problem}"),
]
SIZES = [1, 3, 8, 17, 40]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operations_on_rings(dtype):
    covered = Counter()

    @given(data=st.data())
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    def check(data):
        covered.update(check_tree_operations(dispatch, data.draw, dtype, SIZES, "cuda"))

    check()
    assert min(covered[name] for name in ("wrapped", "merged", "products")) > 0


def test_narrow_column_tiles():
    """A state so large that the launcher takes them: every slot written, so a product has all H rows."""
    generator = torch.Generator().manual_seed(0)
    slots, size = 16, 40
    trees = [CircularTree(8, 1, slots, size, torch.float64, device) for device in ("cpu", "cuda")]
    for _ in range(11):
        write, read = pick(slots, 9, 1, generator), pick(slots, 3, 1, generator)
        Jh = torch.randn(1, 9 * size, 12 * size, generator=generator, dtype=torch.float64) / 30
        for tree in trees:
            tree.append(*(t.to(tree.device) for t in (Jh, write, torch.cat((read, write), 1))))
    expected, found = (tree.suffix(4) for tree in trees)
    assert torch.equal(found.rows.cpu(), expected.rows)
    torch.testing.assert_close(found.dense().cpu(), expected.dense(), rtol=1e-12, atol=1e-12)


def test_a_graph_is_replayed_at_different_counts():
    """Append, query and replay of influence, captured once: counts, starts and slots are read on the device."""
    torch.manual_seed(0)
    batch, slots, size, columns, capacity = 3, 5, 4, 33, 8
    generator = torch.Generator().manual_seed(0)
    tree, plain = (CircularTree(capacity, batch, slots, size, torch.float64, d) for d in ("cuda", "cpu"))
    every = torch.arange(batch)
    P = torch.randn(batch, slots * size + 1, columns, dtype=torch.float64)
    moved = P.cuda()
    inputs = [
        torch.zeros(batch, 2 * size, 4 * size, dtype=torch.float64, device="cuda"),
        torch.zeros(batch, 2, dtype=torch.int64, device="cuda"),
        torch.zeros(batch, 4, dtype=torch.int64, device="cuda"),
        torch.zeros(batch, slots * size, dtype=torch.float64, device="cuda"),
    ]
    starts = torch.zeros(batch, dtype=torch.int64, device="cuda")
    streams = every.cuda()

    def segment():
        write, read = pick(slots, 2, batch, generator), pick(slots, 2, batch, generator)
        support = torch.cat((read, write), 1)
        Jh = torch.randn(batch, 2 * size, 4 * size, generator=generator, dtype=torch.float64) / 4
        return Jh, write, support, None

    def step():
        tree.append_segment(*inputs)
        node = tree.suffixes(streams, starts)
        tree.replay_(moved, streams, streams, starts)
        return node, tree.loss_rows(starts.unsqueeze(1), inputs[3])

    def feed(values, begin):
        for target, value in zip(inputs, values, strict=True):
            if value is not None:
                target.copy_(value)
        starts.copy_(begin)

    for t in range(3):  # warms up, and makes the rings wide enough
        values = segment()
        plain.append_segment(*values)
        begin = torch.full((batch,), t)
        feed(values, begin)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        plain.replay_(P, every, every, begin)
    graph = torch.cuda.CUDAGraph()
    counted = tree.count
    with torch.cuda.graph(graph):
        node, rows = step()
    assert int(tree._count) == counted  # a capture runs nothing
    tree.refresh_count()
    for _ in range(2 * capacity + 3):
        values = segment()
        plain.append_segment(*values)
        begin = torch.randint(max(0, plain.count - capacity), plain.count + 1, (batch,), generator=generator)
        feed(values, begin)
        graph.replay()
        plain.replay_(P, every, every, begin)
        torch.testing.assert_close(moved.cpu(), P, rtol=1e-10, atol=1e-10)
        expected = plain.suffixes(every, begin)
        torch.testing.assert_close(node.dense().cpu(), expected.dense(), rtol=1e-10, atol=1e-10)
        newest = torch.zeros(batch, slots * size, dtype=torch.float64)
        torch.testing.assert_close(rows.cpu(), plain.loss_rows(begin.unsqueeze(1), newest), rtol=1e-10, atol=1e-10)
    tree.refresh_count()
    assert tree.count == plain.count and tree.merges == plain.merges


@pytest.mark.parametrize("segment", [1, 3])
def test_recorded_learning_steps_equal_the_ordinary_ones(segment):
    cells = [new_cell().cuda() for _ in range(2)]
    ordinary = RTRL(cells[0], BATCH, commit_every=segment, catch_up="eager")
    recorded = RTRL(cells[1], BATCH, cuda_graph=True)
    check_equal(train(ordinary, segment), train(recorded, segment))
    assert recorded._fixed is not None, "it fell back to steps without graphs"


def test_a_recorded_learning_step_neither_waits_nor_allocates():
    cell = new_cell().cuda()
    # A parametrized weight is made anew outside of the graphs, here by a solver that looks at its result.
    parametrize.remove_parametrizations(cell.core, "weight")
    recorded = RTRL(cell, BATCH, cuda_graph=True)
    x = torch.randn(1, BATCH, 3, dtype=torch.float64, device="cuda")

    def step():
        cell.zero_grad()
        recorded.unroll(x).sum().backward()

    for _ in range(3):
        step()
    reserved = torch.cuda.memory_reserved()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert recorded._fixed is not None and torch.cuda.memory_reserved() == reserved
