"""Evaluates what a row tape needs of the steps that were taken, for all steps and streams of a window at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparse_rtrl.capture.tape import RowTape
from sparse_rtrl.capture.trace import record_operations

aten = torch.ops.aten

MAX_SIZES = 8
"""Numbers of steps for which a flat program is kept."""
SHAKEN_BY = 16
"""By how many times the rounding of a number it is changed to see which decisions hang on rounding."""
_STEPS = (
    *(aten.sign.default, aten.sgn.default, aten.floor.default, aten.ceil.default, aten.round.default),
    *(aten.round.decimals, aten.trunc.default, aten.heaviside.default, aten.floor_divide.default),
    *(aten.div.Tensor_mode, aten.div.Scalar_mode),
)
"""Operations with floating-point results that jump."""


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
        decisions = _decisions(graph, len(tape.reaches))
        per_step = [results[i] for i in range(count) if tape.per_step[i]]
        self._shared = _part(graph, [results[i] for i in range(count) if not tape.per_step[i]])
        self._per_step = _part(graph, per_step + decisions)
        self._decisions = _part(graph, decisions) if decisions else None
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
            if self._decisions is not None:
                self._check_decided(found[self._count :], arguments, len(parameters))
        return found[: self._count]

    def _check_decided(self, decided: list[Tensor], arguments: list[Tensor], parameters: int) -> None:
        """Refuse steps in which a decision is another one if numbers change by a little more than their rounding.

        Steps are evaluated many at once, which rounds in other ways than what ran: a decision between equal quantities
        may then fall differently. Everything is changed up and down by turns, so that a difference of two quantities
        that is as small as rounding gets both signs. Whole numbers in inputs and states are left: they are added and
        compared without rounding, and decisions on them (flags, counters, words) are meant.
        """
        self._calls += 1
        generator = torch.Generator(device="cpu").manual_seed(self._calls)
        assert self._decisions is not None
        signs = [_signs(a, generator) for a in arguments]
        for way in (1.0, -1.0):
            shaken = [_shaken(a, s, way, i < parameters) for i, (a, s) in enumerate(zip(arguments, signs, strict=True))]
            if not all(map(torch.equal, decided, self._evaluate(self._decisions, shaken, parameters))):
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


def _signs(tensor: Tensor, generator: torch.Generator) -> Tensor | None:
    """A random 1 or -1 for each number, in its shape ``(...)``; None for what is not of floating point."""
    if not tensor.is_floating_point():
        return None
    bits = torch.randint(0, 2, tensor.shape, device="cpu", generator=generator, dtype=torch.int8)
    return bits.mul_(2).sub_(1).to(tensor)


def _shaken(tensor: Tensor, signs: Tensor | None, way: float, all_of_it: bool) -> Tensor:
    """Every number changed a little, up or down; whole numbers only if that is wanted; all ``(...)``."""
    if signs is None:
        return tensor
    changed = torch.addcmul(tensor, tensor, signs, value=way * SHAKEN_BY * torch.finfo(tensor.dtype).eps)
    return changed if all_of_it else torch.where(tensor == tensor.round(), tensor, changed)


def _decisions(graph: fx.GraphModule, parameters: int) -> list[fx.Node]:
    """The nodes whose values jump while what they are made of moves on, if that depends on the step.

    What is made of parameters alone is computed as the module does it.
    """
    found: list[fx.Node] = []
    per_step: set[fx.Node] = set()
    for number, node in enumerate(n for n in graph.graph.nodes if n.op == "placeholder"):
        if number >= parameters:
            per_step.add(node)
    for node in graph.graph.nodes:
        if node.op != "call_function" or not per_step.intersection(node.all_input_nodes):
            continue
        per_step.add(node)
        jumps = node.target in _STEPS or (_is_whole(node) and not all(_is_whole(n) for n in node.all_input_nodes))
        if jumps and isinstance(node.meta["val"], Tensor):
            found.append(node)
    return found


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
