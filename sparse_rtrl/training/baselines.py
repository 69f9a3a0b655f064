"""What the sparse engine is compared with: BPTT, truncated BPTT, plain recurrent networks, and dense-Jacobian RTRL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils import _pytree as pytree

from sparse_rtrl.cells.slot_cell import Routing, SlotCell
from sparse_rtrl.training.gradient_method import (
    GradientMethod,
    RecurrentModel,
    Tally,
    backpropagate,
    lyapunov_metrics,
    unroll,
)
from sparse_rtrl.training.lyapunov import LyapunovRegularizer


class TBPTT(GradientMethod):
    """Truncated BPTT: backpropagation through segments, with the state but no gradient carried between them.

    Args:
        model: a :class:`~sparse_rtrl.SlotCell` or a module that takes whole sequences.
        segment: steps per segment; None for a whole batch.
        lyapunov: see :class:`~sparse_rtrl.training.gradient_method.GradientMethod`.
    """

    def __init__(
        self, model: RecurrentModel, segment: int | None = 8, lyapunov: LyapunovRegularizer | None = None
    ) -> None:
        if segment is not None and segment < 1:
            raise ValueError(f"segment must be at least 1, got {segment}")
        self.model = model
        self.segment = segment
        self.lyapunov = lyapunov
        self._state: Any = None

    def reset(self, streams: Tensor | None = None) -> None:
        """See :meth:`GradientMethod.reset`."""
        self._state = _started_anew(self.model, self._state, streams)
        if self.lyapunov is not None:
            self.lyapunov.reset(streams)

    def learn(self, x: Tensor, target: Tensor, divisor: int) -> Tally:
        """See :meth:`GradientMethod.learn`."""
        state = self.model.initial_state(x.shape[1]) if self._state is None else self._state
        penalty = None if self.lyapunov is None else self.lyapunov.loss(x, state)
        # A segment without a question has no loss and no gradient here, so it needs no graph.
        with torch.set_grad_enabled(divisor > 0):
            outputs, state = unroll(self.model, x, state)
        tally = backpropagate(outputs, target, divisor, penalty)
        self._state = pytree.tree_map(Tensor.detach, state)
        return tally

    def metrics(self) -> dict[str, Any]:
        """The Lyapunov exponent, if it is watched."""
        return lyapunov_metrics(self.lyapunov)

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`GradientMethod.state_dict`."""
        lyapunov = None if self.lyapunov is None else self.lyapunov.state_dict()
        return {"state": self._state, "lyapunov": lyapunov}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`GradientMethod.load_state_dict`."""
        self._state = state["state"]
        if self.lyapunov is not None:
            self.lyapunov.load_state_dict(state["lyapunov"])


class BPTT(TBPTT):
    """Backpropagation through the whole batch: the exact gradient of its sequences, memory that grows with the length.

    On a stream that is not reset between batches the gradient ends where the batch begins.

    Args:
        model: a :class:`~sparse_rtrl.SlotCell` or a module that takes whole sequences.
        lyapunov: see :class:`~sparse_rtrl.training.gradient_method.GradientMethod`.
    """

    def __init__(self, model: RecurrentModel, lyapunov: LyapunovRegularizer | None = None) -> None:
        super().__init__(model, None, lyapunov)


def _started_anew(model: RecurrentModel, state: Any, streams: Tensor | None) -> Any:
    """The state with the initial one in some streams, a mask ``(B,)``; None stands for the initial state of all."""
    if state is None or streams is None:
        return None

    def chosen(one: Tensor, two: Tensor, initial: Tensor, now: Tensor) -> Tensor:
        # Streams are the dimension whose size follows the batch size: 0 of a slot cell's state, 1 of a GRU's.
        dim = next(d for d, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b)
        shape = [1] * now.dim()
        shape[dim] = len(streams)
        return torch.where(streams.to(now.device).view(shape), initial.detach(), now)

    initial = (model.initial_state(batch) for batch in (1, 2, len(streams)))
    return pytree.tree_map(chosen, *initial, state)


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
        self.segment = 1
        self._state: Any = None
        self._influence: Tensor | None = None
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

    def reset(self, streams: Tensor | None = None) -> None:
        """See :meth:`GradientMethod.reset`."""
        self._state = _started_anew(self.model, self._state, streams)
        if self._influence is not None:
            kept = None if streams is None else ~streams.to(self._influence.device)
            self._influence = None if kept is None else self._influence * kept.view(-1, 1, 1)

    def learn(self, x: Tensor, target: Tensor, divisor: int) -> Tally:
        """A segment of one step; see :meth:`GradientMethod.learn`."""
        cell = self.model
        state = cell.initial_state(x.shape[1]) if self._state is None else self._state
        if self._influence is None:
            size = sum(parameter.numel() for parameter in self._recurrent.values())
            self._influence = state.new_zeros(state.shape[0], cell.hidden_size, size)  # (B, H, N)
        entry = state.detach().requires_grad_(divisor > 0)
        with torch.no_grad():
            routing = cell.route(x[0], entry)
        with torch.set_grad_enabled(divisor > 0):
            output, _, state = cell(x[0], entry, routing)
        tally = Tally()
        if divisor:
            tally = backpropagate(output[None], target, divisor)
            self._add_carried_gradient(entry.grad, self._influence)
        # After the loss, which needs the influence at its entry; before the optimizer changes the parameters.
        self._update_influence(self._influence, x[0], entry.detach(), routing)
        self._state = pytree.tree_map(Tensor.detach, state)
        return tally

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`GradientMethod.state_dict`."""
        # The state is replaced by every step, the influence changed in place.
        return {"state": self._state, "influence": None if self._influence is None else self._influence.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`GradientMethod.load_state_dict`."""
        self._state = state["state"]
        self._influence = None if state["influence"] is None else state["influence"].clone()

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
