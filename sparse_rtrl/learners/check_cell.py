"""Verification of a cell's support contract against its dense Jacobians."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sparse_rtrl.capture.diagonal_structure import find_layouts
from sparse_rtrl.cells.diagonal_cell import DiagonalCell
from sparse_rtrl.cells.expert_bank import ExpertBank
from sparse_rtrl.cells.slot_cell import Routing, SlotCell, gather_slots
from sparse_rtrl.errors import ContractError
from sparse_rtrl.ops.reference import slot_entries


def check_cell(cell: SlotCell | DiagonalCell, x: Tensor, h: Tensor) -> None:
    """Check one step of a cell against its dense Jacobians, in float64 on a copy.

    Checked are, of a diagonal cell: a new state entry depends only on the old entry at its place, holomorphically if
    it is complex; all parameters that reach the state do so through ``project``, as linear maps of the input or as
    learned values; parameters under ``readout`` do not reach it; every parameter receives some gradient; rows of the
    batch do not influence each other.

    Of a slot cell: the written slots and the output depend only on declared slots; other slots are copied bit for bit;
    experts that are not active have no influence; parameters under ``readout`` do not reach the state; every parameter
    receives some gradient; rows of the batch do not influence each other; ``transition`` is the first part of
    ``update``.

    Args:
        cell: the cell.
        x: an input ``(B, ...)``; more rows find more. For a diagonal cell with ``previous_input``, of
            ``2 * input_size`` numbers.
        h: a state ``(B, S, D)``, or the entries ``(B, *state_shape)`` of a diagonal cell, best with random content: at
            a state of zeros little can be seen.

    Raises:
        ContractError: naming every violation.
    """
    if isinstance(cell, DiagonalCell):
        check_diagonal_cell(cell, x, h)
        return
    cell = copy.deepcopy(cell).double()
    x = x.detach().double() if x.is_floating_point() else x
    h = h.detach().double().requires_grad_()
    if tuple(h.shape[1:]) != (cell.num_slots, cell.slot_size):
        raise ValueError(f"h must have shape (B, {cell.num_slots}, {cell.slot_size}), got {tuple(h.shape)}")
    with torch.enable_grad():
        output, info, new = cell(x, h)
    routing = Routing(info["idx_slots_read"], info["idx_slots_write"], info["idx_experts"])
    violations = _index_violations(routing, cell)
    if not violations:
        violations = _state_violations(routing, h, new, output, cell)
        violations += _parameter_violations(x, h, routing, new, output, cell)
    if violations:
        raise ContractError(violations)


def _index_violations(routing: Routing, cell: SlotCell) -> list[str]:
    out = []
    for name, index, size in (
        ("read", routing.read, cell.num_slots),
        ("write", routing.write, cell.num_slots),
        ("experts", routing.experts, cell.num_experts),
    ):
        for stream, row in enumerate(index.tolist()):
            if len(set(row)) != len(row):
                out.append(f"{name}: duplicates {row} in stream {stream}")
            if any(not 0 <= i < size for i in row):
                out.append(f"{name}: {row} in stream {stream} is out of range 0 ... {size - 1}")
    return out


def _jacobian(value: Tensor, h: Tensor) -> Tensor:
    """Dense Jacobian ``(B, n, B, H)`` of ``value (B, ...)`` with respect to the state, one backward per entry."""
    flat = value.reshape(h.shape[0], -1)
    rows = []
    for entry in flat.flatten():
        grad = torch.autograd.grad(entry, h, retain_graph=True, allow_unused=True)[0] if entry.requires_grad else None
        rows.append(torch.zeros_like(h) if grad is None else grad)
    return torch.stack(rows).view(*flat.shape, h.shape[0], -1)


def _state_violations(routing: Routing, h: Tensor, new: Tensor, output: Tensor, cell: SlotCell) -> list[str]:
    out = []
    support_entries = slot_entries(routing.support, cell.slot_size)
    for name, value in (("new state", new), ("output", output)):
        if not value.is_floating_point():
            continue
        jacobian = _jacobian(value, h)
        for stream in range(h.shape[0]):
            per_row = jacobian[stream].abs().amax(0)  # (B, H)
            others = [b for b in range(h.shape[0]) if b != stream and bool(per_row[b].any())]
            if others:
                out.append(f"rows of the batch influence each other: {name} of stream {stream} depends on {others}")
            own = jacobian[stream, :, stream]
            if name == "new state":
                written = slot_entries(routing.write[stream : stream + 1], cell.slot_size)[0]
                own = own[written]
            own = own.abs().sum(0).index_fill(0, support_entries[stream], 0.0)
            if bool(own.any()):
                slots = sorted({int(c) // cell.slot_size for c in own.nonzero().flatten()})
                what = "written slots" if name == "new state" else name
                out.append(f"undeclared columns: {what} of stream {stream} depend on slots {slots}")
    for stream in range(h.shape[0]):
        kept = [s for s in range(cell.num_slots) if s not in routing.write[stream].tolist()]
        changed = [s for s in kept if not torch.equal(new[stream, s], h[stream, s])]
        if changed:
            out.append(f"copied slots {changed} of stream {stream} changed")
    return out


def _parameter_violations(
    x: Tensor, h: Tensor, routing: Routing, new: Tensor, output: Tensor, cell: SlotCell
) -> list[str]:
    named = {n: p for n, p in cell.named_parameters() if p.requires_grad}
    in_banks = {id(p) for m in cell.modules() if isinstance(m, ExpertBank) for p in m.parameters()}
    generator = torch.Generator(device="cpu").manual_seed(0)
    of_state, of_output = (
        torch.randn(value.shape, device="cpu", generator=generator, dtype=torch.float64).to(value)
        for value in (new, output)
    )
    out = []
    reached: set[str] = set()
    for stream in range(len(h)):
        state_grads = _gradients(new, of_state, stream, named)
        output_grads = _gradients(output, of_output, stream, named)
        idle = [e for e in range(cell.num_experts) if e not in routing.experts[stream].tolist()]
        for name, parameter in named.items():
            reaches_state = bool(state_grads[name].any())
            if reaches_state or bool(output_grads[name].any()):
                reached.add(name)
            if name.startswith("readout.") and reaches_state:
                out.append(f"readout parameter {name} reaches the state of stream {stream}")
            if id(parameter) in in_banks:
                both = (state_grads[name].abs() + output_grads[name].abs()).flatten(1).sum(1)
                wrong = [e for e in idle if bool(both[e])]
                if wrong:
                    out.append(f"inactive experts {wrong} have influence through {name} in stream {stream}")
    out += [f"no gradient reaches parameter {name}" for name in named if name not in reached]
    h_read, h_write = gather_slots(h, routing.read), gather_slots(h, routing.write)
    if not torch.equal(cell.transition(x, h_read, h_write, routing), cell.update(x, h_read, h_write, routing)[0]):
        out.append("transition differs from what update returns first")
    return out


def _gradients(value: Tensor, cotangent: Tensor, stream: int, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Gradients of parameters for the part ``value[stream]`` of ``value (B, ...)``, zeros where there are none."""
    if not value.requires_grad:
        return {name: torch.zeros_like(p) for name, p in named.items()}
    only = torch.zeros_like(cotangent)
    only[stream] = cotangent[stream]
    grads = torch.autograd.grad(value, list(named.values()), only, retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}


def check_diagonal_cell(cell: DiagonalCell, x: Tensor, h: Tensor) -> None:
    """Check one step of a diagonal cell, see :func:`check_cell`.

    Raises:
        ContractError: naming every violation.
        ValueError: if ``h`` is not a tensor.
    """
    if not isinstance(h, Tensor):
        raise ValueError(f"h must be the state entries (B, *state_shape) alone, got {type(h).__name__}")
    cell = copy.deepcopy(cell).double()
    x = x.detach().double()
    h = h.detach().to(torch.complex128 if cell.complex_state else torch.float64).requires_grad_()
    if tuple(h.shape[1:]) != cell.state_shape or len(h) != len(x):
        raise ValueError(f"h must have shape ({len(x)}, {', '.join(map(str, cell.state_shape))}), got {tuple(h.shape)}")
    find_layouts(cell)
    with torch.enable_grad():
        projections = cell.project(x)
        values = [projection.value for projection in projections]
        new = cell.step(h, *values)
        output = cell.output(x, h, new, *values)
        initial = cell.initial_entries(len(x))
    violations = _mixing(new, h)
    violations += _batch_mixing("output", output, h)
    named = [(name, p) for name, p in cell.named_parameters() if p.requires_grad]
    reached = _reached(new, named)
    violations += [f"readout parameter {name} reaches the state" for name in reached if name.startswith("readout.")]
    reached |= _reached(output, named) | _reached(initial, named)
    violations += [f"no gradient reaches parameter {name}" for name, _ in named if name not in reached]
    if violations:
        raise ContractError(violations)


def _mixing(new: Tensor, h: Tensor) -> list[str]:
    """New state entries that depend on old ones elsewhere, one backward pass per entry."""
    for place in range(new.numel()):
        weight = torch.zeros_like(new).view(-1)
        weight[place] = 1
        (row,) = torch.autograd.grad(new, h, weight.view_as(new), retain_graph=True, allow_unused=True)
        others = [] if row is None else [i for i in row.flatten().nonzero().flatten().tolist() if i != place]
        if others:
            return [f"entries mix: entry {place} of the new states depends on old entries {others}"]
    return []


def _batch_mixing(name: str, value: Tensor, h: Tensor) -> list[str]:
    for row in range(len(value)):
        if not value.requires_grad:
            return []
        (gradient,) = torch.autograd.grad(value[row].abs().sum(), h, retain_graph=True, allow_unused=True)
        others = [] if gradient is None else [b for b in range(len(h)) if b != row and bool(gradient[b].any())]
        if others:
            return [f"rows of the batch influence each other: {name} of stream {row} depends on {others}"]
    return []


def _reached(value: Tensor, named: list[tuple[str, nn.Parameter]]) -> set[str]:
    """Names of the parameters that a value depends on."""
    if not value.requires_grad:
        return set()
    generator = torch.Generator(device="cpu").manual_seed(0)
    cotangent = torch.randn(value.shape, device="cpu", generator=generator, dtype=value.dtype).to(value.device)
    found = torch.autograd.grad(value, [p for _, p in named], cotangent, retain_graph=True, allow_unused=True)
    return {name for (name, _), gradient in zip(named, found, strict=True) if gradient is not None and gradient.any()}
