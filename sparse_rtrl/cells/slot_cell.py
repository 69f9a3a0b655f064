"""The contract of a recurrent cell with slot memory: declare what a step reads, writes and runs, then update it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_rtrl.cells.fused_pass import FusedPass


@dataclass(frozen=True)
class Routing:
    """What one step touches, per stream; entries are distinct within a row.

    Attributes:
        read: slots whose old content the step reads, ``(B, kr)`` int64.
        write: slots the step writes, ``(B, kw)`` int64. Their old content may be used too (gated writes).
        experts: experts that are active in the step, ``(B, k)`` int64.
    """

    read: Tensor
    write: Tensor
    experts: Tensor

    @property
    def support(self) -> Tensor:
        """Slots that the written content may depend on: ``read`` and ``write``, ``(B, kr + kw)``, overlaps repeated."""
        return torch.cat((self.read, self.write), dim=1)

    def repeat_interleave(self, repeats: int) -> Routing:
        """Repeat each stream's row ``repeats`` times."""
        return Routing(
            self.read.repeat_interleave(repeats, 0),
            self.write.repeat_interleave(repeats, 0),
            self.experts.repeat_interleave(repeats, 0),
        )


def gather_slots(state: Tensor, slots: Tensor) -> Tensor:
    """Content of each stream's own ``slots (B, k)`` in ``state (B, S, D)``, as ``(B, k, D)``."""
    return state.gather(1, slots.unsqueeze(-1).expand(-1, -1, state.shape[-1]))


def scatter_slots(state: Tensor, slots: Tensor, content: Tensor) -> Tensor:
    """A copy of ``state (B, S, D)`` with each stream's ``slots (B, k)`` replaced by ``content (B, k, D)``."""
    return state.scatter(1, slots.unsqueeze(-1).expand(-1, -1, state.shape[-1]), content)


def _is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor belongs to ``torch.compile`` or a ``torch.func`` transform, which do not allow marking it."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


class SlotCell(nn.Module):
    """A recurrent cell whose state is ``num_slots`` slots of ``slot_size`` numbers.

    A subclass implements :meth:`route` and :meth:`update`. ``update`` sees only the slots that ``route`` declared, so
    the support contract (written slots and output depend differentiably on the declared slots only, all other slots
    are copied bit for bit) holds by construction.

    Parameters are grouped by where they live: those of an :class:`~sparse_rtrl.ExpertBank` belong to their expert,
    those under ``self.readout`` affect only the output and carry no influence, all others are the core group. A
    parameter that ``route`` uses must also enter a soft weight in ``update``, or it never trains.

    Args:
        num_slots: number of slots ``S``.
        slot_size: numbers per slot ``D``.
        num_experts: number of experts ``E``; 0 for a cell without experts.
    """

    def __init__(self, num_slots: int, slot_size: int, num_experts: int = 0) -> None:
        super().__init__()
        for name, value, least in (
            ("num_slots", num_slots, 1),
            ("slot_size", slot_size, 1),
            ("num_experts", num_experts, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.num_slots = num_slots
        self.slot_size = slot_size
        self.num_experts = num_experts

    @property
    def hidden_size(self) -> int:
        """State size ``H = S * D``."""
        return self.num_slots * self.slot_size

    def initial_state(self, batch_size: int) -> Tensor:
        """State a stream starts from, ``(B, S, D)``: zeros in the dtype and on the device of the parameters."""
        reference = next(self.parameters())
        return reference.new_zeros(batch_size, self.num_slots, self.slot_size)

    def route(self, x: Tensor, state: Tensor) -> Routing:
        """Choose the slots and experts of a step. Runs without gradient and may look at everything.

        Args:
            x: input of the step, ``(B, ...)``.
            state: ``(B, S, D)``.

        Returns:
            Indices of the step, distinct within each row.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement route(x, state)")

    def update(self, x: Tensor, h_read: Tensor, h_write: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Compute the new content of the written slots and the output, row by row of the batch.

        Args:
            x: input of the step, ``(B, ...)``.
            h_read: old content of the read slots, ``(B, kr, D)``.
            h_write: old content of the written slots, ``(B, kw, D)``.
            routing: what :meth:`route` declared.

        Returns:
            New content of the written slots ``(B, kw, D)`` and the output ``(B, ...)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement update(x, h_read, h_write, routing)")

    def transition(self, x: Tensor, h_read: Tensor, h_write: Tensor, routing: Routing) -> Tensor:
        """The new content of the written slots alone, ``(B, kw, D)``: the part of :meth:`update` that is captured.

        Override it together with ``update`` where the output costs something, so that capture does not compute it.
        """
        return self.update(x, h_read, h_write, routing)[0]

    def fused_pass(self) -> FusedPass | None:
        """Compiled operations that run whole segments of this cell; None, the default, if there are none."""
        return None

    def unroll(self, xs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run several steps with plain autograd; without gradient in the fused pass, if there is one.

        Args:
            xs: inputs ``(n, B, ...)``.
            state: state that enters the first step, ``(B, S, D)``.

        Returns:
            Outputs ``(n, B, ...)`` and the state after the last step.
        """
        fused = None if torch.is_grad_enabled() else self.fused_pass()
        if fused is not None and (found := fused.evaluate(xs, state)) is not None:
            return found
        outputs = []
        # Parametrized weights are constant within the chunk: evaluate them once, not at every step.
        with parametrize.cached():
            for x in xs:
                output, _, state = self(x, state)
                outputs.append(output)
        return torch.stack(outputs), state

    def forward(
        self, x: Tensor, state: Tensor, routing: Routing | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Run one step.

        Args:
            x: input of the step, ``(B, ...)``.
            state: ``(B, S, D)``; marked as requiring a gradient if it does not yet and gradients are enabled, so that
                the gradient of a loss with respect to the entry of the step exists.
            routing: indices to use instead of those of :meth:`route`, for replaying a recorded step.

        Returns:
            Output, an info dict with ``idx_slots_read (B, kr)``, ``idx_slots_write (B, kw)``, ``idx_experts (B, k)``
            and ``h_next``, the new state detached, and the new state ``(B, S, D)``.
        """
        if torch.is_grad_enabled() and not state.requires_grad and not _is_transformed(state):
            state.requires_grad_()
        if routing is None:
            with torch.no_grad():
                routing = self.route(x, state)
        h_read = gather_slots(state, routing.read)
        h_write = gather_slots(state, routing.write)
        h_write_new, output = self.update(x, h_read, h_write, routing)
        new = scatter_slots(state, routing.write, h_write_new)
        info = {
            "idx_slots_read": routing.read,
            "idx_slots_write": routing.write,
            "idx_experts": routing.experts,
            "h_next": new.detach(),
        }
        return output, info, new
