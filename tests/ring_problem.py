"""Random trees, and each operation on their rings against the reference in float64."""

import torch
from hypothesis import strategies as st
from pattern_cell import pick

from sparse_rtrl import CircularTree
from sparse_rtrl.ops import reference


def to(value, dtype, device="cpu"):
    """The same arguments with floating-point tensors in another dtype, all of them copies."""
    if isinstance(value, (list, tuple)):
        return [to(v, dtype, device) for v in value]
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None, copy=True)
    return value


def outcome(module, name, arguments):
    """What an operation returns or, for an operation in place, leaves in its arguments."""
    result = getattr(module, name)(*arguments)
    if result is None:
        rings = [ring for part in arguments[:4] for ring in part] if name == "tree_append_" else []
        return [*rings, arguments[4]] if rings else [arguments[0]]
    return list(result) if isinstance(result, tuple) else [result]


def assert_as_good_as_reference(module, name, arguments, dtype, device="cpu"):
    """Both implementations get the same arguments, rounded to the dtype.

    The reference's own error in float64 is not measured, as nothing more exact is at hand: it is that in float32, times
    the ratio of the rounding units.
    """
    rounded = to(arguments, dtype)
    exact = outcome(reference, name, to(rounded, torch.float64))
    single = to(rounded, torch.float32)
    own = outcome(reference, name, to(single, torch.float32))
    own_exact = outcome(reference, name, to(single, torch.float64))
    found = to(outcome(module, name, to(rounded, dtype, device)), dtype)
    eps = torch.finfo(dtype).eps
    for e, o, oe, f in zip(exact, own, own_exact, found, strict=True):
        assert f.shape == e.shape
        if not e.is_floating_point():
            assert torch.equal(f, e)
            continue
        assert f.dtype == dtype and torch.isfinite(f).all()
        own_error = (o.double() - oe).norm() * (eps / torch.finfo(torch.float32).eps)
        assert (f.double() - e).norm() <= 2 * own_error + eps * e.norm()
    return exact, found


def randn(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_segment(draw, generator, tree):
    """Widths that change from segment to segment, and a pattern per stream."""
    kr, kw = draw(st.integers(0, tree.num_slots)), draw(st.integers(0, tree.num_slots))
    write, read = (pick(tree.num_slots, k, tree.batch_size, generator) for k in (kw, kr))
    w, r = kw * tree.slot_size, (kr + kw) * tree.slot_size
    loss_row = randn(generator, tree.batch_size, r) if draw(st.booleans()) else None
    Jh = randn(generator, tree.batch_size, w, r) / max(1, r) ** 0.5
    return Jh, write, torch.cat((read, write), 1), loss_row


def check_tree_operations(module, draw, dtype, sizes, device="cpu"):
    """An append, queries from inside, at and behind the window's end, replays and loss rows; returns what was covered.

    Args:
        module: the implementation, with a function per operation.
        draw: of a hypothesis test.
        dtype: of the numbers.
        sizes: slot sizes to draw from.
        device: of the implementation's arguments.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    batch, slots, size = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.sampled_from(sizes))
    capacity, levels = draw(st.integers(1, 9)), draw(st.sampled_from([None, 0, 1]))
    tree = CircularTree(capacity, batch, slots, size, torch.float64, levels=levels, backend="reference")
    tree.begin_at(draw(st.integers(0, 5)))
    for _ in range(draw(st.integers(0, 2 * capacity))):
        tree.append(*random_segment(draw, generator, tree))
    segment = random_segment(draw, generator, tree)
    tree._reserve(segment[1].shape[1], segment[2].shape[1])
    rings = [list(part) for part in tree._rings]
    leaves = [part[0] for part in rings]
    *segment, u = segment
    if u is not None:
        u = u.new_zeros(batch, slots * size).scatter_add_(1, reference.slot_entries(segment[2], size), u)
    append = [*rings, tree._count, *segment, u, tree.first, slots, size]
    assert_as_good_as_reference(module, "tree_append_", append, dtype, device)
    oldest = max(tree.first, tree.count - capacity)

    def starts(*shape):
        return torch.randint(oldest, tree.count + 2, shape, generator=generator)

    products = draw(st.integers(0, 4))
    room = [min(slots, (tree.count - oldest) * part.shape[2]) for part in leaves[:2]]
    of, begin = torch.randint(batch, (products,), generator=generator), starts(products)
    query = [*rings, tree._count, of, begin, *room, slots, size]
    (_, _, exact, _), _ = assert_as_good_as_reference(module, "suffix_product", query, dtype, device)
    assert exact.shape == (products, room[0] * size, room[1] * size)
    groups, columns = draw(st.integers(1, 4)), draw(st.sampled_from([1, 31, 64, 200]))
    moved = torch.randperm(groups, generator=generator)[: draw(st.integers(0, groups))]
    of, begin = torch.randint(batch, (len(moved),), generator=generator), starts(len(moved))
    P = randn(generator, groups, slots * size + 1, columns)
    replay = [P, *leaves, tree._count, of, moved, begin, size]
    _, (found,) = assert_as_good_as_reference(module, "catch_up_", replay, dtype, device)
    kept = [g for g in range(groups) if g not in moved[begin < tree.count].tolist()]
    assert torch.equal(found[kept], P[kept].to(dtype))  # what stays, stays bit for bit
    sweep = [*leaves, tree._count, starts(batch, 3), randn(generator, batch, slots * size), size]
    assert_as_good_as_reference(module, "suffix_loss_rows", sweep, dtype, device)
    return {"wrapped": tree.count - tree.first > capacity, "merged": tree.merges > 0, "products": products}
