"""Triton kernels against the reference: on a GPU where there is one, else in Triton's interpreter.

The error in a dtype is at most twice that of the reference in that dtype, plus a rounding unit. Influence matrices are
cut out of a larger tensor full of NaN, and rows that are written but not read hold NaN too: what a kernel must not
touch stays as it was, bit for bit, and what it must not read would show.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import bptt, cotangents, inputs, online, worst_error
from pattern_cell import PatternCell, make_pattern, pick

from sparse_rtrl import RTRL
from sparse_rtrl.errors import BackendError
from sparse_rtrl.ops import dispatch, reference, triton_backend

pytest.importorskip("triton")

from sparse_rtrl import triton_kernels
from sparse_rtrl.triton_kernels import catch_up, launch, loss_row, segment_update, tiles

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not launch.INTERPRETED, reason="the kernels run on the GPU")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(launch.INTERPRETED, reason="no CUDA device")]),
]
on_devices = pytest.mark.parametrize("device", DEVICES)
DTYPES = (torch.float32, torch.float64)
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}


def randn(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def to(value, dtype, device):
    """Copies of arguments: floating-point tensors in another dtype, everything on a device."""
    if isinstance(value, (list, tuple)):
        return [to(v, dtype, device) for v in value]
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None, copy=True)
    return value


def guarded(P):
    """A copy of influence matrices inside a larger tensor of NaN: the view, whose rows are not contiguous, and all."""
    groups, rows, columns = P.shape
    whole = torch.full((groups + 2, rows, columns + 16), torch.nan, dtype=P.dtype, device=P.device)
    view = whole[1:-1, :, :columns]
    view.copy_(P)
    return view, whole


def problem(
    slots=5, size=3, kr=2, kw=2, batch=3, groups=6, columns=21, terms=((2, 2, 4), (1, 3, 1)), loss=True, seed=0
):
    """Arguments of ``influence_update_``; a term is ``(τ, m, j)``, and they overlap by one column."""
    g = torch.Generator().manual_seed(seed)
    write, read = pick(slots, kw, batch, g), pick(slots, kr, batch, g)
    moved = torch.randperm(groups, generator=g)[: max(groups - 2, 1)]
    w, r, count = kw * size, (kr + kw) * size, len(moved)
    deltas = [randn(g, count, w, tau, m) for tau, m, _ in terms]
    zs = [randn(g, count, tau, j) for tau, _, j in terms]
    offsets, column = [], 1
    for _, m, j in terms:
        offsets.append(column)
        column += m * j - 1
    return [
        randn(g, groups, slots * size + 1, columns),
        randn(g, batch, w, r) / max(r, 1) ** 0.5,
        write,
        torch.cat((read, write), 1),
        randn(g, batch, r) if loss else None,
        torch.randint(batch, (count,), generator=g),
        moved,
        deltas,
        zs,
        offsets,
    ]


def errors(name, arguments, dtype, device, ours=None, **options):
    """Relative error of a kernel and of the reference in the same dtype, and the matrices before and after.

    The reference's own error in float64 is that in float32, times the ratio of the rounding units.
    """
    rounded = to(arguments, dtype, "cpu")
    single = to(rounded, torch.float32, "cpu")
    exact, own = to(rounded, torch.float64, "cpu"), to(single, torch.float32, "cpu")
    own_exact = to(single, torch.float64, "cpu")
    for copy in (exact, own, own_exact):
        getattr(reference, name)(*copy)
    own_error = float((own[0].double() - own_exact[0]).norm() / own_exact[0].norm())
    own_error *= torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    found = to(rounded, dtype, device)
    found[0], whole = guarded(found[0])
    before = whole.clone()
    (ours or getattr(triton_kernels, name))(*found, **options)
    error = float((found[0].cpu().double() - exact[0]).norm() / exact[0].norm())
    return error, own_error, before, whole


def assert_unchanged_outside(before, after, groups, rows_of_group):
    """Bitwise equality of everything but some rows of some matrices, guard included."""
    bits = BITS[before.dtype]
    before, after = before.clone(), after.clone()
    for group in groups:
        rows = rows_of_group(group)
        before[group + 1, rows, :-16] = after[group + 1, rows, :-16] = 0
    assert torch.equal(before.view(bits), after.view(bits))


def written_rows(arguments):
    """Rows that an influence update may change, by group."""
    P, Jh, write, support, u, streams, groups = arguments[:7]
    size = Jh.shape[2] // support.shape[1] if support.shape[1] else 1
    loss = [P.shape[1] - 1] if u is not None else []
    return {
        int(g): reference.slot_entries(write[b : b + 1], size)[0].tolist() + loss
        for b, g in zip(streams.tolist(), groups.tolist(), strict=True)
    }


SHAPES = {
    "small": {},
    "no write": {"kw": 0},
    "only write": {"kr": 0, "loss": False},
    "all slots": {"kw": 5, "kr": 5, "batch": 2, "groups": 3},
    "no terms": {"terms": ()},
    "slot size 1": {"size": 1},
    "wide": {"size": 17, "columns": 200, "groups": 3, "terms": ((3, 2, 70), (1, 8, 1), (2, 40, 1), (1, 1, 1))},
    "many terms of tau": {"groups": 2, "columns": 100, "terms": ((19, 1, 70), (19, 3, 9))},
    "w above a tile": {"size": 40, "kw": 4, "kr": 1, "batch": 1, "groups": 2, "columns": 70, "terms": ((2, 2, 30),)},
}


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_influence_update(shape, dtype, device, monkeypatch):
    def nan_scratch(*size, **options):
        return torch.full(size, torch.nan, **options)

    monkeypatch.setattr(segment_update, "torch", FakeTorch(nan_scratch))
    monkeypatch.setattr(segment_update, "SCRATCH_BYTES", 160 * 64 * 8)  # one tile at a time
    arguments = problem(**SHAPES[shape])
    error, own, before, after = errors("influence_update_", arguments, dtype, device)
    assert error <= 2 * own + torch.finfo(dtype).eps
    rows = written_rows(arguments)
    assert_unchanged_outside(before, after, arguments[6].tolist(), rows.__getitem__)


class FakeTorch:
    """The module with another ``empty``."""

    def __init__(self, empty):
        self.empty = empty

    def __getattr__(self, name):
        return getattr(torch, name)


@on_devices
def test_comparison_can_fail(device):
    """Each part of the update, left out, shows: the written part of the support, the factors, the loss row."""
    arguments = problem()
    exact = to(arguments, torch.float64, "cpu")
    reference.influence_update_(*exact)
    half = arguments[1].shape[2] // 2
    without_write = arguments[1].clone()
    without_write[:, :, half:] = 0
    for index, wrong in ((1, without_write), (7, [d * 0 for d in arguments[7]]), (4, None), (5, arguments[5] * 0)):
        found = to([*arguments[:index], wrong, *arguments[index + 1 :]], torch.float64, device)
        triton_kernels.influence_update_(*found)
        assert (found[0].cpu() - exact[0]).norm() > 1e-2 * exact[0].norm()


@on_devices
def test_rows_that_are_written_only_are_not_read(device):
    arguments = problem(kr=0, kw=1, slots=3)
    arguments[3] = (arguments[2] + 1) % 3  # the support is another slot than the written one
    expected = to(arguments, torch.float64, "cpu")
    reference.influence_update_(*expected)
    for group, rows in written_rows(arguments).items():
        arguments[0][group, rows[:-1]] = torch.nan
    found = to(arguments, torch.float64, device)
    triton_kernels.influence_update_(*found)
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=1e-13, atol=1e-13)


@on_devices
@pytest.mark.parametrize("precision", ["tf32x3", "tf32"])
def test_precisions(precision, device):
    """The interpreter multiplies exactly; on a GPU ``tf32x3`` stays near float32, and ``tf32`` is three digits."""
    arguments = problem(size=16, columns=64, terms=((2, 2, 16),), groups=3)
    error, own, _, _ = errors("influence_update_", arguments, torch.float32, device, precision=precision)
    assert error <= (4 * own + 1e-7 if precision == "tf32x3" or launch.INTERPRETED else 2e-3)


@on_devices
def test_negative_groups_do_not_move(device):
    arguments = to(problem(), torch.float64, device)
    kept = arguments[0].clone()
    full = to(arguments, torch.float64, device)
    triton_kernels.influence_update_(*full)
    group = int(arguments[6][1])
    arguments[6][1] = -1
    triton_kernels.influence_update_(*arguments)
    assert torch.equal(arguments[0][group], kept[group])
    others = [g for g in range(len(kept)) if g != group]
    assert torch.equal(arguments[0][others], full[0][others]) and not torch.equal(full[0], arguments[0])


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 130])
def test_loss_row(columns, dtype, device):
    g = torch.Generator().manual_seed(1)
    P, u, groups = randn(g, 5, 24, columns), randn(g, 3, 23), torch.tensor([4, 0, 2])
    error, own, before, after = errors("loss_row_", [P, u, groups], dtype, device)
    assert error <= 2 * own + torch.finfo(dtype).eps
    assert_unchanged_outside(before, after, groups.tolist(), lambda group: [23])
    one_without = torch.tensor([4, -1, 2])  # deferred gradients of all pairs, of which one has none

    def masked(P, u, groups):
        triton_kernels.loss_row_(P, u, one_without.to(device))

    error, _, before, after = errors("loss_row_", [P, u, groups], dtype, device, masked)
    assert error > 1e-2
    assert_unchanged_outside(before, after, [4, 2], lambda group: [23])


@on_devices
def test_loss_row_over_a_support(device):
    g = torch.Generator().manual_seed(2)
    support, streams, groups = torch.tensor([[2, 0, 2], [1, 1, 3]]), torch.tensor([1, 0, 1]), torch.tensor([0, 4, 3])
    P, u = randn(g, 5, 4 * 3 + 1, 40), randn(g, 2, 9)
    expected = P.clone()
    for b, m in zip(streams.tolist(), groups.tolist(), strict=True):
        for j, row in enumerate(reference.slot_entries(support[b : b + 1], 3)[0].tolist()):
            expected[m, -1] += u[b, j] * P[m, row]
    found = to([P, u, support, streams, groups], torch.float64, device)
    loss_row.support_loss_row_(*found)
    torch.testing.assert_close(found[0].cpu(), expected, rtol=1e-13, atol=1e-13)
    assert not torch.equal(expected, P)


@on_devices
@pytest.mark.parametrize("strides", [(4000, 70_000_000), (2_200_000_000, 100)])
def test_large_offsets(strides, device):
    """Rows or matrices beyond 2**31 entries: the memory is mapped, not filled, so only the pages in use cost any."""
    rows, columns = 33, 70
    storage = torch.empty(2_245_000_000, dtype=torch.bfloat16, device=device)
    P = storage.as_strided((2, rows, columns), (*strides, 1))
    assert max(strides[0], 32 * strides[1]) > 2**31
    g = torch.Generator().manual_seed(3)
    P.copy_(randn(g, 2, rows, columns))
    seed = torch.tensor(0, device=device)
    one, zero = torch.tensor([1]), torch.tensor([0])
    map_ = [randn(g, 1, 16, 32) / 6, one[None], torch.tensor([[0, 1]]), randn(g, 1, 32), zero, one]
    arguments = [P.float().cpu().contiguous(), *map_, [randn(g, 1, 16, 1, 1)], [randn(g, 1, 1, 70)], [0]]
    expected = to(arguments, torch.float32, "cpu")
    reference.influence_update_(*expected)
    triton_kernels.influence_update_(P, *to(arguments[1:], torch.float32, device), seed=seed)
    torch.testing.assert_close(P.float().cpu().contiguous(), expected[0], rtol=2**-7, atol=1e-6)
    u = randn(g, 2, 32).float()
    expected = expected[0]
    expected[...] = P.float().cpu().contiguous()
    reference.loss_row_(expected, u, torch.tensor([0, 1]))
    triton_kernels.loss_row_(P, u.to(device), torch.tensor([0, 1], device=device), seed)
    torch.testing.assert_close(P.float().cpu().contiguous(), expected, rtol=2**-7, atol=1e-6)
    ring = ring_problem(slots=2, size=16, capacity=2, batch=1, generator=g)
    count, start = torch.tensor(2), torch.tensor([1])
    expected[...] = P.float().cpu().contiguous()
    node = [part[1].to(torch.float32 if part.is_floating_point() else None) for part in ring]
    reference.influence_update_(expected, node[2], node[0], node[1], node[3], zero, one, [], [], [])
    found = to([*ring, count, zero, one, start], torch.float32, device)
    triton_kernels.catch_up_(P, *found, 16, seed=seed)
    torch.testing.assert_close(P.float().cpu().contiguous(), expected, rtol=2**-7, atol=1e-6)


def ring_problem(slots, size, capacity, batch, generator):
    """Segments as the ring of a tree holds them: sorted slots, a repeated row is a copy, a repeated column zero."""
    places = []
    for _ in range(capacity):
        kw, ks = torch.randint(1, slots + 1, (2,), generator=generator).tolist()
        write, read = pick(slots, kw, batch, generator), pick(slots, ks, batch, generator)
        r = (kw + ks) * size
        Jh, u = randn(generator, batch, kw * size, r) / r**0.5, randn(generator, batch, slots * size)
        node = reference.leaf(Jh, write, torch.cat((read, write), 1), u, slots, size)
        places.append(reference.widen(*node, slots, slots, size))
    return [torch.stack(part) for part in zip(*places, strict=True)]


def catch_up_problem(slots=4, size=5, capacity=4, count=6, columns=21, seed=0):
    """A ring that has wrapped, and gaps of none, some and all of it; a start behind the count moves nothing."""
    g = torch.Generator().manual_seed(seed)
    batch, groups = 3, 7
    P = randn(g, groups, slots * size + 1, columns)
    ring = ring_problem(slots, size, capacity, batch, g)
    starts = torch.tensor([count, count - 1, count - capacity, count - 2, count + 3])
    moved = torch.randperm(groups, generator=g)[: len(starts)]
    return [P, *ring, torch.tensor(count), torch.randint(batch, (len(starts),), generator=g), moved, starts, size]


CATCH_UPS = {
    "small": {},
    "odd": {"slots": 3, "size": 17, "columns": 37},
    "slot size 1": {"slots": 9, "size": 1},
    "too large for a column": {"slots": 2, "size": 5, "count": 5},
}


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CATCH_UPS)
def test_catch_up(shape, dtype, device, monkeypatch):
    if "large" in shape:
        monkeypatch.setattr(catch_up, "choose_column", lambda *sizes: None)
    arguments = catch_up_problem(**CATCH_UPS[shape])
    P, *_, groups, starts, _ = arguments
    error, own, before, after = errors("catch_up_", arguments, dtype, device)
    assert error <= 2 * own + torch.finfo(dtype).eps
    moving = groups[starts < int(arguments[5])].tolist()
    assert len(moving) == 3
    assert_unchanged_outside(before, after, moving, lambda group: list(range(P.shape[1])))


@on_devices
def test_comparison_of_catch_ups_can_fail(device):
    """A segment left out at the old or the new end, another stream, or no loss row: each shows."""
    arguments = catch_up_problem()
    exact = to(arguments, torch.float64, "cpu")
    reference.catch_up_(*exact)
    for index, wrong in (
        (8, arguments[8] + 1),
        (5, arguments[5] - 1),
        (6, (arguments[6] + 1) % 3),
        (4, arguments[4] * 0),
    ):
        found = to([*arguments[:index], wrong, *arguments[index + 1 :]], torch.float64, device)
        triton_kernels.catch_up_(*found)
        assert (found[0].cpu() - exact[0]).norm() > 1e-2 * exact[0].norm()


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["small", "odd", "too large for a column", "no write", "no loss"])
def test_catch_up_and_update(shape, dtype, device, monkeypatch):
    """The segments, then the step that wakes the expert, in one pass."""
    if "large" in shape:
        monkeypatch.setattr(catch_up, "choose_column", lambda *sizes: None)
    past = catch_up_problem(**CATCH_UPS.get(shape, {}))
    size, slots, columns = past[-1], (past[0].shape[1] - 1) // past[-1], past[0].shape[2]
    kw = 0 if shape == "no write" else 2
    now = problem(slots, size, kw=kw, columns=columns, groups=7, terms=((2, 2, 4), (1, 3, 2)), loss=shape != "no loss")
    now[0], now[5], now[6] = past[0], past[6], past[7]
    both = [*past, *now[1:5], *now[7:]]
    error, own, before, after = errors("catch_up_update_", both, dtype, device)
    assert error <= 2 * own + torch.finfo(dtype).eps
    assert_unchanged_outside(before, after, past[7].tolist(), lambda group: list(range(past[0].shape[1])))


@on_devices
def test_non_contiguous_arguments(device):
    """Factors may be views, as a captured step hands them out; columns of the influence must lie side by side."""
    plain = to(problem(), torch.float64, device)
    expected = to(plain, torch.float64, device)
    triton_kernels.influence_update_(*expected)
    Jh = plain[1].transpose(1, 2).contiguous().transpose(1, 2)
    deltas = [torch.cat((d, d), 3)[..., : d.shape[3]] for d in plain[7]]
    assert not Jh.is_contiguous() and not deltas[0].is_contiguous()
    found = to(plain, torch.float64, device)[0]
    triton_kernels.influence_update_(found, Jh, *plain[2:7], deltas, *plain[8:])
    assert torch.equal(found, expected[0])
    with pytest.raises(ValueError, match=r"P must have shape \(G, H \+ 1, N\) with columns of stride 1, got"):
        triton_kernels.loss_row_(torch.zeros(1, 4, 5, device=device).transpose(1, 2), Jh, plain[6])


@on_devices
def test_wrong_arguments_are_refused(device):
    arguments = to(problem(), torch.float32, device)
    before = arguments[0].clone()
    for index, wrong, error, message in (
        (0, arguments[0].half(), TypeError, "P must be float32, float64 or bfloat16, got torch.float16"),
        (1, arguments[1].double(), TypeError, "Jh must be torch.float32, got torch.float64"),
        (2, arguments[2][:, :1], ValueError, r"write must have shape \(3, 2\), got \(3, 1\)"),
        (3, arguments[3].int(), TypeError, "support must be torch.int64, got torch.int32"),
        (4, arguments[4][:1], ValueError, r"loss_row must have shape \(3, 12\), got \(1, 12\)"),
        (5, arguments[5][1:], ValueError, r"streams must have shape \(4,\), got \(3,\)"),
        (7, arguments[7][:1], ValueError, "one entry per parameter, got 1, 2 and 2"),
        (8, [arguments[8][0][:, :1], arguments[8][1]], ValueError, r"zs\[0\] must have shape \(4, 2, \*\)"),
        (9, [1, 20], ValueError, r"offsets\[1\] must leave room for 3 columns in N = 21, got 20"),
    ):
        with pytest.raises(error, match=message):
            triton_kernels.influence_update_(*arguments[:index], wrong, *arguments[index + 1 :])
    with pytest.raises(ValueError, match=r"precision must be one of .* got 'fast'"):
        triton_kernels.influence_update_(*arguments, precision="fast")
    with pytest.raises(ValueError, match="seed must be an int64 tensor"):
        triton_kernels.loss_row_(arguments[0].bfloat16(), arguments[1], arguments[6])
    with pytest.raises(ValueError, match="Jh must have ks \\* D columns with D a divisor of H = 15, got 11"):
        triton_kernels.influence_update_(arguments[0], arguments[1][..., :11], *arguments[2:])
    assert torch.equal(arguments[0], before)


def rounding_problem(device, columns=2048):
    """An update whose exact results lie a known fraction between two neighbours in bfloat16: ``1 + f / 128``."""
    fractions = torch.arange(16, dtype=torch.float32) / 16
    P = torch.ones(1, 17, columns, dtype=torch.bfloat16, device=device)
    slot, one = torch.tensor([[0]], device=device), torch.tensor([0], device=device)
    Jh = torch.diag(1 + fractions / 128)[None].to(device)
    return P, (Jh, slot, slot, None, one, one, [], [], []), fractions


@on_devices
def test_rounding_into_bfloat16_is_unbiased(device):
    """The share rounded up is the fraction; a deviation as large as allowed has a probability below 1e-12.

    Hoeffding's bound for the mean of ``n`` independent draws from 0 ... 1: ``2 exp(-2 n t**2)``, here for 16 rows.
    """
    P, update, fractions = rounding_problem(device)
    seed = torch.tensor(12345, device=device)
    triton_kernels.influence_update_(P, *update, seed=seed)
    up = ((P[0, :16].float().cpu() - 1) * 128).double()
    assert set(up.unique().tolist()) == {0.0, 1.0} and int(seed) == 12346
    bound = (math.log(2 * 16 / 1e-12) / (2 * up.shape[1])) ** 0.5
    assert ((up.mean(1) - fractions).abs() <= bound).all()
    nearest = (fractions > 0.5).double()  # what rounding to nearest would give: the bound tells it apart
    assert ((nearest - fractions).abs() > bound).any() and bound < 0.1
    neighbours = (up[8, 1:] * up[8, :-1]).mean() - up[8].mean() ** 2  # and entries are independent of each other
    assert abs(float(neighbours)) <= 2 * bound
    again, _, _ = rounding_problem(device)
    triton_kernels.influence_update_(again, *update, seed=torch.tensor(12345, device=device))
    other, _, _ = rounding_problem(device)
    triton_kernels.influence_update_(other, *update, seed=seed)
    assert torch.equal(P, again) and not torch.equal(P, other)


@on_devices
def test_bfloat16_keeps_what_it_can_hold(device):
    """Numbers that need no rounding stay; infinity and NaN stay what they are, NaN with any payload."""
    values = torch.tensor([0.0, -0.5, 3.0, torch.inf, -torch.inf, torch.nan, torch.nan, 2.0**-120, 1e30]).bfloat16()
    values.view(torch.int16)[6] = 0x7FFF  # a carry would make it a zero
    P = torch.zeros(1, 2, 64 * len(values), dtype=torch.bfloat16, device=device)
    P[0, 0] = values.to(device).repeat(64)
    zero, one = torch.tensor([0], device=device), torch.ones(1, 1, 1, device=device)
    slot, seed = zero[None], torch.tensor(7, device=device)
    triton_kernels.influence_update_(P, one, slot, slot, None, zero, zero, [], [], [], seed=seed)
    torch.testing.assert_close(P[0, 0].cpu(), values.repeat(64), rtol=0, atol=0, equal_nan=True)


@on_devices
def test_bfloat16_update_is_near_the_exact_one(device):
    """Storage in bfloat16, arithmetic in float32: the error is that of one rounding of each entry."""
    arguments = problem(size=5, columns=40)
    arguments[0] = arguments[0].bfloat16().double()
    exact = to(arguments, torch.float64, "cpu")
    reference.influence_update_(*exact)
    P = arguments[0].to(device, torch.bfloat16)
    rest = to(arguments[1:], torch.float32, device)
    triton_kernels.influence_update_(P, *rest, seed=torch.tensor(1, device=device))
    error = (P.cpu().double() - exact[0]).abs()
    assert (error <= 2**-7 * exact[0].abs() + 1e-6).all() and error.max() > 0


def diagonal_problem(batch, rows, tau, columns, dtype, loss):
    """Arguments of ``diagonal_update_`` in double precision."""
    g = torch.Generator().manual_seed(columns)
    dtype = torch.complex128 if dtype.is_complex else torch.float64

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    arguments = [draw(batch, rows, columns), draw(batch, rows), draw(batch, rows, tau), randn(g, batch, tau, columns)]
    return [*arguments, draw(rows, columns), draw(batch, rows)] if loss else arguments


def cast(values, real, device="cpu"):
    """Copies in another precision, complex where they are complex."""
    return [v.to(device, real.to_complex() if v.is_complex() else real, copy=True) for v in values]


@on_devices
@pytest.mark.parametrize("loss", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize(("rows", "columns", "tau"), [(9, 300, 1), (5, 7, 3), (1100, 1, 1), (3, 1, 0)])
def test_diagonal_update(rows, columns, tau, dtype, loss, device):
    arguments = diagonal_problem(2, rows, tau, columns, dtype, loss)
    real = dtype.to_real()
    single = cast(arguments, torch.float32)
    given = single if real == torch.float32 else arguments
    exact, own, own_exact = cast(given, torch.float64), cast(single, torch.float32), cast(single, torch.float64)
    for values in (exact, own, own_exact):
        reference.diagonal_update_(*values)
    found = cast(given, real, device)
    guards = []
    for i in (0, 4)[: 1 + loss]:  # what is changed lies between NaN in memory
        guards.append(torch.full((found[i].numel() + 64,), torch.nan, dtype=dtype, device=device))
        guards[-1][32:-32] = found[i].flatten()
        found[i] = guards[-1][32:-32].view(found[i].shape)
    triton_kernels.diagonal_update_(*found)
    eps = torch.finfo(dtype).eps
    for i, guard in zip((0, 4), guards, strict=False):
        own_error = (own[i] - own_exact[i]).norm() * (eps / torch.finfo(torch.float32).eps)
        assert (found[i].cpu() - exact[i]).norm() <= 2 * own_error + eps * exact[i].norm()
        assert guard[:32].isnan().all() and guard[-32:].isnan().all()
    if loss and columns == 300:
        P, _, _, _, g, u = cast(given, real, device)
        triton_kernels.diagonal_loss_(g, P, u.conj().resolve_conj().conj())
        assert (g - found[4]).norm() <= 4 * eps * g.norm()
        assert torch.equal(P.cpu(), given[0].to(dtype))


@on_devices
def test_wrong_arguments_of_diagonal_operations(device):
    P, decay, delta, z, g, u = to(diagonal_problem(2, 4, 1, 5, torch.float32, True), torch.float32, device)
    update = triton_kernels.diagonal_update_
    with pytest.raises(ValueError, match=r"P must have shape \(B, R, J\) and be contiguous"):
        update(P.mT, decay, delta, z)
    with pytest.raises(TypeError, match=r"P must be float32.*bfloat16"):
        update(P.bfloat16(), decay, delta, z)
    with pytest.raises(ValueError, match=r"decay must have shape \(2, 4\), got \(1, 4\)"):
        update(P, decay[:1], delta, z)
    with pytest.raises(ValueError, match=r"z must have shape \(2, 1, 5\)"):
        update(P, decay, delta, z[:, :0])
    with pytest.raises(TypeError, match=r"u must be torch.float32"):
        update(P, decay, delta, z, g, u.double())
    with pytest.raises(ValueError, match="g without u"):
        update(P, decay, delta, z, g)
    with pytest.raises(ValueError, match="g must be contiguous"):
        triton_kernels.diagonal_loss_(torch.zeros(5, 4, device=device).mT, P, u)


@on_devices
def test_opcheck(device):
    tests = ("test_schema", "test_faketensor")
    operations = torch.ops.sparse_rtrl
    update = to(problem(groups=3), torch.float32, device)
    torch.library.opcheck(operations.triton_influence_update_.default, tuple(update), test_utils=tests)
    P, u, seed = update[0].bfloat16(), update[0][: len(update[6]), -1, :15].contiguous(), update[6][0] * 0
    torch.library.opcheck(operations.triton_loss_row_.default, (P, u, update[6], seed), test_utils=tests)
    diagonal = cast(diagonal_problem(2, 4, 1, 5, torch.complex64, True), torch.float32, device)
    torch.library.opcheck(operations.triton_diagonal_update_.default, tuple(diagonal), test_utils=tests)
    loss = (diagonal[4], diagonal[0], diagonal[5])
    torch.library.opcheck(operations.triton_diagonal_loss_.default, loss, test_utils=tests)
    past = to(catch_up_problem(), torch.float32, device)
    torch.library.opcheck(operations.triton_catch_up_.default, tuple(past), test_utils=tests)
    now = to(problem(4, 5, groups=7), torch.float32, device)
    both = (*past, *now[1:5], [], [], [])
    torch.library.opcheck(operations.triton_catch_up_update_.default, both, {"precision": "tf32"}, test_utils=tests)


@on_devices
def test_compiled_by_torch(device):
    """Nothing breaks the graph, and what is computed is the same, bit for bit."""
    arguments = to(problem(groups=3), torch.float32, device)
    expected = to(arguments, torch.float32, device)
    triton_kernels.influence_update_(*expected)
    u = arguments[0][: len(arguments[6]), -1, :15].contiguous()
    triton_kernels.loss_row_(expected[0], u * 2, arguments[6])
    operations = dispatch.select("triton", torch.device(device), torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(P, u, *rest):
        operations.influence_update_(P, *rest)
        operations.loss_row_(P, u * 2, rest[5])

    before = arguments[0].clone()
    step(arguments[0], u, *arguments[1:])
    assert torch.equal(arguments[0], expected[0]) and not torch.equal(before, expected[0])


@on_devices
def test_runs_are_repeatable(device):
    first, second = (to(problem(**SHAPES["wide"]), torch.float32, device) for _ in range(2))
    for arguments in (first, second):
        triton_kernels.influence_update_(*arguments)
    assert torch.equal(first[0], second[0])


@on_devices
def test_learner_has_the_gradient_of_bptt(device):
    """Experts that sleep, expire and are paid, all through the kernels."""
    steps, batch = 14, 2
    torch.manual_seed(0)
    cell = PatternCell(make_pattern("random", steps, batch), dense=False).double().to(device)
    x, c = inputs(steps, batch).to(device), cotangents(steps, batch).to(device)
    learner = RTRL(cell, batch, buffer=3, commit_every=1, catch_up="replay", backend="triton")
    assert worst_error(online(learner, x, c, 1), bptt(cell, x, c)) <= 1e-12
    assert min(learner.events.get(event, 0) for event in ("wakes", "expiries", "payments", "replays")) > 0


@pytest.mark.gpu
@pytest.mark.skipif(launch.INTERPRETED, reason="no CUDA device")
def test_no_host_synchronisation_and_graph_capture():
    """A replayed CUDA graph of catch-up, update and loss row does what the calls do."""
    past, now = (to(p, torch.float32, "cuda") for p in (catch_up_problem(), problem(4, 5, groups=7)))
    u = torch.randn(len(past[7]), 20, device="cuda")
    P = past[0]

    def step():
        triton_kernels.catch_up_update_(*past, *now[1:5], *now[7:])
        triton_kernels.loss_row_(P, u, past[7])

    start = P.clone()
    step()  # compiles
    expected = P.clone()
    P.copy_(start)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    P.copy_(start)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(P, expected)


def test_backend_is_refused_where_it_cannot_run(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(ValueError, match="precision must be one of"):
        dispatch.select("triton", cuda, torch.float32, "fast")
    with pytest.raises(ValueError, match="precision must be 'ieee' for backend 'auto', got 'tf32'"):
        dispatch.select("auto", cpu, torch.float32, "tf32")
    for dtype, precision in ((torch.float16, "ieee"), (torch.float64, "tf32x3")):
        with pytest.raises(BackendError, match="is for float32, and float64 in precision 'ieee', got"):
            dispatch.select("triton", cuda, dtype, precision)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match=r"runs on CUDA tensors, the tensors are on cpu: .* set TRITON_INTERPRET=1"):
        dispatch.select("triton", cpu, torch.float32)
    monkeypatch.setattr(triton_backend, "installed", lambda: False)
    with pytest.raises(BackendError, match=r"needs the package triton: install it with 'pip install sparse_rtrl\[tri"):
        dispatch.select("triton", cuda, torch.float32)


def test_package_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import sparse_rtrl.cli.environment as e; assert 'Triton' not in e.backends(), e.backends()\n"
        "import torch; from sparse_rtrl.ops import dispatch\n"
        "dispatch.loss_row_(torch.ones(1, 3, 2), torch.ones(1, 2), torch.tensor([0]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_the_interpreter_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(BackendError, match=r"are for CUDA tensors, got cpu: .* set TRITON_INTERPRET=1"):
        triton_kernels.loss_row_(torch.zeros(1, 2, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))


def test_tile_table_covers_every_column_once():
    sizes = ((0, 3, 5, 2), (15, 40, 1, 1), (60, 1, 100, 4))
    spans, entries = tiles._tile_table(sizes, 7, 170, 32, torch.device("cpu"))
    seen = torch.zeros(3, 170, dtype=torch.int64)
    for tile, (first, last) in enumerate(zip(spans[:-1].tolist(), spans[1:].tolist(), strict=True)):
        for offset, m, j, tau, _, _ in entries[first:last].tolist():
            term = sizes.index((offset, m, j, tau))
            seen[term, max(offset, tile * 32) : min(offset + m * j, tile * 32 + 32)] += 1
    for term, (offset, m, j, _) in enumerate(sizes):
        assert seen[term].sum() == m * j and (seen[term, offset : offset + m * j] == 1).all()


def test_kernels_compile_ahead_of_time():
    """For sm_80 and sm_90: no error, no spilled register, and matrix units wherever the precision allows them."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).parents[1] / "compile_kernels.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["capability"] for row in rows} == {80, 90}
    products = ("influence_update_kernel", "segment_product_kernel", "catch_up_kernel")
    for row in rows:
        assert row["spilled"] == 0, row
        if row["kernel"] in products:
            units = {"ieee": ["f64"] if "float64" in row["name"] else []}.get(row["name"].split()[-1], ["tf32"])
            assert row["matrix_units"] == units, row
