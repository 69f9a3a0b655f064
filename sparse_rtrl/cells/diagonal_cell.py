"""The contract of a recurrence whose state entries do not mix: what of the input enters, and how an entry moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeAlias
from weakref import WeakKeyDictionary, WeakMethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_rtrl.errors import ContractError
from sparse_rtrl.ops.precision import full_precision

State: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""State entries ``(B, *state_shape)``; with the previous input ``(B, input_size)`` where a cell looks at it."""


@dataclass(frozen=True)
class Mapped:
    """A linear map of the input, ``W x + b``. Its influence is kept as factors ``δ ⊗ x``.

    The weight may be any function of parameters, such as a product of matrices or a scaled one: its influence is that
    of the weight, and the gradient goes on from there to the parameters.

    Attributes:
        x: what the weight multiplies, ``(N, J)``, one row per input row; no gradient flows through it.
        weight: ``(M, J)``, real or complex.
        shape: how the ``M`` values lie in the state: a shape broadcastable to the cell's ``state_shape``, with as many
            dimensions.
        bias: ``(M,)`` or None.
    """

    x: Tensor
    weight: Tensor
    shape: tuple[int, ...]
    bias: Tensor | None = None

    @cached_property
    def value(self) -> Tensor:
        """``W x + b``, ``(N, *shape)``."""
        x = self.x.to(self.weight.dtype) if self.weight.is_complex() else self.x
        return F.linear(x, self.weight, self.bias).unflatten(-1, self.shape)

    @property
    def columns(self) -> int:
        """Numbers per row of its influence: one for each input, and one for the bias."""
        return self.weight.shape[1] + (self.bias is not None)

    @property
    def tensors(self) -> list[Tensor]:
        """What is trained: the weight ``(M, J)``, and the bias ``(M,)`` if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


@dataclass(frozen=True)
class Learned:
    """A value that does not depend on the input: any function of parameters alone.

    Attributes:
        value: broadcastable to the cell's ``state_shape``, with as many dimensions.
    """

    value: Tensor
    columns: ClassVar[int] = 1

    @property
    def tensors(self) -> list[Tensor]:
        """What is trained: the value, in its own shape."""
        return [self.value]


@dataclass(frozen=True)
class Given:
    """A value that depends on the input alone and is not trained.

    Attributes:
        value: ``(N, *shape)``, ``shape`` broadcastable to the cell's ``state_shape``; without gradient.
    """

    value: Tensor
    columns: ClassVar[int] = 0

    @property
    def tensors(self) -> list[Tensor]:
        """Nothing is trained: none, of any shape."""
        return []


Projection: TypeAlias = Mapped | Learned | Given
Observer: TypeAlias = Callable[[tuple[Projection, ...], list[Tensor], list[Tensor]], None]

_observers: WeakKeyDictionary[nn.Module, list[WeakMethod[Observer]]] = WeakKeyDictionary()


class DiagonalCell(nn.Module):
    r"""A recurrent cell in which every state entry moves by itself, so that the state Jacobian is diagonal.

    .. math:: h_t[i] = step(h_{t-1}[i], y_t[i]), \qquad y_t = project(x_t), \qquad o_t = output(x_t, h_{t-1}, h_t, y_t)

    A subclass implements the three functions. ``project`` says what of the input enters, as :class:`Mapped`,
    :class:`Learned` and :class:`Given` values, each broadcast to the state; all parameters that reach the state are in
    it. ``step`` is element-wise arithmetic of a state entry and the values at its place, and uses no parameter itself;
    a complex one is holomorphic in the state. ``output`` may mix everything; parameters under ``self.readout`` affect
    only the output and carry no influence.

    A parameter then influences few state entries, and what must be kept is about as large as the parameters: one
    number per row of a weight, input, and state entry that the row enters, less the axes of the state along which
    neither the decay nor the derivative by the row's value varies. (In ``S[i, m] = γ S[i, m] + k[i] v[m]`` the
    influence of the weight of ``k`` is the same for all ``i`` and is kept once.) That structure is found, not declared.

    All three functions work row by row on any number of rows, which are steps and streams together.

    Args:
        input_size: numbers of an input row.
        state_shape: shape of one stream's state.
        complex_state: whether the state is complex, of the precision of the parameters.
        previous_input: whether the cell looks at the previous input too (token shift). Input rows are then
            ``[x_t, x_{t-1}]``, of ``2 * input_size`` numbers, and the state carries ``x_{t-1}`` along.
    """

    def __init__(
        self,
        input_size: int,
        state_shape: tuple[int, ...],
        complex_state: bool = False,
        previous_input: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), *((f"state_shape[{a}]", s) for a, s in enumerate(state_shape))):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if not state_shape:
            raise ValueError("state_shape must have at least one dimension, got ()")
        self.input_size = input_size
        self.state_shape = tuple(state_shape)
        self.complex_state = complex_state
        self.previous_input = previous_input

    @property
    def hidden_size(self) -> int:
        """State entries of one stream, a complex one counted once."""
        return torch.Size(self.state_shape).numel()

    def zero_rows(self, rows: int) -> Tensor:
        """Input rows of zeros ``(rows, input_size)``, twice as wide with ``previous_input``, as the parameters are."""
        reference = next(self.parameters(), None)
        if reference is None:
            raise ValueError(f"cell must have parameters, got a {type(self).__name__} without any")
        dtype = reference.dtype.to_real() if reference.is_complex() else reference.dtype
        width = self.input_size * (2 if self.previous_input else 1)
        return torch.zeros(rows, width, dtype=dtype, device=reference.device)

    def zero_entries(self, rows: int) -> Tensor:
        """State entries of zeros ``(rows, *state_shape)``, as the parameters are."""
        like = self.zero_rows(0)
        dtype = like.dtype.to_complex() if self.complex_state else like.dtype
        return like.new_zeros(rows, *self.state_shape, dtype=dtype)

    def initial_entries(self, batch_size: int) -> Tensor:
        """State entries a stream starts from, ``(B, *state_shape)``: zeros.

        A subclass may return others, also a function of the cell's parameters, which are then trained.
        """
        return self.zero_entries(batch_size)

    def initial_state(self, batch_size: int) -> State:
        """State to start from, see :meth:`initial_entries`; the previous input of a first step is zero."""
        entries = self.initial_entries(batch_size)
        if not self.previous_input:
            return entries
        return entries, self.zero_rows(batch_size)[:, : self.input_size].clone()

    def project(self, x: Tensor) -> tuple[Projection, ...]:
        """What of the input enters the state.

        Args:
            x: input rows ``(N, input_size)``, or ``(N, 2 * input_size)`` with ``previous_input``.

        Returns:
            The values that ``step`` takes, in its order.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement project(x)")

    def step(self, h: Tensor, *values: Tensor) -> Tensor:
        """Move the state entries by one step, each by itself.

        Args:
            h: state entries ``(N, *state_shape)``.
            values: those of :meth:`project`, broadcastable to ``h``. They may also come broadcast: of the shape of
                ``h``.

        Returns:
            New state entries ``(N, *state_shape)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement step(h, *values)")

    def output(self, x: Tensor, before: Tensor, h: Tensor, *values: Tensor) -> Tensor:
        """The output of a step.

        Args:
            x: input rows ``(N, input_size)``, or ``(N, 2 * input_size)`` with ``previous_input``.
            before: state entries before the step, ``(N, *state_shape)``.
            h: state entries after it, ``(N, *state_shape)``.
            values: those of :meth:`project`.

        Returns:
            Output ``(N, ...)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement output(x, before, h, *values)")

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Run one step: ``x (B, input_size)`` and a state to the output ``(B, ...)`` and the new state."""
        outputs, state = self.unroll(x.unsqueeze(0), state)
        return outputs[0], state

    def unroll(self, xs: Tensor, state: State) -> tuple[Tensor, State]:
        """Run several steps: ``xs (n, B, input_size)`` and a state to outputs ``(n, B, ...)`` and the new state."""
        rows = self.rows(xs, state)
        projections, values = self.projected(rows)
        states = self.states(state if isinstance(state, Tensor) else state[0], values, xs.shape[0])
        for observer in [method() for method in _observers.get(self, ())]:
            if observer is not None:
                observer(projections, values, states)
        return self.outputs(rows, states, values), self.next_state(xs, states)

    def rows(self, xs: Tensor, state: State) -> Tensor:
        """Input rows ``(n * B, ...)`` of inputs ``xs (n, B, input_size)``, steps outside."""
        if self.previous_input:
            if isinstance(state, Tensor) or len(state) != 2:
                raise ValueError(
                    f"state of a {type(self).__name__} must be (entries, previous input), as initial_state gives it,"
                    f" got {type(state).__name__}"
                )
            xs = torch.cat((xs, torch.cat((state[1].unsqueeze(0), xs[:-1]))), dim=-1)
        return xs.flatten(0, 1)

    @full_precision
    def projected(self, rows: Tensor) -> tuple[tuple[Projection, ...], list[Tensor]]:
        """What :meth:`project` gives for rows ``(N, input_size)``, and its values, in full precision always."""
        projections = tuple(self.project(rows))
        return projections, [projection.value for projection in projections]

    @full_precision
    def states(self, h: Tensor, values: list[Tensor], steps: int) -> list[Tensor]:
        """Entries ``(B, *state_shape)`` before the first and after each step, from values ``(steps * B, ...)``."""
        batch = h.shape[0]
        # Values of rows have one dimension more than those that are the same in every row.
        per_step = [
            v.unflatten(0, (steps, batch)).unbind() if v.dim() > len(self.state_shape) else [v] * steps for v in values
        ]
        states = [h]
        for step_values in zip(*per_step, strict=True):
            states.append(self.step(states[-1], *step_values))
        states[-1] = _apart(states[-1], [h, *values])
        return states

    def outputs(self, rows: Tensor, states: list[Tensor], values: list[Tensor]) -> Tensor:
        """Outputs ``(n, B, ...)`` of steps whose states are given, see :meth:`states`."""
        steps = len(states) - 1
        before, after = (states[0], states[1]) if steps == 1 else (torch.cat(states[:-1]), torch.cat(states[1:]))
        outputs = self.output(rows, before, after, *values)
        if not isinstance(outputs, Tensor) or outputs.shape[:1] != before.shape[:1]:
            got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ContractError([f"output must return a tensor ({len(before)}, ...), a row per input row, got {got}"])
        return _apart(outputs, [before, after]).unflatten(0, (steps, states[0].shape[0]))

    def next_state(self, xs: Tensor, states: list[Tensor]) -> State:
        """State ``(B, *state_shape)`` after ``xs (n, B, input_size)``, with the last input where the cell looks."""
        return (states[-1], xs[-1].clone()) if self.previous_input else states[-1]  # the caller may reuse the inputs


def _apart(tensor: Tensor, others: list[Tensor]) -> Tensor:
    """The tensor, or a copy if it shares memory with others: the caller may write to it or to them."""
    place = tensor.untyped_storage().data_ptr()
    return tensor.clone() if any(place == other.untyped_storage().data_ptr() for other in others) else tensor


def observe(cell: DiagonalCell, observer: Observer) -> None:
    """Have ``observer(projections, values, states)`` called for every run of the cell, as long as its owner lives.

    Args:
        cell: the cell.
        observer: a bound method; takes what :meth:`DiagonalCell.projected` gave for the input rows, and the state
            entries before the first and after each step.
    """
    _observers[cell] = [*(known for known in _observers.get(cell, ()) if known() is not None), WeakMethod(observer)]
