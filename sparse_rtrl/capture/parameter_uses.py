"""Where the parameters of a segment enter its autograd graph, and how their immediate Jacobians factor there.

A parameter is followed from the node that accumulates its gradient through views (transposes, slices, splits, casts)
to the operations that use it. A known operation gives a :class:`Use`: the node whose output ``y`` is to be
differentiated, and what turns ``delta = dh/dy`` and the node's saved input into the factors ``delta`` and ``z``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

GraphNode: TypeAlias = Any
"""A node of the autograd graph."""

StreamOrder: TypeAlias = Literal["outer", "inner"]
"""How the rows of a map are ordered: stream by stream (``"outer"``) or step by step (``"inner"``)."""
STREAM_ORDERS: tuple[StreamOrder, ...] = get_args(StreamOrder)


@dataclass(frozen=True)
class Factor:
    """An immediate Jacobian of some columns of one parameter, factored as in ``Term``.

    Attributes:
        column: first of its columns within the parameter.
        delta: ``(B, rows, τ, m)``.
        z: ``(B, τ, j)``, or None for ``z = 1``, ``τ = j = 1``.
    """

    column: int
    delta: Tensor
    z: Tensor | None


@dataclass(frozen=True)
class Use:
    """One known map of a parameter.

    Attributes:
        parameter: index of the parameter.
        node: the node of the map; its first output is differentiated.
        build: from ``delta (rows, *output shape)`` and an order to the factor; None if the order does not fit the
            shapes.
    """

    parameter: int
    node: GraphNode
    build: Callable[[Tensor, StreamOrder], Factor | None]


@dataclass(frozen=True)
class SegmentGraph:
    """The part of the autograd graph that a segment made.

    Attributes:
        accumulators: node that accumulates each parameter's gradient, by parameter identity, as (parameter, node).
        consumers: uses of a node's outputs, as (node that uses it, input number there, output number).
        nodes: all nodes, in the order they were met.
        names: their names.
    """

    accumulators: dict[int, tuple[nn.Parameter, GraphNode]]
    consumers: dict[GraphNode, list[tuple[GraphNode, int, int]]]
    nodes: list[GraphNode]
    names: list[str]

    @property
    def compiled(self) -> bool:
        """Whether ``torch.compile`` made a part of it, which hides the maps inside."""
        return "CompiledFunctionBackward" in self.names

    def has(self, beginnings: tuple[str, ...]) -> bool:
        """Whether the name of a node begins with one of these."""
        return any(name.startswith(beginnings) for name in self.names)

    def floating_dtypes(self) -> set[torch.dtype]:
        """Floating-point dtypes of the nodes' outputs; the real ones of complex numbers."""
        dtypes = {data.dtype for node in self.nodes for data in getattr(node, "_input_metadata", ())}
        return {d.to_real() if d.is_complex else d for d in dtypes if d.is_floating_point or d.is_complex}


def walk(end: Tensor, entry: GraphNode | None) -> SegmentGraph:
    """Walk the graph from ``end (B, H)`` back to the node ``entry``, which is not passed; with None to its leaves.

    Returns:
        The leaves that were met, and who uses what.
    """
    graph = SegmentGraph({}, {}, [], [])
    stack = [] if end.grad_fn is None else [end.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is entry:
            continue
        graph.nodes.append(node)
        graph.names.append(node.name())
        variable = getattr(node, "variable", None)
        if variable is not None:
            graph.accumulators[id(variable)] = (variable, node)
        for position, (source, output) in enumerate(node.next_functions):
            if source is None:
                continue
            graph.consumers.setdefault(source, []).append((node, position, output))
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return graph


@contextmanager
def without_hooks(parameters: list[Tensor]) -> Iterator[None]:
    """Switch off the gradient hooks of parameters of any shape: they are for whole gradients, not for rows."""
    hooked = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for hooks, _ in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, saved in hooked:
            hooks.update(saved)


@contextmanager
def without_reducers(graph: SegmentGraph) -> Iterator[None]:
    """Keep ``DistributedDataParallel(static_graph=True)`` from reducing gradients in a backward pass of ours.

    Its first backward pass is to queue the reduction, and the node that does so cannot tell ours from the user's.
    """
    wrappers = [node.ddp_weakref() for node, name in zip(graph.nodes, graph.names, strict=True) if "DDPSink" in name]
    waiting = [w for w in wrappers if w is not None and w.static_graph and not w._static_graph_delay_allreduce_enqueued]
    for wrapper in waiting:
        wrapper._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        for wrapper in waiting:
            wrapper._static_graph_delay_allreduce_enqueued = False


def uses_of(
    number: int, parameter: Tensor, accumulator: GraphNode, graph: SegmentGraph, batch: int
) -> list[Use] | None:
    """Known uses of a parameter; None if there is one that is not known.

    Args:
        number: index of the parameter.
        parameter: the parameter, any shape.
        accumulator: the node that accumulates its gradient.
        graph: from :func:`walk`.
        batch: streams ``B``.
    """
    whole = parameter.detach() if parameter.is_contiguous() else torch.empty(parameter.shape, device="meta")
    uses: list[Use] = []
    pending: list[tuple[GraphNode, Callable[[int], Tensor | None]]] = [(accumulator, lambda _: whole)]
    while pending:
        source, view_of = pending.pop()
        for node, position, output in graph.consumers.get(source, []):
            view = view_of(output)
            if view is None:
                return None
            name = node.name()
            if name in _VIEWS:
                pending.append((node, _through(node, name, view)))
                continue
            use = _use(_Operand(number, view, whole), node, name, position, batch)
            if use is None:
                return None
            uses.append(use)
    return uses


def _through(node: GraphNode, name: str, view: Tensor) -> Callable[[int], Tensor | None]:
    """What a view's outputs show of a parameter, by output number; None where it is no view after all."""

    def view_of(output: int) -> Tensor | None:
        try:
            return _VIEWS[name](view, node, output)
        except RuntimeError:  # a reshape that had to copy
            return None

    return view_of


def _signed(dim: int) -> int:
    """A dimension or index that autograd saved as an unsigned number."""
    return dim - 2**64 if dim >= 2**63 else dim


_VIEWS: dict[str, Callable[[Tensor, GraphNode, int], Tensor]] = {
    "TBackward0": lambda p, node, _: p.t(),
    "TransposeBackward0": lambda p, node, _: p.transpose(_signed(node._saved_dim0), _signed(node._saved_dim1)),
    "PermuteBackward0": lambda p, node, _: p.permute([_signed(d) for d in node._saved_dims]),
    "ViewBackward0": lambda p, node, _: p.view(node._input_metadata[0].shape),
    "UnsafeViewBackward0": lambda p, node, _: p.view(node._input_metadata[0].shape),
    "ReshapeAliasBackward0": lambda p, node, _: p.view(node._input_metadata[0].shape),
    "UnsqueezeBackward0": lambda p, node, _: p.unsqueeze(_signed(node._saved_dim)),
    "SqueezeBackward1": lambda p, node, _: p.squeeze(_signed(node._saved_dim)),
    "SplitBackward0": lambda p, node, k: p.split(node._saved_split_size, _signed(node._saved_dim))[k],
    "SplitWithSizesBackward0": lambda p, node, k: p.split(node._saved_split_sizes, _signed(node._saved_dim))[k],
    "UnbindBackward0": lambda p, node, k: p.unbind(_signed(node._saved_dim))[k],
    "SelectBackward0": lambda p, node, _: p.select(_signed(node._saved_dim), _signed(node._saved_index)),
    "ToCopyBackward0": lambda p, node, _: p,
}
"""Nodes that pass a parameter on, element for element, and the same view of the parameter itself."""


@dataclass(frozen=True)
class _Operand:
    """A parameter as an operation sees it.

    Attributes:
        parameter: index of the parameter.
        view: what the operation sees: a view of ``whole``, whose strides and offset say which columns.
        whole: the parameter, contiguous.
    """

    parameter: int
    view: Tensor
    whole: Tensor

    @property
    def column(self) -> int:
        """Column of the view's first element within the parameter."""
        return int(self.view.storage_offset()) - int(self.whole.storage_offset())


def _use(operand: _Operand, node: GraphNode, name: str, position: int, batch: int) -> Use | None:
    """The use of a parameter as one input of an operation, if it is a known one."""
    product = _product_use(operand, node, name, position, batch)
    if product is not None:
        return product
    if name == "ConvolutionBackward0" and position != 2:
        return _convolution(operand, node, batch)
    if name == "EmbeddingBackward0" and not node._saved_scale_grad_by_freq:
        return _embedding(operand, node, batch)
    factor = _factor(node, name, position)
    if factor is None:
        return None
    channels = name in ("NativeGroupNormBackward0", "NativeBatchNormBackward0", "ConvolutionBackward0")
    return (_channelwise if channels else _elementwise)(operand, node, factor, batch)


def _factor(node: GraphNode, name: str, position: int) -> Tensor | float | None:
    """What an operation multiplies its input by, element by element; None for one that is not known."""
    if name == "AddmmBackward0" and position == 0:
        return float(node._saved_beta)
    if name in ("AddBackward0", "SubBackward0"):
        sign = -1.0 if name == "SubBackward0" else 1.0
        return 1.0 if position == 0 else sign * float(node._saved_alpha)
    if name == "MulBackward0":
        other: Tensor = node._saved_other if position == 0 else node._saved_self
        return other.detach()
    return _normalised(node, name, position)


def _normalised(node: GraphNode, name: str, position: int) -> Tensor | float | None:
    """The normalised input for the scale of a norm, 1 for a bias; None for another operation."""
    if name == "NativeLayerNormBackward0":
        if position != 1:
            return 1.0
        x_hat: Tensor = (node._saved_input.detach() - node._saved_result1) * node._saved_result2
        return x_hat
    if name == "NativeGroupNormBackward0":
        return 1.0 if position == 2 else _group_normalised(node)
    if name == "NativeBatchNormBackward0" and not node._saved_training:
        return 1.0 if position == 2 else _batch_normalised(node)
    return 1.0 if name == "ConvolutionBackward0" else None


def _rows(delta: Tensor, batch: int, order: StreamOrder) -> Tensor | None:
    """``delta (n, R, m)`` with ``R = B * q`` rows to ``(B, n, q, m)``; None if ``R`` is not a multiple of ``B``."""
    count, rows, m = delta.shape
    if rows % batch:
        return None
    if order == "outer":
        return delta.reshape(count, batch, rows // batch, m).transpose(0, 1)
    return delta.reshape(count, rows // batch, batch, m).permute(2, 0, 1, 3)


def _entries(z: Tensor, batch: int, order: StreamOrder) -> Tensor:
    """``z (R, j)`` with ``R = B * q`` rows to ``(B, q, j)``."""
    if order == "outer":
        return z.reshape(batch, -1, z.shape[-1])
    return z.reshape(-1, batch, z.shape[-1]).transpose(0, 1)


def _dense(operand: _Operand, values: Tensor) -> Factor | None:
    """The factor of dense values ``(B, n, *view shape)``, put where the view stands in its parameter."""
    view, size = operand.view, operand.whole.numel()
    if view.is_contiguous():
        return Factor(operand.column, values.reshape(*values.shape[:2], 1, view.numel()), None)
    if 0 in view.stride():  # an expanded view: several elements are one
        return None
    dense = values.new_zeros(*values.shape[:2], size)
    strides = (*dense.stride()[:2], *view.stride())
    dense.as_strided((*values.shape[:2], *view.shape), strides, operand.column).copy_(values)
    return Factor(0, dense.unsqueeze(2), None)


def _product_use(operand: _Operand, node: GraphNode, name: str, position: int, batch: int) -> Use | None:
    """A product of two matrices, one of them the parameter: ``y = scale * z W``, or ``W z`` if it is on the left."""
    if name == "MmBackward0":
        operands, scale = ("_saved_self", "_saved_mat2"), 1.0
    elif name == "AddmmBackward0" and position > 0:
        operands, scale, position = ("_saved_mat1", "_saved_mat2"), float(node._saved_alpha), position - 1
    else:
        return None
    other, on_the_left = getattr(node, operands[1 - position]), position == 0
    # Rows of the product are applications: W z = (z^T W^T)^T. The view is then (inputs, outputs).
    z, view = (other.T, operand.view.T) if on_the_left else (other, operand.view)
    (ins, _), (stride_in, stride_out) = view.shape, view.stride()

    def build(delta: Tensor, order: StreamOrder) -> Factor | None:
        d = _rows(delta.transpose(1, 2) if on_the_left else delta, batch, order)
        if d is None:
            return None
        inputs = _entries(z.detach(), batch, order).to(d.dtype) * scale
        before = operand.column % max(stride_out, 1)
        if stride_in == 1 and before + ins <= stride_out:  # rows of the parameter are outputs, as in Factor
            if ins < stride_out:
                inputs = nn.functional.pad(inputs, (before, stride_out - before - ins))
            return Factor(operand.column - before, d, inputs)
        return _dense(_Operand(operand.parameter, view, operand.whole), torch.einsum("btj,bntm->bnjm", inputs, d))

    return Use(operand.parameter, node, build)


def _elementwise(operand: _Operand, node: GraphNode, factor: Tensor | float, batch: int) -> Use:
    """``y = ... + factor * p`` with ``p`` broadcast to ``y``: the immediate Jacobian is ``factor * delta``, summed."""
    shape = operand.view.shape

    def build(delta: Tensor, order: StreamOrder) -> Factor | None:
        value = delta * factor
        own = value.dim() - 1 - len(shape)  # leading dimensions that p lacks
        if own < 1:
            return None
        rows = _rows(value.reshape(value.shape[0], value.shape[1 : 1 + own].numel(), -1), batch, order)
        if rows is None:
            return None
        summed = rows.sum(2).unflatten(-1, value.shape[1 + own :]) if len(shape) else rows.sum((2, 3))
        for dim, size in enumerate(shape):  # dimensions that p broadcasts
            if size == 1 and summed.shape[2 + dim] != 1:
                summed = summed.sum(2 + dim, keepdim=True)
        return _dense(operand, summed)

    return Use(operand.parameter, node, build)


def _group_normalised(node: GraphNode) -> Tensor:
    """The normalised input ``(N, C, *)`` of a group norm."""
    x = node._saved_input.detach()
    groups = x.reshape(x.shape[0], node._saved_group, -1)
    return ((groups - node._saved_result1.unsqueeze(-1)) * node._saved_result2.unsqueeze(-1)).view_as(x)


def _batch_normalised(node: GraphNode) -> Tensor:
    """The normalised input ``(N, C, *)`` of a batch norm in evaluation."""
    x = node._saved_input.detach()
    shape = (-1, *[1] * (x.dim() - 2))
    scale = (node._saved_running_var + node._saved_eps).rsqrt()
    return (x - node._saved_running_mean.view(shape)) * scale.view(shape)


def _channelwise(operand: _Operand, node: GraphNode, factor: Tensor | float, batch: int) -> Use:
    """One number per channel of ``y (N, C, *)``: the immediate Jacobian is ``factor * delta``, summed over the rest."""

    def build(delta: Tensor, order: StreamOrder) -> Factor | None:
        value = (delta * factor).flatten(3).sum(3) if delta.dim() > 3 else delta * factor
        rows = _rows(value, batch, order)
        return None if rows is None else _dense(operand, rows.sum(2))

    return Use(operand.parameter, node, build)


def _convolution(operand: _Operand, node: GraphNode, batch: int) -> Use | None:
    """A convolution over one or two dimensions: a linear map of patches, applied at every position."""
    weight = operand.view
    if node._saved_groups != 1 or node._saved_transposed or weight.dim() > 4 or not weight.is_contiguous():
        return None
    options = {
        name: (0 if name == "padding" else 1, *values) if len(values) == 1 else values
        for name, values in (
            ("dilation", node._saved_dilation),
            ("padding", node._saved_padding),
            ("stride", node._saved_stride),
        )
    }
    kernel = (1, *weight.shape[2:]) if weight.dim() == 3 else weight.shape[2:]

    def build(delta: Tensor, order: StreamOrder) -> Factor | None:
        d = _rows(delta.flatten(2), batch, order)  # (B, n, q, outputs * positions)
        if d is None:
            return None
        x = node._saved_input.detach().to(delta.dtype)
        patches = nn.functional.unfold(x.unsqueeze(2) if x.dim() == 3 else x, kernel, **options)  # (N, C K, positions)
        inputs = _entries(patches.flatten(1), batch, order).unflatten(-1, patches.shape[1:])
        d = d.unflatten(-1, (delta.shape[2], -1)).transpose(-1, -2)
        return Factor(operand.column, d.flatten(2, 3), inputs.transpose(-1, -2).flatten(1, 2))

    return Use(operand.parameter, node, build)


def _embedding(operand: _Operand, node: GraphNode, batch: int) -> Use:
    index, padding = node._saved_indices, _signed(node._saved_padding_idx)

    def build(delta: Tensor, order: StreamOrder) -> Factor | None:
        d = _rows(delta.reshape(delta.shape[0], -1, operand.view.shape[-1]), batch, order)
        if d is None:
            return None
        rows = _entries(index.reshape(-1, 1), batch, order)  # (B, q, 1)
        if padding >= 0:
            d = d * (rows != padding).unsqueeze(1)
        dense = d.new_zeros(batch, d.shape[1], *operand.view.shape)
        dense.scatter_add_(2, rows.unsqueeze(1).expand_as(d), d)
        return _dense(operand, dense)

    return Use(operand.parameter, node, build)
