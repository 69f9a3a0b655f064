"""Capture of segments of one-layer cells by reading the autograd graph, without a backward pass.

The graph is read from the new state backwards. Element-wise operations, splits, and linear maps ``x W^T + b`` whose
input is the state or needs no gradient are understood; so every entry of a tensor reaches one state entry of its step
per component (``step_chain``). Where all paths meet in tensors of the state's size that a linear map
reads, the step before begins. Steps that ran the same code are computed together. Any other graph is left to
:mod:`sparse_rtrl.capture.graph_capture`.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sparse_rtrl.capture.parameter_uses import without_hooks
from sparse_rtrl.capture.parameters import ParameterGroups
from sparse_rtrl.capture.step_chain import (
    AlikeSteps,
    Diagonal,
    Linear,
    OneRowTerm,
    Rows,
    StepChain,
    pull_back,
    rows_count,
)
from sparse_rtrl.capture.verify import PROBE_SCALE
from sparse_rtrl.cells.slot_cell import Routing

GraphNode: TypeAlias = Any
"""A node of the autograd graph."""

Edge: TypeAlias = tuple[GraphNode, Any]
"""An output of a node; of the entry, a range of its columns ``(first, width)``."""

Operation: TypeAlias = tuple[str, tuple[int | None, ...], tuple[Hashable, ...], Hashable]
"""Name, values whose gradients come in, values and parameters whose gradients go out, attributes."""

_SAME = ("AliasBackward0", "CloneBackward0", "ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0")
_SPLITS = ("UnsafeSplitBackward0", "SplitBackward0", "SplitWithSizesBackward0")
_POINTWISE = ("TanhBackward0", "SigmoidBackward0", "ReluBackward0", "NegBackward0", "RsubBackward1")
_BINARY = ("AddBackward0", "SubBackward0", "MulBackward0")
_LAST_DIM = (1, 2**64 - 1)  # dimension -1, as autograd saves it


class NotAChain(Exception):
    """The graph holds something that is left to the general capture."""


class _Step:
    """One step as it was read: operations that are equal for steps that ran the same code, and their nodes."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.nodes: list[GraphNode] = []
        self.values: dict[Edge, int] = {}
        self.start: tuple[tuple[int, int, int], ...] = ()
        self.frontier: tuple[tuple[int, int, int], ...] = ()

    def value(self, edge: Edge) -> int:
        """Number of a value within the step."""
        return self.values.setdefault(edge, len(self.values))

    @property
    def signature(self) -> Hashable:
        return tuple(self.operations), self.start, self.frontier


class ChainCapture:
    """Captures segments as :class:`~sparse_rtrl.capture.step_chain.StepChain`, where that is possible.

    A segment of a new kind is compared with an ordinary backward pass, and so is one in which hooks were registered:
    the graph does not show them. A kind that disagreed once is left to the general capture from then on.

    Args:
        groups: the carried parameters, in the core group.
    """

    def __init__(self, groups: ParameterGroups) -> None:
        self.groups = groups
        self._accepted: dict[Hashable, bool] = {}
        self._hooks = 0
        """How many hooks the process had registered when the last segment was captured."""
        self._weights: dict[int, Tensor] = {}

    def segment(self, end: Tensor, entry: Tensor, parameters: list[Tensor], routing: Routing) -> StepChain | None:
        """Capture one segment; the graph is left as it is.

        Args:
            end: state that left the segment, ``(B, H)``, with its graph.
            entry: state that entered it, ``(B, H)``.
            parameters: what is carried, in the order of ``groups.core``.
            routing: one slot for the whole state.

        Returns:
            The steps, or None if the general capture has to do it.

        Raises:
            RuntimeError: from autograd, if the graph was freed or a tensor in it changed.
        """
        numbers = {id(p): n for n, p in enumerate(parameters)}
        try:
            steps = _Reader(end, entry, numbers).steps()
            signatures = tuple(step.signature for step in steps)
            kind = tuple(dict.fromkeys(signatures))
            if not self._accepted.get(kind, True):
                return None
            parts = []
            first = 0
            while first < len(steps):
                last = first
                while last < len(steps) and signatures[last] == signatures[first]:
                    last += 1
                parts.append(self._evaluate(steps[first:last], end))
                first = last
        except NotAChain:
            return None
        if not all(part.terms for part in parts):  # a step of the segment uses no parameter
            return None
        chain = StepChain(tuple(parts), end.shape[0], end.shape[1], routing, self.groups.core)
        hooks, self._hooks = self._hooks, RemovableHandle.next_id
        if kind not in self._accepted or hooks != self._hooks:
            agrees, certain = self._agrees(chain, end, entry, parameters)
            if certain or not agrees:
                self._accepted[kind] = agrees
            return chain if agrees else None
        return chain

    def _agrees(self, chain: StepChain, end: Tensor, entry: Tensor, parameters: list[Tensor]) -> tuple[bool, bool]:
        """Whether a random row vector pulled back through a chain agrees with autograd, and whether that shows much.

        It does not where a gradient is zero, as that of a weight that multiplies a state of zeros.
        """
        generator = torch.Generator(device="cpu").manual_seed(0)
        c = torch.randn(end.shape, device="cpu", generator=generator, dtype=torch.float64).to(end)
        inputs = [entry, *parameters]
        wanted = [i for i in inputs if i.requires_grad]
        # Larger than gradients are, so that a hook that clips them shows; a power of two scales exactly.
        with without_hooks(parameters):
            seen = torch.autograd.grad(end, wanted, PROBE_SCALE * c, retain_graph=True, allow_unused=True)
        by_input = {id(i): g for i, g in zip(wanted, seen, strict=True)}
        core, _ = self.groups.zero_gradients(c)
        v = pull_back([chain], c, core)
        found = [v, *self.groups.split(core, core.new_zeros(0, 0))]
        pairs = [(mine, by_input[id(i)]) for mine, i in zip(found, inputs, strict=True) if id(i) in by_input]
        errors = torch.stack([(mine if its is None else mine - its / PROBE_SCALE).abs().amax() for mine, its in pairs])
        sizes = torch.stack([mine.abs().amax() for mine, _ in pairs])
        tolerance = 50 * torch.finfo(end.dtype).eps ** 0.75
        # What is not finite is not judged here; the caller refuses the segment.
        agrees = not bool((errors > tolerance * torch.maximum(sizes, 1e-2 * sizes.amax())).any())
        return agrees, bool((sizes > 0).all() & torch.isfinite(errors).all())

    def _evaluate(self, steps: list[_Step], end: Tensor) -> AlikeSteps:
        """Diagonals, maps and terms of alike steps, all at once."""
        count, batch = len(steps), end.shape[0]
        step = steps[0]
        columns = {value: column for value, column, _ in step.frontier}
        found: dict[int, dict[Rows, Tensor]] = {}
        for value, column, width in step.start:
            found[value] = {((column, width),): end.new_ones(count * batch, width)}
        linears: list[Linear] = []
        terms: list[OneRowTerm] = []

        views: dict[int, tuple[Tensor, Tensor]] = {}

        def steps_of(x: Tensor) -> Tensor:
            """``(n * B, k)`` as ``(n, B, k)``; the same view for the same tensor, which terms may share."""
            return views.setdefault(id(x), (x, x.view(count, batch, -1)))[1]

        def send(target: Hashable, rows: Rows, d: Tensor) -> None:
            if target is None:
                return
            if isinstance(target, tuple):
                number = target[1]
                terms.append(OneRowTerm(number, self.groups.core[number].start, rows, steps_of(d), None))
                return
            assert isinstance(target, int)
            components = found.setdefault(target, {})
            components[rows] = components[rows] + d if rows in components else d

        for place, (name, sources, targets, attributes) in enumerate(step.operations):
            nodes = [each.nodes[place] for each in steps]
            if name in _SPLITS:
                widths: Any = attributes
                parts = [{} if s is None else found.pop(s, {}) for s in sources]
                for rows, d in _joined(parts, widths, end.new_zeros(count * batch, 1)):
                    send(targets[0], rows, d)
                continue
            assert sources[0] is not None
            incoming = found.pop(sources[0], {})
            factors = _factors(name, nodes, batch, attributes)
            if name in ("AddmmBackward0", "MmBackward0"):
                bias, x, weight = targets
                z = _stacked([node._saved_mat1 if name == "AddmmBackward0" else node._saved_self for node in nodes])
                for rows, d in incoming.items():
                    send(bias, rows, d)
                    if isinstance(weight, tuple):
                        number = weight[1]
                        offset = self.groups.core[number].start
                        terms.append(OneRowTerm(number, offset, rows, steps_of(d), steps_of(z)))
                    if x is not None:
                        assert isinstance(x, int)
                        linears.append(Linear(rows, steps_of(d), self._weight(nodes[0], weight), columns[x]))
                continue
            for rows, d in incoming.items():
                for target, factor in zip(targets, factors, strict=True):
                    if target is not None:
                        send(target, rows, d if factor is None else d * factor)
        diagonals = [
            Diagonal(rows, steps_of(d), column)
            for value, column, _ in step.frontier
            for rows, d in found.pop(value, {}).items()
        ]
        return AlikeSteps(count, tuple(linears), tuple(diagonals), tuple(terms))

    def _weight(self, node: GraphNode, weight: Hashable) -> Tensor:
        """A copy of a map's weight ``(M, K)``, one for as long as its values do not change."""
        if not isinstance(weight, tuple):
            return node._saved_mat2.detach().T.clone(memory_format=torch.contiguous_format)
        now = node._saved_mat2.detach().T
        kept = self._weights.get(weight[1])
        if kept is None or not torch.equal(kept, now):
            kept = self._weights[weight[1]] = now.clone(memory_format=torch.contiguous_format)
        return kept


class _Reader:
    """Reads the graph of a segment step by step, newest first."""

    def __init__(self, end: Tensor, entry: Tensor, numbers: dict[int, int]) -> None:
        self.end = end
        self.batch, self.hidden = end.shape
        self.entry = entry.grad_fn
        self.numbers = numbers

    def steps(self) -> list[_Step]:
        """The steps of the segment, oldest first."""
        node: GraphNode = self.end.grad_fn
        if node is None:
            raise NotAChain
        if node.name() == "CatBackward0" and node._saved_dim in _LAST_DIM:
            edges = [self._resolved(edge) for edge in node.next_functions]
        else:
            edges = [self._resolved((node, 0))]
        out = []
        while any(edge is None or edge[0] is not self.entry for edge in edges):
            step, edges = self._step(edges)
            out.append(step)
        if not out:
            raise NotAChain
        return out[::-1]

    def _resolved(self, edge: Any) -> Edge | None:
        """An edge past operations that change nothing, and past slices of the entry; None where no gradient goes."""
        node, index = edge
        slices: list[tuple[int, int]] = []
        while node is not None:
            if node is self.entry:
                return self.entry, slices[0] if slices else (0, self.hidden)
            name = node.name()
            if name == "PermuteBackward0" and tuple(node._saved_dims) == tuple(range(len(node._saved_dims))):
                pass
            elif name in _SAME:
                sizes = getattr(node, "_saved_self_sym_sizes", None)
                if sizes is not None and tuple(sizes) != tuple(node._input_metadata[0].shape):
                    return node, index
            elif name == "SliceBackward0" and node._saved_dim in _LAST_DIM and node._saved_step == 1:
                below = self._resolved(node.next_functions[0])
                if below is None or below[0] is not self.entry or slices:
                    return node, index
                slices.append((int(node._saved_start), int(node._input_metadata[0].shape[1])))
            else:
                return node, index
            node, index = node.next_functions[0]
        return None

    def _width(self, edge: Edge) -> int:
        if edge[0] is self.entry:
            return edge[1][1]
        metadata = edge[0]._input_metadata[edge[1]]
        shape = tuple(metadata.shape)
        if len(shape) != 2 or shape[0] != self.batch or metadata.dtype != self.end.dtype:
            raise NotAChain
        return shape[1]

    def _step(self, edges: list[Edge | None]) -> tuple[_Step, list[Edge | None]]:
        """Read one step whose results are ``edges``; returns what it read from the step before."""
        step = _Step()
        column, start = 0, []
        pending: dict[GraphNode, dict[Any, Edge]] = {}
        heap: list[tuple[int, int, GraphNode]] = []
        read_by_map: set[Edge] = set()

        def push(edge: Edge) -> int:
            node = edge[0]
            if node not in pending:
                pending[node] = {}
                if node is not self.entry:
                    heapq.heappush(heap, (-node._sequence_nr(), id(node), node))
            pending[node][edge[1]] = edge
            return step.value(edge)

        for edge in edges:
            if edge is None:  # a part of the state that does not depend on anything trainable
                raise NotAChain
            width = self._width(edge)
            start.append((push(edge), column, width))
            column += width
        step.start = tuple(start)
        while True:
            waiting = [edge for outputs in pending.values() for edge in outputs.values()]
            if not waiting:
                raise NotAChain
            at_entry = all(edge[0] is self.entry for edge in waiting)
            if at_entry or (read_by_map and sum(map(self._width, waiting)) == self.hidden):
                break
            if not heap:
                raise NotAChain
            node = heapq.heappop(heap)[2]
            outputs = pending.pop(node)
            if any(edge in read_by_map for edge in outputs.values()):
                raise NotAChain
            step.operations.append(self._operation(node, outputs, step, push, read_by_map))
            step.nodes.append(node)
        if at_entry:
            frontier = sorted(waiting, key=lambda edge: edge[1])
            step.frontier = tuple((step.value(edge), *edge[1]) for edge in frontier)
            return step, list(frontier)
        # The newest first, as in the step before this one.
        frontier = sorted(waiting, key=lambda edge: (-edge[0]._sequence_nr(), edge[1]))
        column, found = 0, []
        for edge in frontier:
            width = self._width(edge)
            found.append((step.value(edge), column, width))
            column += width
        step.frontier = tuple(found)
        return step, list(frontier)

    def _operation(
        self, node: GraphNode, outputs: dict[Any, Edge], step: _Step, push: Any, read_by_map: set[Edge]
    ) -> Operation:
        name = node.name()
        width = self._width(next(iter(outputs.values())))

        def below(position: int, of: int | None = width) -> Hashable:
            """Value or parameter that a gradient goes to; element-wise operations demand equal widths."""
            source, index = node.next_functions[position]
            if source is None:
                return None
            variable = getattr(source, "variable", None)
            if variable is not None:
                if of is not None and tuple(variable.shape) != (of,):
                    raise NotAChain
                number = self.numbers.get(id(variable))
                return None if number is None else ("parameter", number)
            edge = self._resolved((source, index))
            if edge is None:
                return None
            if of is not None and self._width(edge) != of:
                raise NotAChain
            if edge[0]._sequence_nr() >= node._sequence_nr():
                raise NotAChain
            return push(edge)

        if name in _SPLITS:
            total = self._width_of_input(node)
            if node._saved_dim not in _LAST_DIM:
                raise NotAChain
            if name == "SplitWithSizesBackward0":
                widths = tuple(int(n) for n in node._saved_split_sizes)
            else:
                size = int(node._saved_split_size)
                widths = tuple(min(size, total - first) for first in range(0, total, size))
            sources = tuple(step.value(outputs[i]) if i in outputs else None for i in range(len(widths)))
            return name, sources, (below(0, total),), widths
        if 0 not in outputs:
            raise NotAChain
        sources = (step.value(outputs[0]),)
        if name in _POINTWISE:
            alpha = float(node._saved_alpha) if name == "RsubBackward1" else None
            return name, sources, (below(0),), alpha
        if name in _BINARY:
            alpha = None if name == "MulBackward0" else float(node._saved_alpha)
            return name, sources, (below(0), below(1)), alpha
        if name == "AddmmBackward0":
            if float(node._saved_alpha) != 1.0 or float(node._saved_beta) != 1.0:
                raise NotAChain
            bias, x, weight = below(0), self._state_of(node, 1), self._weight(node, 2)
        elif name == "MmBackward0":
            bias, x, weight = None, self._state_of(node, 0), self._weight(node, 1)
        else:
            raise NotAChain
        value = None
        if x is not None:
            value = push(x)
            read_by_map.add(x)
        constant = None if isinstance(weight, tuple) or x is None else node._saved_mat2.data_ptr()
        return name, sources, (bias, value, weight), constant

    def _width_of_input(self, node: GraphNode) -> int:
        sizes = tuple(node._saved_self_sym_sizes)
        if len(sizes) != 2 or sizes[0] != self.batch:
            raise NotAChain
        return int(sizes[1])

    def _state_of(self, node: GraphNode, position: int) -> Edge | None:
        """The tensor that a map reads; None if no gradient goes there."""
        source, index = node.next_functions[position]
        if source is None:
            return None
        if getattr(source, "variable", None) is not None:
            raise NotAChain
        edge = self._resolved((source, index))
        if edge is not None:
            self._width(edge)
        return edge

    def _weight(self, node: GraphNode, position: int) -> Hashable:
        """The parameter behind a transposed weight; None if it is not carried."""
        source = node.next_functions[position][0]
        if source is None:
            return None
        if source.name() != "TBackward0":
            raise NotAChain
        variable = getattr(source.next_functions[0][0], "variable", None)
        if variable is None:
            raise NotAChain
        number = self.numbers.get(id(variable))
        return None if number is None else ("parameter", number)


def _factors(name: str, nodes: list[GraphNode], batch: int, attributes: Hashable) -> list[Any]:
    """What an element-wise operation multiplies a gradient with, per operand; None for one."""
    if name in ("TanhBackward0", "SigmoidBackward0", "ReluBackward0"):
        result = _stacked([node._saved_result for node in nodes])
        if name == "TanhBackward0":
            return [1.0 - result * result]
        return [(result > 0).to(result.dtype) if name == "ReluBackward0" else result * (1.0 - result)]
    if name == "NegBackward0":
        return [-1.0]
    if name == "RsubBackward1":
        return [-attributes]  # type: ignore[operator]
    if name in ("AddBackward0", "SubBackward0"):
        sign = -1.0 if name == "SubBackward0" else 1.0
        alpha = sign * attributes  # type: ignore[operator]
        return [None, None if alpha == 1.0 else alpha]
    if name == "MulBackward0":
        return [_operand(nodes, "_saved_other", 0, batch), _operand(nodes, "_saved_self", 1, batch)]
    return []


def _operand(nodes: list[GraphNode], saved: str, position: int, batch: int) -> Any:
    """The other operand of a product, if this operand needs a gradient."""
    if nodes[0].next_functions[position][0] is None:
        return None
    values = [getattr(node, saved) for node in nodes]
    if not isinstance(values[0], Tensor):
        if any(value != values[0] for value in values):
            raise NotAChain
        return values[0]
    if values[0].dim() > 2:
        raise NotAChain
    width = values[0].shape[-1] if values[0].dim() else 1
    return _stacked([value.detach().expand(batch, width) for value in values])


def _stacked(values: list[Any]) -> Tensor:
    """Tensors ``(B, k)`` of alike steps as ``(n * B, k)``."""
    if any(not isinstance(value, Tensor) for value in values):
        return torch.empty(0)
    return values[0].detach().clone() if len(values) == 1 else torch.cat([value.detach() for value in values])


def _joined(parts: list[dict[Rows, Tensor]], widths: tuple[int, ...], zero: Tensor) -> list[tuple[Rows, Tensor]]:
    """Gradient of a split tensor from those of its parts: the components that reach equal rows, side by side."""
    keys = list(dict.fromkeys(rows for part in parts for rows in part))
    out = []
    for key in keys:
        width = rows_count(key)
        pieces = []
        for part, own in zip(parts, widths, strict=True):
            if own != width:
                raise NotAChain
            pieces.append(part[key] if key in part else zero.expand(-1, own))
        out.append((key * len(parts), torch.cat(pieces, dim=1)))
    return out
