"""Every compiled operation against the reference in float64: at most twice the reference's own error in that dtype."""

import itertools
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import bptt, cotangents, inputs, online, worst_error
from pattern_cell import PatternCell, make_pattern, pick
from ring_problem import assert_as_good_as_reference, check_tree_operations, randn
from tree_oracle import Dense, random_segment

import sparse_rtrl.influence.sparse
from sparse_rtrl import RTRL, CircularTree
from sparse_rtrl.cli.environment import backends
from sparse_rtrl.errors import BackendError
from sparse_rtrl.influence.plan import Plan, plan
from sparse_rtrl.ops import dispatch, reference

compiled = pytest.mark.skipif(
    bool(dispatch.compiled_problem), reason=f"no compiled operations: {dispatch.compiled_problem}"
)
DTYPES = (torch.float32, torch.float64)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_influence_update(dtype, data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    batch, slots, size = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.sampled_from([1, 3, 8, 17]))
    kw, kr = draw(st.integers(0, slots)), draw(st.integers(0, slots))
    groups = draw(st.integers(1, 5))
    deltas, zs, offsets, column = [], [], [], draw(st.integers(0, 3))
    moved = torch.randperm(groups, generator=generator)[: draw(st.integers(0, groups))]
    for _ in range(draw(st.integers(0, 3))):
        m, j = draw(st.sampled_from([1, 5, 40])), draw(st.sampled_from([1, 2, 7, 33, 70]))
        tau = draw(st.integers(1, 3))
        deltas.append(randn(generator, len(moved), kw * size, tau, m))
        zs.append(randn(generator, len(moved), tau, j))
        offsets.append(column)
        column += m * j + draw(st.integers(0, 2))
    columns = column + draw(st.integers(1, 40))
    write, read = pick(slots, kw, batch, generator), pick(slots, kr, batch, generator)
    P = randn(generator, groups, slots * size + 1, columns)
    arguments = [
        P,
        randn(generator, batch, kw * size, (kr + kw) * size),
        write,
        torch.cat((read, write), 1),
        randn(generator, batch, (kr + kw) * size) if draw(st.booleans()) else None,
        torch.randint(batch, (len(moved),), generator=generator),
        moved,
        deltas,
        zs,
        offsets,
    ]
    _, (found,) = assert_as_good_as_reference(dispatch, "influence_update_", arguments, dtype)
    before = P.to(dtype)
    for g in range(groups):  # what is not in the pattern stays as it was, bit for bit
        kept = torch.ones(P.shape[1], dtype=torch.bool)
        at = (moved == g).nonzero().flatten()
        if len(at):
            kept[reference.slot_entries(write[arguments[5][at]], size).flatten()] = False
            kept[-1] = arguments[4] is None or kr + kw == 0
        assert torch.equal(found[g, kept], before[g, kept])


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 31, 256, 300])
def test_loss_row(dtype, columns):
    generator = torch.Generator().manual_seed(0)
    arguments = [randn(generator, 5, 25, columns), randn(generator, 3, 24), torch.tensor([4, 0, 2])]
    (exact,), _ = assert_as_good_as_reference(dispatch, "loss_row_", arguments, dtype)
    assert not torch.equal(exact, arguments[0].to(dtype).double())


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_on_rings(dtype):
    covered = Counter()

    @given(data=st.data())
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    def check(data):
        covered.update(check_tree_operations(dispatch, data.draw, dtype, [1, 3, 8, 17]))

    check()
    assert min(covered[name] for name in ("wrapped", "merged", "products")) > 10


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_trees(dtype, data):
    """Appends, resets of single streams, expiry and wrap-around, and queries with a start per stream."""
    draw = data.draw
    batch, capacity = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    levels = draw(st.sampled_from([None, 0, 1]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    ours = CircularTree(capacity, batch, 5, 2, dtype, levels=levels, backend="cpp")
    plain = CircularTree(capacity, batch, 5, 2, dtype, levels=levels, backend="reference")
    dense = Dense(batch)
    begin = [0] * batch
    for _ in range(draw(st.integers(1, 25))):
        Jh, write, support, u = random_segment(batch, generator, draw(st.integers(0, 3)), draw(st.integers(0, 3)))
        for tree in (ours, plain):
            tree.append(Jh.to(dtype), write, support, u.to(dtype))
        dense.append(Jh.to(dtype).double(), write, support, u.to(dtype).double())
        if draw(st.integers(0, 5)) == 0:
            mask = torch.tensor(draw(st.lists(st.booleans(), min_size=batch, max_size=batch)))
            ours.reset(mask)
            plain.reset(mask)
            begin = [ours.count if m else b for m, b in zip(mask.tolist(), begin, strict=True)]
    starts = torch.tensor([draw(st.integers(max(b, ours.count - capacity, 0), ours.count)) for b in begin])
    found, own = ours.suffix(starts), plain.suffix(starts)
    eps = torch.finfo(dtype).eps
    for b, start in enumerate(starts.tolist()):
        product, u = dense.suffix(start)
        for exact, o, f in (
            (product[b], own.dense()[b], found.dense()[b]),
            (u[b], own.dense_loss_row()[b], found.dense_loss_row()[b]),
        ):
            own_error = (o.double() - exact).norm() if dtype == torch.float32 else 2 * eps * exact.norm()
            assert (f.double() - exact).norm() <= 2 * own_error + eps * exact.norm()
    streams = torch.arange(batch)[starts < ours.count]
    if len(streams):
        merged = ours.suffixes(streams, starts[streams])
        for q, b in enumerate(streams.tolist()):
            product, _ = dense.suffix(int(starts[b]))
            assert (merged.dense()[q].double() - product[b]).norm() <= 64 * eps * product[b].norm()


def pattern_cell(steps, batch):
    torch.manual_seed(0)
    return PatternCell(make_pattern("random", steps, batch), dense=False).double()


@compiled
@pytest.mark.parametrize("catch_up", ["eager", "replay", "product"])
@pytest.mark.parametrize("commit_every", [1, 4])
def test_backends_give_the_gradient_of_bptt(catch_up, commit_every):
    steps, batch = 40, 3
    cell = pattern_cell(steps, batch)
    x, c = inputs(steps, batch), cotangents(steps, batch)
    resets = {11: torch.tensor([True, False, False]), 23: torch.tensor([False, True, True])}
    expected = bptt(cell, x, c, resets)
    for backend in ("cpp", "reference"):
        learner = RTRL(cell, batch, buffer=6, commit_every=commit_every, catch_up=catch_up, backend=backend)
        assert worst_error(online(learner, x, c, 1, resets), expected) <= 1e-12
        if catch_up != "eager" and commit_every == 1:
            events = learner.events
            assert min(events[e] for e in ("wakes", "expiries", "payments")) > 0
            assert events["replays" if catch_up == "replay" else "products"] > 0


@pytest.mark.parametrize("resets", [False, True])
def test_changing_the_plan_keeps_the_gradient(monkeypatch, resets):
    """Whatever the planner says, and however often it changes its mind."""
    plans = itertools.cycle(
        [
            Plan(eager=True),
            Plan(eager=False, buffer=5, levels=2, product_from=2),
            Plan(eager=False, buffer=9, levels=0, product_from=0),
        ]
    )
    monkeypatch.setattr(sparse_rtrl.influence.sparse, "plan", lambda **sizes: next(plans))
    steps, batch = 60, 3
    cell = pattern_cell(steps, batch)
    x, c = inputs(steps, batch), cotangents(steps, batch)
    reset_at = {t: torch.tensor([t % 2 == 0, True, False]) for t in (9, 20, 41)} if resets else None
    learner = RTRL(cell, batch, commit_every=1)
    flushes = {1, 2, 3, 20, 21, 22, 23, 24, 25, 26, 27, 50, 51, 52, 53, 54, 55, 56}
    found = online(learner, x, c, 1, reset_at, lambda t: learner.flush() if t in flushes else None)
    assert worst_error(found, bptt(cell, x, c, reset_at)) <= 1e-12
    assert learner.events["plans"] >= 4 and learner.events["wakes"] > 0


def test_plans():
    sizes = {"slot_size": 32, "read_slots": 2, "write_slots": 2, "top_k": 2, "expert_columns": 1056}
    many = plan(num_slots=4, num_experts=256, flush_every=64, **sizes)
    assert not many.eager and many.product_from and many.buffer >= 64
    assert [row["path"] for row in many.table] == ["eager", "replay", "product", "auto"]
    assert "merged from a gap of" in many.decision
    assert plan(num_slots=4, num_experts=2, flush_every=64, **sizes).eager
    assert plan(num_slots=4, num_experts=256, buffer=16, **sizes).buffer == 16
    assert plan(num_slots=4, num_experts=256, catch_up="replay", **sizes).product_from == 0
    assert plan(num_slots=4, num_experts=256, margin=0.0, **sizes).eager
    for wrong, message in (
        ({"num_slots": 0}, "num_slots must be at least 1, got 0"),
        ({"buffer": 0}, "buffer must be 'auto' or at least 1, got 0"),
        ({"catch_up": "lazy"}, "catch_up must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(**{"num_slots": 4, "num_experts": 8, **sizes, **wrong})


@given(count=st.integers(1, 500), capacity=st.integers(1, 64), first=st.integers(0, 40), data=st.data())
@settings(max_examples=50, deadline=None)
def test_dyadic_arithmetic_is_that_of_the_tree(count, capacity, first, data):
    _planner = pytest.importorskip("sparse_rtrl._planner")
    levels = data.draw(st.integers(0, _planner.highest_level(capacity)))
    start = data.draw(st.integers(max(0, count - capacity), count))
    assert list(reference.dyadic_cover(start, count, levels)) == _planner.cover(start, count, levels)
    built = [level for level in range(1, levels + 1) if count % (1 << level) == 0 and count - (1 << level) >= first]
    assert _planner.completed_levels(count, first, levels) == len(built)
    assert reference.completed_levels(count, first, levels) == len(built)


def test_backends_that_are_not_there_are_refused(monkeypatch):
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="backend must be one of"):
        dispatch.select("fast", device, torch.float32)
    with pytest.raises(BackendError, match=r"float32 and float64, got torch\.bfloat16"):
        dispatch.select("cpp", device, torch.bfloat16)
    with pytest.raises(BackendError, match="'cpp' is for cpu, the tensors are on cuda"):
        dispatch.select("cpp", torch.device("cuda"), torch.float32)
    with pytest.raises(BackendError, match="'cuda' is for cuda, the tensors are on cpu"):
        dispatch.select("cuda", device, torch.float32)
    with pytest.raises(BackendError, match=r"float32 and float64, got torch\.float16"):
        dispatch.select("cuda", torch.device("cuda"), torch.float16)
    assert dispatch.select("auto", torch.device("cuda"), torch.bfloat16) is reference
    assert dispatch.select("auto", device, torch.bfloat16) is reference
    monkeypatch.setattr(dispatch, "compiled_problem", "they were not built")
    with pytest.raises(BackendError, match=r"they were not built\. Build them with 'SPARSE_RTRL_CPP=1 pip"):
        CircularTree(4, 1, 2, 2, backend="cpp")
    monkeypatch.setattr(dispatch, "cuda_problem", "this torch was built for the CPU")
    assert "CUDA C++: no, this torch was built for the CPU" in backends()
    with pytest.raises(BackendError, match=r"built for the CPU\. Build them with 'SPARSE_RTRL_CUDA=1 pip"):
        dispatch.select("cuda", torch.device("cuda"), torch.float32)


@compiled
def test_wrong_arguments_are_refused():
    P, u, groups = torch.randn(3, 5, 7), torch.randn(2, 4), torch.tensor([0, 2])
    for arguments, message in (
        ((P, u[:, :3], groups), "u must be Float of shape"),
        ((P, u.double(), groups), "u must be Float"),
        ((P, u, groups + 1), r"groups must lie in 0 \.\.\. 2, got 3"),
        ((P.transpose(1, 2), u, groups), "P must be contiguous"),
        ((P.half(), u.half(), groups), "P must be contiguous float32 or float64"),
    ):
        before = arguments[0].clone()
        with pytest.raises((ValueError, IndexError), match=message):
            dispatch.loss_row_(*arguments)
        assert torch.equal(arguments[0], before)
    with pytest.raises(IndexError, match="support must lie in"):
        slot = torch.zeros(1, 1, dtype=torch.int64)
        dispatch.influence_update_(P, torch.randn(1, 2, 2), slot, slot + 2, None, groups[:1], groups[:1], [], [], [])


@compiled
def test_wrong_rings_are_refused():
    def refused(error, message, name, arguments, **changes):
        names = [argument.name for argument in getattr(dispatch, name).default._schema.arguments]
        given = {**dict(zip(names, arguments, strict=True)), **changes}
        with pytest.raises(error, match=message):
            getattr(dispatch, name)(*given.values())

    tree = CircularTree(4, 2, 3, 2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        write, read = (pick(3, 1, 2, generator) for _ in range(2))
        segment = (torch.randn(2, 2, 4), write, torch.cat((read, write), 1), None)
        tree.append(*segment)
    count, leaves, slot = tree._count, [part[0] for part in tree._rings], torch.zeros(1, dtype=torch.int64)
    append = [*tree._rings, count, *segment, 0, 3, 2]
    refused(
        ValueError, "write and support must fit the rings", "tree_append_", append, support=torch.zeros(2, 3).long()
    )
    refused(
        ValueError,
        "write must be contained in support",
        "tree_append_",
        append,
        write=(write + 1) % 3,
        support=segment[2] * 0 + write,
    )
    refused(IndexError, r"support must lie in 0 \.\.\. 2, got 3", "tree_append_", append, support=segment[2] * 0 + 3)
    refused(ValueError, r"loss_row must be Float of shape \(2, 6\)", "tree_append_", append, loss_row=torch.randn(2, 4))
    refused(ValueError, "one entry per level", "tree_append_", append, cols=tree._rings[1][:1])
    refused(ValueError, "count must be Long of shape", "tree_append_", append, count=count.int())
    refused(
        ValueError,
        r"cols must be Long of shape \(4, 2",
        "tree_append_",
        append,
        rows=[tree._rings[0][0], *tree._rings[0][:-1]],
    )
    refused(
        ValueError, "loss_rows must be Float", "tree_append_", append, loss_rows=[u.double() for u in tree._rings[3]]
    )
    query = [*tree._rings, count, slot, slot + 5, 3, 3, 3, 2]
    refused(IndexError, "starts must be at least count - L = 5, got 4", "suffix_product", query, starts=slot + 4)
    refused(RuntimeError, "must leave room for every slot", "suffix_product", query, num_rows=1, num_cols=1)
    replay = [torch.randn(1, 7, 5), *leaves, count, slot, slot, slot + 5, 2]
    refused(IndexError, "starts must be at least count - L = 5, got 4", "catch_up_", replay, starts=slot + 4)
    refused(ValueError, "must be sorted", "catch_up_", replay, cols=leaves[1].flip(2))
    refused(IndexError, r"rows must lie in 0 \.\.\. 2", "catch_up_", replay, rows=leaves[0] + 9)
    refused(ValueError, "slot_size must divide H = 6, got 4", "catch_up_", replay, slot_size=4)
    sweep = [*leaves, count, torch.full((2, 1), 5), torch.randn(2, 6), 2]
    refused(ValueError, "newest must be", "suffix_loss_rows", sweep, newest=torch.randn(2, 5))
    refused(IndexError, "starts must be at least", "suffix_loss_rows", sweep, starts=torch.full((2, 1), 4))


@compiled
@pytest.mark.parametrize("cpu", ["generic", "avx2"])
def test_other_instruction_sets(cpu):
    """The operations once more in a process that uses less than this processor has."""
    tests = ["test_influence_update", "test_loss_row", "test_operations_on_rings"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *(f"{__file__}::{name}" for name in tests)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "SPARSE_RTRL_CPU": cpu})
    if "must name instructions that this processor has" in done.stdout:
        pytest.skip(f"this processor has no {cpu}")
    assert done.returncode == 0, done.stdout[-3000:]
