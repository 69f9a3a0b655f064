"""Capture, checks and influence of one cell: what every front end of the library runs on."""

from __future__ import annotations

import warnings
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from sparse_rtrl.capture.fused import FusedCapture, FusedSteps
from sparse_rtrl.capture.jacobian import (
    JacobianCapture,
    gradients,
    gradients_of_rows,
    nearby,
    refuse_untracked,
    without_hooks,
)
from sparse_rtrl.capture.parameters import ParameterGroups
from sparse_rtrl.capture.segment import StepJacobian
from sparse_rtrl.capture.verify import Verifier, Verify, tolerance_of
from sparse_rtrl.captured import Captured
from sparse_rtrl.cells.slot_cell import Routing, SlotCell, gather_slots, scatter_slots
from sparse_rtrl.errors import ContractError, DisagreementError, NonFiniteError
from sparse_rtrl.influence.estimate import MAX_COMMIT_EVERY, MAX_FUSED_COMMIT_EVERY, check_memory, choose_commit_every
from sparse_rtrl.influence.plan import CatchUp
from sparse_rtrl.influence.sparse import Influence, check_finite
from sparse_rtrl.learners.parametrized import make_picklable
from sparse_rtrl.ops import dispatch
from sparse_rtrl.ops.precision import full_precision

Capture: TypeAlias = Literal["auto", "dense"]
"""How Jacobians are captured: as factors where that is possible, or by dense backward passes."""


class Engine:
    """Capture and influence of one cell, shared by :class:`RTRL` and :class:`~sparse_rtrl.BlockRTRL`.

    Args:
        cell: the cell.
        batch_size: streams ``B``.
        buffer: segments kept for sleeping experts, or ``"auto"``.
        catch_up: how sleeping experts catch up, see :class:`~sparse_rtrl.influence.sparse.Influence`.
        backend: what computes, see :func:`sparse_rtrl.ops.dispatch.select`.
        capture: how Jacobians are captured.
        verify: which captures are compared with an ordinary backward pass, see ``Verifier``.

    Raises:
        ContractError: if the cell has modules that couple the rows of a batch or draw random numbers.
        MemoryError: if the influence does not fit, with the numbers.
    """

    def __init__(
        self,
        cell: SlotCell,
        batch_size: int,
        buffer: int | Literal["auto"],
        catch_up: CatchUp,
        backend: dispatch.Backend = "auto",
        capture: Capture = "auto",
        verify: Verify = "sample",
    ) -> None:
        if not isinstance(cell, SlotCell):
            raise TypeError(f"cell must be a SlotCell, got {type(cell).__name__}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if capture not in get_args(Capture):
            raise ValueError(f"capture must be one of {get_args(Capture)}, got {capture!r}")
        if lazy := [name for name, p in cell.named_parameters() if isinstance(p, UninitializedParameter)]:
            raise ValueError(
                f"cell has parameters whose shape is not known yet: {', '.join(lazy)}. Run the cell once before"
            )
        refused = [
            f"{name or type(module).__name__} ({type(module).__name__}) {why}"
            for name, module in cell.named_modules()
            for why in refusals(module)
        ]
        if type(cell).forward is not SlotCell.forward:
            refused.append(f"{type(cell).__name__} overrides forward, which a learner does not call; override update")
        if refused:
            raise ContractError(refused)
        make_picklable(cell)
        self.cell = cell
        self.batch_size = batch_size
        self.buffer: int | Literal["auto"] = buffer
        self.catch_up = catch_up
        self.backend: dispatch.Backend = backend
        self.capture_by: Capture = capture
        self.verifier = Verifier(verify)
        self.steps = 0
        self._build()

    def _build(self) -> None:
        self.groups = ParameterGroups.of_cell(self.cell)
        if not self.groups.all:
            raise ValueError("cell has no trainable recurrent parameter: there is no influence to carry")
        # Recurrent parameters that are frozen now, watched in case they are unfrozen later.
        self._frozen = [
            p for name, p in self.cell.named_parameters() if not p.requires_grad and not name.startswith("readout.")
        ]
        with torch.no_grad():
            tensors = self.tensors()
        self._expected = [(t.shape, t.dtype, t.device) for t in tensors]
        self._effective: dict[str, tuple[list[Tensor], Tensor]] = {}
        """For each parametrized tensor, the parameters it was last made of, and its value then."""
        like = tensors[0]
        check_memory(self.groups, self.cell.hidden_size, self.batch_size, like)
        self.dtype, self.device = like.dtype, like.device
        self.capture = JacobianCapture(self.cell, self.groups, self.capture_by == "dense")
        self.fused = None
        if self.capture_by == "auto":
            self.fused = FusedCapture.of_cell(self.cell, self.groups, self.backend, like.device, like.dtype)
        self.influence = Influence(
            self.groups,
            self.batch_size,
            self.cell.num_slots,
            self.cell.slot_size,
            self.buffer,
            self.catch_up,
            like.dtype,
            like.device,
            self.backend,
        )

    @full_precision
    def tensors(self) -> list[Tensor]:
        """The tensors the cell uses now for its recurrent parameters, in the order of ``groups.all``."""
        return [p.tensor for p in self.groups.all]

    def checked_tensors(self, look: bool = True) -> list[Tensor]:
        """The :meth:`tensors`, in their own shapes, after checking that the influence was built for them.

        Args:
            look: whether values may be looked at, which recorded steps must not wait for.

        Raises:
            RuntimeError: if a parameter changed its shape, dtype or device.
            ContractError: if a parametrization is not the function of its parameters that it was before.
        """
        if any(p.requires_grad for p in self._frozen):
            self._unfreeze()
        tensors = self.tensors()
        for parameter, tensor, expected in zip(self.groups.all, tensors, self._expected, strict=True):
            now = (tensor.shape, tensor.dtype, tensor.device)
            if now != expected:
                raise RuntimeError(
                    f"parameter {parameter.name} was {describe(*expected)} when the learner was built and is"
                    f" {describe(*now)} now: build a new learner after changing a cell"
                )
        if look:
            self._check_parametrizations(tensors)
        return tensors

    @torch.no_grad()
    @full_precision
    def _check_parametrizations(self, tensors: list[Tensor]) -> None:
        """Refuse parametrizations that change by themselves: their past values give no gradient to the parameters."""
        for parameter, tensor in zip(self.groups.all, tensors, strict=True):
            if not parametrize.is_parametrized(parameter.module, parameter.attribute):
                continue
            sources = [source.detach().clone() for source in parameter.sources]
            again = parameter.module.parametrizations[parameter.attribute]()  # type: ignore[index, union-attr, operator]
            before = self._effective.get(parameter.name)
            self._effective[parameter.name] = sources, tensor.detach().clone()
            same = before is not None and all(map(torch.equal, before[0], sources))
            compared = [again, *([before[1]] if before is not None and same else [])]
            scale = float(tensor.abs().max()) if tensor.numel() else 0.0
            if any(float((tensor - other).abs().max()) > tolerance_of(tensor.dtype) * scale for other in compared):
                raise ContractError(
                    [
                        f"the parametrization of {parameter.name} gives another value for the same parameters: it draws"
                        " random numbers, or a number in it changes. Its influence would be that of another function;"
                        " carry the cell with Carry, which captures each step as it ran"
                    ]
                )

    def _unfreeze(self) -> None:
        names = [
            name for name, p in self.cell.named_parameters() if any(p is f and f.requires_grad for f in self._frozen)
        ]
        warnings.warn(f"{', '.join(names)}: trainable from now on; its influence starts at zero", stacklevel=2)
        old = self.influence
        self._build()
        self.influence.adopt(old)

    def initial_state(self) -> Tensor:
        """State that the streams start from now, ``(B, S, D)``, with its graph.

        Raises:
            ContractError: if it has another shape.
        """
        with torch.enable_grad():
            state = self.cell.initial_state(self.batch_size)
        expected = (self.batch_size, self.cell.num_slots, self.cell.slot_size)
        if not isinstance(state, Tensor) or tuple(state.shape) != expected:
            got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise ContractError([f"initial_state must return a tensor {expected}, got {got}"])
        return state

    @full_precision
    def begin(self, streams: Tensor) -> Tensor:
        """Let streams start: their influence becomes that of their initial state, ``P = dh_0/dθ``.

        Args:
            streams: boolean mask ``(B,)``.

        Returns:
            The initial state of all streams, ``(B, S, D)``, detached.

        Raises:
            ContractError: if it depends on a trainable tensor that is not carried.
        """
        with parametrize.cached(), torch.enable_grad(), without_hooks(self.groups):
            tensors = self.checked_tensors()
            initial = self.initial_state()
            if initial.requires_grad:
                self.influence.begin(streams, *self._initial_influence(initial, tensors))
        return initial.detach().to(self.dtype)

    def _initial_influence(self, initial: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Jacobian of the initial state: core ``(B, H, N_core)``, experts ``(B, E, H, N_expert)``."""
        refuse_untracked(initial, tensors, self.cell)
        batch, hidden = self.batch_size, self.cell.hidden_size
        wanted = [t for t in tensors if t.requires_grad]
        generator = torch.Generator(device="cpu").manual_seed(0)
        cotangent = torch.randn(initial.shape, device="cpu", generator=generator, dtype=torch.float64).to(initial)
        truth = gradients(initial, wanted, cotangent, retain_graph=True)
        rows = gradients_of_rows(self.cell.initial_state(1), wanted, 1)
        v = cotangent.flatten(1).sum(0)
        alike = [None if row is None else torch.tensordot(v, row[0], 1) for row in rows]
        largest = max((float(g.abs().max()) for g in truth if g is not None), default=0.0)
        least = tolerance_of(initial.dtype) * largest
        if any(
            (g is None) != (a is None) or (g is not None and a is not None and float((g - a).abs().max()) > least)
            for g, a in zip(truth, alike, strict=True)
        ):  # each stream has its own
            rows = gradients_of_rows(initial, wanted, batch)
        by_id = {id(t): row for t, row in zip(wanted, rows, strict=True)}
        core = self.influence.core.new_zeros(batch, hidden, self.groups.core_columns)
        experts = core.new_zeros(batch, self.groups.num_experts, hidden, self.groups.expert_columns)
        for parameter, tensor in zip(self.groups.all, tensors, strict=True):
            row = by_id.get(id(tensor))
            if row is None:
                continue
            if parameter.expert:  # (B, H, E, *shape)
                experts[..., parameter.columns] = row.flatten(3).transpose(1, 2)
            else:
                core[..., parameter.columns] = row.flatten(2)
        return core, experts

    def choose_commit_every(self, x: Tensor, state: Tensor) -> int:
        """The cheapest number of steps of a window, by the routing of one step.

        Args:
            x: input ``(B, ...)``.
            state: ``(B, S, D)``.
        """
        with torch.no_grad():
            routing = self.cell.route(x, state)
        most = MAX_COMMIT_EVERY if self.fused is None else MAX_FUSED_COMMIT_EVERY
        return choose_commit_every(self.cell, self.groups, routing, most)

    def run(
        self, xs: Tensor, state: Tensor, tensors: list[Tensor]
    ) -> tuple[Tensor | list[Tensor], list[Captured], Tensor, list[Routing]]:
        """Run consecutive steps and capture them, in the cell's fused pass if it can run now.

        Args:
            xs: inputs ``(n, B, ...)``.
            state: state that enters them, ``(B, S, D)``, with the graph of its past.
            tensors: from :meth:`checked_tensors`.

        Returns:
            Outputs ``(n, B, ...)`` or one by one, what was captured, the new state and what each step touched.

        Raises:
            ContractError, DisagreementError, NonFiniteError: as :meth:`steps_of`.
        """
        if self.fused is not None and self.fused.usable(tensors):
            return self._run_fused(self.fused, xs, state, tensors)
        return self._run_step_by_step(xs, state, tensors)

    def _run_fused(
        self, fused: FusedCapture, xs: Tensor, state: Tensor, tensors: list[Tensor]
    ) -> tuple[Tensor, list[Captured], Tensor, list[Routing]]:
        """Run all steps in one compiled call."""
        steps, slots, new_state = fused.run(xs, state, tensors)
        self._check_fused(steps, new_state, tensors)
        if self.verifier.due():
            fused.compare(steps, slots, state, new_state, tensors, self.verifier, self.steps)
        slots = fused.with_graph(steps, slots, state, tensors)
        return fused.outputs(steps, slots), [steps], new_state, steps.routings

    def _run_step_by_step(
        self, xs: Tensor, state: Tensor, tensors: list[Tensor]
    ) -> tuple[list[Tensor], list[Captured], Tensor, list[Routing]]:
        """Run the cell's own code step by step, and capture the Jacobians of the steps."""
        outputs, entered, routings, ran = [], [], [], []
        for number, x in enumerate(xs, self.steps):
            before = state._version
            with torch.no_grad():
                routing = self.checked_routing(self.cell.route(x, state))
            if state._version != before:
                raise ContractError(["route must not change the state, which it did in place; let it work on a copy"])
            entered.append(state.detach())
            routings.append(routing)
            h_write_new, output = self.cell.update(
                x, gather_slots(state, routing.read), gather_slots(state, routing.write), routing
            )
            self._check_update(h_write_new, output, routing)
            ran.append(h_write_new.detach())
            state = scatter_slots(state, routing.write, h_write_new.to(state.dtype))
            self.check_new_state(state, routing, tensors, number)
            outputs.append(output)
        captured: list[Captured] = [*self.steps_of(xs, entered, routings, tensors, ran, self.steps)]
        return outputs, captured, state, routings

    def _check_update(self, h_write_new: Tensor, output: Tensor, routing: Routing) -> None:
        expected = (self.batch_size, routing.write.shape[1], self.cell.slot_size)
        if tuple(h_write_new.shape) != expected:
            raise ContractError(
                [f"update must return the written slots first, shape {expected}, got {tuple(h_write_new.shape)}"]
            )
        if not isinstance(output, Tensor) or output.shape[:1] != (self.batch_size,):
            raise ContractError([f"update must return an output (B, ...) second, got {described(output)}"])

    def steps_of(
        self,
        xs: Tensor,
        states: list[Tensor],
        routings: list[Routing],
        tensors: list[Tensor],
        ran: list[Tensor],
        number: int,
    ) -> list[StepJacobian]:
        """Capture consecutive steps and check that their Jacobians are finite. Changes nothing.

        Args:
            xs: inputs ``(n, B, ...)``.
            states: state that entered each step, ``(B, S, D)``, detached.
            routings: what each step touched.
            tensors: from :meth:`checked_tensors`.
            ran: new content of the written slots of each step, ``(B, kw, D)``, detached.
            number: number of the first step, for messages.

        Returns:
            State Jacobian and factored immediate Jacobians of each step.

        Raises:
            ContractError: if a step cannot be carried exactly, see :meth:`JacobianCapture.step`.
            DisagreementError: if a step was compared with an ordinary backward pass and disagrees.
            NonFiniteError: if a Jacobian holds NaN or infinity.
        """
        steps = self.capture.steps(xs, states, routings, tensors, ran)
        totals = [value.sum() for step in steps for value in (step.Jh, step.core.delta, step.expert.delta)]
        if not bool(torch.isfinite(torch.stack(totals).sum())):
            for position, step in enumerate(steps):
                self._raise_non_finite(step, tensors, number + position)
        if self.verifier.due():
            t = self.verifier.choose(len(steps))
            try:
                self.capture.compare(steps[t], xs[t], states[t], routings[t], tensors, self.verifier, number + t)
            except DisagreementError:  # at a kink, rounding alone may do that: once more from states nearby
                near = [nearby(state) for state in states]
                again = self.capture.steps(xs, near, routings, tensors, None)
                self.capture.compare(again[t], xs[t], near[t], routings[t], tensors, self.verifier, number + t)
        return steps

    def _check_fused(self, steps: FusedSteps, state: Tensor, tensors: list[Tensor]) -> None:
        """Check that all that fused steps computed is finite, and the state after them.

        Raises:
            NonFiniteError: naming the first bad step, and the parameters that hold NaN or infinity, or else the state.
        """
        if bool(torch.isfinite(steps.saved.sum() + state.sum())):
            return
        for position in range(steps.count):
            last = position + 1 == steps.count
            values = (steps.saved[position], state) if last else (steps.saved[position],)
            if not all(bool(torch.isfinite(value).all()) for value in values):
                self._check_parameters(steps.routings[position], tensors, self.steps + position)
                for value in values:
                    check_finite(self.steps + position, {"the new state": value})

    def check_new_state(self, state: Tensor, routing: Routing, tensors: list[Tensor], number: int) -> None:
        """Check that the state after step ``number`` is finite.

        Raises:
            NonFiniteError: naming the parameters that hold NaN or infinity, or else the state.
        """
        if not bool(torch.isfinite(state.detach().sum())):
            self._check_parameters(routing, tensors, number)
            check_finite(number, {"the new state": state})

    def _check_parameters(self, routing: Routing, tensors: list[Tensor], number: int) -> None:
        every = list(range(self.batch_size))
        for parameter, tensor in zip(self.groups.all, tensors, strict=True):
            bad = ~torch.isfinite(tensor.detach())
            if parameter.expert:
                broken = bad.flatten(1).any(1)[routing.experts]  # (B, k)
                if bool(broken.any()):
                    experts = sorted(set(routing.experts[broken].tolist()))
                    streams = broken.any(1).nonzero().flatten().tolist()
                    raise NonFiniteError(number, streams, f"{parameter.name} of experts {experts}")
            elif bool(bad.any()):
                raise NonFiniteError(number, every, f"{parameter.name} (core)")

    def _raise_non_finite(self, step: StepJacobian, tensors: list[Tensor], number: int) -> None:
        """Name the parameters, or else the Jacobian, that hold NaN or infinity."""
        self._check_parameters(step.routing, tensors, number)
        values = {
            "the state Jacobian": step.Jh,
            "the immediate Jacobian of the core group": step.core.delta,
            "the immediate Jacobian of the active experts": step.expert.delta,
        }
        check_finite(number, values)

    def past_gradients(self, position: int, u: Tensor, number: int) -> list[Tensor]:
        """Gradients through the past before a segment, in the order of ``groups.all``.

        Args:
            position: place of the segment in the window.
            u: gradient of the loss by the state that entered it, ``(B, S, D)``.
            number: number of its first step, for messages.
        """
        return self.groups.split(*self.influence.loss_gradient(position, u.flatten(1), number))

    def add_to_grad(self, core: Tensor, experts: Tensor) -> None:
        """Add gradients, core ``(N_core,)`` and experts ``(E, N_expert)``, to ``.grad``, through parametrizations."""
        for parameter, gradient in zip(self.groups.all, self.groups.split(core, experts), strict=True):
            if not parameter.trainable or not bool(gradient.any()):
                continue
            with torch.enable_grad():
                tensor = parameter.tensor
            torch.autograd.backward(tensor, gradient)

    def load_influence(self, state: dict[str, Any]) -> None:
        """Restore what ``influence.state_dict()`` returned.

        Raises:
            ValueError: if it does not fit; nothing is changed then.
        """
        self.influence.load_state_dict(state, self._restore)

    def _restore(self, state: dict[str, Any]) -> Captured:
        """A captured piece of a window from its ``state_dict``."""
        if "saved" not in state:
            return StepJacobian.from_state_dict(state, self.device)
        if self.fused is None:
            raise ValueError("the state holds steps of a compiled pass, which is not there: use the same backend")
        return self.fused.restore(state)

    def flush(self) -> None:
        """Add the deferred gradients of sleeping experts, and every loss row not handed out yet, to ``.grad``.

        Raises:
            DisagreementError: if a comparison on a CUDA device found one; nothing is added then.
        """
        self.verifier.settle()
        deferred = self.influence.flush()
        if deferred is not None:
            self.add_to_grad(*deferred)

    def checked_mask(self, streams: Tensor | None) -> Tensor:
        """A mask of streams ``(B,)`` on the engine's device, see :func:`checked_mask`."""
        return checked_mask(streams, self.batch_size, self.device)

    def checked_routing(self, routing: Routing) -> Routing:
        """A copy of a routing, which the caller may reuse, after checking that it is well formed.

        Raises:
            ContractError: on wrong shapes or dtypes, and on duplicate or out-of-range indices.
        """
        for name, index, size, owner in (
            ("read", routing.read, self.cell.num_slots, "num_slots"),
            ("write", routing.write, self.cell.num_slots, "num_slots"),
            ("experts", routing.experts, self.cell.num_experts, "num_experts"),
        ):
            if index.dim() != 2 or index.shape[0] != self.batch_size or index.dtype != torch.int64:
                raise ContractError(
                    [f"routing.{name} must be int64 ({self.batch_size}, k), got {index.dtype} {tuple(index.shape)}"]
                )
            for stream, row in enumerate(index.tolist()):
                if len(set(row)) != len(row):
                    raise ContractError([f"routing.{name} must be distinct within a row, got {row} in stream {stream}"])
                if row and not (min(row) >= 0 and max(row) < size):
                    raise ContractError(
                        [f"routing.{name} must lie in 0 ... {owner} - 1 = {size - 1}, got {row} in stream {stream}"]
                    )
        return Routing(routing.read.clone(), routing.write.clone(), routing.experts.clone())


def checked_mask(streams: Tensor | None, batch_size: int, device: torch.device) -> Tensor:
    """A mask of streams ``(B,)`` on a device; None stands for all.

    Raises:
        ValueError: if it is no boolean mask of that shape.
    """
    if streams is None:
        return torch.ones(batch_size, dtype=torch.bool, device=device)
    got = f"{streams.dtype} {tuple(streams.shape)}" if isinstance(streams, Tensor) else type(streams).__name__
    if got != f"{torch.bool} ({batch_size},)":
        raise ValueError(f"streams must be a bool mask of shape ({batch_size},), got {got}")
    return streams.to(device)


def refusals(module: nn.Module) -> list[str]:
    """Why a learner cannot run a module exactly, if it cannot."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
        return ["couples the rows of the batch in training; use a norm per row, or eval()"]
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
        return ["draws random numbers in training, so a captured step is not the step that ran; remove it, or eval()"]
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
        return ["has sparse gradients, which cannot be carried; use sparse=False"]
    return []


def described(value: Any) -> str:
    """A value's shape, if it is a tensor, or else its type, for messages."""
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def describe(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    """A tensor's dtype, shape and device, for messages."""
    return f"{dtype} {tuple(shape)} on {device}"
