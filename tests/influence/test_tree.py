"""The circular tree against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_oracle import HIDDEN, SIZE, SLOTS, Dense, random_segment, swap_products

from sparse_rtrl import CircularTree
from sparse_rtrl.influence.tree import ring_bytes, ring_widths
from sparse_rtrl.ops import dispatch
from sparse_rtrl.ops.reference import union_slots


def assert_node(node, product, u):
    assert (node.dense() - product).norm() <= 1e-12 * product.norm()
    assert (node.dense_loss_row() - u).norm() <= 1e-12 * max(1.0, float(u.norm()))


@pytest.mark.parametrize("levels", [None, 0, 1])
@pytest.mark.parametrize(
    ("capacity", "backend"),
    [
        *((capacity, "auto") for capacity in (1, 2, 4, 5, 7, 8, 64)),
        *((capacity, "reference") for capacity in (1, 5, 8)),
    ],
)
def test_every_suffix_over_three_wraps(capacity, backend, levels):
    generator = torch.Generator().manual_seed(capacity)
    tree, dense = CircularTree(capacity, 2, SLOTS, SIZE, torch.float64, levels=levels, backend=backend), Dense(2)
    for step in range(3 * capacity + 5):
        segment = random_segment(2, generator)
        tree.append(*segment)
        dense.append(*segment)
        if capacity == 64 and step % 16 != 3:
            continue
        for start in range(max(0, tree.count - capacity), tree.count + 1):
            assert_node(tree.suffix(start), *dense.suffix(start))
    for start in (tree.count - capacity - 1, tree.count + 1):
        with pytest.raises(IndexError, match="start must lie between"):
            tree.suffix(start)


def test_the_product_does_not_commute_and_the_comparison_sees_it(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    tree, dense = CircularTree(8, 1, SLOTS, SIZE, torch.float64), Dense(1)
    swap_products(monkeypatch)
    for _ in range(12):
        segment = random_segment(1, generator)
        tree.append(*segment)
        dense.append(*segment)
    wrong = 0
    for start in range(4, 12):
        product, _ = dense.suffix(start)
        wrong += int((tree.suffix(start).dense() - product).norm() > 1e-2 * product.norm())
    assert wrong == 7  # all but the suffix of a single segment


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_random_operations(data):
    """Appends of varying width, resets of single streams, and queries with a start per stream."""
    batch = data.draw(st.integers(1, 3))
    capacity = data.draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tree, dense = CircularTree(capacity, batch, SLOTS, SIZE, torch.float64), Dense(batch)
    begin = [0] * batch
    for _ in range(data.draw(st.integers(1, 30))):
        kr, kw = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
        segment = random_segment(batch, generator, kr, kw)
        tree.append(*segment)
        dense.append(*segment)
        if data.draw(st.integers(0, 5)) == 0:
            mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch)))
            tree.reset(mask)
            begin = [tree.count if m else b for m, b in zip(mask.tolist(), begin, strict=True)]
    oldest = [max(b, tree.count - capacity, 0) for b in begin]
    starts = torch.tensor([data.draw(st.integers(low, tree.count)) for low in oldest])
    node = tree.suffix(starts)
    rows = tree.loss_rows(starts.unsqueeze(1), torch.zeros(batch, HIDDEN, dtype=torch.float64))
    for b, start in enumerate(starts.tolist()):
        product, u = dense.suffix(start)
        assert (node.dense()[b] - product[b]).norm() <= 1e-12 * product[b].norm()
        for found in (node.dense_loss_row()[b], rows[b, 0]):
            assert (found - u[b]).norm() <= 1e-12 * max(1.0, float(u[b].norm()))
    for b, low in enumerate(oldest):
        if low > 0:
            before = starts.clone()
            before[b] = low - 1
            with pytest.raises(IndexError, match=f"stream {b}"):
                tree.suffix(before)


@pytest.mark.parametrize("capacity", [8, 64, 256])
def test_merges_are_at_most_one_per_append_and_two_log_per_query(capacity):
    generator = torch.Generator().manual_seed(0)
    tree = CircularTree(capacity, 1, 2, 1, torch.float64)
    for _ in range(3 * capacity):
        segment = (torch.randn(1, 1, 1, generator=generator, dtype=torch.float64),) + (torch.zeros(1, 1).long(),) * 2
        tree.append(*segment)
        before = tree.query_merges
        tree.suffix(max(0, tree.count - capacity))
        assert tree.query_merges - before <= 2 * capacity.bit_length()
    assert tree.merges <= tree.count


def test_resume_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    tree, other = (CircularTree(5, 2, SLOTS, SIZE, torch.float64) for _ in range(2))
    for _ in range(8):
        tree.append(*random_segment(2, generator))
    tree.reset(torch.tensor([True, False]))
    other.load_state_dict(tree.state_dict())
    segment = random_segment(2, generator)
    for t in (tree, other):
        t.append(*segment)
    start = torch.tensor([8, 4])
    assert torch.equal(tree.suffix(start).dense(), other.suffix(start).dense())
    with pytest.raises(ValueError, match="capacity"):
        CircularTree(6, 2, SLOTS, SIZE, torch.float64).load_state_dict(tree.state_dict())


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_what_an_append_builds(data):
    """Every place of every ring, against segments multiplied one by one: nothing else is built."""
    batch, capacity = 2, data.draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tree, dense = CircularTree(capacity, batch, SLOTS, SIZE, torch.float64), Dense(batch)
    first = data.draw(st.integers(0, 5))
    tree.begin_at(first)
    assert tree.nbytes == 0
    built: dict[tuple[int, int], int] = {}
    for _ in range(data.draw(st.integers(1, 20))):
        segment = random_segment(batch, generator, data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2)))
        tree.append(*segment)
        dense.append(*segment)
        for level in range(tree.levels + 1):
            index = (tree.count >> level) - 1
            if tree.count % (1 << level) == 0 and index << level >= first:
                built[level, index] = built.get((level, index), 0) + 1
    assert set(built.values()) == {1} and tree.merges == sum(level > 0 for level, _ in built)
    for level, index in built:
        if index + (capacity >> level) > max(i for lv, i in built if lv == level):
            maps = dense.maps[(index << level) - first : ((index + 1) << level) - first]
            product = Dense(batch)
            product.maps = maps
            assert_node(tree._node(level, index), *product.suffix(0))
    widths = ring_widths(tree.levels, capacity, SLOTS, tree._rings[0][0].shape[2], tree._rings[1][0].shape[2])
    assert tree.nbytes == ring_bytes(widths, batch, SIZE, 8) > 0


def test_the_count_on_the_device_is_read_back():
    generator = torch.Generator().manual_seed(0)
    tree, other = (CircularTree(4, 1, SLOTS, SIZE, torch.float64) for _ in range(2))
    segments = [random_segment(1, generator) for _ in range(7)]
    for segment in segments:
        tree.append(*segment)
    other.append(*segments[0])
    for segment in segments[1:]:  # as the replay of a CUDA graph would
        Jh, write, support, _ = segment
        dispatch.tree_append_(*other._rings, other._count, Jh, write, support, None, 0, SLOTS, SIZE)
    other.refresh_count()
    assert (other.count, other.merges) == (tree.count, tree.merges) == (7, 4)
    assert torch.equal(other.suffix(3).dense(), tree.suffix(3).dense())


def test_union_of_sets_of_different_size():
    first, second = torch.tensor([[0, 3], [1, 2]]), torch.tensor([[3, 0], [4, 0]])
    assert union_slots(first, second, 5).tolist() == [[0, 3, 3, 3], [0, 1, 2, 4]]
    assert union_slots(first, second, 3 + 1).shape == (2, 4)


def test_bad_arguments():
    tree = CircularTree(4, 2, SLOTS, SIZE, torch.float64)
    generator = torch.Generator().manual_seed(0)
    Jh, write, support, u = random_segment(2, generator)
    for arguments, message in (
        ((Jh.float(), write, support, u), "Jh must be torch.float64"),
        ((Jh[:, :-1], write, support, u), "Jh must be"),
        ((Jh, write[:1], support, u), "write must be int64"),
        ((Jh, write.int(), support, u), "write must be int64"),
        ((Jh, write + 5, support, u), r"write must hold slots in 0 \.\.\. 4"),
        ((Jh, write[:, :1].repeat(1, 2), support, u), "distinct"),
        ((Jh, write, torch.zeros_like(support), u), "contained in support"),
        ((Jh, write, support, u[:, :-1]), "loss_row must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            tree.append(*arguments)
    assert tree.count == 0
    for name in ("capacity", "batch_size", "num_slots", "slot_size"):
        sizes = {"capacity": 4, "batch_size": 2, "num_slots": 3, "slot_size": 2, name: 0}
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            CircularTree(**sizes)
    with pytest.raises(ValueError, match="start must be an int or hold one start per stream"):
        tree.suffix(torch.zeros(3, dtype=torch.int64))
