"""A learning step of fixed shapes that looks at no value on the host, recorded once as CUDA graphs and replayed.

Two graphs, split at the output, because the criterion is the user's: the first runs a segment and captures its
Jacobians; the second takes ``dL/doutput`` backwards, forms the loss row with the influence at the entry, and commits.
Work that otherwise depends on what was chosen has a fixed size here: every expert moves at every commit, and a segment
of several steps covers all slots.

A recorded segment reads copies of the parameters that it takes first, so that what changes them before its backward
pass changes nothing in it. Two checks are noted on the device: that what was captured is what ran, and that no row of
the batch influences another. The host reads them without waiting, one replay late.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from sparse_rtrl.capture.parameters import RecurrentParameter
from sparse_rtrl.capture.segment import StepJacobian, compose_fixed
from sparse_rtrl.cells.slot_cell import gather_slots, scatter_slots
from sparse_rtrl.errors import ContractError, NonFiniteError
from sparse_rtrl.learners.engine import Engine
from sparse_rtrl.ops import dispatch
from sparse_rtrl.ops.precision import full_precision

WARM_UPS = 3
"""Runs before a recording: capture is checked in the first two, and libraries allocate what they need."""

Record: TypeAlias = Callable[[Sequence[Callable[[], None]]], Sequence[Callable[[], None]]]
"""From functions on fixed tensors to functions that repeat what they did."""


class CannotRecord(RuntimeError):
    """A cell whose step cannot be recorded, with the reason."""


def record_graphs(functions: Sequence[Callable[[], None]]) -> Sequence[Callable[[], None]]:
    """Record functions that run one after the other as CUDA graphs with one memory pool."""
    pool = torch.cuda.graph_pool_handle()
    replays = []
    for function in functions:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            function()
        replays.append(graph.replay)
    return replays


def run_directly(functions: Sequence[Callable[[], None]]) -> Sequence[Callable[[], None]]:
    """Record nothing: the same fixed work on any device, for comparing it with the ordinary step."""
    return functions


@contextmanager
def _restored(*tensors: Tensor) -> Iterator[None]:
    """Give tensors their values back when the block ends, whatever ran in it."""
    kept = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)


@dataclass
class _Segment:
    """Fixed tensors of one segment length, and what runs on them.

    Attributes:
        xs: inputs ``(n, B, ...)``.
        outputs: ``(n, B, ...)``.
        cotangent: ``dL/doutputs``.
        gradient: gradients of all parameters side by side.
        start: entry state, the leaf of the segment's graph.
        leaves: what the cell used for its recurrent parameters.
        steps: what was captured.
        forward: run the segment and capture it.
        backward: from ``cotangent`` to ``gradient``, then commit.
        commit: commit alone, of a segment without a loss.
    """

    xs: Tensor
    outputs: Tensor = field(init=False)
    cotangent: Tensor = field(init=False)
    gradient: Tensor = field(init=False)
    start: Tensor = field(init=False)
    leaves: list[Tensor] = field(init=False)
    steps: list[StepJacobian] = field(init=False)
    forward: Callable[[], None] = field(init=False)
    backward: Callable[[], None] = field(init=False)
    commit: Callable[[], None] = field(init=False)


class FixedSteps:
    """Runs a learner's segments with fixed work; its influence is that of the engine, in the eager plan.

    Args:
        engine: what captures, and where the influence lives.
        state: current state ``(B, S, D)``.
        record: how the two halves of a segment are repeated; CUDA graphs by default.
    """

    def __init__(self, engine: Engine, state: Tensor, record: Record = record_graphs) -> None:
        self.engine = engine
        self.record = record
        self._ops = dispatch.select(engine.backend, engine.device, engine.dtype)
        self.state = state.clone()
        """State after the last segment; changed in place."""
        self.finite = torch.ones((), dtype=torch.bool, device=state.device)
        """Whether everything was finite so far; kept on the device, since reading it waits for the device."""
        self.agrees = torch.ones((), dtype=torch.bool, device=state.device)
        """Whether what was captured was what ran so far, row by row; on the device."""
        self._read = torch.ones((), dtype=torch.bool, pin_memory=state.is_cuda)
        self._read_view = self._read.numpy()
        self._arrived = torch.cuda.Event() if state.is_cuda else None
        self._copies: dict[int, torch.nn.Parameter] = {}
        self._effective: dict[str, Tensor] = {}
        self._segments: dict[Any, _Segment] = {}
        self._pending: _Segment | None = None
        self._number = 0
        self._others: list[torch.nn.Parameter] = []
        self._recorded_with: list[tuple[int, bool]] = []
        self._influence = engine.influence
        self._influence.influenced.fill_(True)

    def _parametrized(self) -> list[RecurrentParameter]:
        return [p for p in self.engine.groups.all if parametrize.is_parametrized(p.module, p.attribute)]

    def run(self, xs: Tensor, tensors: list[Tensor]) -> Tensor:
        """Run a segment, after :meth:`finish`.

        Args:
            xs: inputs ``(n, B, ...)``.
            tensors: from :meth:`~sparse_rtrl.learners.engine.Engine.checked_tensors`.

        Returns:
            Outputs ``(n, B, ...)``.

        Raises:
            CannotRecord: with the reason; the learner is as it was.
        """
        if self.engine.influence is not self._influence:
            raise CannotRecord("a parameter was unfrozen")
        # A recording reads the parameters where they lie in memory: record again if they moved, or others train.
        now = [(p.data_ptr(), p.requires_grad) for p in self.engine.cell.parameters()]
        if now != self._recorded_with:
            self._segments.clear()
            self._recorded_with = now
            carried = {id(source) for p in self.engine.groups.all for source in p.sources}
            self._others = [p for p in self.engine.cell.parameters() if p.requires_grad and id(p) not in carried]
            self._copies = {
                id(p): torch.nn.Parameter(p.detach().clone(), p.requires_grad) for p in self.engine.cell.parameters()
            }
            self._effective = {p.name: p.tensor.detach().clone().requires_grad_() for p in self._parametrized()}
        for parameter, tensor in zip(self.engine.groups.all, tensors, strict=True):
            if parameter.name in self._effective:
                with torch.no_grad():
                    self._effective[parameter.name].copy_(tensor)
        key = (tuple(xs.shape), xs.dtype)
        if key not in self._segments:
            self._segments[key] = self._new_segment(xs)
        segment = self._segments[key]
        segment.xs.copy_(xs)
        segment.forward()
        self._read.copy_(self.agrees, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
        self._pending = segment
        self._number += 1
        parameters = [*tensors, *self._others]
        if not any(p.requires_grad for p in parameters):
            return segment.outputs.detach().clone()
        return _Replay.apply(self, self._number, segment.outputs.detach(), *parameters)

    def gradients(self, number: int, cotangent: Tensor) -> Tensor:
        """Gradients of all parameters side by side for ``dL/doutputs`` of the segment with a number."""
        if number != self._number or self._pending is None:
            raise RuntimeError(
                "backward came too late or twice: with cuda_graph a segment is committed by its backward, or when the"
                " next one begins; add the losses up and call backward once, before the next step or reset"
            )
        segment, self._pending = self._pending, None
        segment.cotangent.copy_(cotangent)
        segment.backward()
        return segment.gradient.clone()

    def finish(self) -> None:
        """Commit the last segment if none of its losses went backwards."""
        if self._pending is not None:
            self._pending.commit()
            self._pending = None

    def check_agreement(self) -> None:
        """Report a replay that did not capture what it ran, if that is known by now; does not wait for the device.

        Raises:
            ContractError: once; the influence has moved through the replay already.
        """
        if (self._arrived is None or self._arrived.query()) and not bool(self._read_view):
            self._refuse()

    def check(self) -> None:
        """Report NaN or infinity, or what :meth:`check_agreement` does, once; waits for the device.

        Raises:
            NonFiniteError: if anything since the last check was not finite.
            ContractError: if a replay did not capture what it ran.
        """
        if not bool(self.agrees):
            self._refuse()
        if not bool(self.finite):
            self.finite.fill_(True)
            raise NonFiniteError(self.engine.steps, list(range(self.engine.batch_size)), "a recorded step")

    def _refuse(self) -> None:
        self.agrees.fill_(True)
        self._read_view[...] = True
        raise ContractError(
            [
                f"a recorded step before step {self.engine.steps} was not what was captured, and the influence has"
                " moved through it: rows of the batch influence each other, or update draws random numbers. Build the"
                " learner without cuda_graph to learn which, and reset all streams"
            ]
        )

    def _new_segment(self, xs: Tensor) -> _Segment:
        if reason := self._obstacle():
            raise CannotRecord(reason)
        segment, influence = _Segment(xs.clone()), self.engine.influence
        try:
            with _restored(influence.core, influence.experts, self.state, self.finite, self.agrees):
                self._warm_up(segment)
                if dense := self.engine.capture.dense:
                    raise CannotRecord(f"{', '.join(sorted(dense))}: their dense immediate Jacobians")
                halves = [functools.partial(self._forward, segment, self.agrees)]
                halves += [functools.partial(half, segment) for half in (self._backward, self._commit)]
                segment.forward, segment.backward, segment.commit = self.record(halves)
        except CannotRecord:
            raise
        except RuntimeError as error:
            raise CannotRecord(str(error).splitlines()[0]) from error
        return segment

    def _warm_up(self, segment: _Segment) -> None:
        """Run a segment a few times, on a stream of its own where the device has streams."""
        side = torch.cuda.Stream() if segment.xs.is_cuda else None
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._forward(segment, None)
                segment.cotangent = torch.zeros_like(segment.outputs)
                self._backward(segment)
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)

    def _obstacle(self) -> str:
        """Why a cell cannot be recorded, as far as this shows before it runs; empty if it seems possible."""
        cell = self.engine.cell
        for name, parameter in cell.named_parameters():
            if parameter._backward_hooks:
                return f"parameter {name} has a hook, which would run once and never again"
        for name, module in cell.named_modules():
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
                return f"module {name or type(module).__name__} has a hook, which would run once and never again"
        return ""

    @contextmanager
    def _fixed_weights(self) -> Iterator[None]:
        """Let the cell use the copies; for a parametrized weight its value, as what makes it is not recorded."""
        parametrized = [(p, p.module.get_submodule(f"parametrizations.{p.attribute}")) for p in self._parametrized()]
        owned = [
            (module._parameters, name, parameter)
            for module in self.engine.cell.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        try:
            for p, made_by in parametrized:
                made_by.forward = lambda p=p: self._effective[p.name]  # type: ignore[method-assign, assignment]
            with torch.no_grad():
                for parameters, name, parameter in owned:
                    parameters[name] = copied = self._copies[id(parameter)]
                    copied.copy_(parameter)
            yield
        finally:
            for parameters, name, parameter in owned:
                parameters[name] = parameter
            for _, made_by in parametrized:
                vars(made_by).pop("forward", None)

    def _forward(self, segment: _Segment, agrees: Tensor | None) -> None:
        """Run and capture; checks clear ``agrees``, and raise where it is None."""
        engine = self.engine
        segment.start = state = self.state.clone().requires_grad_()
        outputs, entered, routings, ran = [], [], [], []
        with torch.enable_grad(), self._fixed_weights(), parametrize.cached():
            segment.leaves = engine.tensors()
            for x in segment.xs:
                with torch.no_grad():
                    routing = engine.cell.route(x, state)
                entered.append(state.detach())
                routings.append(routing)
                h_write_new, output = engine.cell.update(
                    x, gather_slots(state, routing.read), gather_slots(state, routing.write), routing
                )
                ran.append(h_write_new.detach())
                state = scatter_slots(state, routing.write, h_write_new.to(state.dtype))
                outputs.append(output)
            segment.outputs = torch.stack(outputs)
            segment.steps = engine.capture.steps(segment.xs, entered, routings, segment.leaves, ran, agrees)
        self.state.copy_(state.detach())

    @full_precision
    def _backward(self, segment: _Segment) -> None:
        engine = self.engine
        influence, groups = engine.influence, engine.groups
        tensors = [segment.start, *segment.leaves, *(self._copies[id(p)] for p in self._others)]
        wanted = [t for t in tensors if t.requires_grad]
        found = torch.autograd.grad(segment.outputs, wanted, segment.cotangent, allow_unused=True)
        by_id = {id(t): g for t, g in zip(wanted, found, strict=True) if g is not None}
        u, *direct = [by_id.get(id(t), torch.zeros_like(t)) for t in tensors]
        with torch.no_grad():
            u = u.flatten(1)
            self._ops.loss_row_(influence.core, u, torch.arange(len(u), device=u.device))
            core = influence.core[:, -1].sum(0)
            influence.core[:, -1].zero_()
            experts = u.new_zeros(groups.num_experts, groups.expert_columns)
            if groups.num_experts:
                rows = torch.arange(len(influence.experts), device=u.device)
                self._ops.loss_row_(influence.experts, u.repeat_interleave(groups.num_experts, 0), rows)
                experts = influence.experts[:, -1].unflatten(0, (-1, groups.num_experts)).sum(0)
                influence.experts[:, -1].zero_()
            past = groups.split(core, experts)
            total = [a + b for a, b in zip(direct, past, strict=False)] + direct[len(past) :]
            segment.gradient = torch.cat([t.flatten() for t in total])
            self.finite.logical_and_(torch.isfinite(segment.gradient.sum()))
        self._commit(segment)

    @full_precision
    @torch.no_grad()
    def _commit(self, segment: _Segment) -> None:
        engine = self.engine
        influence, groups = engine.influence, engine.groups
        moved, idle = compose_fixed(segment.steps, groups.num_experts, engine.cell.num_slots, engine.cell.slot_size)
        for P, factors in ((influence.core, moved.core), (influence.experts, moved.expert)):
            if len(factors.groups):
                self._ops.influence_update_(
                    P,
                    moved.Jh,
                    moved.write,
                    moved.support,
                    None,
                    factors.streams,
                    factors.groups,
                    factors.deltas,
                    factors.zs,
                    factors.offsets,
                )
        if len(idle):
            streams = torch.div(idle, groups.num_experts, rounding_mode="floor")
            self._ops.influence_update_(
                influence.experts, moved.Jh, moved.write, moved.support, None, streams, idle, [], [], []
            )
        self.finite.logical_and_(torch.isfinite(self.state.sum() + moved.Jh.sum()))


class _Replay(torch.autograd.Function):
    """The outputs of a segment as a function of all parameters; its backward pass replays the second half."""

    @staticmethod
    def forward(ctx: Any, steps: FixedSteps, number: int, outputs: Tensor, *parameters: Tensor) -> Tensor:
        """Return the outputs as a new tensor."""
        ctx.steps, ctx.number = steps, number
        ctx.shapes = [p.shape for p in parameters]
        return outputs.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:  # type: ignore[override]
        """Gradients of the parameters, through the segment and the whole past before it."""
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True is not supported: the influence is not differentiable")
        flat = ctx.steps.gradients(ctx.number, cotangent)
        parts = flat.split([shape.numel() for shape in ctx.shapes])
        return None, None, None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))
