"""Capture of a segment's Jacobians from the autograd graph that the user's own code left behind.

The graph between the state that entered the segment and the state that left it is walked once. Where a parameter enters
a known map, the backward pass is asked for the gradient ``delta`` at the output of that node, for all state entries at
once (a batched backward pass, one row per entry of the new state, all streams together), and the node's saved input is
``z``: that is the immediate Jacobian, factored. A parameter that enters the graph in any other way, or whose factors
disagree with an ordinary backward pass, takes the dense path: one backward row per stream and state entry.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from sparse_rtrl.jacobian import Factors, Term

GraphNode: TypeAlias = Any
"""A node of the autograd graph."""

Layout: TypeAlias = str
"""Where the streams are in the rows of a map: ``"outer"`` (stream by stream) or ``"inner"`` (step by step)."""


@dataclass(frozen=True)
class _Use:
    """One known map of a parameter.

    Attributes:
        parameter: index of the parameter.
        node: the node of the map; its first output is differentiated.
        build: from ``delta (H, *output shape)`` and a layout to ``(delta (B, H, τ, m), z (B, τ, j) or None)``, or None
            if the layout does not fit the shapes.
    """

    parameter: int
    node: GraphNode
    build: Callable[[Tensor, Layout], tuple[Tensor, Tensor | None] | None]


@dataclass(frozen=True)
class SegmentGraph:
    """The part of the autograd graph that a segment made.

    Attributes:
        accumulators: node that accumulates each parameter's gradient, by parameter identity, as (parameter, node).
        consumers: nodes that use a node's output, with the input number there.
    """

    accumulators: dict[int, tuple[nn.Parameter, GraphNode]]
    consumers: dict[GraphNode, list[tuple[GraphNode, int]]]


def walk(end: Tensor, entry: GraphNode) -> SegmentGraph:
    """Walk the graph from ``end`` back to the node ``entry``, which is not passed.

    Returns:
        The leaves that were met, and who uses what.
    """
    graph = SegmentGraph({}, {})
    stack = [] if end.grad_fn is None else [end.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is entry:
            continue
        variable = getattr(node, "variable", None)
        if variable is not None:
            graph.accumulators[id(variable)] = (variable, node)
        for position, (source, _) in enumerate(node.next_functions):
            if source is None:
                continue
            graph.consumers.setdefault(source, []).append((node, position))
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return graph


def _rows(delta: Tensor, batch: int, layout: Layout) -> Tensor | None:
    """``delta (H, R, m)`` with ``R = B * q`` rows to ``(B, H, q, m)``; None if the rows are not a multiple of ``B``."""
    count, rows, m = delta.shape
    if rows % batch:
        return None
    if layout == "outer":
        return delta.reshape(count, batch, rows // batch, m).transpose(0, 1)
    return delta.reshape(count, rows // batch, batch, m).permute(2, 0, 1, 3)


def _entries(z: Tensor, batch: int, layout: Layout) -> Tensor:
    """``z (R, j)`` with ``R = B * q`` rows to ``(B, q, j)``."""
    if layout == "outer":
        return z.reshape(batch, -1, z.shape[-1])
    return z.reshape(-1, batch, z.shape[-1]).transpose(0, 1)


def _matrix_product(
    parameter: int, node: GraphNode, z: Tensor, batch: int, scale: float, on_the_left: bool, transposed: bool
) -> _Use:
    """``y = scale * z W`` or, ``on_the_left``, ``y = scale * W z``; ``transposed`` where ``W^T`` stands for ``W``."""

    def build(delta: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None] | None:
        # Rows of the product are applications: W z = (z^T W^T)^T.
        d = _rows(delta.transpose(1, 2) if on_the_left else delta, batch, layout)
        if d is None:
            return None
        inputs = _entries((z.T if on_the_left else z).detach(), batch, layout) * scale
        if on_the_left != transposed:  # the parameter is (m, j), as the factors are
            return d, inputs
        dense = torch.einsum("btj,bhtm->bhjm", inputs, d)
        return dense.flatten(2).unsqueeze(2), None

    return _Use(parameter, node, build)


def _elementwise(parameter: int, node: GraphNode, shape: torch.Size, factor: Tensor | float, batch: int) -> _Use:
    """``y = ... + factor * p`` with ``p`` broadcast to ``y``: the immediate Jacobian is ``factor * delta``, summed."""

    def build(delta: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None] | None:
        value = delta * factor
        own = value.dim() - 1 - len(shape)  # leading dimensions that p lacks
        if own < 1:
            return None
        rows = _rows(value.reshape(value.shape[0], value.shape[1 : 1 + own].numel(), -1), batch, layout)
        if rows is None:
            return None
        summed = rows.sum(2).unflatten(-1, value.shape[1 + own :]) if len(shape) else rows.sum((2, 3))
        for dim, size in enumerate(shape):  # dimensions that p broadcasts
            if size == 1 and summed.shape[2 + dim] != 1:
                summed = summed.sum(2 + dim, keepdim=True)
        return summed.reshape(batch, value.shape[0], 1, shape.numel()), None

    return _Use(parameter, node, build)


def _embedding(parameter: int, node: GraphNode, shape: torch.Size, batch: int) -> _Use:
    index = node._saved_indices

    def build(delta: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None] | None:
        d = _rows(delta.reshape(delta.shape[0], -1, shape[-1]), batch, layout)
        if d is None:
            return None
        rows = _entries(index.reshape(-1, 1), batch, layout)  # (B, q, 1)
        dense = d.new_zeros(batch, d.shape[1], *shape)
        dense.scatter_add_(2, rows.unsqueeze(1).expand_as(d), d)
        return dense.flatten(2).unsqueeze(2), None

    return _Use(parameter, node, build)


def _uses_of(
    number: int, parameter: Tensor, accumulator: GraphNode, graph: SegmentGraph, batch: int
) -> list[_Use] | None:
    """Known uses of a parameter; None if there is one that is not known."""
    uses: list[_Use] = []
    for node, position in graph.consumers.get(accumulator, []):
        name = node.name()
        if name == "TBackward0" or (name == "PermuteBackward0" and tuple(node._saved_dims) == (1, 0)):
            for product, place in graph.consumers.get(node, []):
                use = _product_use(number, product, place, batch, transposed=True)
                if use is None:
                    return None
                uses.append(use)
            continue
        use = _product_use(number, node, position, batch, transposed=False)
        if use is None and name == "AddmmBackward0" and position == 0:
            use = _elementwise(number, node, parameter.shape, float(node._saved_beta), batch)
        elif use is None and name in ("AddBackward0", "SubBackward0"):
            sign = -1.0 if name == "SubBackward0" else 1.0
            factor = 1.0 if position == 0 else sign * float(node._saved_alpha)
            use = _elementwise(number, node, parameter.shape, factor, batch)
        elif use is None and name == "MulBackward0":
            other = node._saved_other if position == 0 else node._saved_self
            use = _elementwise(number, node, parameter.shape, other.detach(), batch)
        elif use is None and name == "NativeLayerNormBackward0":
            x_hat: Tensor | float = 1.0
            if position == 1:
                x_hat = (node._saved_input.detach() - node._saved_result1) * node._saved_result2
            use = _elementwise(number, node, parameter.shape, x_hat, batch)
        elif use is None and name == "EmbeddingBackward0":
            use = _embedding(number, node, parameter.shape, batch)
        if use is None:
            return None
        uses.append(use)
    return uses


def _product_use(number: int, node: GraphNode, position: int, batch: int, transposed: bool) -> _Use | None:
    """A product of two matrices, one of them the parameter or its transpose; None for anything else."""
    if node.name() == "MmBackward0":
        operands, scale = ("_saved_self", "_saved_mat2"), 1.0
    elif node.name() == "AddmmBackward0" and position > 0:
        operands, scale, position = ("_saved_mat1", "_saved_mat2"), float(node._saved_alpha), position - 1
    else:
        return None
    other = getattr(node, operands[1 - position])
    return _matrix_product(number, node, other, batch, scale, on_the_left=position == 0, transposed=transposed)


class GraphCapture:
    """Captures segments of any differentiable code.

    Args:
        names: names of the parameters that are carried, for messages.
        offsets: their first columns in the influence matrix.
    """

    def __init__(self, names: list[str], offsets: list[int]) -> None:
        self.names = names
        self.offsets = offsets
        self._layouts: dict[Any, dict[int, Layout | None]] = {}
        self._noted: set[str] = set()

    def segment(
        self, end: Tensor, entry: Tensor, parameters: list[Tensor], graph: SegmentGraph
    ) -> tuple[Tensor, Factors]:
        """Capture one segment; the graph is kept for the backward pass of the user's loss.

        Args:
            end: state that left the segment, ``(B, H)``, with its graph.
            entry: state that entered it, ``(B, H)``.
            parameters: what is carried, in the order of ``names``.
            graph: from :func:`walk`.

        Returns:
            State Jacobian ``(B, H, H)`` and the immediate Jacobians.
        """
        batch, hidden = end.shape
        uses: list[_Use] = []
        dense: list[int] = []
        for number, parameter in enumerate(parameters):
            if id(parameter) not in graph.accumulators:
                continue
            found = _uses_of(number, parameter, graph.accumulators[id(parameter)][1], graph, batch)
            if found is None:
                dense.append(number)
            else:
                uses += found
        deltas = self._backward_rows(end, entry, uses)
        J = end.new_zeros(hidden, batch, hidden) if deltas[0] is None else deltas[0]
        shapes = [None if d is None else tuple(d.shape) for d in deltas[1:]]
        signature = tuple((use.parameter, shape) for use, shape in zip(uses, shapes, strict=True))
        layouts = self._layouts.get(signature)
        if layouts is None:
            layouts, unambiguous = self._verified_layouts(end, parameters, uses, deltas[1:])
            if unambiguous:
                self._layouts[signature] = layouts
        dense += [number for number, layout in layouts.items() if layout is None]
        self._note_dense(dense)
        pieces: list[tuple[int, Tensor, Tensor | None]] = []
        for use, delta in zip(uses, deltas[1:], strict=True):
            layout = layouts.get(use.parameter)
            if delta is not None and layout is not None:
                built = use.build(delta, layout)
                assert built is not None
                pieces.append((use.parameter, *built))
        pieces += self._dense_pieces(end, parameters, dense)
        return J.transpose(0, 1), self._join(pieces, batch, hidden, end)

    def _note_dense(self, numbers: list[int]) -> None:
        new = [self.names[number] for number in numbers if self.names[number] not in self._noted]
        self._noted.update(new)
        if new:
            warnings.warn(
                f"{', '.join(new)}: used in a way whose immediate Jacobian is not captured as factors; the dense one is"
                " computed instead (exact, slower)",
                stacklevel=2,
            )

    def _backward_rows(self, end: Tensor, entry: Tensor, uses: list[_Use]) -> list[Tensor | None]:
        """``d end[:, i] / d (entry, outputs of the uses)``, ``(H, *shape)`` each."""
        batch, hidden = end.shape
        inputs = [entry, *(GradientEdge(use.node, 0) for use in uses)]
        eye = torch.eye(hidden, dtype=end.dtype, device=end.device).unsqueeze(1).expand(-1, batch, -1)
        return _batched_grad(end, inputs, eye)

    def _verified_layouts(
        self, end: Tensor, parameters: list[Tensor], uses: list[_Use], deltas: list[Tensor | None]
    ) -> tuple[dict[int, Layout | None], bool]:
        """For each parameter the layout whose factors agree with an ordinary backward pass; None if there is none.

        Also whether another segment may rely on it: not where two different layouts agree, or nothing is seen because
        the gradient is zero, as that of a weight which multiplies a state of zeros.
        """
        batch, hidden = end.shape
        numbers = sorted({use.parameter for use in uses})
        if not numbers:
            return {}, True
        generator = torch.Generator(device="cpu").manual_seed(0)
        c = torch.randn(batch, hidden, generator=generator, dtype=torch.float64).to(end)
        truth = torch.autograd.grad(end, [parameters[n] for n in numbers], c, retain_graph=True, allow_unused=True)
        if not all(bool(torch.isfinite(g).all()) for g in truth if g is not None):
            return dict.fromkeys(numbers, "outer"), False  # nothing to compare with; the caller refuses the segment
        scale = max((float(g.abs().max()) for g in truth if g is not None), default=0.0)
        tolerance = 50 * torch.finfo(end.dtype).eps ** 0.75
        out: dict[int, Layout | None] = {}
        unambiguous = True
        for number, expected in zip(numbers, truth, strict=True):
            agreeing: list[Layout] = []
            mine = [(use, d) for use, d in zip(uses, deltas, strict=True) if use.parameter == number and d is not None]
            for layout in ("outer", "inner"):
                built = [use.build(d, layout) for use, d in mine]
                if any(b is None for b in built):
                    continue
                total = end.new_zeros(parameters[number].numel())
                for delta, z in (b for b in built if b is not None):
                    pulled = torch.einsum("bh,bhtm->btm", c, delta)
                    total += (pulled.sum((0, 1)) if z is None else torch.einsum("btm,btj->mj", pulled, z)).flatten()
                g = end.new_zeros(parameters[number].numel()) if expected is None else expected.flatten()
                own = max(float(g.abs().max()), 1e-2 * scale)
                if float((total - g).abs().max()) <= tolerance * own:
                    agreeing.append(layout)
            out[number] = agreeing[0] if agreeing else None
            one_row_each = all(d.dim() == 2 or d.shape[1] == batch for _, d in mine)
            seen = expected is not None and bool(expected.any())
            unambiguous &= seen and (len(agreeing) <= 1 or batch == 1 or one_row_each)
        return out, unambiguous

    def _dense_pieces(
        self, end: Tensor, parameters: list[Tensor], numbers: list[int]
    ) -> list[tuple[int, Tensor, Tensor | None]]:
        """Dense immediate Jacobians by one backward row per stream and state entry."""
        if not numbers:
            return []
        batch, hidden = end.shape
        eye = torch.eye(batch * hidden, dtype=end.dtype, device=end.device).view(-1, batch, hidden)
        grads = _batched_grad(end, [parameters[number] for number in numbers], eye)
        return [
            (number, grad.reshape(batch, hidden, 1, -1), None)
            for number, grad in zip(numbers, grads, strict=True)
            if grad is not None
        ]

    def _join(self, pieces: list[tuple[int, Tensor, Tensor | None]], batch: int, hidden: int, like: Tensor) -> Factors:
        terms, start = [], 0
        for number, delta, z in pieces:
            tau, m = delta.shape[-2:]
            terms.append(Term(self.offsets[number], start, tau, m, None if z is None else z.contiguous()))
            start += tau * m
        if not terms:
            return Factors(like.new_zeros(batch, hidden, 0), ())
        return Factors(torch.cat([delta.flatten(-2) for _, delta, _ in pieces], dim=-1), tuple(terms))


def _batched_grad(end: Tensor, inputs: list[Any], cotangents: Tensor) -> list[Tensor | None]:
    """Gradients for a batch of cotangents ``(n, *end.shape)``, stacked; row by row where torch cannot batch them."""
    try:
        return list(
            torch.autograd.grad(end, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True)
        )
    except RuntimeError as error:
        if "second time" in str(error) or "modified by an inplace operation" in str(error):
            raise
        rows = [torch.autograd.grad(end, inputs, c, retain_graph=True, allow_unused=True) for c in cotangents]
        return [
            None if all(g is None for g in column) else torch.stack([g for g in column if g is not None])
            for column in zip(*rows, strict=True)
        ]
