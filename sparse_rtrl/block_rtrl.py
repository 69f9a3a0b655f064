"""The explicit step interface: the caller runs the model and hands over what the step touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_rtrl import ops
from sparse_rtrl.engine import Engine
from sparse_rtrl.errors import ContractError
from sparse_rtrl.influence import check_finite
from sparse_rtrl.parameters import ParameterGroups
from sparse_rtrl.plan import CatchUp
from sparse_rtrl.reference import slot_entries
from sparse_rtrl.slot_cell import Routing, SlotCell


def get_expert_latent_activated(
    model: SlotCell, info: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[int], list[int]]:
    """What a step used, as flat lists over the whole batch.

    Args:
        model: the cell that ran.
        info: the dict it returned, with ``idx_slots_read``, ``idx_slots_write`` and ``idx_experts``.

    Returns:
        Active parameters by name, core parameters and ``name.e`` for each active expert ``e`` of a stacked one; the
        sorted state entries written by any stream; the sorted state entries read by any stream.
    """
    groups = ParameterGroups.of_cell(model)
    experts = info["idx_experts"].unique().tolist()
    active = {p.name: p.tensor for p in groups.core}
    active |= {f"{p.name}.{e}": p.tensor[e] for p in groups.expert for e in experts}
    write, read = (
        slot_entries(info[key].unique().unsqueeze(0), model.slot_size).flatten().tolist()
        for key in ("idx_slots_write", "idx_slots_read")
    )
    return active, write, read


class BlockRTRL:
    """Exact RTRL for a loop that calls the model itself, on the same engine as :class:`~sparse_rtrl.RTRL`.

    .. code-block:: python

        out, info, h_next = model(x_t, h_t)
        active_params, write_idx, read_idx = get_expert_latent_activated(model, info)
        rtrl.step(model, x_t, h_t, criterion(out, y_t), active_params, read_idx, write_idx)
        h_t = h_next.detach()

    Args:
        state_params: the recurrent parameters to carry, by name; names may include others, such as the readout's.
        B: streams.
        H: state size ``S * D``.
        len_buffer: segments kept for sleeping experts.
        catch_up: how sleeping experts catch up, see :class:`~sparse_rtrl.RTRL`.
        backend: what computes, see :class:`~sparse_rtrl.RTRL`.
    """

    def __init__(
        self,
        state_params: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        B: int,
        H: int,
        len_buffer: int = 64,
        catch_up: CatchUp = "auto",
        backend: ops.Backend = "auto",
    ) -> None:
        for name, value in (("B", B), ("H", H), ("len_buffer", len_buffer)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.state_params = dict(state_params)
        if not self.state_params:
            raise ValueError("state_params must name at least one recurrent parameter, got none")
        self.B, self.H, self.len_buffer, self.catch_up, self.backend = B, H, len_buffer, catch_up, backend
        self._engine: Engine | None = None
        self._pending_state: dict[str, Any] | None = None

    def step(
        self,
        model: SlotCell,
        x_t: Tensor,
        h_t: Tensor,
        loss: Tensor | None,
        active_params: Mapping[str, Tensor] | Iterable[str],
        read_idx: Iterable[int],
        write_idx: Iterable[int],
    ) -> None:
        """Capture the step that the caller just ran, send its loss backwards, and update the influence.

        Calls ``loss.backward()``, adds the gradient through the past and what sleeping experts are owed to ``.grad``,
        and commits. The model's ``route`` is called once more and must choose the same again. The caller detaches
        ``h_next``.

        Args:
            model: the cell, with the parameters that the step ran with.
            x_t: input of the step ``(B, ...)``.
            h_t: state that entered it ``(B, S, D)``, the very tensor that was given to the model.
            loss: loss of this step before its backward, or None.
            active_params: names of the active parameters, from :func:`get_expert_latent_activated`.
            read_idx: state entries read by any stream.
            write_idx: state entries written by any stream.

        Raises:
            ContractError: if the model uses slots or parameters that the lists do not name.
            ValueError: if a recurrent parameter of the model is missing from ``state_params``.
            NonFiniteError: if a Jacobian or the gradient of the loss is not finite.
        """
        engine = self._engine_for(model)
        if tuple(h_t.shape) != (self.B, model.num_slots, model.slot_size):
            raise ValueError(
                f"h_t must have shape {(self.B, model.num_slots, model.slot_size)}, got {tuple(h_t.shape)}"
            )
        if not h_t.is_leaf:
            raise ValueError("h_t must be detached from the step before: h_t = h_next.detach()")
        if x_t.requires_grad:
            raise ValueError("x_t must not require a gradient: make the parameters before the model a part of it")
        if loss is not None and not loss.requires_grad:
            raise ValueError("loss must depend on the model's output; it does not require a gradient")
        if loss is not None and not h_t.requires_grad:
            raise ValueError("h_t must be the very tensor that was given to the model, which marks it for gradients")
        entered = h_t.detach()
        with torch.no_grad():
            routing = model.route(x_t, entered)
        engine.check_routing(routing)
        self._check_lists(model, routing, set(active_params), set(read_idx), set(write_idx))
        with torch.nn.utils.parametrize.cached():
            step = engine.step(x_t, entered, routing, engine.checked_tensors(), engine.steps)
        u = None if loss is None else self._backward(loss, h_t)
        engine.influence.record([step])
        engine.steps += 1
        if u is not None:
            engine.add_to_grad(*engine.influence.loss_gradient(0, u, engine.steps - 1))
        engine.influence.commit()
        engine.flush()

    def _backward(self, loss: Tensor, h_t: Tensor) -> Tensor | None:
        """Send the loss backwards and return ``dL/dh_t (B, H)``; None if it does not depend on the state."""
        assert self._engine is not None
        received: list[Tensor] = []
        hook = h_t.register_hook(received.append)
        try:
            loss.backward()
        finally:
            hook.remove()
        if not received:
            return None
        u = received[0].flatten(1)
        check_finite(self._engine.steps, {"the gradient of the loss": u})
        return u

    def flush(self) -> None:
        """Add to ``.grad`` what sleeping experts are owed; :meth:`step` has done so already."""
        if self._engine is not None:
            self._engine.flush()

    def reset(self, streams: Tensor | None = None) -> None:
        """Clear the influence of some streams ``(B,)`` bool, or of all; the caller resets ``h_t``."""
        if self._engine is not None:
            self._engine.influence.reset(self._engine.checked_mask(streams))

    def influence(self) -> dict[str, Tensor]:
        """Influence ``dh/dθ`` of every recurrent parameter, ``(B, H, *shape)``; empty before the first step."""
        return {} if self._engine is None else self._engine.influence.matrices()

    def state_dict(self) -> dict[str, Any]:
        """Influence and tree; empty before the first step."""
        if self._engine is None:
            return self._pending_state or {}
        return {"version": 1, "influence": self._engine.influence.state_dict(), "steps": self._engine.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; takes effect at the next step if the model is not known yet."""
        if state and state.get("version") != 1:
            raise ValueError(f"state must be of version 1, got {state.get('version')!r}")
        if not state:
            self._engine = self._pending_state = None
        elif self._engine is None:
            self._pending_state = state
        else:
            self._engine.influence.load_state_dict(state["influence"])
            self._engine.steps = state["steps"]

    def _engine_for(self, model: SlotCell) -> Engine:
        if self._engine is not None and self._engine.cell is model:
            return self._engine
        if self._engine is not None:
            raise ValueError("model must be the one of the steps before; build a new BlockRTRL for another model")
        if model.hidden_size != self.H:
            raise ValueError(f"H must be the model's num_slots * slot_size = {model.hidden_size}, got {self.H}")
        engine = Engine(model, self.B, self.len_buffer, self.catch_up, self.backend)
        carried = {id(tensor) for tensor in self.state_params.values()}
        missing = [
            p.name
            for p in engine.groups.all
            if p.name not in self.state_params and not any(id(source) in carried for source in p.sources)
        ]
        if missing:
            raise ValueError(f"state_params must name every trainable recurrent parameter; missing: {missing}")
        if self._pending_state is not None:
            engine.influence.load_state_dict(self._pending_state["influence"])
            engine.steps = self._pending_state["steps"]
            self._pending_state = None
        self._engine = engine
        return engine

    def _check_lists(
        self, model: SlotCell, routing: Routing, active: set[str], read: set[int], write: set[int]
    ) -> None:
        assert self._engine is not None
        violations = []
        for name, given, slots in (("read_idx", read, routing.read), ("write_idx", write, routing.write)):
            used = set(slot_entries(slots.unique().unsqueeze(0), model.slot_size).flatten().tolist())
            if not used <= given:
                violations.append(f"{name} must hold every state entry of the step; missing {sorted(used - given)}")
        experts = routing.experts.unique().tolist()
        names = {p.name for p in self._engine.groups.core if p.trainable}
        names |= {f"{p.name}.{e}" for p in self._engine.groups.expert if p.trainable for e in experts}
        if not names <= active:
            violations.append(f"active_params must name every active parameter; missing {sorted(names - active)}")
        if violations:
            raise ContractError(violations)
