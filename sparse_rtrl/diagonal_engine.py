"""Capture, checks and influence of one diagonal cell, with steps that enter the past through their graph."""

from __future__ import annotations

import cmath
import warnings

import torch
from torch import Tensor

from sparse_rtrl import ops
from sparse_rtrl.diagonal_cell import DiagonalCell, Projection, State
from sparse_rtrl.diagonal_influence import DiagonalInfluence
from sparse_rtrl.diagonal_structure import Layout, find_layouts
from sparse_rtrl.engine import checked_mask, describe, refusals
from sparse_rtrl.entry import EnterSegment
from sparse_rtrl.errors import ContractError, NonFiniteError
from sparse_rtrl.estimate import available_bytes
from sparse_rtrl.influence import check_finite
from sparse_rtrl.learner import SegmentEntry


class DiagonalEngine:
    """Runs a diagonal cell in segments and keeps the influence of its parameters.

    Args:
        cell: the cell.
        batch_size: streams ``B``.
        backend: what computes, see :func:`sparse_rtrl.ops.select`.

    Raises:
        ContractError: if the cell breaks its contract.
        MemoryError: if the influence does not fit into memory, with the numbers.
    """

    def __init__(self, cell: DiagonalCell, batch_size: int, backend: ops.Backend = "auto") -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
        refused = [
            f"{name or type(module).__name__} ({type(module).__name__}) {why}"
            for name, module in cell.named_modules()
            for why in refusals(module)
        ]
        refused += [
            f"{type(cell).__name__} overrides {name}, which a learner does not call; override project, step and output"
            for name in ("forward", "unroll")
            if getattr(type(cell), name) is not getattr(DiagonalCell, name)
        ]
        if cell.initial_entries(batch_size).requires_grad:
            refused.append("initial_entries requires a gradient: a trained initial state is not carried; detach it")
        if refused:
            raise ContractError(refused)
        self.cell = cell
        self.batch_size = batch_size
        self.steps = 0
        like = cell.zero_rows(1)
        self.dtype, self.device = like.dtype, like.device
        self._parameters = [
            (f"{prefix}.{attribute}" if prefix else attribute, module._parameters, attribute, _kind(p))
            for prefix, module in cell.named_modules()
            for attribute, p in module._parameters.items()
            if p is not None
        ]
        self._layouts = find_layouts(cell)
        projections, _ = cell.projected(like)
        self._columns = [projection.columns for projection in projections]
        self._parts = [[(t.shape, t.is_complex()) for t in projection.tensors] for projection in projections]
        kept = [
            layout if any(tensor.requires_grad for tensor in projection.tensors) else None
            for layout, projection in zip(self._layouts, projections, strict=True)
        ]
        if not any(kept):
            raise ValueError("cell has no trainable parameter that reaches the state: there is no influence to carry")
        self.check_memory(kept)
        self.influence = DiagonalInfluence(cell, kept, self._columns, batch_size, backend)

    def check_memory(self, layouts: list[Layout | None]) -> None:
        """Refuse influence that cannot fit into the memory of the device.

        Raises:
            MemoryError: with the numbers.
        """
        item = self.cell.initial_entries(1).element_size()
        numbers = [
            layout.rows[0] * layout.rows[1] * count
            for layout, count in zip(layouts, self._columns, strict=True)
            if layout is not None
        ]
        needed = item * self.batch_size * sum(numbers)
        available = available_bytes(self.device)
        if needed > available:
            raise MemoryError(
                f"the influence needs {needed / 2**20:.1f} MiB: itemsize {item} * batch_size {self.batch_size} *"
                f" {sum(numbers)} numbers (per projection {numbers}); {available / 2**20:.1f} MiB are available on"
                f" {self.device}. Use fewer streams or a smaller state"
            )

    def run(self, xs: Tensor, state: State) -> tuple[Tensor, State]:
        """Run some steps as one segment whose backward pass continues through the influence.

        Args:
            xs: inputs ``(n, B, input_size)``; what is kept of the past takes them as given, even if they have a graph.
            state: the state that enters, detached.

        Returns:
            Outputs ``(n, B, ...)`` and the new state, detached.

        Raises:
            RuntimeError: if a parameter changed its shape, dtype or device.
            NonFiniteError: if the new state is not finite, or a derivative of an earlier step that is committed now;
                nothing is changed then.
        """
        self._check_parameters()
        cell, steps = self.cell, xs.shape[0]
        entries, *rest = (state,) if isinstance(state, Tensor) else state
        rows = cell.rows(xs, (entries, *rest) if rest else entries)  # type: ignore[arg-type]
        projections, values = cell.projected(rows)
        for number in self.admit(projections):
            warnings.warn(
                f"value {number} of project: trainable from now on; its influence starts at zero", stacklevel=4
            )
        entry = SegmentEntry(self)
        tensors = [tensor for projection in projections for tensor in projection.tensors]
        states = cell.states(EnterSegment.apply(entry, entries, *tensors), values, steps)
        outputs = cell.outputs(rows, states, values)
        self._check_new_state(states)
        if self.influence.is_full:
            self.influence.commit()
        entry.settle()
        self.influence.record(projections, values, states, self.steps)
        self.steps += steps
        new = cell.next_state(xs.detach(), states)
        return outputs, new.detach() if isinstance(new, Tensor) else (new[0].detach(), new[1])

    def checked_mask(self, streams: Tensor | None) -> Tensor:
        """A mask of streams ``(B,)`` on the engine's device, see :func:`~sparse_rtrl.engine.checked_mask`."""
        return checked_mask(streams, self.batch_size, self.device)

    def dense_influence(self) -> dict[str, Tensor]:
        """Influence ``dh/dθ`` of every parameter, ``(B, *state_shape, *shape)``, up to date; for looking at."""
        self.influence.commit()
        cell, shape = self.cell, self.cell.initial_entries(self.batch_size).shape
        named = [(name, p) for name, p in cell.named_parameters() if p.requires_grad]
        like = cell.initial_entries(1)
        size = like.shape[1:].numel()
        with torch.enable_grad():
            projections, _ = cell.projected(cell.zero_rows(1))
        tensors = [tensor for projection in projections for tensor in projection.tensors]

        def by_parameter(u: Tensor) -> list[Tensor | None]:
            pairs = [
                (tensor, gradient)
                for tensor, gradient in zip(tensors, self.of_tensors(self.influence.carried(u)), strict=True)
                if gradient is not None and tensor.requires_grad
            ]
            return list(
                torch.autograd.grad(
                    [tensor for tensor, _ in pairs],
                    [p for _, p in named],
                    [gradient for _, gradient in pairs],
                    retain_graph=True,
                    allow_unused=True,
                )
            )

        rows: list[list[Tensor | None]] = []
        for place in range(self.batch_size * size):
            u = like.new_zeros(shape)
            u.view(-1)[place] = 1
            found = by_parameter(u)
            if like.is_complex():
                # The gradient by a real parameter is the real part of conj(u) dh/dθ.
                second = by_parameter(1j * u)
                found = [
                    None if a is None or b is None else a.conj() if a.is_complex() else torch.complex(a, b)
                    for a, b in zip(found, second, strict=True)
                ]
            rows.append(found)
        return {
            name: torch.stack([row[i] for row in rows]).view(*shape, *p.shape)  # type: ignore[misc]
            for i, (name, p) in enumerate(named)
            if rows[0][i] is not None
        }

    def past_gradients(self, position: int, u: Tensor, number: int) -> list[Tensor | None]:
        """Gradients through the past before a segment, one per tensor that its projections are made of.

        Args:
            position: place of the segment in the window.
            u: gradient of the loss by the entries that entered it, ``(B, *state_shape)``.
            number: number of its first step, for messages.
        """
        return self.of_tensors(self.influence.loss_gradient(position, u, number))

    def of_tensors(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Gradients ``(M, J)`` of projections as those of their weights, biases and values, real where they are."""
        out: list[Tensor | None] = []
        for gradient, parts in zip(gradients, self._parts, strict=True):
            for place, (shape, is_complex) in enumerate(parts):
                if gradient is None:
                    out.append(None)
                    continue
                part = gradient if len(parts) == 1 else gradient[:, -1] if place else gradient[:, :-1]
                part = part if is_complex or not part.is_complex() else part.real
                out.append(part if part.shape == shape else part.reshape(shape))
        return out

    def _check_parameters(self) -> None:
        for name, owned, attribute, expected in self._parameters:
            now = _kind(owned[attribute])
            if now != expected:
                raise RuntimeError(
                    f"parameter {name} was {describe(*expected)} when the learner was built and is {describe(*now)}"
                    " now: build a new learner after changing a cell"
                )

    def admit(self, projections: tuple[Projection, ...]) -> list[int]:
        """Keep the influence of projections that became trainable, starting at zero; returns their numbers."""
        new = []
        for number, (projection, kept) in enumerate(zip(projections, self.influence.kept, strict=True)):
            layout = self._layouts[number]
            if not kept and layout is not None and any(tensor.requires_grad for tensor in projection.tensors):
                self.influence.add(number, layout, self._columns[number])
                new.append(number)
        return new

    def _check_new_state(self, states: list[Tensor]) -> None:
        """Check that every new state is finite.

        Raises:
            NonFiniteError: naming the parameter that holds NaN or infinity, or else the state.
        """
        if cmath.isfinite(states[-1].detach().sum().item()):
            return  # a state that is not finite stays so, up to sums that overflow
        for name, parameter in self.cell.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise NonFiniteError(self.steps, list(range(self.batch_size)), name)
        for number, state in enumerate(states[1:], self.steps):
            check_finite(number, {"the new state": state})


def _kind(tensor: Tensor | None) -> tuple[torch.Size, torch.dtype, torch.device]:
    assert tensor is not None
    return tensor.shape, tensor.dtype, tensor.device
