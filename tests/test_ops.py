"""Operations against dense arithmetic, and their registration."""

import pytest
import torch

from sparse_rtrl import ops
from sparse_rtrl.reference import slot_entries


def problem(batch=3, num_slots=5, slot_size=3, kr=2, kw=2, groups=7, columns=11, dtype=torch.float64, seed=0):
    """Arguments of ``influence_update_`` with overlapping read and write, and groups moved out of order."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    P = randn(groups, num_slots * slot_size + 1, columns)
    write = torch.stack([torch.randperm(num_slots, generator=g)[:kw] for _ in range(batch)])
    read = torch.stack([torch.randperm(num_slots, generator=g)[:kr] for _ in range(batch)])
    w, r = kw * slot_size, (kr + kw) * slot_size
    moved = torch.randperm(groups, generator=g)[: groups - 2]
    streams = torch.randint(batch, (len(moved),), generator=g)
    count = len(moved)
    deltas, zs, offsets = (
        [randn(count, w, 2, 2), randn(count, w, 1, 3)],
        [randn(count, 2, 4), randn(count, 1, 1)],
        [0, 8],
    )
    return [
        P,
        randn(batch, w, r),
        write,
        torch.cat((read, write), 1),
        randn(batch, r),
        streams,
        moved,
        deltas,
        zs,
        offsets,
    ]


def expected_update(P, Jh, write, support, loss_row, streams, groups, deltas, zs, offsets):
    out, size = P.clone(), Jh.shape[2] // support.shape[1]
    for i, (b, g) in enumerate(zip(streams.tolist(), groups.tolist(), strict=True)):
        rows, cols = slot_entries(write[b : b + 1], size)[0], slot_entries(support[b : b + 1], size)[0]
        new = sum(torch.outer(Jh[b, :, j], P[g, col]) for j, col in enumerate(cols))
        for delta, z, offset in zip(deltas, zs, offsets, strict=True):
            F = torch.einsum("wtm,tj->wmj", delta[i], z[i]).flatten(1)
            new[:, offset : offset + F.shape[1]] += F
        if loss_row is not None:
            out[g, -1] += sum(loss_row[b, j] * P[g, col] for j, col in enumerate(cols))
        out[g, rows] = new
    return out


@pytest.mark.parametrize("with_loss", [True, False])
@pytest.mark.parametrize("shape", [{}, {"kw": 0}, {"kr": 0}, {"batch": 1, "kw": 5, "kr": 5}, {"slot_size": 1}])
def test_influence_update(shape, with_loss):
    arguments = problem(**shape)
    if not with_loss:
        arguments[4] = None
    expected = expected_update(*arguments)
    P = arguments[0]
    before = P.clone()
    ops.influence_update_(*arguments)
    torch.testing.assert_close(P, expected, rtol=1e-12, atol=1e-12)
    untouched = [g for g in range(len(P)) if g not in arguments[6].tolist()]
    assert torch.equal(P[untouched], before[untouched])
    size = arguments[1].shape[2] // arguments[3].shape[1]
    for b, g in zip(arguments[5].tolist(), arguments[6].tolist(), strict=True):
        kept = sorted(set(range(P.shape[1] - 1)) - set(slot_entries(arguments[2][b : b + 1], size)[0].tolist()))
        assert torch.equal(P[g, kept], before[g, kept])


def test_influence_update_in_float32_is_as_good_as_dense_float32():
    exact = expected_update(*problem())
    single = problem(dtype=torch.float32)
    dense_error = (expected_update(*problem(dtype=torch.float32)).double() - exact).norm()
    ops.influence_update_(*single)
    assert (single[0].double() - exact).norm() <= 2 * dense_error + torch.finfo(torch.float32).eps * exact.norm()


def test_loss_row():
    P = torch.randn(5, 7, 3, dtype=torch.float64)
    before, u, groups = P.clone(), torch.randn(2, 6, dtype=torch.float64), torch.tensor([4, 1])
    ops.loss_row_(P, u, groups)
    for i, g in enumerate(groups.tolist()):
        torch.testing.assert_close(P[g, -1], before[g, -1] + u[i] @ before[g, :-1])
    assert torch.equal(P[:, :-1], before[:, :-1]) and torch.equal(P[[0, 2, 3]], before[[0, 2, 3]])


def test_opcheck():
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.sparse_rtrl.influence_update_.default, tuple(problem()), test_utils=tests)
    P, u = torch.randn(5, 7, 3), torch.randn(2, 6)
    torch.library.opcheck(torch.ops.sparse_rtrl.loss_row_.default, (P, u, torch.tensor([4, 1])), test_utils=tests)
    rows, cols = torch.tensor([[0, 2]]), torch.tensor([[0, 1, 2]])
    node = (rows, cols, torch.randn(1, 4, 6), torch.randn(1, 6))
    torch.library.opcheck(torch.ops.sparse_rtrl.tree_merge.default, (*node, *node, 4, 2), test_utils=tests)
