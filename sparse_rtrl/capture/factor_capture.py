"""Factors of the immediate Jacobians inside a cell's transition, by intercepting known maps of its parameters.

A map ``y = W z`` of a tracked parameter is evaluated with the parameter detached, and ``y`` is recorded. Once
``dh[write]/dy`` is known, the immediate Jacobian of ``W`` is ``F[i, (m, j)] = sum_τ delta[i, τ, m] z[τ, j]``. Any other
differentiable use leaves the parameter itself in the graph, where a gradient with respect to it is found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparse_rtrl.capture.parameters import RecurrentParameter
from sparse_rtrl.cells.expert_bank import expert_linear
from sparse_rtrl.errors import ContractError

Piece: TypeAlias = tuple[RecurrentParameter, Tensor, Tensor | None]
"""A parameter, its ``delta`` (core ``(B, c, τ, m)``, expert ``(B, k, c, τ, m)``, with ``c`` copies of a stream) and its
``z`` (core ``(B, τ, j)``, expert ``(B, k, τ, j)``; None for ``z = 1``)."""


@dataclass
class RecordedCall:
    """One recognised call on parameters.

    Attributes:
        parameters: the recurrent parameters it used.
        y: its output, to be differentiated; ``(B * c, ...)``.
        version: version counter of ``y`` when it was recorded; a later in-place change invalidates the record.
        build: from ``dh/dy``, of the shape of ``y``, to a piece per parameter.
    """

    parameters: tuple[RecurrentParameter, ...]
    y: Tensor
    version: int
    build: Callable[[Tensor], list[Piece]]


def _untracked(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


@dataclass
class FactorCapture(TorchFunctionMode):
    """Replaces known maps of tracked parameters by detached ones and records their outputs.

    Attributes:
        tracked: recurrent parameters by the identity of the tensor that the cell uses.
        batch: streams ``B``.
        copies: copies of each stream, ``c``.
        experts: active experts ``(B, k)``.
        repeated_experts: the same for every copy, ``(B * c, k)``.
        dense: names of the parameters that take the dense path.
        coarsest: the dtype of least precision that was computed in.
        calls: recognised calls, in order.
    """

    tracked: dict[int, RecurrentParameter]
    batch: int
    copies: int
    experts: Tensor
    repeated_experts: Tensor
    dense: set[str]
    coarsest: torch.dtype
    calls: list[RecordedCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.dtype != self.coarsest:
            self.coarsest = coarser(self.coarsest, result.dtype)
        return result

    def find(self, tensor: Tensor | None) -> RecurrentParameter | None:
        """The recurrent parameter that a tensor of any shape is, unless it takes the dense path."""
        parameter = None if tensor is None else self.tracked.get(id(tensor))
        return None if parameter is None or parameter.name in self.dense else parameter

    def record(
        self,
        parameters: tuple[RecurrentParameter | None, ...],
        y: Tensor,
        build: Callable[[Tensor], list[Piece]],
    ) -> Tensor:
        """Note a recognised call, and return its output ``(B * copies, ...)``."""
        self.coarsest = coarser(self.coarsest, y.dtype)
        if not y.requires_grad:
            y.requires_grad_()
        self.calls.append(RecordedCall(tuple(p for p in parameters if p is not None), y, y._version, build))
        return y

    def one_row_each(self, z: Tensor) -> bool:
        """Whether the first dimension of an input ``(B * copies, ...)`` can be the copies of the streams."""
        return z.dim() >= 2 and z.shape[0] == self.batch * self.copies

    def per_row(self, delta: Tensor) -> Tensor:
        """``dh/dy (B * c, ..., m)`` as ``(B, c, τ, m)``."""
        return delta.reshape(self.batch, self.copies, -1, delta.shape[-1])

    def once(self, z: Tensor) -> Tensor:
        """``z (B * c, ..., j)``, equal in the ``c`` copies of a stream, as ``(B, τ, j)``."""
        first = z.detach().unflatten(0, (self.batch, self.copies))[:, 0]
        # A copy: a view would keep all c copies alive as long as the captured step.
        return first.reshape(self.batch, -1, z.shape[-1]).clone()


def coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """The floating-point dtype of less precision of two; a dtype of integers does not count."""
    if not other.is_floating_point or torch.finfo(other).eps <= torch.finfo(one).eps:
        return one
    return other


def flat_row(delta: Tensor) -> Tensor:
    """A dense immediate Jacobian ``(B, w, ...)`` as the delta of a term with ``z = 1``, ``(B, w, 1, numel)``."""
    return delta.reshape(*delta.shape[:2], 1, -1)


def _linear(capture: FactorCapture, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    p_weight, p_bias = capture.find(weight), capture.find(bias)
    if (p_weight is None and p_bias is None) or not capture.one_row_each(z):
        return NotImplemented
    if weight.dim() != 2 or (p_weight is None and weight.requires_grad) or _lost(p_bias, bias):
        return NotImplemented
    y = F.linear(z, weight.detach(), _untracked(bias))

    def build(grad: Tensor) -> list[Piece]:
        delta = capture.per_row(grad)
        out: list[Piece] = []
        if p_weight is not None:
            out.append((p_weight, delta, capture.once(z)))
        if p_bias is not None:
            out.append((p_bias, delta.sum(2, keepdim=True), None))
        return out

    return capture.record((p_weight, p_bias), y, build)


def _lost(parameter: RecurrentParameter | None, tensor: Tensor | None) -> bool:
    """Whether detaching the tensor would lose its gradient: it requires one, and is not recorded."""
    return parameter is None and tensor is not None and tensor.requires_grad


def _normalised(capture: FactorCapture, x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x_hat * weight + bias``, element-wise, recorded; ``x_hat (B * c, ..., *weight.shape)``."""
    p_weight, p_bias = capture.find(weight), capture.find(bias)
    y = x_hat if weight is None else x_hat * weight.detach()
    if bias is not None:
        y = y + bias.detach()
    if y is x_hat:
        y = x_hat.clone()

    def build(grad: Tensor) -> list[Piece]:
        out: list[Piece] = []
        for parameter, value in ((p_weight, grad * x_hat.detach()), (p_bias, grad)):
            if parameter is not None:
                per_entry = value.reshape(capture.batch, capture.copies, -1, parameter.shape.numel())
                out.append((parameter, per_entry.sum(2, keepdim=True), None))
        return out

    return capture.record((p_weight, p_bias), y, build)


def _layer_norm(
    capture: FactorCapture,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    if capture.find(weight) is None and capture.find(bias) is None:
        return NotImplemented
    if not capture.one_row_each(x) or _lost(capture.find(weight), weight) or _lost(capture.find(bias), bias):
        return NotImplemented
    return _normalised(capture, F.layer_norm(x, normalized_shape, None, None, eps), weight, bias)


def _rms_norm(
    capture: FactorCapture, x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Any:
    if capture.find(weight) is None or not capture.one_row_each(x):
        return NotImplemented
    return _normalised(capture, F.rms_norm(x, normalized_shape, None, eps), weight, None)


def _embedding(capture: FactorCapture, index: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    parameter = capture.find(weight)
    if parameter is None or index.dim() < 1 or index.shape[0] != capture.batch * capture.copies or args:
        return NotImplemented
    if any(kwargs.get(name) for name in ("scale_grad_by_freq", "sparse", "max_norm")):
        return NotImplemented
    if kwargs.get("padding_idx") is not None:
        return NotImplemented
    y = F.embedding(index, weight.detach())

    def build(grad: Tensor) -> list[Piece]:
        delta = capture.per_row(grad)
        rows = index.reshape(capture.batch, capture.copies, -1, 1).expand_as(delta)
        dense = delta.new_zeros(capture.batch, capture.copies, *weight.shape).scatter_add_(2, rows, delta)
        return [(parameter, flat_row(dense), None)]

    return capture.record((parameter,), y, build)


def _expert_linear(capture: FactorCapture, z: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor) -> Any:
    p_weight, p_bias = capture.find(weight), capture.find(bias)
    if (p_weight is None and p_bias is None) or not capture.one_row_each(z):
        return NotImplemented
    if _lost(p_weight, weight) or _lost(p_bias, bias):
        return NotImplemented
    if experts is not capture.repeated_experts and not torch.equal(experts, capture.repeated_experts):
        return NotImplemented
    batch, copies, k = capture.batch, capture.copies, experts.shape[1]
    # One product per stream and expert serves all copies of the stream.
    positions = z.shape[2:-1].numel()
    inputs = z.reshape(batch, copies, k, positions, z.shape[-1]).transpose(1, 2)  # (B, k, c, τ, j)
    y = expert_linear(inputs, weight.detach(), _untracked(bias), capture.experts)
    y = y.transpose(1, 2).reshape(*z.shape[:-1], weight.shape[1])

    def build(grad: Tensor) -> list[Piece]:
        delta = grad.reshape(batch, copies, k, positions, grad.shape[-1]).transpose(1, 2)  # (B, k, c, τ, m)
        out: list[Piece] = []
        if p_weight is not None:
            out.append((p_weight, delta, inputs.detach()[:, :, 0].clone()))
        if p_bias is not None:
            out.append((p_bias, delta.sum(3, keepdim=True), None))
        return out

    return capture.record((p_weight, p_bias), y, build)


def _dropout(capture: FactorCapture, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p > 0:
        raise ContractError(["update draws random numbers (dropout): a captured step is not the step that ran"])
    return NotImplemented


def _batch_norm(capture: FactorCapture, *args: Any, training: bool = False, **kwargs: Any) -> Any:
    if training or (len(args) > 5 and args[5]):
        raise ContractError(["update couples the rows of the batch (batch norm in training)"])
    return NotImplemented


_HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.embedding: _embedding,
    expert_linear: _expert_linear,
    F.dropout: _dropout,
    F.batch_norm: _batch_norm,
}
