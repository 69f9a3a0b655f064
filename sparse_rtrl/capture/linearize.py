"""Evaluates what a row tape needs of the steps that were taken, for all steps and streams of a window at once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparse_rtrl.capture.tape import RowTape
from sparse_rtrl.capture.tape_builder import MOVES, SAMES, nodes_behind
from sparse_rtrl.capture.trace import record_operations

aten = torch.ops.aten

MAX_SIZES = 8
"""Numbers of steps for which a flat program is kept."""
SHAKEN_BY = 32
"""By how many times the rounding of a number it is changed, at most, to see which decisions hang on rounding."""
_JUMPS = (
    *(aten.sign.default, aten.sgn.default, aten.floor.default, aten.ceil.default, aten.round.default),
    *(aten.round.decimals, aten.trunc.default, aten.heaviside.default, aten.floor_divide.default),
    *(aten.div.Tensor_mode, aten.div.Scalar_mode),
)
"""Operations with floating-point results that jump."""
_SAME_ALWAYS = frozenset(
    (
        *MOVES,
        *SAMES,
        *_JUMPS,
        *(operator.getitem, aten.cat.default, aten.stack.default, aten.gather.default, aten.index.Tensor),
        *(aten.index_select.default, aten.embedding.default, aten.split.Tensor, aten.split_with_sizes.default),
        *(aten.unbind.int, aten.constant_pad_nd.default, aten.slice_scatter.default, aten.select_scatter.default),
        *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.neg.default),
        *(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.remainder.Scalar),
        *(aten.remainder.Tensor, aten.abs.default, aten.relu.default, aten.clamp.default, aten.where.self),
        *(aten.maximum.default, aten.minimum.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    )
)
"""Operations that give the same bits from the same bits, one entry at a time or many at once."""


class Linearizer:
    """Evaluates the second graph of a tape.

    The graph is for one stream; ``vmap`` makes it one for many. From the second use of a number of steps on the
    operations that ``vmap`` calls are kept as a flat program, which costs a fraction of its overhead.

    Args:
        tape: the tape.
    """

    def __init__(self, tape: RowTape) -> None:
        self.tape = tape
        graph = tape.second
        count = len(tape.per_step)
        results = list(next(node for node in graph.graph.nodes if node.op == "output").args[0])  # type: ignore[arg-type]
        uncertain = _rounded(graph, len(tape.reaches))
        decisions = [node for node in graph.graph.nodes if node in uncertain and _jumps(node)]
        per_step = [results[i] for i in range(count) if tape.per_step[i]]
        self._shared = _part(graph, [results[i] for i in range(count) if not tape.per_step[i]])
        self._per_step = _part(graph, per_step + decisions)
        self._shaken, self._noise = _shaken(graph, decisions, uncertain, len(tape.reaches))
        self._count = len(per_step)
        self._flat: dict[Any, Any] = {}
        self._calls = 0

    def shared(self, parameters: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """What is the same in every step: copies, since parameters change in place.

        Args:
            parameters: their values ``(...)``.
            inputs: of any steps, ``(k, ...)`` each, for their shapes only.

        Returns:
            The outputs of the second graph that do not depend on the step, in order, without a first dimension for
            steps, ``(...)``.
        """
        with torch.no_grad():
            state = (
                inputs[0].new_zeros(self.tape.state_size) if inputs else parameters[0].new_zeros(self.tape.state_size)
            )
            found = self._shared(*parameters, *(i[0] for i in inputs), state)
            return [value.clone(memory_format=torch.contiguous_format) for value in found]

    def __call__(self, parameters: Sequence[Tensor], inputs: Sequence[Tensor], states: Tensor) -> list[Tensor]:
        """Evaluate what differs between steps, for all steps at once.

        Args:
            parameters: their values when the steps ran, ``(...)``.
            inputs: ``(steps * B, ...)`` each, in the shape of one stream.
            states: state before each step, ``(steps * B, H)``.

        Returns:
            The outputs of the second graph that depend on the step, in order, ``(steps * B, ...)``.

        Raises:
            Undecided: if a decision in them, such as the sign that ReLU looks at, hangs on rounding.
        """
        arguments = [*parameters, *inputs, states]
        with torch.no_grad():
            found = list(self._evaluate(self._per_step, arguments, len(parameters)))
            if self._shaken is not None:
                self._check_decided(found[self._count :], arguments, len(parameters))
        return found[: self._count]

    def _check_decided(self, decided: list[Tensor], arguments: list[Tensor], parameters: int) -> None:
        """Refuse steps in which a decision is another one if numbers change by a little more than their rounding.

        Steps are evaluated many at once, which rounds in other ways than what ran: a decision between equal quantities
        may then fall differently. What may round differently is changed up and down by turns, so that a difference of
        two quantities that is as small as rounding gets both signs.
        """
        assert self._shaken is not None
        self._calls += 1
        generator = torch.Generator(device="cpu").manual_seed(self._calls)
        like, count = arguments[-1], len(arguments[-1])
        for sign in (1.0, -1.0):
            size = sign * SHAKEN_BY * torch.finfo(like.dtype).eps
            if sign > 0:
                noise = [
                    torch.rand(count, *shape, generator=generator, dtype=like.dtype, device="cpu")
                    .mul_(2)
                    .sub_(1)
                    .mul_(size)
                    for shape in self._noise
                ]
            else:
                noise = [n.neg_() for n in noise]
            if not all(map(torch.equal, decided, self._evaluate(self._shaken, [*arguments, *noise], parameters))):
                raise Undecided

    def _evaluate(self, program: fx.GraphModule, arguments: list[Tensor], parameters: int) -> Any:
        key = (program is self._per_step, *((a.shape, a.dtype, a.device) for a in arguments))
        flat = self._flat.get(key)
        if flat is None:
            batched = torch.vmap(program, in_dims=tuple([None] * parameters + [0] * (len(arguments) - parameters)))
            if key in self._flat and len([f for f in self._flat.values() if f]) < 2 * MAX_SIZES:
                flat = self._flat[key] = record_operations(batched, arguments)
            else:
                self._flat[key] = None
                return batched(*arguments)
        return flat(*arguments)


def _rounded(graph: fx.GraphModule, parameters: int) -> set[fx.Node]:
    """The nodes that may have other last bits than what ran: those behind a sum, a matrix product, an exponential.

    What is made of parameters alone is computed as the module does it.
    """
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    per_step = set(places[parameters:])
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op != "call_function" or not per_step.intersection(node.all_input_nodes):
            continue
        per_step.add(node)
        if not _keeps_bits(node) or found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def _keeps_bits(node: fx.Node) -> bool:
    """Whether a node has the same bits whenever what it is made of has."""
    same = bool(node.target in _SAME_ALWAYS and node.kwargs.get("alpha", 1) == 1)
    return same or _jumps(node) or all(_is_whole(n) for n in node.all_input_nodes)


def _jumps(node: fx.Node) -> bool:
    """Whether a node's values jump while what they are made of moves on."""
    if node.op != "call_function" or not isinstance(node.meta["val"], Tensor):
        return False
    return node.target in _JUMPS or (_is_whole(node) and not all(_is_whole(n) for n in node.all_input_nodes))


def _shaken(
    graph: fx.GraphModule, decisions: list[fx.Node], uncertain: set[fx.Node], parameters: int
) -> tuple[fx.GraphModule | None, list[torch.Size]]:
    """The graph of decisions in which everything that may round differently is changed by noise.

    Returns:
        The graph, with one more argument for each place where there is noise; and the shapes of these.
    """
    if not decisions:
        return None, []
    copied, values, noise = fx.Graph(), {}, []
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    per_step = set(places[parameters:])
    wanted = nodes_behind(decisions)

    def shake(node: fx.Node, value: fx.Node) -> fx.Node:
        if not isinstance(node.meta["val"], Tensor) or _is_whole(node):
            return value
        noise.append(node.meta["val"].shape)
        return copied.call_function(aten.addcmul.default, (value, value, arguments[len(noise) - 1]))

    for node in places:
        values[node] = copied.node_copy(node)
    # As many as there may be; those that are not used go.
    arguments = [copied.placeholder(f"noise_{i}") for i in range(4 * len(wanted))]
    for node in graph.graph.nodes:
        if node in values or node not in wanted:
            continue
        inputs = node.all_input_nodes
        if per_step.intersection(inputs):
            per_step.add(node)
        source = node in uncertain and not _keeps_bits(node)
        operands = {n: shake(n, values[n]) if source and n in per_step else values[n] for n in inputs}
        value = copied.node_copy(node, operands.__getitem__)
        values[node] = shake(node, value) if source else value
    copied.output(tuple(values[node] for node in decisions))
    for node in arguments[len(noise) :]:
        copied.erase_node(node)
    return fx.GraphModule(graph, copied), noise


def _is_whole(node: fx.Node) -> bool:
    """Whether a node gives integers or truth values only."""
    value = node.meta["val"]
    parts = value if isinstance(value, (list, tuple)) else [value]
    return not any(isinstance(t, Tensor) and t.is_floating_point() for t in parts)


def _part(graph: fx.GraphModule, outputs: list[fx.Node]) -> fx.GraphModule:
    """The graph with other outputs, among its nodes."""
    copied = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    copied.graph_copy(graph.graph, values)
    copied.output(tuple(values[node] for node in outputs))
    copied.eliminate_dead_code()
    return fx.GraphModule(graph, copied)


class Undecided(Exception):
    """Steps in which a decision hangs on rounding."""
