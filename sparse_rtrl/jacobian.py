"""Capture of a step's state Jacobian and factored immediate Jacobians by one ordinary backward pass.

``SlotCell.update`` works row by row of the batch. Its inputs are repeated ``w`` times, once per written state entry,
and one backward pass with the identity as cotangent gives all rows of the Jacobians at once. Parameters never enter
that graph: where ``update`` hands one to a known linear map ``y = W z``, the map is evaluated with detached parameters,
and the backward pass is asked for ``delta = dh[write]/dy``; together with ``z`` that is the immediate Jacobian,
factored.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sparse_rtrl.errors import ContractError
from sparse_rtrl.factor_capture import FactorCapture, Piece, flat_row
from sparse_rtrl.parameters import ParameterGroups, RecurrentParameter
from sparse_rtrl.precision import full_precision
from sparse_rtrl.slot_cell import Routing, SlotCell, gather_slots

ROWS_TOGETHER = 4096
"""Most rows, one per stream and written state entry, of steps that are captured together: bounds their memory."""
_PARTS = ("read", "write", "experts")


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

    @property
    def routings(self) -> list[Routing]:
        """What the step touched, as a list."""
        return [self.routing]

    def state_dict(self) -> dict[str, Any]:
        """Everything in it, as tensors, numbers and containers of them; the tensors are not copied."""
        factors = {
            name: {"delta": kind.delta, "terms": [tuple(getattr(t, f.name) for f in fields(Term)) for t in kind.terms]}
            for name, kind in (("core", self.core), ("expert", self.expert))
        }
        return {"Jh": self.Jh, **{part: getattr(self.routing, part) for part in _PARTS}, **factors}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> StepJacobian:
        """Rebuild what :meth:`state_dict` described, on a device."""

        def on_device(values: Iterable[Any]) -> list[Any]:
            return [value.to(device) if isinstance(value, Tensor) else value for value in values]

        core, expert = (
            Factors(state[name]["delta"].to(device), tuple(Term(*on_device(t)) for t in state[name]["terms"]))
            for name in ("core", "expert")
        )
        return cls(state["Jh"].to(device), Routing(*on_device(state[part] for part in _PARTS)), core, expert)


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

    def state_dict(self) -> dict[str, Any]:
        """What was found out about ``update``: it decides which steps are captured together, and so how they round."""
        return {"dense": sorted(self.dense), "checked": sorted(self._checked, key=repr)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.dense, self._checked = set(state["dense"]), set(state["checked"])

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
            # At a state of zeros, where streams begin, a weight that multiplies the state shows nothing.
            generator = torch.Generator(device="cpu").manual_seed(1)
            probe = torch.randn(state.shape, generator=generator, dtype=torch.float64).to(state)
            probed, probed_signature = self._expanded(x, probe, routing, tracked)
            if probed_signature == signature:
                wrong |= self._disagreeing(probed, x, probe, routing, tensors)
            self._check_transition(x, state, routing)
            self._checked.add(signature)
            if not wrong:
                return step
            self._note_dense(wrong)

    def steps(
        self, xs: Tensor, states: list[Tensor], routings: list[Routing], tensors: list[Tensor]
    ) -> list[StepJacobian]:
        """Capture consecutive steps together: a step that was run is only rows of a batch, as its streams are.

        Args:
            xs: inputs ``(n, B, ...)``.
            states: state that entered each step, ``(B, S, D)``, detached.
            routings: what each step touched.
            tensors: as for :meth:`step`.

        Returns:
            What :meth:`step` returns for each of them.
        """
        out: list[StepJacobian] = []
        while len(out) < len(states):
            first = len(out)
            last = first + self._steps_together(routings[first:], states[first])
            if last == first + 1:
                out.append(self.step(xs[first], states[first], routings[first], tensors))
            else:
                joined = Routing(*(torch.cat([getattr(r, part) for r in routings[first:last]]) for part in _PARTS))
                state = torch.cat(states[first:last])
                captured = self.step(xs[first:last].flatten(0, 1), state, joined, tensors)
                out += _split(captured, routings[first:last])
        return out

    def _steps_together(self, routings: list[Routing], state: Tensor) -> int:
        """How many of the next steps are captured together: those of equal shapes, within bounded memory."""
        if self.dense or not self._checked:
            return 1  # dense rows cost the square of the batch, and which parameters need them shows at the first step
        shapes = [[getattr(r, part).shape for part in _PARTS] for r in routings]
        rows = routings[0].write.numel() * state.shape[2]
        most = max(1, ROWS_TOGETHER // max(rows, 1))
        return next((i for i, shape in enumerate(shapes[:most]) if shape != shapes[0]), min(most, len(shapes)))

    def _check_transition(self, x: Tensor, state: Tensor, routing: Routing) -> None:
        """Refuse a step that draws random numbers, or whose ``transition`` is not the first part of its ``update``."""
        h_read, h_write = gather_slots(state, routing.read), gather_slots(state, routing.write)
        with torch.no_grad():
            before = torch.get_rng_state()
            content, _ = self.cell.update(x, h_read, h_write, routing)
            if not torch.equal(before, torch.get_rng_state()):
                raise ContractError(["update draws random numbers: a captured step is not the step that ran"])
            captured = self.cell.transition(x, h_read, h_write, routing)
        if not torch.allclose(content, captured, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise ContractError(["transition must return the written slots that update returns first; they differ"])

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
        # Copies: an update may change them in place, which autograd refuses for the parts of a split.
        h_read, h_write = (part.clone() for part in h.split((routing.read.shape[1], routing.write.shape[1]), dim=1))
        repeated = routing.repeat_interleave(width)
        capture = FactorCapture(tracked, batch, width, routing.experts, repeated.experts, set(self.dense))
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
        capture.uses.clear()  # they refer back to the capture: the expanded graph would live until a garbage collection
        pieces += self._dense_pieces(x, state, routing, tracked)
        signature = (self.cell.training, *((p.name, tuple(delta.shape)) for p, delta, _ in pieces))
        core = _join([piece for piece in pieces if not piece[0].expert], (batch, width), state)
        expert = _join([piece for piece in pieces if piece[0].expert], (batch, routing.experts.shape[1], width), state)
        return StepJacobian(Jh.to(state.dtype), routing, core, expert), signature

    def _dense_pieces(
        self, x: Tensor, state: Tensor, routing: Routing, tracked: dict[int, RecurrentParameter]
    ) -> list[Piece]:
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
        pieces: list[Piece] = []
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is None:
                continue
            if parameter.expert:  # (B * w, E, ...) to the active experts, (B, k, w, 1, n)
                delta = grad.reshape(batch, rows // batch, len(grad[0]), -1).transpose(1, 2)
                idle = delta.any(-1).any(2).scatter(1, routing.experts, False)
                if bool(idle.any()):
                    experts = sorted(set(idle.nonzero()[:, 1].tolist()))
                    raise ContractError([f"inactive experts {experts} have influence through {parameter.name}"])
                active = routing.experts.view(batch, -1, 1, 1).expand(-1, -1, *delta.shape[2:])
                pieces.append((parameter, delta.gather(1, active).unsqueeze(3), None))
            else:
                pieces.append((parameter, flat_row(grad.view(batch, rows // batch, *grad.shape[1:])), None))
        return pieces

    def _local_forward(
        self, x: Tensor, state: Tensor, routing: Routing, parameters: list[RecurrentParameter]
    ) -> tuple[Tensor, list[Tensor]]:
        """The step alone, at fixed entry state: written content and the parameters it depends on."""
        slot_size = state.shape[2]
        h = state.gather(1, routing.support.unsqueeze(-1).expand(-1, -1, slot_size))
        h_read, h_write = (part.clone() for part in h.split((routing.read.shape[1], routing.write.shape[1]), dim=1))
        with torch.enable_grad(), _without_hooks(self.cell):
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
        device = content.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else content.dtype
        tolerance = min(0.2, 50 * torch.finfo(dtype).eps ** 0.75)
        scale = max((float(g.abs().max()) for g in truth if g is not None), default=0.0)
        wrong = set()
        for parameter, g in zip(parameters, truth, strict=True):
            expected = torch.zeros_like(parameter.tensor) if g is None else g
            if parameter.name in self.dense or not torch.isfinite(expected).all():
                continue
            own = max(float(expected.abs().max()), 1e-2 * scale)
            if float((found[parameter.name] - expected).abs().max()) > tolerance * own:
                wrong.add(parameter.name)
        return wrong


@contextmanager
def _without_hooks(cell: SlotCell) -> Iterator[None]:
    """Replace parameters that have gradient hooks by aliases without them: a hook is meant for whole gradients."""
    swapped = [
        (module, name, parameter)
        for module in cell.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter._backward_hooks
    ]
    aliases = {id(parameter): torch.nn.Parameter(parameter.detach()) for _, _, parameter in swapped}
    try:
        for module, name, parameter in swapped:
            module._parameters[name] = aliases[id(parameter)]
        yield
    finally:
        for module, name, parameter in swapped:
            module._parameters[name] = parameter


def _split(captured: StepJacobian, routings: list[Routing]) -> list[StepJacobian]:
    """Take apart steps that were captured as one batch."""
    count = len(routings)

    def parts(factors: Factors) -> list[Factors]:
        zs = [[None] * count if term.z is None else term.z.chunk(count) for term in factors.terms]
        return [
            Factors(delta, tuple(replace(term, z=z[t]) for term, z in zip(factors.terms, zs, strict=True)))
            for t, delta in enumerate(factors.delta.chunk(count))
        ]

    Jhs = captured.Jh.chunk(count)
    every = zip(Jhs, routings, parts(captured.core), parts(captured.expert), strict=True)
    return [StepJacobian(*step) for step in every]


def _join(pieces: list[Piece], leading: tuple[int, ...], like: Tensor) -> Factors:
    """Put the deltas of one group kind side by side."""
    terms, start = [], 0
    for parameter, delta, z in pieces:
        tau, m = delta.shape[-2:]
        terms.append(Term(parameter.start, start, tau, m, None if z is None else z.to(like.dtype)))
        start += tau * m
    if not terms:
        return Factors(like.new_zeros(*leading, 0), ())
    return Factors(torch.cat([delta.flatten(-2) for _, delta, _ in pieces], dim=-1).to(like.dtype), tuple(terms))


@full_precision
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
