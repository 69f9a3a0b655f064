"""Capture of a step's state Jacobian and factored immediate Jacobians by one ordinary backward pass.

``SlotCell.update`` works row by row of the batch. Its inputs are repeated ``w`` times, once per written state entry,
and one backward pass with the identity as cotangent gives all rows of the Jacobians at once. Parameters never enter
that graph: where ``update`` hands one to a known linear map ``y = W z``, the map is evaluated with detached parameters,
and the backward pass is asked for ``delta = dh[write]/dy``; together with ``z`` that is the immediate Jacobian,
factored.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparse_rtrl.errors import ContractError
from sparse_rtrl.expert_bank import expert_linear
from sparse_rtrl.parameters import ParameterGroups, RecurrentParameter
from sparse_rtrl.slot_cell import Routing, SlotCell


@dataclass(frozen=True)
class Term:
    """One factored immediate Jacobian: ``F[i, (m, j)] = sum_τ delta[i, τ, m] z[τ, j]``.

    Attributes:
        offset: first column of the parameter in its group.
        delta_start: first entry of this term along the last dimension of :attr:`Factors.delta`.
        tau: number of applications of the map.
        m: output size of the map.
        z: inputs of the map, core ``(B, τ, j)``, expert ``(B, k, τ, j)``; None for ``z = 1``, ``τ = j = 1``.
    """

    offset: int
    delta_start: int
    tau: int
    m: int
    z: Tensor | None

    @property
    def delta_slice(self) -> slice:
        """This term's part of the last dimension of :attr:`Factors.delta`."""
        return slice(self.delta_start, self.delta_start + self.tau * self.m)


@dataclass(frozen=True)
class Factors:
    """The immediate Jacobians of one group kind in one step.

    Attributes:
        delta: all terms side by side: core ``(B, w, Σ τ m)``, experts ``(B, k, w, Σ τ m)``.
        terms: how to read it.
    """

    delta: Tensor
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class StepJacobian:
    """Everything one step contributes to the influence, with the parameters it was run with.

    Attributes:
        Jh: state Jacobian ``dh[write] / dh_entry[support]``, ``(B, w, r)``, columns of ``read`` then of ``write``.
        routing: what the step touched.
        core: immediate Jacobians of the core group.
        expert: immediate Jacobians of the active experts.
    """

    Jh: Tensor
    routing: Routing
    core: Factors
    expert: Factors


@dataclass
class _Use:
    """One recognised use of a parameter inside ``update``; ``y`` is differentiated, ``build`` reads the result."""

    parameters: tuple[RecurrentParameter, ...]
    y: Tensor
    version: int
    build: Callable[[Tensor], list[tuple[RecurrentParameter, Tensor, Tensor | None]]]
    """From ``dh/dy (B * w, ...)`` to (parameter, delta, z) per parameter."""


def _untracked(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


@dataclass
class _Capture(TorchFunctionMode):
    """Replaces known maps of tracked parameters by detached ones and records their outputs.

    A parameter that is used in any other differentiable way is noted in ``dense`` and takes the dense path.
    """

    tracked: dict[int, RecurrentParameter]
    batch: int
    width: int
    experts: Tensor
    repeated_experts: Tensor
    dense: set[str]
    uses: list[_Use] = field(default_factory=list)

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
        found = [self.tracked[key] for key in _ids_in(args, kwargs) if key in self.tracked]
        if found and any(r.requires_grad for r in _tensors_in(result)):
            self.dense.update(parameter.name for parameter in found)
        return result

    def find(self, tensor: Tensor | None) -> RecurrentParameter | None:
        """The recurrent parameter that a tensor is, unless it takes the dense path."""
        parameter = None if tensor is None else self.tracked.get(id(tensor))
        return None if parameter is None or parameter.name in self.dense else parameter

    def record(
        self,
        parameters: tuple[RecurrentParameter | None, ...],
        y: Tensor,
        build: Callable[[Tensor], list[tuple[RecurrentParameter, Tensor, Tensor | None]]],
    ) -> Tensor:
        if not y.requires_grad:
            y.requires_grad_()
        self.uses.append(_Use(tuple(p for p in parameters if p is not None), y, y._version, build))
        return y

    def one_row_each(self, z: Tensor) -> bool:
        return z.dim() >= 2 and z.shape[0] == self.batch * self.width

    def per_row(self, delta: Tensor) -> Tensor:
        """``dh/dy (B * w, ..., m)`` as ``(B, w, τ, m)``."""
        return delta.reshape(self.batch, self.width, -1, delta.shape[-1])

    def once(self, z: Tensor) -> Tensor:
        """``z (B * w, ..., j)``, equal in the ``w`` copies of a stream, as ``(B, τ, j)``."""
        first = z.detach().unflatten(0, (self.batch, self.width))[:, 0]
        return first.reshape(self.batch, -1, z.shape[-1])


def _ids_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Identities of the arguments of a call and of the items of its lists and tuples; runs at every torch call."""
    ids = [id(a) for a in args]
    for a in args:
        if type(a) is tuple or type(a) is list:
            ids += _ids_in(tuple(a), {})
    if kwargs:
        ids += _ids_in(tuple(kwargs.values()), {})
    return ids


def _tensors_in(value: Any) -> list[Tensor]:
    """Tensors in a nest of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in _tensors_in(item)]
    if isinstance(value, dict):
        return [t for item in value.values() for t in _tensors_in(item)]
    return []


def _flat_row(delta: Tensor) -> Tensor:
    """A dense immediate Jacobian ``(B, w, ...)`` as the delta of a term with ``z = 1``, ``(B, w, 1, numel)``."""
    return delta.reshape(*delta.shape[:2], 1, -1)


def _linear(capture: _Capture, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    p_weight, p_bias = capture.find(weight), capture.find(bias)
    if (p_weight is None and p_bias is None) or not capture.one_row_each(z):
        return NotImplemented
    if weight.dim() != 2 or (p_weight is None and weight.requires_grad) or _lost(p_bias, bias):
        return NotImplemented
    y = F.linear(z, weight.detach(), _untracked(bias))

    def build(grad: Tensor) -> list[tuple[RecurrentParameter, Tensor, Tensor | None]]:
        delta = capture.per_row(grad)
        out: list[tuple[RecurrentParameter, Tensor, Tensor | None]] = []
        if p_weight is not None:
            out.append((p_weight, delta, capture.once(z)))
        if p_bias is not None:
            out.append((p_bias, delta.sum(2, keepdim=True), None))
        return out

    return capture.record((p_weight, p_bias), y, build)


def _lost(parameter: RecurrentParameter | None, tensor: Tensor | None) -> bool:
    """Whether detaching the tensor would lose a gradient that nothing records."""
    return parameter is None and tensor is not None and tensor.requires_grad


def _normalised(capture: _Capture, x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x_hat * weight + bias``, element-wise, recorded; ``x_hat (B * w, ..., *weight.shape)``."""
    p_weight, p_bias = capture.find(weight), capture.find(bias)
    y = x_hat if weight is None else x_hat * weight.detach()
    if bias is not None:
        y = y + bias.detach()
    if y is x_hat:
        y = x_hat.clone()

    def build(grad: Tensor) -> list[tuple[RecurrentParameter, Tensor, Tensor | None]]:
        out: list[tuple[RecurrentParameter, Tensor, Tensor | None]] = []
        for parameter, value in ((p_weight, grad * x_hat.detach()), (p_bias, grad)):
            if parameter is not None:
                per_entry = value.reshape(capture.batch, capture.width, -1, parameter.shape.numel())
                out.append((parameter, per_entry.sum(2, keepdim=True), None))
        return out

    return capture.record((p_weight, p_bias), y, build)


def _layer_norm(
    capture: _Capture,
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
    capture: _Capture, x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Any:
    if capture.find(weight) is None or not capture.one_row_each(x):
        return NotImplemented
    return _normalised(capture, F.rms_norm(x, normalized_shape, None, eps), weight, None)


def _embedding(capture: _Capture, index: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    parameter = capture.find(weight)
    if parameter is None or index.dim() < 1 or index.shape[0] != capture.batch * capture.width or args:
        return NotImplemented
    if any(kwargs.get(name) for name in ("scale_grad_by_freq", "sparse", "max_norm")) or kwargs.get("padding_idx"):
        return NotImplemented
    y = F.embedding(index, weight.detach())

    def build(grad: Tensor) -> list[tuple[RecurrentParameter, Tensor, Tensor | None]]:
        delta = capture.per_row(grad)  # (B, w, τ, d)
        rows = index.view(capture.batch, capture.width, -1, 1).expand_as(delta)
        dense = delta.new_zeros(capture.batch, capture.width, *weight.shape).scatter_add_(2, rows, delta)
        return [(parameter, _flat_row(dense), None)]

    return capture.record((parameter,), y, build)


def _expert_linear(capture: _Capture, z: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor) -> Any:
    p_weight, p_bias = capture.find(weight), capture.find(bias)
    if (p_weight is None and p_bias is None) or not capture.one_row_each(z):
        return NotImplemented
    if _lost(p_weight, weight) or _lost(p_bias, bias):
        return NotImplemented
    if experts is not capture.repeated_experts and not torch.equal(experts, capture.repeated_experts):
        return NotImplemented
    batch, width, k = capture.batch, capture.width, experts.shape[1]
    # One product per stream and expert serves all w copies of the stream.
    inputs = z.reshape(batch, width, k, -1, z.shape[-1]).transpose(1, 2)  # (B, k, w, τ, j)
    y = expert_linear(inputs, weight.detach(), _untracked(bias), capture.experts)
    y = y.transpose(1, 2).reshape(*z.shape[:-1], weight.shape[1])

    def build(grad: Tensor) -> list[tuple[RecurrentParameter, Tensor, Tensor | None]]:
        delta = grad.reshape(batch, width, k, -1, grad.shape[-1]).transpose(1, 2)  # (B, k, w, τ, m)
        out: list[tuple[RecurrentParameter, Tensor, Tensor | None]] = []
        if p_weight is not None:
            out.append((p_weight, delta, inputs.detach()[:, :, 0]))
        if p_bias is not None:
            out.append((p_bias, delta.sum(3, keepdim=True), None))
        return out

    return capture.record((p_weight, p_bias), y, build)


def _dropout(capture: _Capture, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p > 0:
        raise ContractError(["update draws random numbers (dropout): a captured step is not the step that ran"])
    return NotImplemented


_HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.embedding: _embedding,
    expert_linear: _expert_linear,
    F.dropout: _dropout,
}


class JacobianCapture:
    """Captures steps of one cell, remembering which of its parameters need the dense path.

    Whenever ``update`` uses its parameters in a new pattern of calls and shapes, the captured factors are checked once
    against an ordinary backward pass; a parameter whose factors disagree takes the dense path from then on.

    Args:
        cell: the cell.
        groups: its recurrent parameters.
    """

    def __init__(self, cell: SlotCell, groups: ParameterGroups) -> None:
        self.cell = cell
        self.groups = groups
        self.dense: set[str] = set()
        self._checked: set[Any] = set()

    def step(self, x: Tensor, state: Tensor, routing: Routing, tensors: list[Tensor]) -> StepJacobian:
        """Capture one step.

        Args:
            x: input of the step, ``(B, ...)``.
            state: state that entered it, ``(B, S, D)``, detached.
            routing: what it touched.
            tensors: the tensors the cell uses for its recurrent parameters, in the order of ``groups.all``.

        Returns:
            State Jacobian and factored immediate Jacobians.
        """
        tracked = {id(t): p for t, p in zip(tensors, self.groups.all, strict=True) if t.requires_grad}
        while True:
            dense_before = len(self.dense)
            step, signature = self._expanded(x, state, routing, tracked)
            if len(self.dense) > dense_before:
                continue  # a parameter turned out to need the dense path: capture again without its factors
            if signature in self._checked:
                return step
            wrong = self._disagreeing(step, x, state, routing, tensors)
            self._checked.add(signature)
            if not wrong:
                return step
            self._note_dense(wrong)

    def _note_dense(self, names: set[str]) -> None:
        new = sorted(names - self.dense)
        self.dense |= names
        if new:
            warnings.warn(
                f"{', '.join(new)}: used in a way whose immediate Jacobian is not captured as factors; the dense one is"
                " computed instead (exact, slower). nn.Linear, nn.LayerNorm, nn.Embedding and ExpertBank are captured",
                stacklevel=2,
            )

    def _expanded(
        self, x: Tensor, state: Tensor, routing: Routing, tracked: dict[int, RecurrentParameter]
    ) -> tuple[StepJacobian, Any]:
        batch, slot_size = state.shape[0], state.shape[2]
        width = routing.write.shape[1] * slot_size
        support = routing.support
        if width == 0:
            none = state.new_zeros(batch, 0, support.shape[1] * slot_size)
            core = Factors(state.new_zeros(batch, 0, 0), ())
            expert = Factors(state.new_zeros(batch, routing.experts.shape[1], 0, 0), ())
            return StepJacobian(none, routing, core, expert), None
        entries = support.unsqueeze(-1).expand(-1, -1, slot_size)
        h = state.gather(1, entries).repeat_interleave(width, 0).requires_grad_()
        h_read, h_write = h.split((routing.read.shape[1], routing.write.shape[1]), dim=1)
        repeated = routing.repeat_interleave(width)
        capture = _Capture(tracked, batch, width, routing.experts, repeated.experts, set(self.dense))
        with torch.enable_grad(), capture:
            content = self.cell.transition(x.repeat_interleave(width, 0), h_read, h_write, repeated)
        touched_in_place = {p.name for use in capture.uses if use.y._version != use.version for p in use.parameters}
        self._note_dense((capture.dense | touched_in_place) - self.dense)
        eye = torch.eye(width, dtype=content.dtype, device=content.device)
        grads: list[Tensor | None]
        if content.requires_grad:
            grads = list(
                torch.autograd.grad(
                    content,
                    [h, *(use.y for use in capture.uses)],
                    grad_outputs=eye.expand(batch, -1, -1).reshape(content.shape),
                    allow_unused=True,
                )
            )
        else:
            grads = [None] * (1 + len(capture.uses))
        Jh = state.new_zeros(batch, width, h[0].numel()) if grads[0] is None else grads[0].view(batch, width, -1)
        pieces = [
            piece
            for use, grad in zip(capture.uses, grads[1:], strict=True)
            if grad is not None
            for piece in use.build(grad)
            if piece[0].name not in self.dense
        ]
        pieces += self._dense_pieces(x, state, routing, tracked)
        signature = tuple((p.name, tuple(delta.shape)) for p, delta, _ in pieces)
        core = _join([piece for piece in pieces if not piece[0].expert], (batch, width), state)
        expert = _join([piece for piece in pieces if piece[0].expert], (batch, routing.experts.shape[1], width), state)
        return StepJacobian(Jh.to(state.dtype), routing, core, expert), signature

    def _dense_pieces(
        self, x: Tensor, state: Tensor, routing: Routing, tracked: dict[int, RecurrentParameter]
    ) -> list[tuple[RecurrentParameter, Tensor, Tensor | None]]:
        """Dense immediate Jacobians, one backward row per written state entry, of the parameters that need them."""
        parameters = [p for p in tracked.values() if p.name in self.dense]
        if not parameters:
            return []
        batch = state.shape[0]
        content, tensors = self._local_forward(x, state, routing, parameters)
        rows = content.numel()
        if not content.requires_grad:
            return []
        cotangents = torch.eye(rows, dtype=content.dtype, device=content.device).view(rows, *content.shape)
        grads: tuple[Tensor | None, ...]
        try:
            grads = torch.autograd.grad(
                content, tensors, cotangents, is_grads_batched=True, allow_unused=True, retain_graph=True
            )
        except RuntimeError:  # an operation without a batching rule: row by row
            per_row = [
                torch.autograd.grad(content, tensors, c, allow_unused=True, retain_graph=True) for c in cotangents
            ]
            columns: list[list[Tensor | None]] = [list(c) for c in zip(*per_row, strict=True)]
            grads = tuple(None if c[0] is None else torch.stack([g for g in c if g is not None]) for c in columns)
        pieces: list[tuple[RecurrentParameter, Tensor, Tensor | None]] = []
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is None:
                continue
            delta = grad.view(batch, rows // batch, *grad.shape[1:])
            if parameter.expert:  # (B, w, E, ...) to the active experts, (B, k, w, 1, n)
                delta = delta.flatten(3).transpose(1, 2)
                active = routing.experts.view(batch, -1, 1, 1).expand(-1, -1, *delta.shape[2:])
                pieces.append((parameter, delta.gather(1, active).unsqueeze(3), None))
            else:
                pieces.append((parameter, _flat_row(delta), None))
        return pieces

    def _local_forward(
        self, x: Tensor, state: Tensor, routing: Routing, parameters: list[RecurrentParameter]
    ) -> tuple[Tensor, list[Tensor]]:
        """The step alone, at fixed entry state: written content and the parameters it depends on."""
        slot_size = state.shape[2]
        h = state.gather(1, routing.support.unsqueeze(-1).expand(-1, -1, slot_size))
        h_read, h_write = h.split((routing.read.shape[1], routing.write.shape[1]), dim=1)
        with torch.enable_grad():
            tensors = [p.tensor for p in parameters]
            content = self.cell.transition(x, h_read, h_write, routing)
        return content, tensors

    def _disagreeing(
        self, step: StepJacobian, x: Tensor, state: Tensor, routing: Routing, tensors: list[Tensor]
    ) -> set[str]:
        """Names of parameters whose factors disagree with an ordinary backward pass for a random cotangent."""
        parameters = [p for p, t in zip(self.groups.all, tensors, strict=True) if t.requires_grad]
        content, used = self._local_forward(x, state, routing, parameters)
        if not parameters or not content.requires_grad:
            return set()
        generator = torch.Generator(device="cpu").manual_seed(0)
        cotangent = torch.randn(content.shape, generator=generator, dtype=torch.float64).to(content)
        truth = torch.autograd.grad(content, used, cotangent, allow_unused=True)
        core, experts = direct_gradient(step, cotangent.flatten(1), self.groups)
        found = dict(zip((p.name for p in self.groups.all), self.groups.split(core, experts), strict=True))
        tolerance = 50 * torch.finfo(content.dtype).eps ** 0.75
        scale = max((float(g.abs().max()) for g in truth if g is not None), default=0.0)
        wrong = set()
        for parameter, g in zip(parameters, truth, strict=True):
            expected = torch.zeros_like(parameter.tensor) if g is None else g
            if parameter.name in self.dense or not torch.isfinite(expected).all():
                continue
            if float((found[parameter.name] - expected).abs().max()) > tolerance * scale:
                wrong.add(parameter.name)
        return wrong


def _join(
    pieces: list[tuple[RecurrentParameter, Tensor, Tensor | None]], leading: tuple[int, ...], like: Tensor
) -> Factors:
    """Put the deltas of one group kind side by side."""
    terms, start = [], 0
    for parameter, delta, z in pieces:
        tau, m = delta.shape[-2:]
        terms.append(Term(parameter.start, start, tau, m, None if z is None else z.to(like.dtype)))
        start += tau * m
    if not terms:
        return Factors(like.new_zeros(*leading, 0), ())
    return Factors(torch.cat([delta.flatten(-2) for _, delta, _ in pieces], dim=-1).to(like.dtype), tuple(terms))


def direct_gradient(step: StepJacobian, cotangent: Tensor, groups: ParameterGroups) -> tuple[Tensor, Tensor]:
    """Gradient of one step's parameters at fixed entry state, summed over the streams: ``v F``.

    Args:
        step: the captured step.
        cotangent: ``v = dL/dh[write]``, ``(B, w)``.
        groups: the recurrent parameters.

    Returns:
        Core ``(N_core,)`` and experts ``(E, N_expert)``.
    """
    core = cotangent.new_zeros(groups.core_columns)
    experts = cotangent.new_zeros(groups.num_experts, groups.expert_columns)
    v = cotangent.unsqueeze(1)
    rows = torch.bmm(v, step.core.delta).squeeze(1) if step.core.terms else None
    for term in step.core.terms:
        delta = rows[:, term.delta_slice]  # type: ignore[index]
        value = delta.sum(0) if term.z is None else delta.reshape(-1, term.m).T @ term.z.flatten(0, 1)
        core[term.offset : term.offset + value.numel()] += value.flatten()
    if step.expert.terms:
        index = step.routing.experts.flatten()
        rows = torch.matmul(v.unsqueeze(1), step.expert.delta).squeeze(2)  # (B, k, Σ)
        for term in step.expert.terms:
            delta = rows[..., term.delta_slice].reshape(-1, term.tau, term.m)
            value = delta.sum(1) if term.z is None else torch.bmm(delta.transpose(1, 2), term.z.flatten(0, 1))
            value = value.flatten(1)
            experts[:, term.offset : term.offset + value.shape[1]].index_add_(0, index, value)
    return core, experts
