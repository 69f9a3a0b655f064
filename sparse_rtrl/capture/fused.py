"""Capture by the fused pass that a cell offers: whole segments in one call, and rows sent back through them later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse_rtrl.capture.jacobian import DISAGREEMENT, nearby, without_hooks
from sparse_rtrl.capture.parameters import ParameterGroups
from sparse_rtrl.capture.verify import OTHER_STREAMS, STATE, Verifier, tolerance_of
from sparse_rtrl.captured import Moved
from sparse_rtrl.cells.fused_pass import FusedPass, Kept
from sparse_rtrl.cells.slot_cell import Routing, SlotCell, gather_slots, scatter_slots
from sparse_rtrl.errors import ContractError
from sparse_rtrl.ops import dispatch
from sparse_rtrl.ops.reference import slot_entries

COMPARED = 4
"""At most this many steps of a call are compared with the cell's own code."""


@dataclass(frozen=True)
class FusedSteps:
    """Consecutive steps as one call of the forward pass left them, with the weights that they were run with.

    Attributes:
        of: what ran them.
        inputs: ``(n, B, input_size)``.
        saved: what the backward pass reads, ``(n, B, ...)``.
        index: slots read, slots written and experts of each step, ``(n, B, kr + kw + k)`` int64.
        weights: copies of the weights that the backward pass reads.
    """

    of: FusedCapture
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
        return [self._routing(row) for row in self.index]

    @property
    def routing(self) -> Routing:
        """What the last step touched."""
        return self._routing(self.index[-1])

    def _routing(self, row: Tensor) -> Routing:
        return Routing(*row.split(self.of.sizes[-3:], dim=1))

    @property
    def experts(self) -> Tensor:
        """Experts that any step used, with repeats, ``(B, n * k)``."""
        return self.index[..., -self.of.sizes[-1] :].transpose(0, 1).flatten(1)

    @classmethod
    def pull_back(cls, window: Sequence[FusedSteps], v: Tensor, core: Tensor, experts: Tensor) -> Tensor:
        """See :meth:`~sparse_rtrl.captured.Captured.pull_back`."""
        v = v.clone()
        window[0].of.pull_back_(window, v, core, experts)
        return v

    @classmethod
    def commit_(cls, window: Sequence[FusedSteps], core: Tensor, experts: Tensor, num_slots: int, ops: Any) -> Moved:
        """See :meth:`~sparse_rtrl.captured.Captured.commit_`."""
        of = window[0].of
        moved, streams, rows = of.map_of(window)
        every = torch.arange(len(core), device=core.device)
        for P, its_streams, its_rows in ((core, every, every), (experts, streams, moved.experts)):
            ops.influence_update_(P, moved.Jh, moved.write, moved.support, None, its_streams, its_rows, [], [], [])
        phi = _identity(rows, core.shape[1] - 1, core)
        of.kernels.add_immediate_(core, experts, phi, rows, of.kept(window))
        return moved

    def state_dict(self) -> dict[str, Any]:
        """Everything in it; the tensors are not copied."""
        tensors = {"inputs": self.inputs, "saved": self.saved, "index": self.index, "weights": list(self.weights)}
        return {"sizes": self.of.sizes, "options": self.of.kernels.options, **tensors}


class FusedCapture:
    """Runs segments of one cell in its fused pass, and keeps them as :class:`FusedSteps`.

    Args:
        cell: the cell.
        kernels: its fused pass.
        groups: its recurrent parameters.
    """

    def __init__(self, cell: SlotCell, kernels: FusedPass, groups: ParameterGroups) -> None:
        self.cell = cell
        self.kernels = kernels
        self.groups = groups
        starts = {p.name: p.start for p in groups.all}
        self.columns = [starts[name] for name in (*kernels.core, *kernels.expert)]
        self.sizes = kernels.sizes
        self._modules = {p.name.rpartition(".")[0]: p.module for p in groups.all}
        self._copied: list[Tensor] = []

    @classmethod
    def of_cell(
        cls,
        cell: SlotCell,
        groups: ParameterGroups,
        backend: dispatch.Backend,
        device: torch.device,
        dtype: torch.dtype,
    ) -> FusedCapture | None:
        """The capture of a cell; None if it offers no pass, has frozen or more parameters, or nothing is compiled."""
        kernels = cell.fused_pass()
        if kernels is None or not kernels.available(backend, device, dtype):
            return None
        if tuple(p.name for p in groups.core) != kernels.core or tuple(p.name for p in groups.expert) != kernels.expert:
            return None
        return cls(cell, kernels, groups)

    def usable(self, tensors: list[Tensor]) -> bool:
        """Whether the cell runs now as it was written, in the sizes it had, and all of its recurrent parameters train.

        Args:
            tensors: the tensors the cell uses for its recurrent parameters, in the order of ``groups.all``.
        """
        if any(self.cell.get_submodule(path) is not module for path, module in self._modules.items()):
            return False  # a module was replaced
        kernels = self.kernels
        return kernels.as_written() and kernels.sizes == self.sizes and all(t.requires_grad for t in tensors)

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
        named = {p.name: tensor.detach() for p, tensor in zip(self.groups.all, tensors, strict=True)}
        new_state, slots, saved, index = self.kernels.forward(xs, state.detach(), named)
        inputs = xs.to(saved.dtype, memory_format=torch.contiguous_format, copy=True)  # the caller may reuse its buffer
        return FusedSteps(self, inputs, saved, index, self._copies(self.kernels.weights(named))), slots, new_state

    def outputs(self, steps: FusedSteps, slots: Tensor) -> Tensor:
        """Outputs ``(n, B, output_size)`` of steps from the slots they look at, see :meth:`run`."""
        return self.kernels.outputs(steps.inputs, slots, steps.index)

    def with_graph(self, steps: FusedSteps, slots: Tensor, state: Tensor, tensors: list[Tensor]) -> Tensor:
        """The slots that outputs look at, ``(n, B, kr + kw, D)``, as a function of entry state and parameters.

        Args:
            steps: from :meth:`run`.
            slots: from :meth:`run`.
            state: state that entered the segment, with its graph, ``(B, S, D)``.
            tensors: as for :meth:`run`.
        """
        found: Tensor = _FusedSegment.apply(steps, slots, state, *tensors)
        return found

    def restore(self, state: dict[str, Any]) -> FusedSteps:
        """The steps that :meth:`FusedSteps.state_dict` described.

        Raises:
            ValueError: if they are of other sizes.
        """
        if (options := tuple(state.get("options", self.kernels.options))) != self.kernels.options:
            raise ValueError(f"the state must be of a cell with the options {self.kernels.options}, got {options}")
        if tuple(state["sizes"]) != self.sizes:
            raise ValueError(
                f"the state must be of a cell with ({', '.join(self.kernels.size_names)}) = {self.sizes},"
                f" got {tuple(state['sizes'])}"
            )
        return FusedSteps(self, state["inputs"], state["saved"], state["index"], list(state["weights"]))

    def kept(self, window: Sequence[FusedSteps]) -> Kept:
        """A window as the kernels take it."""
        return Kept(
            [steps.inputs for steps in window],
            [steps.saved for steps in window],
            [steps.index for steps in window],
            [weight for steps in window for weight in steps.weights],
            self.columns,
        )

    def pull_back_(
        self, window: Sequence[FusedSteps], v: Tensor, core: Tensor, experts: Tensor, cotangent: Tensor | None = None
    ) -> None:
        """See :meth:`~sparse_rtrl.cells.fused_pass.FusedPass.pull_back_`, ``v (B, H)``."""
        self.kernels.pull_back_(v, core, experts, cotangent, self.kept(window))

    def map_of(self, window: Sequence[FusedSteps]) -> tuple[Moved, Tensor, Tensor]:
        """The state Jacobian of a window, oldest step first.

        Returns:
            The map; the stream of each (stream, expert) pair that the window used, ``(M,)``; and the state entries that
            it writes, ``(B, R)``.
        """
        cell, like = self.cell, window[0].saved
        batch, device = like.shape[1], like.device
        read, _, top_k = self.sizes[-3:]
        support = torch.cat([steps.index[..., :-top_k] for steps in window]).transpose(0, 1)  # (B, n, kr + kw)
        written = torch.zeros(batch, cell.num_slots, dtype=torch.bool, device=device)
        write = _slots(written.scatter(1, support[..., read:].flatten(1), True))
        support = _slots(written.scatter(1, write, True).scatter_(1, support.flatten(1), True))
        rows = slot_entries(write, cell.slot_size)
        phi = _identity(rows, cell.hidden_size, like)
        self.kernels.transfer_(phi, self.kept(window))
        if support.shape[1] == cell.num_slots:
            support, Jh = torch.arange(cell.num_slots, device=device).expand(batch, -1), phi
        else:
            Jh = phi.gather(2, slot_entries(support, cell.slot_size).unsqueeze(1).expand(-1, phi.shape[1], -1))
        used = torch.cat([steps.experts for steps in window], 1)
        every = torch.arange(batch, device=device).unsqueeze(1)
        pairs = (every * self.groups.num_experts + used).unique()
        streams = torch.div(pairs, self.groups.num_experts, rounding_mode="floor")
        return Moved(Jh, write, support, pairs), streams, rows

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
            new_state: state after it, ``(B, S, D)``.
            tensors: as for :meth:`run`.
            verifier: draws the cotangent and judges.
            number: number of the first step, for messages.

        Raises:
            DisagreementError: if the gradients disagree.
            ContractError: if the states or outputs do.
        """
        try:
            self._compare(steps, slots, state, new_state, tensors, verifier, number)
        except ContractError:  # at a kink, rounding alone may do that: once more from a state nearby
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
        count, read = min(steps.count, COMPARED), self.sizes[-3]
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
        core, experts = self.groups.zero_gradients(v)
        shape = (len(v), count, *slots.shape[2:])
        self.pull_back_([part], v, core, experts, of_slots.reshape(shape).transpose(0, 1).contiguous())
        found = {p.name: g for p, g in zip(self.groups.all, self.groups.split(core, experts), strict=True)}
        expected: dict[str, Tensor | None] = dict(zip(found, truth, strict=True))
        others = [b for b in range(len(v)) if b != stream]
        assert of_entry is not None
        for name, rows in ((STATE, [stream]), (OTHER_STREAMS, others)):
            found[name], expected[name] = v[rows], of_entry.flatten(1)[rows]
        verifier.compare(number + first, stream, found, expected, tolerance, DISAGREEMENT)

    def _copies(self, weights: list[Tensor]) -> list[Tensor]:
        """Copies of the weights, shared by all segments that were run with the same ones.

        They are compared by value: fused optimizers and changes through ``.data`` leave version counters alone.
        """
        if not self._copied or not all(map(torch.equal, weights, self._copied)):
            self._copied = [weight.clone() for weight in weights]
        return self._copied


def _slots(chosen: Tensor) -> Tensor:
    """Chosen slots ``(B, S)`` bool as indices ``(B, most)``; a stream that has fewer is filled up."""
    most = int(chosen.sum(1).max())
    return chosen.byte().argsort(dim=1, descending=True, stable=True)[:, :most]


def _identity(rows: Tensor, hidden: int, like: Tensor) -> Tensor:
    """Rows of the identity, ``rows (B, R)`` to ``(B, R, H)``."""
    return like.new_zeros(*rows.shape, hidden).scatter_(2, rows.unsqueeze(2), 1.0)


class _FusedSegment(torch.autograd.Function):
    """The slots that the outputs of a segment look at, as a function of its entry state and the parameters."""

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
        steps, of = ctx.steps, ctx.steps.of
        v = cotangent.new_zeros(cotangent.shape[1], of.cell.hidden_size)
        core, experts = of.groups.zero_gradients(v)
        of.pull_back_([steps], v, core, experts, cotangent)
        return None, None, v.view(-1, of.cell.num_slots, of.cell.slot_size), *of.groups.split(core, experts)
