"""Evaluates what a row tape needs of the steps that were taken, for all steps and streams of a window at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparse_rtrl.capture.tape import RowTape
from sparse_rtrl.capture.trace import record_operations

MAX_SIZES = 8
"""Numbers of steps for which a flat program is kept."""


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
        self._shared = _part(graph, [i for i in range(count) if not tape.per_step[i]])
        self._per_step = _part(graph, [i for i in range(count) if tape.per_step[i]])
        self._flat: dict[Any, Any] = {}

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
        """
        with torch.no_grad():
            return list(self._evaluate([*parameters, *inputs, states], len(parameters)))

    def _evaluate(self, arguments: list[Tensor], parameters: int) -> Any:
        key = tuple((a.shape, a.dtype, a.device) for a in arguments)
        flat = self._flat.get(key)
        if flat is None:
            batched = torch.vmap(
                self._per_step, in_dims=tuple([None] * parameters + [0] * (len(arguments) - parameters))
            )
            if key in self._flat and len([f for f in self._flat.values() if f]) < MAX_SIZES:
                flat = self._flat[key] = record_operations(batched, arguments)
            else:
                self._flat[key] = None
                return batched(*arguments)
        return flat(*arguments)


def _part(graph: fx.GraphModule, outputs: list[int]) -> fx.GraphModule:
    """The graph with some of its outputs only."""
    copied = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    results = copied.graph_copy(graph.graph, values)
    copied.output(tuple(results[i] for i in outputs))  # type: ignore[index]
    copied.eliminate_dead_code()
    return fx.GraphModule(graph, copied)
