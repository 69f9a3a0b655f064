"""What exact influence costs for a given cell: memory, operations, and when BPTT needs more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_rtrl.capture.diagonal_structure import find_layouts
from sparse_rtrl.capture.parameters import ParameterGroups
from sparse_rtrl.cells.diagonal_cell import DiagonalCell
from sparse_rtrl.cells.slot_cell import Routing, SlotCell
from sparse_rtrl.influence.tree import ring_bytes, ring_widths

MAX_COMMIT_EVERY = 16
"""Longest window that ``commit_every="auto"`` chooses: captured steps cost memory and a pass per loss."""

MAX_FUSED_COMMIT_EVERY = 32
"""The same for a cell with a fused pass, whose passes are cheaper."""

MAX_SEGMENT = 1024
"""Longest segment that is suggested: a segment keeps the activations of its steps."""

MAX_WINDOW_STEPS = 64
"""``Carry(commit_every="auto")`` lets a window collect at most this many steps."""


@dataclass(frozen=True)
class Estimate:
    """Costs of exact online learning for one cell and batch size.

    Attributes:
        batch_size: streams ``B``.
        hidden_size: state size ``H``.
        core_parameters: recurrent parameters that are always active.
        expert_parameters: recurrent parameters of one expert.
        num_experts: ``E``.
        influence_bytes: ``itemsize * B * (H + 1) * |θ_recurrent|``, constant in the length of the stream.
        tree_bytes: upper bound on the circular tree of state Jacobians.
        bptt_bytes_per_step: bytes that one step of BPTT saves for its backward pass, measured on one step.
        break_even_length: length from which BPTT needs more memory than the influence.
        step_flops: ``2 w (r + 1) N B`` floating-point operations of a step-wise update of the active parameters.
        commit_every: suggested steps between two influence updates, for a learner that takes single steps.
        segment: suggested steps per ``unroll``, where single steps are not needed.
    """

    batch_size: int
    hidden_size: int
    core_parameters: int
    expert_parameters: int
    num_experts: int
    influence_bytes: int
    tree_bytes: int
    bptt_bytes_per_step: int
    break_even_length: float
    step_flops: float
    commit_every: int
    segment: int

    @property
    def recurrent_parameters(self) -> int:
        """``|θ_recurrent|``, all experts included."""
        return self.core_parameters + self.num_experts * self.expert_parameters

    def __str__(self) -> str:
        return (
            f"influence: itemsize * B * (H + 1) * |θ| with B = {self.batch_size}, H = {self.hidden_size},"
            f" |θ| = {self.recurrent_parameters}: {_mib(self.influence_bytes)}, at any length\n"
            f"tree of Jacobians: at most {_mib(self.tree_bytes)}\n"
            f"BPTT: {self.bptt_bytes_per_step} bytes per step; more than the influence from length"
            f" {self.break_even_length:.0f}\n"
            f"step-wise update: 2 w (r + 1) N B = {self.step_flops:.3g} flop per step;"
            f" suggested commit_every = {self.commit_every}\n"
            f"segments of n steps: about 2 (2 H + H^2 / n) N B flop per step; suggested n = {self.segment}"
        )


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


@dataclass(frozen=True)
class DiagonalEstimate:
    """Costs of exact online learning for a diagonal cell and batch size.

    Attributes:
        batch_size: streams ``B``.
        hidden_size: state entries of one stream.
        recurrent_parameters: trainable parameters that reach the state, in real numbers.
        influence_numbers: numbers kept per stream, complex ones counted twice, by value of ``project``, and for the
            initial state if it is trained.
        influence_bytes: ``itemsize * B`` times their sum, constant in the length of the stream.
        bptt_bytes_per_step: bytes that one step of BPTT saves for its backward pass, measured on one step.
        break_even_length: length from which BPTT needs more memory than the influence.
        step_bytes: influence that a step with a loss reads and writes.
    """

    batch_size: int
    hidden_size: int
    recurrent_parameters: int
    influence_numbers: tuple[int, ...]
    influence_bytes: int
    bptt_bytes_per_step: int
    break_even_length: float
    step_bytes: int

    def __str__(self) -> str:
        numbers = sum(self.influence_numbers)
        return (
            f"influence: itemsize * B * {numbers} numbers with B = {self.batch_size}:"
            f" {_mib(self.influence_bytes)}, at any length; {numbers / max(self.recurrent_parameters, 1):.2f} times the"
            f" {self.recurrent_parameters} recurrent parameters; by value of project: {self.influence_numbers}\n"
            f"BPTT: {self.bptt_bytes_per_step} bytes per step; more than the influence from length"
            f" {self.break_even_length:.0f}\n"
            f"update and gradient: {_mib(self.step_bytes)} of influence read and written per step with a loss"
        )


def estimate_diagonal(cell: DiagonalCell, batch_size: int) -> DiagonalEstimate:
    """Work out the costs of :class:`~sparse_rtrl.RTRL` for a diagonal cell, see :func:`estimate`."""
    like = cell.zero_entries(1)
    with torch.enable_grad():
        projections = cell.project(cell.zero_rows(1))
        initial = cell.initial_entries(batch_size)
    real_numbers = 2 if like.is_complex() else 1
    numbers = tuple(
        layout.rows[0] * layout.rows[1] * projection.columns * real_numbers
        for layout, projection in zip(find_layouts(cell), projections, strict=True)
        if layout is not None and any(tensor.requires_grad for tensor in projection.tensors)
    )
    if initial.requires_grad:
        numbers += (cell.hidden_size * real_numbers,)
    item = like.element_size() // real_numbers
    saved = _saved_bytes(cell, cell.zero_rows(batch_size)[:, : cell.input_size], batch_size)
    needed = item * batch_size * sum(numbers)
    return DiagonalEstimate(
        batch_size=batch_size,
        hidden_size=cell.hidden_size,
        recurrent_parameters=sum(
            p.numel() for name, p in cell.named_parameters() if p.requires_grad and not name.startswith("readout.")
        ),
        influence_numbers=numbers,
        influence_bytes=needed,
        bptt_bytes_per_step=saved,
        break_even_length=needed / max(saved, 1),
        step_bytes=2 * needed,
    )


@overload
def estimate(cell: SlotCell, batch_size: int, x: Tensor | None = None, buffer: int = 64) -> Estimate: ...


@overload
def estimate(cell: DiagonalCell, batch_size: int, x: Tensor | None = None, buffer: int = 64) -> DiagonalEstimate: ...


def estimate(
    cell: SlotCell | DiagonalCell, batch_size: int, x: Tensor | None = None, buffer: int = 64
) -> Estimate | DiagonalEstimate:
    """Work out the costs of :class:`~sparse_rtrl.RTRL` for a cell before anything is allocated.

    Args:
        cell: the cell.
        batch_size: streams ``B``.
        x: an input of one step ``(B, ...)``; by default zeros ``(B, cell.input_size)``. Not for a diagonal cell.
        buffer: segments kept in the circular tree.

    Returns:
        The costs; printed, they come with their formulas.

    Raises:
        ValueError: if ``x`` is not given and the cell has no ``input_size``.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(cell, DiagonalCell):
        return estimate_diagonal(cell, batch_size)
    if not isinstance(cell, SlotCell):
        raise TypeError(
            f"cell must be a SlotCell or a DiagonalCell, got {type(cell).__name__}; for other modules and stacks see"
            " Carry(module).estimate(state)"
        )
    groups = ParameterGroups.of_cell(cell)
    reference = next(cell.parameters())
    if x is None:
        size = getattr(cell, "input_size", None)
        if not isinstance(size, int):
            raise ValueError(f"x must be given: {type(cell).__name__} has no input_size to build an example input from")
        x = reference.new_zeros(batch_size, size)
    with torch.no_grad():
        routing = cell.route(x, cell.initial_state(batch_size))
    commit_every = choose_commit_every(cell, groups, routing)
    saved_bytes = _saved_bytes(cell, x, batch_size)
    item = reference.element_size()
    hidden = cell.hidden_size
    influence_bytes = item * batch_size * (hidden + 1) * groups.count
    kw, ks = routing.write.shape[1], routing.support.shape[1]
    w, r = kw * cell.slot_size, ks * cell.slot_size
    active = groups.core_columns + routing.experts.shape[1] * groups.expert_columns
    return Estimate(
        batch_size=batch_size,
        hidden_size=hidden,
        core_parameters=groups.core_columns,
        expert_parameters=groups.expert_columns,
        num_experts=groups.num_experts,
        influence_bytes=influence_bytes,
        tree_bytes=tree_bytes(cell, batch_size, routing, buffer, commit_every, item),
        bptt_bytes_per_step=saved_bytes,
        break_even_length=influence_bytes / max(saved_bytes, 1),
        step_flops=2.0 * w * (r + 1) * active * batch_size,
        commit_every=commit_every,
        segment=choose_segment(hidden),
    )


def tree_bytes(cell: SlotCell, batch_size: int, routing: Routing, buffer: int, commit_every: int, item: int) -> int:
    """Bytes of a circular tree at most, ``min(S, 2^level k)`` blocks a side at each level, see ``nbytes`` there.

    Args:
        cell: the cell.
        batch_size: streams ``B``.
        routing: of one step, for ``kw`` and ``kr``.
        buffer: segments that the tree keeps.
        commit_every: steps per segment; one of several steps covers the slots that any stream touched.
        item: bytes per number.
    """
    steps = 1 if commit_every == 1 else commit_every * batch_size
    slots = (max(1, steps * routing.write.shape[1]), max(1, steps * routing.support.shape[1]))
    widths = ring_widths(buffer.bit_length() - 1, buffer, cell.num_slots, *slots)
    return ring_bytes(widths, batch_size, cell.slot_size, item)


def choose_segment(hidden_size: int) -> int:
    """Steps per segment near ``H``, a power of two: from there on longer ones save little of ``(2 H + H² / n) N``."""
    return min(MAX_SEGMENT, 1 << max(0, hidden_size - 1).bit_length())


def choose_commit_every(cell: SlotCell, groups: ParameterGroups, routing: Routing, most: int = MAX_COMMIT_EVERY) -> int:
    """Steps per influence update with the fewest multiply-adds per step, a power of two up to ``most``.

    Step-wise an update costs ``w (r + 1)`` per active parameter. A window of ``n`` steps costs
    ``(min(H, n w) min(H, n r) + min(H, n w) n) / n`` per parameter that is active in any of its steps, which for
    experts is a share ``1 - (1 - k / E)^n`` of them; the loss row costs ``H`` either way (Schmidhuber 1992: ``n`` near
    ``H`` turns ``O(H^2)`` per parameter into ``O(H)``).
    """
    hidden, slot_size = cell.hidden_size, cell.slot_size
    w, r = routing.write.shape[1] * slot_size, routing.support.shape[1] * slot_size
    share = routing.experts.shape[1] / groups.num_experts if groups.num_experts else 0.0

    def cost(n: int) -> float:
        rows, cols = min(hidden, n * w), min(hidden, n * r)
        awake = groups.num_experts * (1.0 - (1.0 - share) ** n) * groups.expert_columns
        return (groups.core_columns + awake) * (rows * cols / n + rows)

    return min((1 << power for power in range(most.bit_length())), key=cost)


def check_memory(
    groups: ParameterGroups,
    hidden_size: int,
    batch_size: int,
    like: Tensor,
    remedy: str = "Use fewer streams, a smaller state, or fewer experts",
) -> None:
    """Refuse influence that cannot fit into the memory of a device.

    Args:
        groups: the recurrent parameters.
        hidden_size: ``H``.
        batch_size: ``B``.
        like: a tensor of any shape, of the influence's dtype on its device.
        remedy: what to do, for the message.

    Raises:
        MemoryError: with the numbers.
    """
    needed = like.element_size() * batch_size * (hidden_size + 1) * groups.count
    available = available_bytes(like.device)
    if needed > available:
        raise MemoryError(
            f"the influence needs {_mib(needed)}: itemsize {like.element_size()} * batch_size {batch_size} *"
            f" (hidden_size {hidden_size} + 1) * {groups.count} recurrent parameters; {_mib(available)} are available"
            f" on {like.device}. {remedy}"
        )


def available_bytes(device: torch.device) -> int:
    """Free memory of a device, or of the machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # psutil may be missing on a machine that only runs the kernels on its GPU

    return psutil.virtual_memory().available


def _saved_bytes(cell: nn.Module, x: Tensor, batch_size: int) -> int:
    """Bytes of activations that one forward step keeps for its backward pass, parameters left out."""
    parameters = {p.data_ptr() for p in cell.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        kept.append(tensor)  # keeps addresses distinct while counting
        return tensor

    kept: list[Tensor] = []
    state = pytree.tree_map(Tensor.requires_grad_, cell.initial_state(batch_size))  # type: ignore[operator]
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cell(x, state)
    return sum(sizes.values())
