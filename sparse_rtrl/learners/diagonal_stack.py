"""Several diagonal layers with mixing between them, and the per-layer approximation of their gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_rtrl.cells.diagonal_cell import DiagonalCell, State
from sparse_rtrl.learners.diagonal_engine import DiagonalEngine
from sparse_rtrl.learners.rtrl import check_learning_input
from sparse_rtrl.ops import dispatch

Run: TypeAlias = Callable[[int, Tensor, State], tuple[Tensor, State]]
"""Runs the cell of a layer: its number, inputs ``(n, B, width)`` and state to outputs ``(n, B, width)`` and state."""


class Mixing(nn.Module):
    """Normalisation, then a perceptron with one hidden layer.

    Args:
        width: numbers in and out.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., width)`` to ``(..., width)``."""
        return self.down(nn.functional.gelu(self.up(self.norm(x))))


class DiagonalStack(nn.Module):
    r"""Residual layers of diagonal cells, with a normalisation before and a perceptron after each.

    .. math::
        x^0 = W_{in} x, \qquad y^l = x^l + cell^l(norm(x^l)), \qquad x^{l+1} = y^l + mlp(norm(y^l)), \qquad
        o = W_{out} \, norm(x^L)

    The joint state of all layers is not diagonal: a parameter of a lower layer influences every state above it. Its
    exact influence is carried by ``Carry(stack)``, whose ``estimate`` shows the cost. For what is cheap and approximate
    see :class:`PerLayerApproximation`.

    Args:
        input_size: size of the input of a step.
        cells: one cell per layer, each with as many inputs as outputs, all the same.
        output_size: size of the output.

    Raises:
        ValueError: if the cells do not fit together.
    """

    def __init__(self, input_size: int, cells: Sequence[DiagonalCell], output_size: int) -> None:
        super().__init__()
        if not cells:
            raise ValueError("cells must hold at least one cell, got none")
        width = cells[0].input_size
        for number, cell in enumerate(cells):
            if cell.input_size != width or getattr(cell, "output_size", None) != width:
                raise ValueError(
                    f"cells[{number}] must have input_size and output_size {width}, got {cell.input_size} and"
                    f" {getattr(cell, 'output_size', None)}"
                )
        self.input_size = input_size
        self.output_size = output_size
        self.input = nn.Linear(input_size, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in cells])
        self.cells = nn.ModuleList(cells)
        self.mixings = nn.ModuleList([Mixing(width) for _ in cells])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, output_size))

    def initial_state(self, batch_size: int) -> tuple[State, ...]:
        """State that streams start from, ``(B, *state_shape)`` for each layer."""
        return tuple(cell.initial_state(batch_size) for cell in self.cells)  # type: ignore[operator]

    def forward(self, x: Tensor, state: tuple[State, ...]) -> tuple[Tensor, tuple[State, ...]]:
        """Run one step: ``x (B, input_size)`` and a state to the output ``(B, output_size)`` and the new state."""
        outputs, state = self.unroll(x.unsqueeze(0), state)
        return outputs[0], state

    def unroll(self, xs: Tensor, state: tuple[State, ...], run: Run | None = None) -> tuple[Tensor, tuple[State, ...]]:
        """Run several steps, layer by layer.

        Args:
            xs: inputs ``(n, B, input_size)``.
            state: one per layer, ``(B, *state_shape)``.
            run: what runs a layer's cell; by default its ``unroll``.

        Returns:
            Outputs ``(n, B, output_size)`` and the new state.
        """
        x = self.input(xs)
        states = []
        for layer, (norm, cell, mixing) in enumerate(zip(self.norms, self.cells, self.mixings, strict=True)):
            inner = norm(x)
            y, new = cell.unroll(inner, state[layer]) if run is None else run(layer, inner, state[layer])  # type: ignore[operator]
            x = x + y
            x = x + mixing(x)
            states.append(new)
        return self.head(x), tuple(states)


class PerLayerApproximation:
    """Online learner for a :class:`DiagonalStack` by the per-layer rule, an approximation.

    Within a segment everything is backpropagated, through all layers. Across segments every cell carries the influence
    of its own parameters on its own state, its input taken as given, and nothing else: what a parameter does to the
    states of the layers above it through time is left out (Irie et al. 2023; Zucchet et al. 2023). So the
    gradient of the uppermost layer is exact, that of everything below it is not, and that of what lies between the
    layers is truncated at the segment. Memory is about that of the parameters.

    The interface is that of :class:`~sparse_rtrl.RTRL`.

    Args:
        stack: what to train.
        batch_size: streams ``B``.
        commit_every: steps between two updates of the influence.
        backend: what computes: see :func:`sparse_rtrl.ops.dispatch.select`.

    Raises:
        ContractError: if a cell breaks its contract.
        MemoryError: if the influence does not fit into memory.
    """

    def __init__(
        self, stack: DiagonalStack, batch_size: int, commit_every: int = 1, backend: dispatch.Backend = "auto"
    ) -> None:
        if not isinstance(stack, DiagonalStack):
            raise TypeError(f"stack must be a DiagonalStack, got {type(stack).__name__}")
        if not isinstance(commit_every, int) or commit_every < 1:
            raise ValueError(f"commit_every must be an int of at least 1, got {commit_every!r}")
        self.stack = stack
        self.commit_every = commit_every
        self._engines = [DiagonalEngine(cell, batch_size, backend) for cell in stack.cells]  # type: ignore[arg-type]
        for engine in self._engines:
            engine.influence.commit_every = commit_every
        self._state: Any = pytree.tree_map(Tensor.detach, stack.initial_state(batch_size))
        self._fresh: Tensor | None = self._engines[0].checked_mask(None)

    def __copy__(self) -> PerLayerApproximation:
        """An independent learner of the same stack, which goes on from where this one stands."""
        return copy.deepcopy(self, {id(module): module for module in self.stack.modules()})

    def __deepcopy__(self, memo: dict[int, Any]) -> PerLayerApproximation:
        """A learner of a copy of the stack, which goes on from where this one stands; nothing is attached to it."""
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    @property
    def state(self) -> tuple[State, ...]:
        """A copy of the state that the next step starts from, ``(B, *state_shape)`` for each layer, detached."""
        states = zip(self._engines, self._state, strict=True)
        return pytree.tree_map(Tensor.clone, tuple(engine.entering(state, self._fresh) for engine, state in states))

    @property
    def kept_bytes(self) -> int:
        """Bytes of the influence of all layers."""
        return sum(engine.influence.kept_bytes for engine in self._engines)

    def __call__(self, x: Tensor) -> Tensor:
        """Take one step: ``x (B, input_size)`` to the output ``(B, output_size)``."""
        return self.unroll(x.unsqueeze(0))[0]

    def unroll(self, xs: Tensor) -> Tensor:
        """Take several steps as one segment: ``xs (n, B, input_size)`` to outputs ``(n, B, output_size)``.

        Raises:
            RuntimeError, ContractError, NonFiniteError: see :meth:`RTRL.unroll`.
        """
        check_learning_input(xs, self._engines[0])
        outputs, self._state = self.stack.unroll(
            xs, self._state, lambda layer, inner, state: self._engines[layer].run(inner, state, self._fresh)
        )
        self._fresh = None
        return outputs

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Call :meth:`flush` before every step of an optimizer; returns a handle with ``remove()``."""
        return optimizer.register_step_pre_hook(lambda *_: self.flush())

    def flush(self) -> None:
        """Nothing is deferred: ``.grad`` holds all there is when ``backward`` returns."""

    def reset(self, streams: Tensor | None = None) -> None:
        """Start new sequences: initial state and zero influence.

        Args:
            streams: boolean mask ``(B,)`` of the streams that start anew; None for all.
        """
        mask = self._engines[0].checked_mask(streams)
        for engine in self._engines:
            engine.influence.reset(None if streams is None else mask)
        self._fresh = mask.clone() if self._fresh is None else mask | self._fresh

    def state_dict(self) -> dict[str, Any]:
        """State, influence and window; with it and the stack's own, training resumes bit for bit."""
        return {
            "version": 1,
            "layers": [engine.influence.state_dict() for engine in self._engines],
            "state": pytree.tree_map(Tensor.clone, self._state),
            "fresh": None if self._fresh is None else self._fresh.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, for the same stack.

        Raises:
            ValueError: if it does not fit.
        """
        if state.get("version") != 1:
            raise ValueError(f"state must be of version 1, got {state.get('version')!r}")
        if missing := {"layers", "state"} - set(state):
            raise ValueError(f"state lacks {sorted(missing)}")
        saved, own = (
            [(tensor.dtype, tuple(tensor.shape)) for tensor in pytree.tree_leaves(each)]
            for each in (state["state"], self._state)
        )
        if saved != own:
            raise ValueError(
                f"state is of another stack, dtype or batch size: its tensors are {saved}, those here {own}"
            )
        for engine, layer in zip(self._engines, state["layers"], strict=True):
            engine.influence.load_state_dict(layer)
        fresh = state.get("fresh")
        self._fresh = None if fresh is None else fresh.to(self._engines[0].device, copy=True)
        self._state = pytree.tree_map(lambda saved, own: saved.to(own).clone(), state["state"], self._state)
