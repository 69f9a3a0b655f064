"""The fused pass of ``SlotMoECell``: whole segments forward, and rows of Jacobians backward, in compiled operations.

The general capture runs a cell's Python code for every step and again for its Jacobians. Here one call runs all steps
of a segment and keeps what their backward pass reads; whatever is asked of the segment later is rows sent back through
it: one row per stream for a loss, one row per written state entry for a commit.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_rtrl import ops
from sparse_rtrl.cells.slot_moe import SlotMoECell
from sparse_rtrl.errors import ContractError
from sparse_rtrl.expert_bank import ExpertBank
from sparse_rtrl.jacobian import DISAGREEMENT, nearby, without_hooks
from sparse_rtrl.parameters import ParameterGroups
from sparse_rtrl.reference import slot_entries
from sparse_rtrl.segment import GroupFactors, Segment
from sparse_rtrl.slot_cell import Routing, SlotCell, gather_slots, scatter_slots
from sparse_rtrl.verify import OTHER_STREAMS, STATE, Verifier, tolerance_of

_CORE = (
    "slot_table",
    "query_token.weight",
    "query_token.bias",
    "key_value.weight",
    "control.weight",
    "control.bias",
    "core.weight",
)
_EXPERT = ("experts.weight", "experts.bias")
_WEIGHTS = (
    "slot_table",
    "key_value.weight",
    "control.weight",
    "control.bias",
    "core.weight",
    "experts.weight",
    "experts.bias",
)
"""Weights in the order of the operations."""
_METHODS = {"forward", "route", "transition", "update", "output"}
COMPARED = 4
"""Most steps of a call that are compared with the cell's own code."""
_TOGETHER = 2**14
"""Steps of streams that are evaluated in one call; what the operation keeps for a backward pass grows with it."""


@dataclass(frozen=True)
class FusedSteps:
    """Consecutive steps as one call of the forward pass left them, with the weights that they were run with.

    Attributes:
        of: the pass that ran them.
        inputs: ``(n, B, input_size)``.
        saved: what the backward pass reads, ``(n, B, ...)``.
        index: slots read, slots written and experts of each step, ``(n, B, kr + kw + k)`` int64.
        weights: copies of the weights that the backward pass reads.
    """

    of: SlotMoePass
    inputs: Tensor
    saved: Tensor
    index: Tensor
    weights: list[Tensor]

    @property
    def count(self) -> int:
        """Number of steps."""
        return len(self.index)

    @property
    def routings(self) -> list[Routing]:
        """What each step touched."""
        return [Routing(*row.split(self.of.sizes[1:], dim=1)) for row in self.index]

    @property
    def experts(self) -> Tensor:
        """Experts that any step used, with repeats, ``(B, n * k)``."""
        return self.index[..., -self.of.sizes[3] :].transpose(0, 1).flatten(1)

    def state_dict(self) -> dict[str, Any]:
        """Everything in it; the tensors are not copied."""
        tensors = {"inputs": self.inputs, "saved": self.saved, "index": self.index, "weights": list(self.weights)}
        return {"sizes": self.of.sizes, **tensors}

    @classmethod
    def from_state_dict(cls, of: SlotMoePass, state: dict[str, Any]) -> FusedSteps:
        """Rebuild what :meth:`state_dict` described."""
        return cls(of, state["inputs"], state["saved"], state["index"], list(state["weights"]))


def _sizes(cell: SlotMoECell) -> tuple[int, int, int, int]:
    """Heads, slots read, slots written and experts of a step."""
    return cell.num_heads, cell.read_slots, cell.write_slots, cell.top_k


def _arguments(window: Sequence[FusedSteps]) -> tuple[Any, ...]:
    """A window as the operations take it."""
    of = window[0].of
    weights = [weight for steps in window for weight in steps.weights]
    parts = ([steps.inputs for steps in window], [steps.saved for steps in window], [steps.index for steps in window])
    return *parts, weights, of.columns, *of.sizes[:3]


def _as_written(cell: SlotMoECell) -> bool:
    """Whether the cell computes what its class says: no autocast, no methods or submodules replaced, no hooks."""
    if torch.is_autocast_enabled("cpu") or not _METHODS.isdisjoint(vars(cell)):
        return False
    forwards = [nn.Linear.forward] * 4 + [ExpertBank.forward]
    modules: list[nn.Module] = [cell.query_token, cell.key_value, cell.control, cell.core, cell.experts]
    for module, forward in zip(modules, forwards, strict=True):
        if type(module).forward is not forward or "forward" in vars(module):
            return False
    return not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in (cell, *modules)
    )


def runs_fused(cell: nn.Module, state: Tensor) -> TypeGuard[SlotMoECell]:
    """Whether :func:`run_without_learning` runs a cell."""
    if type(cell) is not SlotMoECell or not ops.fused("auto", state.device, state.dtype):
        return False
    biased = isinstance(cell.control.bias, Tensor) and isinstance(cell.experts.bias, Tensor)
    return biased and _as_written(cell) and cell.slot_table.dtype == state.dtype


@torch.no_grad()
def run_without_learning(cell: SlotMoECell, xs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run steps of a cell forward in the fused pass, to evaluate it; see :func:`runs_fused`.

    Args:
        cell: the cell.
        xs: inputs ``(n, B, input_size)``.
        state: state that enters the first step, ``(B, S, D)``.

    Returns:
        Outputs ``(n, B, output_size)`` and the state after the last step.
    """
    weights = [operator.attrgetter(name)(cell) for name in _WEIGHTS]  # parametrized or not
    state = state.contiguous()
    outputs = []
    for part in xs.split(max(1, _TOGETHER // max(1, len(state)))):
        state, slots, _, index = ops.slot_moe_forward(state, cell.query_token(part), weights, *_sizes(cell))
        support = index[..., : -cell.top_k].flatten(0, 1)
        outputs.append(cell.output(part.flatten(0, 1), slots.flatten(0, 1), support).unflatten(0, part.shape[:2]))
    return torch.cat(outputs), state


def pull_back_steps_(
    window: Sequence[FusedSteps], v: Tensor, core: Tensor, experts: Tensor, cotangent: Tensor | None = None
) -> None:
    """One row vector per stream back through a window of steps, in place.

    Args:
        window: the steps, oldest first.
        v: ``dL/dh`` behind the last step, ``(B, H)``; becomes that before the first one.
        core: gradient of the core parameters at fixed entry state, ``(N_core,)``, added to.
        experts: that of the experts, ``(E, N_expert)``, added to.
        cotangent: ``dL/d slots`` of every step, ``(n, B, kr + kw, D)``.
    """
    ops.slot_moe_pull_back_(v, core, experts, cotangent, *_arguments(window))


class SlotMoePass:
    """Runs segments of one cell.

    Args:
        cell: the cell.
        groups: its recurrent parameters.
    """

    def __init__(self, cell: SlotMoECell, groups: ParameterGroups) -> None:
        self.cell = cell
        self.groups = groups
        starts = {p.name: p.start for p in groups.all}
        self.columns = [starts[name] for name in (*_CORE, *_EXPERT)]
        self.sizes = _sizes(cell)
        order = ("slot_table", "query_token.weight", "key_value.weight", "control.weight", "core.weight", _EXPERT[0])
        self._order = [p for name in order for p in groups.all if p.name == name]
        self._place = {p.name: number for number, p in enumerate(groups.all)}
        self._copied: list[Tensor] = []

    @classmethod
    def of_cell(
        cls, cell: SlotCell, groups: ParameterGroups, backend: ops.Backend, device: torch.device, dtype: torch.dtype
    ) -> SlotMoePass | None:
        """The pass of a cell; None if it has none: another class, frozen parameters, hooks, or nothing compiled."""
        if type(cell) is not SlotMoECell or not ops.fused(backend, device, dtype):
            return None
        if [p.name for p in groups.core] != list(_CORE) or [p.name for p in groups.expert] != list(_EXPERT):
            return None
        return cls(cell, groups)

    def usable(self, tensors: list[Tensor]) -> bool:
        """Whether the cell runs now as it was written, in the sizes it had, and all of its recurrent parameters train.

        Args:
            tensors: the tensors the cell uses for its recurrent parameters, in the order of ``groups.all``.
        """
        cell = self.cell
        modules = (cell, cell.query_token, cell.key_value, cell.control, cell.core, cell.experts)
        if any(p.module is not module for p, module in zip(self._order, modules, strict=True)):
            return False  # a module was replaced
        return _as_written(cell) and _sizes(cell) == self.sizes and all(t.requires_grad for t in tensors)

    @torch.no_grad()
    def run(self, xs: Tensor, state: Tensor, tensors: list[Tensor]) -> tuple[FusedSteps, Tensor, Tensor]:
        """Run a segment.

        Args:
            xs: inputs ``(n, B, input_size)``.
            state: state that enters the first step, ``(B, S, D)``.
            tensors: the tensors the cell uses for its recurrent parameters, in the order of ``groups.all``.

        Returns:
            The steps, the slots that their outputs look at (old content of the read ones, new content of the written
            ones), ``(n, B, kr + kw, D)``, and the new state.
        """
        named = {name: tensors[place].detach() for name, place in self._place.items()}
        weights = [named[name] for name in _WEIGHTS]
        query_token = F.linear(xs, named["query_token.weight"], named["query_token.bias"])
        new_state, slots, saved, index = ops.slot_moe_forward(
            state.detach().contiguous(), query_token, weights, *self.sizes
        )
        inputs = xs.to(saved.dtype, memory_format=torch.contiguous_format, copy=True)  # the caller may reuse its buffer
        return FusedSteps(self, inputs, saved, index, self._copies(weights)), slots, new_state

    def compare(
        self,
        steps: FusedSteps,
        slots: Tensor,
        state: Tensor,
        new_state: Tensor,
        tensors: list[Tensor],
        verifier: Verifier,
        number: int,
    ) -> None:
        """Compare some of the steps of a call with the cell's own ``update`` and an ordinary backward pass.

        Args:
            steps: the call, from :meth:`run`.
            slots: the slots that its outputs look at, from :meth:`run`.
            state: state that entered it, ``(B, S, D)``.
            new_state: state after it.
            tensors: as for :meth:`run`.
            verifier: draws the cotangent and judges.
            number: number of the first step, for messages.

        Raises:
            DisagreementError: if the gradients disagree.
            ContractError: if the states or outputs do.
        """
        try:
            self._compare(steps, slots, state, new_state, tensors, verifier, number)
        except ContractError:  # at a kink rounding alone may do that: once more from a state nearby
            state = nearby(state.detach())
            steps, slots, new_state = self.run(steps.inputs, state, tensors)
            self._compare(steps, slots, state, new_state, tensors, verifier, number)

    def _compare(
        self,
        steps: FusedSteps,
        slots: Tensor,
        state: Tensor,
        new_state: Tensor,
        tensors: list[Tensor],
        verifier: Verifier,
        number: int,
    ) -> None:
        count, read = min(steps.count, COMPARED), self.sizes[1]
        first = verifier.choose(steps.count - count + 1)
        part = replace(
            steps, **{name: getattr(steps, name)[first : first + count] for name in ("inputs", "saved", "index")}
        )
        states = [state.detach()]
        for routing, content in zip(steps.routings, slots, strict=True):
            states.append(scatter_slots(states[-1], routing.write, content[:, read:]))
        before, after = states[first], states[first + count]
        with torch.enable_grad(), without_hooks(self.groups):
            h = entry = before.clone().requires_grad_()
            outputs, looked_at = [], []
            for x, routing in zip(part.inputs, part.routings, strict=True):
                h_read = gather_slots(h, routing.read)
                h_new, output = self.cell.update(x, h_read, gather_slots(h, routing.write), routing)
                h = scatter_slots(h, routing.write, h_new)
                outputs.append(output)
                looked_at.append(torch.cat((h_read, h_new), 1))
            value = torch.cat([h.flatten(1), torch.stack(looked_at, 1).flatten(1)], 1)
            stream, cotangent = verifier.cotangent(value)
            of_entry, *truth = torch.autograd.grad(value, [entry, *tensors], cotangent, allow_unused=True)
        tolerance = tolerance_of(h.dtype)
        with torch.no_grad():
            own = self.outputs(part, slots[first : first + count])
        pairs = [("state", new_state, states[-1]), ("state", after, h.detach())]
        for what, mine, its in (*pairs, ("output", own, torch.stack(outputs).detach())):
            if float((mine - its).abs().max()) > tolerance * max(1.0, float(its.abs().max())):
                raise ContractError(
                    [
                        f"steps {number + first} to {number + first + count - 1}: the compiled pass gives another"
                        f" {what} than update. capture='dense' runs the cell's own code"
                    ]
                )
        hidden = self.cell.hidden_size
        v, of_slots = cotangent[:, :hidden].clone(), cotangent[:, hidden:]
        core = v.new_zeros(self.groups.core_columns)
        experts = v.new_zeros(self.groups.num_experts, self.groups.expert_columns)
        shape = (len(v), count, *slots.shape[2:])
        pull_back_steps_([part], v, core, experts, of_slots.reshape(shape).transpose(0, 1).contiguous())
        found = {p.name: g for p, g in zip(self.groups.all, self.groups.split(core, experts), strict=True)}
        expected: dict[str, Tensor | None] = dict(zip(found, truth, strict=True))
        others = [b for b in range(len(v)) if b != stream]
        assert of_entry is not None
        for name, rows in ((STATE, [stream]), (OTHER_STREAMS, others)):
            found[name], expected[name] = v[rows], of_entry.flatten(1)[rows]
        verifier.compare(number + first, stream, found, expected, tolerance, DISAGREEMENT)

    def outputs(self, steps: FusedSteps, slots: Tensor) -> Tensor:
        """Outputs ``(n, B, output_size)`` of steps from the slots they look at, see :meth:`run`."""
        support = steps.index[..., : -self.sizes[3]].flatten(0, 1)
        return self.cell.output(steps.inputs.flatten(0, 1), slots.flatten(0, 1), support).unflatten(0, slots.shape[:2])

    def _copies(self, weights: list[Tensor]) -> list[Tensor]:
        """Copies of the weights, shared by all segments that were run with the same ones.

        They are compared by value: fused optimizers and changes through ``.data`` leave version counters alone.
        """
        if not self._copied or not all(map(torch.equal, weights, self._copied)):
            self._copied = [weight.clone() for weight in weights]
        return self._copied


def fused_segment(steps: Sequence[FusedSteps], hidden_size: int) -> tuple[Segment, Tensor]:
    """The state Jacobian of a window of steps.

    Args:
        steps: the window, oldest first.
        hidden_size: ``H``.

    Returns:
        The segment, its immediate Jacobians left out, and the state entries that it writes, ``(B, R)``.
    """
    cell, groups = steps[0].of.cell, steps[0].of.groups
    batch, size, device = steps[0].saved.shape[1], cell.slot_size, steps[0].saved.device
    _, read, _, top_k = steps[0].of.sizes
    support = torch.cat([step.index[..., :-top_k] for step in steps]).transpose(0, 1)  # (B, n, kr + kw)
    written = torch.zeros(batch, cell.num_slots, dtype=torch.bool, device=device)
    write = _slots(written.scatter(1, support[..., read:].flatten(1), True))
    touched = written.scatter(1, write, True).scatter_(1, support.flatten(1), True)
    support = _slots(touched)
    rows = slot_entries(write, size)
    phi = _identity(rows, hidden_size, steps[0].saved)
    ops.slot_moe_transfer_(phi, *_arguments(steps))
    if support.shape[1] == cell.num_slots:
        support, Jh = torch.arange(cell.num_slots, device=device).expand(batch, -1), phi
    else:
        Jh = phi.gather(2, slot_entries(support, size).unsqueeze(1).expand(-1, phi.shape[1], -1))
    every = torch.arange(batch, device=device)
    used = torch.cat([step.experts for step in steps], 1)
    pairs = (every.unsqueeze(1) * groups.num_experts + used).unique()
    streams = torch.div(pairs, groups.num_experts, rounding_mode="floor")
    segment = Segment(
        Jh,
        write,
        support,
        GroupFactors(every, every, [], [], []),
        GroupFactors(streams, pairs, [], [], []),
    )
    return segment, rows


def add_immediate_(core: Tensor, experts: Tensor, rows: Tensor, steps: Sequence[FusedSteps]) -> None:
    """Add the immediate Jacobians of a window of steps to the influence behind it, in place.

    Args:
        core: ``(B, H + 1, N_core)``.
        experts: ``(B * E, H + 1, N_expert)``.
        rows: state entries that the window writes, ``(B, R)``.
        steps: the window, oldest first.
    """
    phi = _identity(rows, core.shape[1] - 1, core)
    ops.slot_moe_commit_(core, experts, phi, rows, *_arguments(steps))


def _slots(chosen: Tensor) -> Tensor:
    """Chosen slots ``(B, S)`` bool as indices ``(B, most)``; a stream that has fewer gets others too."""
    most = int(chosen.sum(1).max())
    return chosen.byte().argsort(dim=1, descending=True, stable=True)[:, :most]


def _identity(rows: Tensor, hidden: int, like: Tensor) -> Tensor:
    """Rows of the identity, ``rows (B, R)`` to ``(B, R, H)``."""
    return like.new_zeros(*rows.shape, hidden).scatter_(2, rows.unsqueeze(2), 1.0)


class FusedSegment(torch.autograd.Function):
    """The slots that the outputs of a segment look at, as a function of its entry state and the parameters.

    ``FusedSegment.apply(steps, slots, state, *tensors)`` returns the slots; ``state`` is the one that entered the
    segment, ``tensors`` are the parameters.
    """

    @staticmethod
    def forward(ctx: Any, steps: FusedSteps, slots: Tensor, state: Tensor, *tensors: Tensor) -> Tensor:
        """Return the slots as a new tensor."""
        ctx.steps = steps
        return slots.view_as(slots)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:  # type: ignore[override]
        """Gradient back through the steps of the segment, to its entry state."""
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True is not supported: the influence is not differentiable")
        steps, groups, cell = ctx.steps, ctx.steps.of.groups, ctx.steps.of.cell
        v = cotangent.new_zeros(cotangent.shape[1], cell.hidden_size)
        core = v.new_zeros(groups.core_columns)
        experts = v.new_zeros(groups.num_experts, groups.expert_columns)
        pull_back_steps_([steps], v, core, experts, cotangent)
        return None, None, v.view(-1, cell.num_slots, cell.slot_size), *groups.split(core, experts)
