"""Operations against dense arithmetic, and their registration."""

import pytest
import torch

from sparse_rtrl import CircularTree
from sparse_rtrl.ops import dispatch, reference
from sparse_rtrl.ops.reference import slot_entries


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


@pytest.mark.parametrize("module", [dispatch, reference], ids=["dispatch", "reference"])
@pytest.mark.parametrize("with_loss", [True, False])
@pytest.mark.parametrize("shape", [{}, {"kw": 0}, {"kr": 0}, {"batch": 1, "kw": 5, "kr": 5}, {"slot_size": 1}])
def test_influence_update(shape, with_loss, module):
    arguments = problem(**shape)
    if not with_loss:
        arguments[4] = None
    expected = expected_update(*arguments)
    P = arguments[0]
    before = P.clone()
    module.influence_update_(*arguments)
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
    dispatch.influence_update_(*single)
    assert (single[0].double() - exact).norm() <= 2 * dense_error + torch.finfo(torch.float32).eps * exact.norm()


@pytest.mark.parametrize("module", [dispatch, reference], ids=["dispatch", "reference"])
def test_loss_row(module):
    P = torch.randn(5, 7, 3, dtype=torch.float64)
    before, u, groups = P.clone(), torch.randn(2, 6, dtype=torch.float64), torch.tensor([4, 1])
    module.loss_row_(P, u, groups)
    for i, g in enumerate(groups.tolist()):
        torch.testing.assert_close(P[g, -1], before[g, -1] + u[i] @ before[g, :-1])
    assert torch.equal(P[:, :-1], before[:, :-1]) and torch.equal(P[[0, 2, 3]], before[[0, 2, 3]])


def test_opcheck():
    def check(name, *arguments):
        operation = getattr(torch.ops.sparse_rtrl, name).default
        torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))
        checked.add(name)

    checked: set[str] = set()
    check("influence_update_", *problem())
    check("loss_row_", torch.randn(5, 7, 3), torch.randn(2, 6), torch.tensor([4, 1]))
    tree = CircularTree(4, 2, 3, 2)
    write, support = torch.tensor([[0], [2]]), torch.tensor([[1, 0], [2, 2]])
    segment = (torch.randn(2, 2, 4), write, support, torch.randn(2, 6))
    for _ in range(5):
        tree.append_segment(*segment)
    leaves = [part[0] for part in tree._rings]
    streams, starts = torch.tensor([1, 0, 1]), torch.tensor([2, 5, 1])
    check("tree_append_", *tree._rings, tree._count, *segment, 0, 3, 2)
    check("suffix_product", *tree._rings, tree._count, streams, starts, 3, 3, 3, 2)
    replay = (torch.randn(4, 7, 5), *leaves, tree._count, streams, torch.tensor([3, 0, 1]), starts, 2)
    check("catch_up_", *replay)
    update = (torch.randn(2, 2, 4), write, support, torch.randn(2, 4))
    factors = ([torch.randn(3, 2, 1, 2)], [torch.randn(3, 1, 2)], [1])
    check("catch_up_update_", *replay, *update, *factors)
    check("suffix_loss_rows", *leaves, tree._count, torch.tensor([[1, 2], [5, 4]]), torch.randn(2, 6), 2)
    P, u = torch.randn(2, 3, 4), torch.randn(2, 3)
    check("diagonal_update_", P, u, torch.randn(2, 3, 1), torch.randn(2, 1, 4), torch.randn(3, 4), u)
    check("diagonal_loss_", torch.randn(3, 4), P, u)
    # One entry is doubled, then goes through a matrix.
    program = torch.tensor([[0, 2, 2, 2, 0, 0, 0, 1], [1, 4, 2, 1, 1, 2, 2, 1]])
    operands = ([torch.tensor([[0, 1]], dtype=torch.int32)], [torch.full((1, 2), 2.0), torch.randn(1, 1, 2, 2)])
    check(
        "rows_back_",
        torch.randn(3, 4, 2),
        torch.empty(3 * 5 * 2 * 4),
        program,
        *operands,
        None,
        [2, 1, 2],
        5,
        3,
        0,
        6,
        4,
    )
    assert checked == set(dispatch.NAMES)
