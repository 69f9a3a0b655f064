"""Builds a row tape: values that depend on the row as sums of terms, and the instructions that they come to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from sparse_rtrl.capture.tape import Combine, Product, RowTape, Use
from sparse_rtrl.capture.trace import NotTraceable, TracedStep, describe

aten = torch.ops.aten

LAZY = 2**40
"""Entries of matrix products that were not computed are numbered from here on."""
MAX_TERMS = 8
"""Terms of a value from which on it is computed rather than carried on."""
MAX_ROWS = 2**16
"""Entries per step beyond which a tape is refused."""

Coefficient: TypeAlias = "float | fx.Node | None"
"""A number, a value of the second graph that broadcasts to the term's shape, or one."""


Rule: TypeAlias = "Callable[[TapeBuilder, Any], Value | list[Value]]"
"""What an operation does to a value: from the builder and the operation's node."""

_PERMUTATIONS = (aten.permute.default, aten.transpose.int, aten.t.default)
_RESHAPES = (
    *_PERMUTATIONS,
    *(aten.reshape.default, aten.expand.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
    aten.unsqueeze.default,
)
_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
_FULL = {aten.full.default: 1, aten.full_like.default: 1, aten.scalar_tensor.default: 0}
"""Position of the value that fills the result."""
MOVES = (
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default, aten.transpose.int),
    *(aten.t.default, aten.expand.default, aten.slice.Tensor, aten.select.int, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.squeeze.default, aten.unsqueeze.default, aten.diagonal.default, aten.flip.default, aten.repeat.default),
    aten.unfold.default,
)
SAMES = (
    *(aten.alias.default, aten.clone.default, aten.detach.default, aten._to_copy.default, aten.conj_physical.default),
)


@dataclass(eq=False)
class Term:
    """``coefficient[i] * entry[index[i]]``; entry -1 is zero. The index is of the value's shape, or a node of it."""

    index: Any
    coefficient: Coefficient = None


@dataclass(eq=False)
class Value:
    """What an operation gives, as a sum of terms of its shape.

    Attributes:
        shape: its shape.
        terms: none for zeros.
    """

    shape: tuple[int, ...]
    terms: list[Term]

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(eq=False)
class MatrixProduct:
    """A matrix product of a row value and another one whose entries are numbered, but not computed unless needed.

    ``left`` tells on which side the row value stands: ``rows (b, p, k) @ other (b, k, q)`` or
    ``other (b, p, k) @ rows (b, k, q)``; without ``b`` on both for a product of matrices. One whose ``other`` holds
    a single 1 in each column, the rest zeros, has their ``places``, ``(k,)``.
    """

    first: int
    rows: Value
    other: fx.Node
    left: bool
    shape: tuple[int, ...]
    inner: int
    places: fx.Node | None = None
    real: int | None = None

    @property
    def numel(self) -> int:
        """How many entries it has."""
        return math.prod(self.shape)

    @property
    def batches(self) -> int:
        """How many products of matrices it is, ``b``."""
        return self.shape[0] if len(self.shape) == 3 else 1


@dataclass(eq=False)
class TapeBuilder:
    """Follows a traced step from the row that comes in to the tape.

    Attributes:
        traced: the step.
        rules: for each operation what it does to a value.
    """

    traced: TracedStep
    rules: Mapping[Any, Rule]
    instructions: list[Combine | Product] = field(default_factory=list)
    rows: int = 0
    lazy: int = LAZY
    products: list[MatrixProduct] = field(default_factory=list)
    values: dict[fx.Node, Value | list[Value]] = field(default_factory=dict)
    second: fx.Graph = field(default_factory=fx.Graph)
    copied: dict[fx.Node, fx.Node] = field(default_factory=dict)
    places: list[fx.Node] = field(default_factory=list)
    numbers: list[fx.Node] = field(default_factory=list)
    known: dict[Any, int] = field(default_factory=dict)
    emitted: dict[Any, fx.Node] = field(default_factory=dict)
    computed: dict[Any, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root = torch.nn.Module()
        graph = self.traced.graph
        self.dependent: set[fx.Node] = {self.traced.row}
        for node in graph.graph.nodes:
            if node.op == "call_function" and self.dependent.intersection(node.all_input_nodes):
                self.dependent.add(node)
            elif node.op == "placeholder" and node is not self.traced.row:
                self.copied[node] = self.second.placeholder(node.name)
                self.copied[node].meta.update(node.meta)
        self.per_step_inputs = {self.copied[n] for n in (*self.traced.inputs, self.traced.state)}

    # The tape as a whole

    def build(self, shapes: list[torch.Size]) -> RowTape:
        """The tape of the step, whose parameters have these shapes.

        Raises:
            NotTraceable: naming an operation that is not understood.
        """
        size = int(self.traced.state.meta["val"].numel())
        self.rows = size
        self.values[self.traced.row] = Value((size,), [Term(torch.arange(size))])
        wanted = self._wanted()
        for node in self.traced.graph.graph.nodes:
            if node in self.dependent and node in wanted and node is not self.traced.row:
                self.values[node] = self._visit(node)
        before = self.traced.before
        last = Value((size,), []) if before is None else self.row_or_zero(before, before)
        first = self.computed_at(last)
        uses: list[Use] = []
        zs: list[fx.Node] = []
        for number, (node, shape) in enumerate(zip(self.traced.gradients, shapes, strict=True)):
            if node is not None:
                uses += self._uses(number, self.row_or_zero(node, node), shape, zs)
        if self.rows > MAX_ROWS:
            raise NotTraceable(f"it needs {self.rows} entries per step, more than {MAX_ROWS}")
        results = [*self.places, *self.numbers, *zs, self.copy(self.traced.new_state)]
        per_step = self._depends_on_step(results)
        self.second.output(tuple(results))
        self.second.eliminate_dead_code()
        for node in self.second.nodes:
            if "val" in node.meta:
                node.meta["val"] = _meta(node)  # the form stays, the numbers of the traced run go
        return RowTape(
            size,
            self.instructions,
            self.rows,
            first,
            uses,
            fx.GraphModule(self.root, self.second),
            len(self.places),
            len(self.numbers),
            per_step,
            [node is not None for node in self.traced.gradients],
        )

    def _wanted(self) -> set[fx.Node]:
        """The nodes behind what goes out, the row's and the gradients'."""
        return nodes_behind([n for n in (self.traced.before, *self.traced.gradients) if n is not None])

    def _depends_on_step(self, results: list[fx.Node]) -> list[bool]:
        found = set(self.per_step_inputs)
        for node in self.second.nodes:
            if found.intersection(node.all_input_nodes):
                found.add(node)
        return [node in found for node in results]

    # The second graph

    def copy(self, node: fx.Node) -> fx.Node:
        """A node that does not depend on the row, in the second graph."""
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [n for n in top.all_input_nodes if n not in self.copied]
            if top in self.copied:
                stack.pop()
            elif missing:
                stack += missing
            else:
                if top.op == "get_attr":
                    setattr(self.root, str(top.target), getattr(self.traced.graph, str(top.target)))
                self.copied[top] = self._copied(top)
                stack.pop()
        return self.copied[node]

    def _copied(self, node: fx.Node) -> fx.Node:
        if node.target in (aten.alias.default, aten.clone.default, aten.detach.default):
            return self.copied[node.args[0]]  # type: ignore[index]
        if node.target is aten.copy.default:  # vmap has no rule for it
            return self.emit(aten.expand.default, self.copied[node.args[1]], list(node.meta["val"].shape))  # type: ignore[index]
        copied = self.second.node_copy(node, lambda n: self.copied[n])
        if copied.target in (aten.view.default, aten._unsafe_view.default):
            copied.target = aten.reshape.default  # what stood before it may have been dropped
        return copied

    def emit(self, target: Any, *arguments: Any) -> fx.Node:
        """A node of the second graph; an equal one is used again, and what only changes shapes becomes one reshape."""
        if target in _RESHAPES and isinstance(source := arguments[0], fx.Node):
            shape = target(_meta(source), *arguments[1:]).shape
            if target in _PERMUTATIONS and _order(source, target, arguments[1:]):
                target, arguments = aten.reshape.default, (source, list(shape))
            if shape == _meta(source).shape and target not in _PERMUTATIONS:
                return source
            if target not in _PERMUTATIONS and math.prod(shape) == _meta(source).numel():
                while source.target is aten.reshape.default:
                    source = source.args[0]  # type: ignore[assignment]
                target, arguments = aten.reshape.default, (source, list(shape))
                if shape == _meta(source).shape:
                    return source
        if (
            target is aten.slice.Tensor
            and target(_meta(arguments[0]), *arguments[1:]).shape == _meta(arguments[0]).shape
        ):
            return arguments[0]
        key = (target, str(arguments))
        if key not in self.emitted:
            node = self.second.call_function(target, arguments)
            node.meta["val"] = target(*fx.map_arg(arguments, _meta))
            self.emitted[key] = node
        return self.emitted[key]

    def constant(self, tensor: Tensor) -> fx.Node:
        """A constant of the second graph, a tensor of any shape ``(...)``."""
        name = f"constant_{len(list(self.root.named_buffers()))}"
        self.root.register_buffer(name, tensor.contiguous())
        node = self.second.get_attr(name)
        node.meta["val"] = tensor
        return node

    def known_now(self, node: fx.Node) -> Tensor | None:
        """The value ``(...)`` of a node of the second graph that depends on no input; None for others."""
        stack, seen = [node], set()
        while stack:
            top = stack.pop()
            if top.op == "placeholder":
                return None
            seen.add(top)
            stack += [n for n in top.all_input_nodes if n not in seen]
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        for each in self.second.nodes:
            if each in seen:
                values[each] = graph.node_copy(each, lambda n: values[n])
        graph.output(values[node])
        return fx.GraphModule(self.root, graph)()

    def fixed(self, places: Tensor | fx.Node) -> Tensor | fx.Node:
        """Places, of any shape ``(...)``, as a tensor if they depend on no input."""
        known = None if isinstance(places, Tensor) else self.known_now(places)
        return places if known is None else known

    def _number_of(self, node: fx.Node, key: Any = None) -> int:
        """Number of a node among the coefficients and matrices; equal keys share one."""
        key = node if key is None else key
        if key not in self.known:
            self.known[key] = len(self.numbers)
            self.numbers.append(node)
        return self.known[key]

    def _place(self, index: fx.Node | Tensor) -> int:
        """Number of places; equal constant ones share one."""
        key = tuple(index.tolist()) if isinstance(index, Tensor) else index
        if key not in self.known:
            self.known[key] = len(self.places)
            node = self.constant(index.to(torch.int32)) if isinstance(index, Tensor) else self.emit(_to_int32, index)
            self.places.append(node)
        return self.known[key]

    # Values

    def value_of(self, node: fx.Node) -> Value:
        """The value of a node that depends on the row."""
        value = self.values[node]
        assert isinstance(value, Value), describe(node)
        return value

    def is_row(self, argument: Any) -> bool:
        """Whether an argument of an operation depends on the row."""
        return isinstance(argument, fx.Node) and argument in self.dependent

    def operand_of(self, argument: Any) -> Coefficient:
        """An argument that does not depend on the row, as a coefficient of the row's dtype.

        Coefficients are multiplied with each other, which integers and truth values do in ways of their own.
        """
        if not isinstance(argument, fx.Node):
            return float(argument)
        node = self.copy(argument)
        return node if argument.meta["val"].dtype == self.dtype else self.emit(_to_dtype(self.dtype), node)

    def is_zero(self, argument: Any) -> bool:
        """Whether an argument is known to be all zeros."""
        if isinstance(argument, (int, float)):
            return argument == 0
        if not isinstance(argument, fx.Node):
            return False
        target, given = argument.target, argument.args
        if argument.op == "get_attr":
            return not bool(getattr(self.traced.graph, str(target)).any())
        if target in _FULL:
            return bool(given[_FULL[target]] == 0)
        return target in _ZEROS or (target in (*MOVES, *SAMES) and self.is_zero(given[0]))

    def row_or_zero(self, argument: Any, node: fx.Node) -> Value:
        """The value of an argument that must be linear in the row."""
        if self.is_row(argument):
            return self.value_of(argument)
        if self.is_zero(argument):
            shape = tuple(argument.meta["val"].shape) if isinstance(argument, fx.Node) else ()
            return Value(shape, [])
        raise NotTraceable(f"its vector-Jacobian product is not linear at {describe(node)}")

    def _visit(self, node: fx.Node) -> Value | list[Value]:
        handler = self.rules.get(node.target)
        if handler is None:
            raise NotTraceable(f"there is no rule for {describe(node)}")
        result = handler(self, node)
        if isinstance(result, Value) and len(result.terms) > MAX_TERMS:
            result = self.as_entries(result)
        return result

    def move(self, value: Value, operation: Callable[[Tensor], Tensor], node_operation: Callable[[Any], Any]) -> Value:
        """A value whose entries are moved, dropped or repeated.

        Args:
            value: before.
            operation: the same on a tensor of places ``(...)``; entries that it adds must be -1.
            node_operation: the same on a node of the second graph; entries that it adds may be anything.
        """
        terms = []
        if any(isinstance(term.index, fx.Node) for term in value.terms):
            value = self.as_entries(value)
        for term in value.terms:
            coefficient = term.coefficient
            if isinstance(coefficient, fx.Node):
                coefficient = node_operation(self.emit(aten.expand.default, coefficient, list(value.shape)))
            terms.append(Term(operation(term.index), coefficient))
        shape = tuple(operation(torch.zeros(value.shape, dtype=torch.int64)).shape)
        return Value(shape, terms)

    def expand(self, value: Value, shape: Sequence[int]) -> Value:
        """A value broadcast to a shape."""
        if tuple(shape) == value.shape:
            return value
        terms = []
        for term in value.terms:
            if isinstance(term.index, fx.Node):
                return self.expand(self.as_entries(value), shape)
            terms.append(Term(term.index.expand(tuple(shape)), term.coefficient))
        return Value(tuple(shape), terms)

    def scale(self, value: Value, by: Coefficient, shape: Sequence[int]) -> Value:
        """A value times numbers, broadcast to a shape."""
        value = self.expand(value, shape)
        return Value(value.shape, [Term(t.index, self._times(t.coefficient, by)) for t in value.terms])

    def keep(self, value: Value, mask: fx.Node, shape: Sequence[int], where: bool = True) -> Value:
        """A value broadcast to a shape, with zeros where a mask is not ``where``; exact zeros, whatever stood there."""
        value = self.expand(value, shape)
        if (known := self.known_now(mask)) is not None:
            kept = (known.bool() == where).expand(value.shape)
            if bool(kept.all()):
                return value
            return self.move(value, lambda t: torch.where(kept, t, -1), lambda n: n)
        terms = []
        for term in value.terms:
            number = term.coefficient
            if not isinstance(number, fx.Node):
                number = self.constant(torch.tensor(1.0 if number is None else number, dtype=self.dtype))
            zero = self.constant(torch.zeros((), dtype=self.dtype))
            both = (number, zero) if where else (zero, number)
            terms.append(Term(term.index, self.emit(aten.where.self, mask, *both)))
        return Value(value.shape, terms)

    def _times(self, a: Coefficient, b: Coefficient) -> Coefficient:
        if a is None or b is None:
            return b if a is None else a
        if isinstance(a, float) and isinstance(b, float):
            return a * b
        return self.emit(aten.mul.Tensor, *((a, b) if isinstance(a, fx.Node) else (b, a)))

    def add(self, values: Sequence[Value], shape: Sequence[int]) -> Value:
        """The sum of values, broadcast to a shape; terms of equal places become one."""
        terms: list[Term] = []
        for value in values:
            for term in self.expand(value, shape).terms:
                same = next((t for t in terms if _same_places(t.index, term.index)), None)
                if same is None:
                    terms.append(Term(term.index, term.coefficient))
                else:
                    same.coefficient = self._plus(same.coefficient, term.coefficient)
        return Value(tuple(shape), terms)

    def _plus(self, a: Coefficient, b: Coefficient) -> Coefficient:
        a, b = (1.0 if c is None else c for c in (a, b))
        if isinstance(a, float) and isinstance(b, float):
            return a + b
        return self.emit(aten.add.Tensor, *((a, b) if isinstance(a, fx.Node) else (b, a)))

    # Instructions

    def _allocate(self, count: int) -> int:
        first, self.rows = self.rows, self.rows + count
        return first

    def as_entries(self, value: Value) -> Value:
        """The same value as one term of consecutive entries."""
        first = self.computed_at(value)
        return Value(value.shape, [Term(torch.arange(first, first + value.numel).view(value.shape))])

    def computed_at(self, value: Value) -> int:
        """First of consecutive entries that hold a value."""
        value = self._without_lazy(value)
        if len(value.terms) == 1 and value.terms[0].coefficient is None and isinstance(value.terms[0].index, Tensor):
            flat = value.terms[0].index.flatten()
            if len(flat) and int(flat[0]) >= 0 and torch.equal(flat, torch.arange(len(flat)) + flat[0]):
                return int(flat[0])
        key = tuple(
            (
                tuple(t.index.flatten().tolist()) if isinstance(t.index, Tensor) else t.index,
                self.flat_number(t, value) if isinstance(t.coefficient, fx.Node) else t.coefficient,
            )
            for t in value.terms
        )
        if (key, value.numel) not in self.computed:
            self.computed[key, value.numel] = self.combine(value, torch.arange(value.numel), value.numel)
        return self.computed[key, value.numel]

    def combine(self, value: Value, dst: Tensor | fx.Node, rows: int) -> int:
        """Add the entries of a value at ``dst (numel,)`` into ``rows`` new ones; returns the first."""
        value = self._without_lazy(value)
        out, terms = self._allocate(rows), value.terms
        dst = self.fixed(dst)
        if any(isinstance(t.index, fx.Node) for t in terms) or isinstance(dst, fx.Node):
            return self._combine_by_data(value, dst, out, rows)
        src = torch.stack([t.index.flatten() for t in terms], 1) if terms else torch.zeros(value.numel, 0).long()
        to = dst.reshape(-1, 1).expand_as(src).flatten()
        kept = (src.flatten() >= 0).nonzero().flatten()
        kept = kept[to[kept].argsort(stable=True)]
        coefficient = -1
        if any(t.coefficient is not None for t in terms) and len(kept):
            numbers = self._stacked(terms, value)
            if not torch.equal(kept, torch.arange(src.numel())):
                numbers = self.emit(aten.index_select.default, numbers, 0, self.constant(kept))
            coefficient = self._number_of(numbers)
        to = to[kept]
        complete = len(torch.unique(to)) == rows
        sources = self._place(src.flatten()[kept])
        self.instructions.append(Combine(out, rows, len(kept), self._place(to), sources, coefficient, complete))
        return out

    def _combine_by_data(self, value: Value, dst: Tensor | fx.Node, out: int, rows: int) -> int:
        """As :meth:`combine`, where places depend on data: entries are not sorted, and equal places add up."""
        terms = value.terms
        parts = []
        for term in terms:
            index = term.index
            if isinstance(index, Tensor):
                if bool((index < 0).any()):
                    raise NotTraceable(
                        "places that depend on data are joined with zeros in a way that is not supported"
                    )
                index = self.constant(index)
            parts.append(self.emit(aten.reshape.default, index, [-1]))
        joined = self.emit(aten.cat.default, parts) if len(parts) > 1 else parts[0]
        to = self.constant(dst) if isinstance(dst, Tensor) else self.emit(aten.reshape.default, dst, [-1])
        if len(parts) > 1:
            to = self.emit(aten.cat.default, [to] * len(parts))
        coefficient = -1
        if any(t.coefficient is not None for t in terms):
            numbers = [self.flat_number(t, value) for t in terms]
            coefficient = self._number_of(self.emit(aten.cat.default, numbers) if len(numbers) > 1 else numbers[0])
        src, dst_number = self._place(joined), self._place(to)
        entries = value.numel * len(terms)
        ordered = isinstance(dst, Tensor) and len(terms) == 1 and torch.equal(dst, torch.arange(rows))
        self.instructions.append(Combine(out, rows, entries, dst_number, src, coefficient, ordered))
        return out

    def flat_number(self, term: Term, value: Value) -> fx.Node:
        """The coefficients of a term, flat."""
        number = term.coefficient
        if not isinstance(number, fx.Node):
            filled = torch.full((value.numel,), 1.0 if number is None else number, dtype=self.dtype)
            return self.constant(filled)
        return self.emit(aten.reshape.default, self.emit(aten.expand.default, number, list(value.shape)), [-1])

    def _stacked(self, terms: list[Term], value: Value) -> fx.Node:
        numbers = [self.flat_number(term, value) for term in terms]
        if len(numbers) == 1:
            return numbers[0]
        columns = [self.emit(aten.unsqueeze.default, number, 1) for number in numbers]
        return self.emit(aten.reshape.default, self.emit(aten.cat.default, columns, 1), [-1])

    @property
    def dtype(self) -> torch.dtype:
        """In which the step computes."""
        return self.traced.row.meta["val"].dtype

    # Matrix products

    def matrix_product(self, node: fx.Node) -> Value:
        """The value of a matrix product, whose entries are not computed yet."""
        a, b = node.args[:2]
        if self.is_row(a) and self.is_row(b):
            raise NotTraceable(f"its vector-Jacobian product is not linear at {describe(node)}")
        left = self.is_row(a)
        rows, other = (a, b) if left else (b, a)
        shape = tuple(node.meta["val"].shape)
        value = self.value_of(rows)  # type: ignore[arg-type]
        if not value.terms:
            return Value(shape, [])
        return self._lazy(value, self.copy(other), left, shape)  # type: ignore[arg-type]

    def scattered_rows(self, value: Value, places: fx.Node, shape: tuple[int, ...]) -> Value:
        """Rows ``(k, m)`` added at places ``(k,)`` into zeros ``(e, m)``, as a product with ones and zeros."""
        every = self.constant(torch.arange(shape[0]).view(-1, 1))
        ones = self.emit(aten.eq.Tensor, every, self.emit(aten.reshape.default, places, [1, -1]))
        return self._lazy(value, self.emit(_to_dtype(self.dtype), ones), False, shape, places)

    def _lazy(
        self, value: Value, other: fx.Node, left: bool, shape: tuple[int, ...], places: fx.Node | None = None
    ) -> Value:
        inner = value.shape[-1] if left else value.shape[-2]
        made = MatrixProduct(self.lazy, value, other, left, shape, inner, places)
        self.lazy += made.numel
        self.products.append(made)
        return Value(shape, [Term(torch.arange(made.first, made.first + made.numel).view(shape))])

    def _product_of(self, entry: int) -> MatrixProduct:
        return next(p for p in self.products if p.first <= entry < p.first + p.numel)

    def _without_lazy(self, value: Value) -> Value:
        """A value without entries that are not computed, after computing them."""
        terms = []
        for term in value.terms:
            index = term.index
            if isinstance(index, Tensor):
                while bool((late := index >= LAZY).any()):
                    product = self._product_of(int(index[late][0]))
                    first = self._compute(product)
                    mine = (index >= product.first) & (index < product.first + product.numel)
                    index = torch.where(mine, index - product.first + first, index)
            terms.append(Term(index, term.coefficient))
        return Value(value.shape, terms)

    def _compute(self, product: MatrixProduct) -> int:
        """First entry of a matrix product, computed now if it was not before."""
        if product.real is not None:
            return product.real
        batches, (p, q) = product.batches, product.shape[-2:]
        if product.places is not None:
            inside = self.constant(torch.arange(q).view(1, -1))
            line = self.emit(aten.mul.Tensor, self.emit(aten.reshape.default, product.places, [-1, 1]), q)
            dst = self.emit(aten.add.Tensor, line, inside)
            product.real = self.combine(product.rows, dst, p * q)
            return product.real
        if product.left:
            source, matrix, positions, outer = product.rows, product.other, p, q
        else:  # the transposed product
            source = self.move(product.rows, _transposed, self._transposed_node)
            matrix, positions, outer = self._transposed_node(product.other), q, p
        first = self.computed_at(source)
        out = self._allocate(batches * positions * outer)
        matrix = self.emit(aten.reshape.default, matrix, [batches, product.inner, outer])
        number = self._number_of(matrix, ("matrix", product.other, product.left))
        self.instructions.append(Product(out, first, batches * positions, batches, product.inner, outer, number))
        if not product.left:  # put the entries into the order of the result
            value = Value(
                (*product.shape[:-2], positions, outer),
                [Term(torch.arange(out, out + product.numel).view(*product.shape[:-2], positions, outer))],
            )
            out = self.computed_at(self.move(value, _transposed, self._transposed_node))
        product.real = out
        return out

    def _transposed_node(self, node: fx.Node) -> fx.Node:
        return self.emit(aten.transpose.int, node, -2, -1)

    # Immediate Jacobians

    def _uses(self, number: int, value: Value, shape: torch.Size, zs: list[fx.Node]) -> list[Use]:
        """The gradient of a parameter as factors where it is a matrix product, else entry by entry."""
        numel = shape.numel()
        plain: list[Term] = []
        out: list[Use] = []
        for term in value.terms:
            index = term.index
            if not isinstance(index, Tensor) or not bool((index >= LAZY).any()):
                plain.append(term)
                continue
            flat = index.flatten()
            factors: list[Use] | None = []
            rest = flat.clone()
            for product in self.products:
                mine = (flat >= product.first) & (flat < product.first + product.numel)
                if factors is None or not bool(mine.any()):
                    continue
                found = self._factors(number, product, flat, mine, term.coefficient, zs)
                factors = None if found is None else factors + found
                rest[mine] = -1
            if factors is None:
                plain.append(term)
                continue
            out += factors
            if bool((rest >= 0).any()):
                plain.append(Term(rest.view(index.shape), term.coefficient))
        if plain:
            first = self.computed_at(Value(value.shape, plain))
            out.append(Use(number, first, 1, numel, 1, -1, 0, 1, 0))
        return out

    def _factors(
        self,
        number: int,
        product: MatrixProduct,
        flat: Tensor,
        mine: Tensor,
        coefficient: Coefficient,
        zs: list[fx.Node],
    ) -> list[Use] | None:
        """A part of a parameter's gradient that is a matrix product, as factors; None if it is not worth it."""
        batches, (p, q) = product.batches, product.shape[-2:]
        tau, m, j = (product.inner, p, q) if product.left else (product.inner, q, p)
        if tau * m >= p * q or isinstance(coefficient, fx.Node):
            return None
        places = torch.full((product.numel,), -1)
        places[flat[mine] - product.first] = mine.nonzero().flatten()
        if int(mine.sum()) != product.numel or bool((places < 0).any()):
            return None
        places = places.view(batches, p, q) if product.left else places.view(batches, p, q).transpose(1, 2)
        grouped: dict[tuple[int, int, int], list[int]] = {}
        for b in range(batches):  # (m, j)
            here = places[b]
            first = int(here[0, 0])
            m_stride = int(here[1, 0]) - first if m > 1 else 1
            j_stride = int(here[0, 1]) - first if j > 1 else 1
            expected = first + torch.arange(m).view(-1, 1) * m_stride + torch.arange(j) * j_stride
            if not torch.equal(here, expected):
                return None
            grouped.setdefault((first, m_stride, j_stride), []).append(b)
        rows = product.rows
        if product.left:
            rows = self.move(rows, _transposed, self._transposed_node)
        first = self.computed_at(self.scale(rows, coefficient, rows.shape))  # (b, τ, m)
        z = product.other if product.left else self._transposed_node(product.other)
        z = self.emit(aten.reshape.default, z, [batches, tau, j])
        out = []
        for (offset, m_stride, j_stride), members in grouped.items():
            if members != list(range(members[0], members[0] + len(members))):
                return None
            part = self.emit(aten.slice.Tensor, z, 0, members[0], members[0] + len(members))
            zs.append(self.emit(aten.reshape.default, part, [len(members) * tau, j]))
            row = first + members[0] * tau * m
            out.append(Use(number, row, len(members) * tau, m, j, len(zs) - 1, offset, m_stride, j_stride))
        return out


def nodes_behind(nodes: list[fx.Node]) -> set[fx.Node]:
    """Some nodes and all that they are made of."""
    stack, found = list(nodes), set()
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _meta(node: fx.Node) -> Any:
    """What a node holds, without numbers."""
    value = node.meta["val"]
    if isinstance(value, (list, tuple)):
        return [torch.empty(v.shape, dtype=v.dtype, device="meta") for v in value]
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _order(node: fx.Node, target: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether a permutation keeps the order of the entries: it moves dimensions of size one only."""
    shape = _meta(node).shape
    dims = target(torch.empty([*range(2, 2 + len(shape))], device="meta"), *arguments).shape
    moved = [d - 2 for d in dims if shape[d - 2] != 1]
    return moved == sorted(moved)


def _to_int32(index: Tensor) -> Tensor:
    return index.to(torch.int32)


def _to_dtype(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return _TO[dtype]


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32)


def _to_float64(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64)


_TO = {torch.float32: _to_float32, torch.float64: _to_float64}


def _same_places(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-2, -1)
