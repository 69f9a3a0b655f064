"""What each operation of a vector-Jacobian product does to a value that depends on the row."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparse_rtrl.capture.tape import RowTape
from sparse_rtrl.capture.tape_builder import LAZY, MAX_TERMS, MOVES, SAMES, Coefficient, Rule, TapeBuilder, Term, Value
from sparse_rtrl.capture.trace import NotTraceable, TracedStep, describe

aten = torch.ops.aten


def _moved(build: TapeBuilder, node: Any) -> Value:
    """Operations that move, repeat or drop entries of their first argument."""
    target, rest = node.target, node.args[1:]
    if target is aten._unsafe_view.default or target is aten.view.default:
        target = aten.reshape.default
    return build.move(
        build.value_of(node.args[0]),
        lambda t: target(t, *rest),
        lambda n: build.emit(target, n, *rest),
    )


def _same(build: TapeBuilder, node: Any) -> Value:
    """Operations that change nothing."""
    value = build.value_of(node.args[0])
    if node.meta["val"].dtype != node.args[0].meta["val"].dtype:
        raise NotTraceable(f"it changes the dtype at {describe(node)}")
    return value


def _split(build: TapeBuilder, node: Any) -> list[Value]:
    """Operations whose result is a list of parts."""
    value = build.value_of(node.args[0])
    rest, count = node.args[1:], len(node.meta["val"])

    def part(i: int) -> Value:
        return build.move(
            value,
            lambda t: node.target(t, *rest)[i],
            lambda n: build.emit(operator.getitem, build.emit(node.target, n, *rest), i),
        )

    return [part(i) for i in range(count)]


def _getitem(build: TapeBuilder, node: Any) -> Value:
    values = build.values[node.args[0]]
    assert isinstance(values, list)
    return values[node.args[1]]


def _cat(build: TapeBuilder, node: Any) -> Value:
    """Values side by side; where one has fewer terms, the others stand beside zeros."""
    dim = node.args[1] if len(node.args) > 1 else 0
    parts = [build.row_or_zero(part, node) for part in node.args[0]]
    parts = [build.as_entries(p) if any(isinstance(t.index, fx.Node) for t in p.terms) else p for p in parts]
    terms = []
    for k in range(max((len(p.terms) for p in parts), default=0)):
        index = [p.terms[k].index if k < len(p.terms) else torch.full(p.shape, -1) for p in parts]
        numbers: list[Coefficient] = [p.terms[k].coefficient if k < len(p.terms) else None for p in parts]
        coefficient: Coefficient = None
        if any(c is not None for c in numbers):
            columns = [
                build.emit(aten.reshape.default, build.flat_number(Term(None, c), p), list(p.shape))
                for c, p in zip(numbers, parts, strict=True)
            ]
            coefficient = build.emit(aten.cat.default, columns, dim)
        terms.append(Term(torch.cat(index, dim), coefficient))
    return Value(tuple(node.meta["val"].shape), terms)


def _placed(build: TapeBuilder, node: Any) -> Value:
    """``slice_scatter`` and its kind: a value with a part of it replaced by another one."""
    base = build.row_or_zero(node.args[0], node)
    part = build.row_or_zero(node.args[1], node)
    shape, rest = tuple(node.meta["val"].shape), list(node.args[2:])
    if node.target is aten.slice_scatter.default and len(rest) > 2 and rest[2] is not None:
        rest[2] = min(rest[2], shape[rest[0]])  # vmap cannot add to the largest number
    hole = node.target(torch.ones(shape), torch.zeros(part.shape), *rest).bool()
    out = []
    if base.terms:
        out.append(build.move(base, lambda t: torch.where(hole, t, -1), lambda n: n))
    if part.terms:
        filled = build.constant(torch.zeros(shape, dtype=build.dtype))
        out.append(
            build.move(
                part,
                lambda t: node.target(torch.full(shape, -1), t, *rest),
                lambda n: build.emit(node.target, filled, n, *rest),
            )
        )
    return build.add(out, shape)


def _padded(build: TapeBuilder, node: Any) -> Value:
    pad = node.args[1]
    if len(node.args) > 2 and node.args[2] != 0:
        raise NotTraceable(f"its vector-Jacobian product is not linear at {describe(node)}")
    return build.move(
        build.value_of(node.args[0]),
        lambda t: aten.constant_pad_nd.default(t, pad, -1),
        lambda n: build.emit(aten.constant_pad_nd.default, n, pad),
    )


def _product_with_numbers(build: TapeBuilder, node: Any) -> Value:
    a, b = node.args[:2]
    if build.is_row(a) and build.is_row(b):
        raise NotTraceable(f"its vector-Jacobian product is not linear at {describe(node)}")
    rows, by = (a, b) if build.is_row(a) else (b, a)
    return build.scale(build.value_of(rows), build.operand_of(by), node.meta["val"].shape)


def _quotient(build: TapeBuilder, node: Any) -> Value:
    a, by = node.args[:2]
    if build.is_row(by):
        raise NotTraceable(f"its vector-Jacobian product is not linear at {describe(node)}")
    number = build.operand_of(by)
    inverse: Coefficient = 1.0 / number if isinstance(number, float) else build.emit(aten.reciprocal.default, number)
    return build.scale(build.value_of(a), inverse, node.meta["val"].shape)


def _negative(build: TapeBuilder, node: Any) -> Value:
    return build.scale(build.value_of(node.args[0]), -1.0, node.meta["val"].shape)


def _sum_of_two(build: TapeBuilder, node: Any) -> Value:
    a, b = (build.row_or_zero(argument, node) for argument in node.args[:2])
    alpha = float(node.kwargs.get("alpha", 1.0))
    sign = -1.0 if node.target is aten.sub.Tensor else 1.0
    if sign * alpha != 1.0:
        b = build.scale(b, sign * alpha, b.shape)
    return build.add([a, b], node.meta["val"].shape)


def _where(build: TapeBuilder, node: Any) -> Value:
    shape = node.meta["val"].shape
    mask = build.copy(node.args[0])
    a, b = (build.row_or_zero(argument, node) for argument in node.args[1:3])
    return build.add([build.keep(a, mask, shape), build.keep(b, mask, shape, False)], shape)


def _masked_fill(build: TapeBuilder, node: Any) -> Value:
    if not build.is_zero(node.args[2]):
        raise NotTraceable(f"its vector-Jacobian product is not linear at {describe(node)}")
    mask = build.copy(node.args[1])
    return build.keep(build.value_of(node.args[0]), mask, node.meta["val"].shape, False)


def _sum(build: TapeBuilder, node: Any) -> Value:
    """A sum over dimensions; that of products which are not computed adds terms, so that they need not be."""
    value = build.value_of(node.args[0])
    shape = tuple(node.meta["val"].shape)
    given: Any = node.args[1] if len(node.args) > 1 else None
    if given is None or given == []:
        given = range(len(value.shape))
    dims = sorted({d % len(value.shape) for d in ([given] if isinstance(given, int) else given)}) if value.shape else []
    kept = [1 if d in dims else size for d, size in enumerate(value.shape)]
    summed = math.prod(value.shape[d] for d in dims)
    if summed == 1:
        return build.move(value, lambda t: t.reshape(shape), lambda n: build.emit(aten.reshape.default, n, list(shape)))
    lazy = any(isinstance(t.index, Tensor) and bool((t.index >= LAZY).any()) for t in value.terms)
    if lazy and len(dims) == 1 and summed <= MAX_TERMS:
        return build.add([_selected(build, value, dims[0], i, shape) for i in range(summed)], shape)
    rows = math.prod(kept)
    dst = torch.arange(rows).view(kept).expand(value.shape).flatten()
    first = build.combine(value, dst, rows)
    return Value(shape, [Term(torch.arange(first, first + rows).view(shape))])


def _selected(build: TapeBuilder, value: Value, dim: int, i: int, shape: tuple[int, ...]) -> Value:
    return build.move(
        value,
        lambda t: t.select(dim, i).reshape(shape),
        lambda n: build.emit(aten.reshape.default, build.emit(aten.select.int, n, dim, i), list(shape)),
    )


def _mean(build: TapeBuilder, node: Any) -> Value:
    total = _sum(build, node)
    count = build.value_of(node.args[0]).numel / max(total.numel, 1)
    return build.scale(total, 1.0 / count, total.shape)


def _matrix_product(build: TapeBuilder, node: Any) -> Value:
    return build.matrix_product(node)


def _gathered(build: TapeBuilder, node: Any) -> Value:
    """Operations that take entries by places that depend on data."""
    value = build.as_entries(build.value_of(node.args[0]))
    places = build.constant(value.terms[0].index)
    rest = [_copied(build, argument) for argument in node.args[1:]]
    return Value(tuple(node.meta["val"].shape), [Term(build.fixed(build.emit(node.target, places, *rest)))])


def _copied(build: TapeBuilder, argument: Any) -> Any:
    """An argument in the second graph."""
    if isinstance(argument, fx.Node):
        return build.copy(argument)
    if isinstance(argument, (list, tuple)):
        return [_copied(build, a) for a in argument]
    return argument


def _scattered(build: TapeBuilder, node: Any) -> Value:
    """``scatter_add``, ``scatter.src``, ``index_put`` and ``index_add`` into zeros, or added to another value."""
    shape, target = tuple(node.meta["val"].shape), node.target
    base = build.row_or_zero(node.args[0], node)
    everywhere = build.constant(torch.arange(math.prod(shape)).view(shape))
    if target is aten.index_put.default:
        index, source = node.args[1], node.args[2]
        adds = len(node.args) > 3 and bool(node.args[3])
        dst = build.emit(aten.index.Tensor, everywhere, _copied(build, index))
    else:
        dim, index, source = node.args[1:4]
        adds = target in (aten.scatter_add.default, aten.index_add.default)
        chosen = aten.index_select.default if target is aten.index_add.default else aten.gather.default
        dst = build.emit(chosen, everywhere, dim, _copied(build, index))
    if not adds and base.terms:  # what is overwritten is gone
        if target is not aten.index_put.default:
            raise NotTraceable(f"there is no rule for {describe(node)}")
        everything = build.constant(torch.ones(shape, dtype=torch.bool))
        nothing = build.constant(torch.zeros((), dtype=torch.bool))
        left = build.emit(target, everything, _copied(build, node.args[1]), nothing)
        base = build.keep(base, left, shape)
    if node.kwargs.get("alpha", 1) != 1:
        raise NotTraceable(f"there is no rule for {describe(node)}")
    value = build.row_or_zero(source, node)
    if target is aten.index_put.default:
        places = tuple(_shape_of_index(node))
        value = build.expand(value, places)
    if not value.terms:
        return base
    rows = _rows_scattered(build, node, value, shape)
    if rows is not None and not base.terms:
        return rows
    first = build.combine(value, dst, math.prod(shape))
    placed = Value(shape, [Term(torch.arange(first, first + math.prod(shape)).view(shape))])
    return build.add([base, placed], shape) if base.terms else placed


def _rows_scattered(build: TapeBuilder, node: Any, value: Value, shape: tuple[int, ...]) -> Value | None:
    """Whole rows that are added into a larger matrix, as the gradient of an embedding is; None if it is not that."""
    if node.target is aten.index_put.default:
        index = node.args[1]
    else:
        index = [node.args[2]] if node.target is aten.index_add.default and node.args[1] == 0 else []
    if len(index) != 1 or not shape or shape[0] <= value.numel // max(math.prod(shape[1:]), 1):
        return None
    places = build.emit(aten.reshape.default, _copied(build, index[0]), [-1])
    width = math.prod(shape[1:])
    rows = build.move(value, lambda t: t.reshape(-1, width), lambda n: build.emit(aten.reshape.default, n, [-1, width]))
    placed = build.scattered_rows(rows, places, (shape[0], width))
    return build.move(placed, lambda t: t.reshape(shape), lambda n: build.emit(aten.reshape.default, n, list(shape)))


def _shape_of_index(node: Any) -> torch.Size:
    """Shape of what ``index_put`` writes."""
    base = torch.empty(node.meta["val"].shape, device="meta")
    index = [
        None if i is None else torch.empty(i.meta["val"].shape, dtype=torch.int64, device="meta") for i in node.args[1]
    ]
    return aten.index.Tensor(base, index).shape


def _overwritten(build: TapeBuilder, node: Any) -> Value:
    """``copy``: the second argument, in the shape of the first."""
    if node.args[0].meta["val"].dtype != node.args[1].meta["val"].dtype:
        raise NotTraceable(f"it changes the dtype at {describe(node)}")
    return build.expand(build.row_or_zero(node.args[1], node), node.meta["val"].shape)


def _zero(build: TapeBuilder, node: Any) -> Value:
    """Zeros, or memory that is written before it is read, in the shape of a value."""
    if node.target is aten.full_like.default and not build.is_zero(node):
        raise NotTraceable(f"its vector-Jacobian product is not linear at {describe(node)}")
    return Value(tuple(node.meta["val"].shape), [])


RULES: dict[Any, Rule] = {
    **dict.fromkeys(MOVES, _moved),
    **dict.fromkeys(SAMES, _same),
    **dict.fromkeys((aten.split_with_sizes.default, aten.split.Tensor, aten.unbind.int), _split),
    operator.getitem: _getitem,
    aten.cat.default: _cat,
    **dict.fromkeys((aten.slice_scatter.default, aten.select_scatter.default, aten.diagonal_scatter.default), _placed),
    aten.constant_pad_nd.default: _padded,
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _product_with_numbers),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _quotient),
    aten.neg.default: _negative,
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _sum_of_two),
    aten.where.self: _where,
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    **dict.fromkeys((aten.sum.dim_IntList, aten.sum.default), _sum),
    **dict.fromkeys((aten.mean.dim, aten.mean.default), _mean),
    **dict.fromkeys((aten.mm.default, aten.bmm.default), _matrix_product),
    **dict.fromkeys((aten.gather.default, aten.index_select.default, aten.index.Tensor), _gathered),
    **dict.fromkeys(
        (aten.scatter_add.default, aten.index_put.default, aten.index_add.default, aten.scatter.src), _scattered
    ),
    aten.copy.default: _overwritten,
    **dict.fromkeys((aten.zeros_like.default, aten.new_zeros.default, aten.full_like.default), _zero),
    **dict.fromkeys((aten.new_empty_strided.default, aten.empty_like.default), _zero),
}
"""For each operation what it does to a value."""


def build_tape(traced: TracedStep, parameters: Sequence[Tensor]) -> RowTape:
    """Build the tape of a traced step.

    Args:
        traced: the step.
        parameters: its parameters, for their shapes ``(...)``.

    Raises:
        NotTraceable: naming an operation that is not understood.
    """
    return TapeBuilder(traced, RULES).build([p.shape for p in parameters])
