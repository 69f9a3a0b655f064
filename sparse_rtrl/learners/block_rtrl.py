"""The explicit step interface: the caller runs the model and hands over what the step touched."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_rtrl.capture.parameters import ParameterGroups
from sparse_rtrl.capture.verify import Verify
from sparse_rtrl.cells.slot_cell import Routing, SlotCell, gather_slots, scatter_slots
from sparse_rtrl.errors import ContractError
from sparse_rtrl.influence.plan import CatchUp
from sparse_rtrl.influence.sparse import check_finite
from sparse_rtrl.learners.engine import Engine, checked_mask
from sparse_rtrl.ops import dispatch
from sparse_rtrl.ops.reference import slot_entries

_INFO = ("idx_slots_read", "idx_slots_write", "idx_experts", "h_next")


class ActiveParameters(dict[str, Tensor]):
    """Active parameters by name, with the ``info`` of the step that used them.

    Attributes:
        info: what the model returned.
    """

    def __init__(self, parameters: Mapping[str, Tensor], info: Mapping[str, Tensor]) -> None:
        super().__init__(parameters)
        self.info = info


def get_expert_latent_activated(
    model: SlotCell, info: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[int], list[int]]:
    """What a step used, as flat lists over the whole batch.

    Args:
        model: the cell that ran.
        info: the dict it returned, with ``idx_slots_read (B, kr)``, ``idx_slots_write (B, kw)`` and
            ``idx_experts (B, k)``.

    Returns:
        Active parameters by name, core parameters and ``name.e`` for each active expert ``e`` of a stacked one, which
        remember ``info``; the sorted state entries written by any stream, ``(m,)``; those read by any stream.
    """
    groups = ParameterGroups.of_cell(model)
    experts = info["idx_experts"].unique().tolist()
    active = {p.name: p.tensor for p in groups.core}
    active |= {f"{p.name}.{e}": p.tensor[e] for p in groups.expert for e in experts}
    write, read = (
        slot_entries(info[key].unique().unsqueeze(0), model.slot_size).flatten().tolist()
        for key in ("idx_slots_write", "idx_slots_read")
    )
    return ActiveParameters(active, info), write, read


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
        verify: which steps are compared with an ordinary backward pass, see :class:`~sparse_rtrl.RTRL`.
    """

    def __init__(
        self,
        state_params: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        B: int,
        H: int,
        len_buffer: int = 64,
        catch_up: CatchUp = "auto",
        backend: dispatch.Backend = "auto",
        *,
        verify: Verify = "sample",
    ) -> None:
        for name, value in (("B", B), ("H", H), ("len_buffer", len_buffer)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.state_params = dict(state_params)
        if not self.state_params:
            raise ValueError("state_params must name at least one recurrent parameter, got none")
        self.B, self.H, self.len_buffer, self.catch_up, self.backend = B, H, len_buffer, catch_up, backend
        self.verify: Verify = verify
        self._engine: Engine | None = None
        self._pending_state: dict[str, Any] | None = None
        self._left: Tensor | None = None
        """State after the last step, ``(B, S, D)``; None before it, and after loading."""
        self._restarted = torch.zeros(B, dtype=torch.bool)
        """Streams that were reset since."""

    def step(
        self,
        model: SlotCell,
        x_t: Tensor,
        h_t: Tensor,
        loss: Tensor | None,
        active_params: Mapping[str, Tensor] | Iterable[str],
        read_idx: Iterable[int],
        write_idx: Iterable[int],
        info: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Capture the step that the caller just ran, send its loss backwards, and update the influence.

        Calls ``loss.backward()``, adds the gradient through the past and those that were deferred to ``.grad``,
        and commits. The step is computed once more, with the slots and experts that ``info`` names, and must give
        ``info["h_next"]`` again. The caller detaches ``h_next``.

        Args:
            model: the cell, with the parameters that the step ran with.
            x_t: input of the step ``(B, ...)``.
            h_t: state that entered it ``(B, S, D)``, the very tensor that was given to the model.
            loss: loss of this step before its backward, a number, or None.
            active_params: the active parameters by name, any shapes, from :func:`get_expert_latent_activated`.
            read_idx: state entries read by any stream.
            write_idx: state entries written by any stream.
            info: the dict that the model returned, see :func:`get_expert_latent_activated`; None for the one that
                ``active_params`` remember.

        Raises:
            ContractError: if the model uses slots or parameters that the lists do not name, or the step with these
                inputs is not the one that gave ``info``.
            ValueError: if a recurrent parameter of the model is missing from ``state_params``, or ``info`` is missing.
            NonFiniteError: if a Jacobian or the gradient of the loss is not finite.
        """
        info = active_params.info if info is None and isinstance(active_params, ActiveParameters) else info
        if info is None or any(key not in info for key in _INFO):
            raise ValueError(
                f"info must be the dict that the model returned, with {', '.join(_INFO)}; got"
                f" {'None' if info is None else sorted(info)}. Pass info=info, or active_params as"
                " get_expert_latent_activated(model, info) returned them"
            )
        engine = self._engine_for(model)
        self._check_tensors(model, x_t, h_t, loss)
        entered, after = h_t.detach(), info["h_next"].detach()
        self._check_entered(entered)
        routing = engine.checked_routing(Routing(*(info[key] for key in _INFO[:3])))
        self._check_lists(model, routing, set(active_params), set(read_idx), set(write_idx))
        ran = gather_slots(after, routing.write)
        if not torch.equal(scatter_slots(entered, routing.write, ran), after):
            raise ContractError(
                ["h_t is not the state that the model ran with: slots that it did not write differ from info['h_next']"]
            )
        with parametrize.cached():
            tensors = engine.checked_tensors()
            (step,) = engine.steps_of(x_t.unsqueeze(0), [entered], [routing], tensors, [ran], engine.steps)
        u = None if loss is None else self._backward(loss, h_t)
        engine.influence.record([step])
        engine.steps += 1
        if u is not None:
            engine.add_to_grad(*engine.influence.loss_gradient(0, u, engine.steps - 1))
        engine.influence.commit()
        engine.flush()
        self._left, self._restarted = after.clone(), torch.zeros_like(self._restarted)

    def _check_tensors(self, model: SlotCell, x_t: Tensor, h_t: Tensor, loss: Tensor | None) -> None:
        """Refuse a state, an input or a loss that reaches beyond this one step.

        Raises:
            ValueError: naming which.
        """
        if tuple(h_t.shape) != (self.B, model.num_slots, model.slot_size):
            raise ValueError(
                f"h_t must have shape {(self.B, model.num_slots, model.slot_size)}, got {tuple(h_t.shape)}"
            )
        named = {id(p): name for name, p in [*self.state_params.items(), *model.named_parameters()]}
        if isinstance(h_t, nn.Parameter) or id(h_t) in named:
            name = named.get(id(h_t), "from outside the model")
            raise ValueError(
                f"h_t must not be trainable, got parameter {name}: a trained first state is not carried"
                " here. Use RTRL, which carries initial_state of the cell, or detach it"
            )
        if not h_t.is_leaf:
            raise ValueError("h_t must be detached from the step before: h_t = h_next.detach()")
        if x_t.requires_grad:
            raise ValueError("x_t must not require a gradient: make the parameters before the model a part of it")
        if loss is not None and not loss.requires_grad:
            raise ValueError("loss must depend on the model's output; it does not require a gradient")
        if loss is not None and not h_t.requires_grad:
            raise ValueError("h_t must be the very tensor that was given to the model, which marks it for gradients")

    def _check_entered(self, state: Tensor) -> None:
        """Refuse a state that is not the one the step before ended with, in streams that were not reset."""
        if self._left is None:
            return
        changed = (state != self._left).flatten(1).any(1) & ~self._restarted.to(state.device)
        if bool(changed.any()):
            raise ContractError(
                [
                    f"h_t differs from the h_next of the step before in streams {changed.nonzero().flatten().tolist()}:"
                    " a stream that starts anew needs rtrl.reset(mask), any other goes on from h_next.detach()"
                ]
            )

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
        """Add the deferred gradients of sleeping experts to ``.grad``; :meth:`step` has done so already."""
        if self._engine is not None:
            self._engine.flush()

    def reset(self, streams: Tensor | None = None) -> None:
        """Clear the influence of some streams ``(B,)`` bool, or of all; the caller resets ``h_t``."""
        mask = checked_mask(streams, self.B, torch.device("cpu"))
        self._restarted = self._restarted | mask
        if self._engine is not None:
            self._engine.influence.reset(self._engine.checked_mask(streams))

    def influence(self) -> dict[str, Tensor]:
        """Influence ``dh/dθ`` of every recurrent parameter, ``(B, H, *shape)``; empty before the first step."""
        return {} if self._engine is None else self._engine.influence.matrices()

    def state_dict(self) -> dict[str, Any]:
        """Influence and tree; empty before the first step."""
        if self._engine is None:
            return self._pending_state or {}
        engine = self._engine
        return {
            "version": 1,
            "influence": engine.influence.state_dict(),
            "steps": engine.steps,
            "verifier": engine.verifier.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; takes effect at the next step if the model is not known yet."""
        if state and state.get("version") != 1:
            raise ValueError(f"state must be of version 1, got {state.get('version')!r}")
        self._left, self._restarted = None, torch.zeros(self.B, dtype=torch.bool)
        if not state:
            self._engine = self._pending_state = None
        elif self._engine is None:
            self._pending_state = state
        else:
            _load(self._engine, state)

    def __copy__(self) -> BlockRTRL:
        """An independent copy for the same model, which goes on from where this one stands."""
        shared: list[Any] = list(self.state_params.values())
        if self._engine is not None:
            cell = self._engine.cell
            shared += [*cell.modules(), *cell.parameters(), *cell.buffers()]
        return copy.deepcopy(self, {id(each): each for each in shared})

    def _engine_for(self, model: SlotCell) -> Engine:
        if self._engine is not None and self._engine.cell is model:
            return self._engine
        if self._engine is not None:
            raise ValueError("model must be the one of the steps before; build a new BlockRTRL for another model")
        if model.hidden_size != self.H:
            raise ValueError(f"H must be the model's num_slots * slot_size = {model.hidden_size}, got {self.H}")
        engine = Engine(model, self.B, self.len_buffer, self.catch_up, self.backend, verify=self.verify)
        if engine.initial_state().requires_grad:
            raise ContractError(
                ["initial_state requires a gradient: a trained initial state is carried by RTRL only; detach it"]
            )
        carried = {id(tensor) for tensor in self.state_params.values()}
        missing = [
            p.name
            for p in engine.groups.all
            if p.name not in self.state_params and not any(id(source) in carried for source in p.sources)
        ]
        if missing:
            raise ValueError(f"state_params must name every trainable recurrent parameter; missing: {missing}")
        if self._pending_state is not None:
            _load(engine, self._pending_state)
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


def _load(engine: Engine, state: dict[str, Any]) -> None:
    engine.load_influence(state["influence"])
    engine.steps = state["steps"]
    if "verifier" in state:
        engine.verifier.load_state_dict(state["verifier"])
