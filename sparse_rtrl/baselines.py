"""What the sparse engine is compared with: BPTT, truncated BPTT, plain recurrent networks, and dense-Jacobian RTRL."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils import _pytree as pytree

from sparse_rtrl.slot_cell import Routing, SlotCell
from sparse_rtrl.tasks import Batch
from sparse_rtrl.training import GradientMethod, RecurrentModel, Tally, answer_loss, split_batch, unroll


class BPTT(GradientMethod):
    """Backpropagation through the whole sequence: the exact gradient, memory that grows with the length.

    Args:
        model: a :class:`~sparse_rtrl.SlotCell` or a module that takes whole sequences.
    """

    def __init__(self, model: RecurrentModel) -> None:
        self.model = model

    def segments(self, batch: Batch, mean_per_segment: bool = False) -> Iterator[Tally]:
        """One segment, the whole sequence; see :meth:`GradientMethod.segments`."""
        outputs, _ = unroll(self.model, batch.x, self.model.initial_state(batch.x.shape[1]))
        loss, tally = answer_loss(outputs, batch.target)
        if tally.asked:
            (loss / tally.asked).backward()
        yield tally


class TBPTT(GradientMethod):
    """Truncated BPTT: backpropagation through segments, with the state but no gradient carried between them.

    Args:
        model: a :class:`~sparse_rtrl.SlotCell` or a module that takes whole sequences.
        segment: steps per segment.
    """

    def __init__(self, model: RecurrentModel, segment: int = 8) -> None:
        if segment < 1:
            raise ValueError(f"segment must be at least 1, got {segment}")
        self.model = model
        self.segment = segment

    def segments(self, batch: Batch, mean_per_segment: bool = False) -> Iterator[Tally]:
        """See :meth:`GradientMethod.segments`."""
        state = self.model.initial_state(batch.x.shape[1])
        for x, target, divisor in split_batch(batch, self.segment, mean_per_segment):
            tally = Tally()
            # A segment that asks nothing has no gradient here, so it needs no graph.
            with torch.set_grad_enabled(divisor > 0):
                outputs, state = unroll(self.model, x, pytree.tree_map(Tensor.detach, state))
                if divisor:
                    loss, tally = answer_loss(outputs, target)
                    (loss / divisor).backward()
            yield tally


class RecurrentNetwork(nn.Module):
    """One GRU or tanh-RNN layer of PyTorch with a linear readout, over whole sequences.

    Args:
        kind: ``"gru"`` or ``"rnn"``.
        input_size: size of the input of a step.
        hidden_size: size of the state.
        output_size: size of the output.
    """

    def __init__(self, kind: str, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        layers = {"gru": nn.GRU, "rnn": nn.RNN}
        if kind not in layers:
            raise ValueError(f"kind must be one of {sorted(layers)}, got {kind!r}")
        self.recurrence = layers[kind](input_size, hidden_size)
        self.readout = nn.Linear(hidden_size, output_size)

    def initial_state(self, batch_size: int) -> Tensor:
        """State a stream starts from, ``(1, B, hidden_size)``."""
        return self.readout.weight.new_zeros(1, batch_size, self.recurrence.hidden_size)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run over a chunk of steps.

        Args:
            x: inputs ``(n, B, input_size)``.
            state: ``(1, B, hidden_size)``.

        Returns:
            Outputs ``(n, B, output_size)`` and the new state.
        """
        hidden, state = self.recurrence(x, state)
        return self.readout(hidden), state


class _WrittenContent(nn.Module):
    """The written slots of one stream as a function of parameters and old slots, for ``torch.func``."""

    def __init__(self, cell: SlotCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(
        self, x: Tensor, h_read: Tensor, h_write: Tensor, read: Tensor, write: Tensor, experts: Tensor
    ) -> Tensor:
        routing = Routing(read[None], write[None], experts[None])
        return self.cell.update(x[None], h_read[None], h_write[None], routing)[0].flatten()


class DenseJacobianRTRL(GradientMethod):
    """RTRL by ``vmap`` of ``torch.func.jacrev`` at every step, with dense Jacobians: correct, and slow.

    Every step takes the dense Jacobian of the written slots with respect to the old read and written slots and to
    every recurrent parameter, of active and sleeping experts alike, and updates ``P[write] = Jh P[support] + F``. This
    is the obvious way to write RTRL for a slot cell; it serves as the speed baseline.

    Args:
        cell: the cell to train; parameters under ``readout`` carry no influence.
    """

    def __init__(self, cell: SlotCell) -> None:
        self.model: SlotCell = cell
        self._written = _WrittenContent(cell)
        self._recurrent = {
            f"cell.{name}": parameter
            for name, parameter in cell.named_parameters()
            if parameter.requires_grad and not name.startswith("readout.")
        }

        def written(parameters: dict[str, Tensor], h_read: Tensor, h_write: Tensor, *fixed: Tensor) -> Tensor:
            x, *routing = fixed
            return functional_call(self._written, parameters, (x, h_read, h_write, *routing))

        self._jacobians = vmap(jacrev(written, argnums=(0, 1, 2)), in_dims=(None, 0, 0, 0, 0, 0, 0))

    def segments(self, batch: Batch, mean_per_segment: bool = False) -> Iterator[Tally]:
        """Segments of one step; see :meth:`GradientMethod.segments`."""
        cell = self.model
        state = cell.initial_state(batch.x.shape[1])
        size = sum(parameter.numel() for parameter in self._recurrent.values())
        influence = state.new_zeros(state.shape[0], cell.hidden_size, size)  # (B, H, N)
        for x, target, divisor in split_batch(batch, 1, mean_per_segment):
            entry = state.detach().requires_grad_(divisor > 0)
            with torch.no_grad():
                routing = cell.route(x[0], entry)
            with torch.set_grad_enabled(divisor > 0):
                output, _, state = cell(x[0], entry, routing)
            tally = Tally()
            if divisor:
                loss, tally = answer_loss(output[None], target)
                (loss / divisor).backward()
                self._add_carried_gradient(entry.grad, influence)
            # After the loss, which needs the influence of its entry; before the yield, which may step the parameters.
            self._update_influence(influence, x[0], entry.detach(), routing)
            yield tally

    def _add_carried_gradient(self, entry_grad: Tensor | None, influence: Tensor) -> None:
        if entry_grad is None:
            return
        carried = torch.einsum("bh,bhn->n", entry_grad.flatten(1), influence)
        parameters = list(self._recurrent.values())
        for parameter, part in zip(parameters, carried.split([p.numel() for p in parameters]), strict=True):
            part = part.view_as(parameter)
            parameter.grad = part.clone() if parameter.grad is None else parameter.grad + part

    @torch.no_grad()
    def _update_influence(self, influence: Tensor, x: Tensor, entry: Tensor, routing: Routing) -> None:
        stream = torch.arange(x.shape[0]).unsqueeze(1)
        h_read, h_write = entry[stream, routing.read], entry[stream, routing.write]
        immediate, by_read, by_write = self._jacobians(
            self._recurrent, h_read, h_write, x, routing.read, routing.write, routing.experts
        )
        state_jacobian = torch.cat((by_read.flatten(2), by_write.flatten(2)), dim=2)  # (B, w, r)
        # An orthogonal or otherwise constrained weight is differentiated through to its own parameters here.
        dense = torch.cat([immediate[name].flatten(2) for name in self._recurrent], dim=2)  # (B, w, N)
        slots = influence.unflatten(1, (-1, self.model.slot_size))  # (B, S, D, N)
        moved = torch.baddbmm(dense, state_jacobian, slots[stream, routing.support].flatten(1, 2))
        slots[stream, routing.write] = moved.unflatten(1, (-1, self.model.slot_size))
