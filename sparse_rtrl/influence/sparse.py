"""Influence matrices of every stream: storage, commits, sleeping experts and their deferred gradients."""

from __future__ import annotations

import cmath
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from sparse_rtrl.capture.parameters import ParameterGroups
from sparse_rtrl.captured import Captured, Moved
from sparse_rtrl.cells.slot_cell import Routing
from sparse_rtrl.errors import NonFiniteError
from sparse_rtrl.influence.plan import CatchUp, Plan, forced, plan
from sparse_rtrl.influence.tree import CircularTree
from sparse_rtrl.ops import dispatch
from sparse_rtrl.ops.precision import full_precision
from sparse_rtrl.ops.reference import slot_entries

Restore: TypeAlias = Callable[[dict[str, Any]], Captured]
"""Makes a captured piece of a window again from its ``state_dict``."""
PLAN_FIELDS = ("eager", "buffer", "levels", "product_from")


class Influence:
    """The influence of every recurrent parameter on the state of every stream.

    Steps are *captured* into a window (:meth:`record`) and later *committed* as one segment (:meth:`commit`). Losses of
    the window go backwards through its captured steps and end in the product with the influence at its entry
    (:meth:`loss_gradient`). An expert that no step of the window uses stays as it was at its ``last_update``: its
    matrix is brought up to date when it is used again or when the Jacobians it needs are about to leave the tree, and
    :meth:`flush` adds the gradient that was deferred meanwhile.

    Args:
        groups: the recurrent parameters.
        batch_size: streams ``B``.
        num_slots: ``S``.
        slot_size: ``D``.
        buffer: segments kept for sleeping experts; ``"auto"`` lets the planner choose at the first step.
        catch_up: ``"eager"`` moves every expert at every commit; ``"replay"`` applies the missed segments one by one;
            ``"product"`` applies their merged product once; ``"auto"`` takes what the planner predicts to be cheapest,
            and plans again when the interval between flushes has changed. Where the planner was not built, it takes
            the one of the last two that needs fewer multiplications.
        dtype: of the influence.
        device: where it is kept.
        backend: what computes, see :func:`sparse_rtrl.ops.dispatch.select`.
    """

    def __init__(
        self,
        groups: ParameterGroups,
        batch_size: int,
        num_slots: int,
        slot_size: int,
        buffer: int | Literal["auto"],
        catch_up: CatchUp,
        dtype: torch.dtype,
        device: torch.device,
        backend: dispatch.Backend = "auto",
    ) -> None:
        if catch_up not in get_args(CatchUp):
            raise ValueError(f"catch_up must be one of {get_args(CatchUp)}, got {catch_up!r}")
        if buffer != "auto" and (not isinstance(buffer, int) or buffer < 1):
            raise ValueError(f"buffer must be 'auto' or at least 1, got {buffer!r}")
        self._ops = dispatch.select(backend, device, dtype)
        self.groups = groups
        self.batch_size = batch_size
        self.num_slots = num_slots
        self.slot_size = slot_size
        self.catch_up: CatchUp = catch_up
        self.buffer: int | Literal["auto"] = buffer
        self.backend: dispatch.Backend = backend
        hidden, experts = num_slots * slot_size, groups.num_experts
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.core = torch.zeros(batch_size, hidden + 1, groups.core_columns, **options)
        self.experts = torch.zeros(batch_size * experts, hidden + 1, groups.expert_columns, **options)
        self.last_update = torch.zeros(batch_size, experts, dtype=torch.int64, device=device)
        self.influenced = torch.zeros(batch_size, experts, dtype=torch.bool, device=device)
        self.awake = torch.full((batch_size, experts), catch_up == "eager", device=device)
        """Experts whose matrix is up to date at the entry of the current window."""
        self._every_pair = torch.ones_like(self.influenced).nonzero()
        self.handed_out = torch.zeros(batch_size, experts, hidden, **options)
        """Part of a sleeping expert's loss row vector whose gradient :meth:`flush` has handed out already."""
        self.window: list[Captured] = []
        """Steps that were captured and not committed yet, oldest first, all of one class."""
        self.window_loss_row = torch.zeros(batch_size, hidden, **options)
        """``dL/dh`` at the entry of the current window, of the losses of its steps so far."""
        self.window_key = object()
        """Identity of the current window. A backward pass comes in time if its window is still this one."""
        self.commits = 0
        self.events: Counter[str] = Counter()
        """How often things happened: wakes, expiries, replays, products, deferred gradients handed out."""
        self.tree: CircularTree | None = None
        self.plan: Plan | None = None
        """How sleeping experts are kept; None until the first step, where it takes the sizes of a step to decide."""
        self.commit_every = 1
        """Steps of a segment, for the planner."""
        self._rows_hold_gradients = False
        """Whether loss rows may hold gradients that no backward pass has handed out."""
        self._steps_since_flush = 0
        self._flush_interval = 1.0
        self._planned_interval = 1.0
        if catch_up == "eager" or not experts:
            self._begin(Plan(eager=True))
        elif buffer != "auto" and catch_up != "auto":
            self._begin(forced(catch_up, buffer))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_ops"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._ops = dispatch.select(self.backend, self.core.device, self.core.dtype)

    def _begin(self, chosen: Plan) -> None:
        """Follow a plan from the current commit on, where every influenced expert is up to date."""
        self.plan = chosen
        self.tree = None if chosen.eager else self._new_tree(chosen)
        self.awake.fill_(chosen.eager)
        self.last_update.fill_(self.commits)
        self.handed_out.zero_()
        if self.tree is not None:
            self.tree.begin_at(self.commits)

    def _new_tree(self, chosen: Plan) -> CircularTree:
        shape = (self.batch_size, self.num_slots, self.slot_size)
        return CircularTree(chosen.buffer, *shape, self.core.dtype, self.core.device, chosen.levels, self.backend)

    def _make_plan(self, routing: Routing) -> Plan:
        self._planned_interval = self._flush_interval
        return plan(
            num_slots=self.num_slots,
            slot_size=self.slot_size,
            read_slots=routing.read.shape[1],
            write_slots=routing.write.shape[1],
            num_experts=self.groups.num_experts,
            top_k=routing.experts.shape[1],
            expert_columns=self.groups.expert_columns,
            batch_size=self.batch_size,
            commit_every=self.commit_every,
            flush_every=self._flush_interval,
            buffer=self.buffer,
            itemsize=self.core.element_size(),
            catch_up=self.catch_up,
        )

    def _plan_again(self, routing: Routing) -> None:
        """After a commit: plan again if flushes have become rarer or more frequent than was planned for."""
        interval = max(self._flush_interval, float(self._steps_since_flush))
        if self.catch_up != "auto" or not self.groups.num_experts:
            return
        if not self._planned_interval / 3 < interval < 3 * self._planned_interval:
            self._flush_interval = interval
            chosen = self._make_plan(routing)
            if self.plan is None or [getattr(chosen, f) for f in PLAN_FIELDS] != [
                getattr(self.plan, f) for f in PLAN_FIELDS
            ]:
                self._catch_up((self.influenced & ~self.awake).nonzero())
                self._begin(chosen)
                self.events["plans"] += 1

    def make_room(self, captured: Captured) -> None:
        """Commit the window if it is full, or if what comes next was captured in another way."""
        other = self.window and type(captured) is not type(self.window[0])
        if other or sum(piece.count for piece in self.window) >= self.commit_every:
            self.commit()

    @full_precision
    def record(self, steps: Sequence[Captured]) -> None:
        """Add captured steps to the current window and wake the experts they use."""
        if self.plan is None and steps:
            self._begin(self._make_plan(steps[0].routing))
        for step in steps:
            assert type(step) is type((self.window or steps)[0]), "a window holds steps of one class"
            self._steps_since_flush += step.count
            self.window.append(step)
            if not self.groups.num_experts:
                continue
            used = torch.zeros_like(self.awake).scatter_(1, step.experts, True)
            if self.tree is None:
                self.influenced |= used
                continue
            woken = used & ~self.awake
            self.awake |= used
            pairs = (woken & self.influenced).nonzero()
            if len(pairs):
                self.events["wakes"] += int((self.last_update[tuple(pairs.T)] < self.commits).sum())
                self._catch_up(pairs)

    @full_precision
    def loss_gradient(self, position: int, u: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Gradient of a loss through the window and the whole past before it, for core and awake experts.

        Args:
            position: number of steps of the window before the one whose entry state ``u`` belongs to.
            u: ``dL/dh`` at that state, ``(B, H)``.
            step: number of that step, for messages.

        Returns:
            Core ``(N_core,)`` and experts ``(E, N_expert)``, summed over the streams.

        Raises:
            NonFiniteError: if ``u`` holds NaN or infinity, or the influence has overflowed.
        """
        check_finite(step, {"the gradient of the loss": u})
        v, direct = u, None
        if before := self.window[:position]:
            direct = self.groups.zero_gradients(self.core)
            v = type(before[0]).pull_back(before, u, *direct)
        self.window_loss_row += v
        every = torch.arange(self.batch_size, device=v.device)
        self._ops.loss_row_(self.core, v, every)
        # Without a tree every expert is awake, always.
        awake = self._every_pair if self.tree is None else self.awake.nonzero()
        if self.groups.num_experts:
            self._ops.loss_row_(self.experts, v.index_select(0, awake[:, 0]), self._rows(awake))
        core, experts = self._take_loss_rows(awake)
        if not bool(torch.isfinite(core.sum() + experts.sum())):
            bad = ~torch.isfinite(self.core).flatten(1).all(1)
            raise NonFiniteError(step, bad.nonzero().flatten().tolist(), "the influence, which has overflowed")
        if direct is not None:
            core += direct[0]
            experts += direct[1]
        return core, experts

    @full_precision
    def flush(self) -> tuple[Tensor, Tensor] | None:
        """Form the deferred gradients of sleeping experts and hand out every loss row.

        Returns:
            Core ``(N_core,)`` and experts ``(E, N_expert)``, summed over the streams; None if nothing can be deferred.
        """
        if self._steps_since_flush:
            self._flush_interval += 0.5 * (self._steps_since_flush - self._flush_interval)
            self._steps_since_flush = 0
        if self.tree is None and not self._rows_hold_gradients:
            return None
        self._form_deferred(self.influenced & ~self.awake)
        self._rows_hold_gradients = False
        return self._take_loss_rows(self._every_pair)

    @full_precision
    def defers(self) -> bool:
        """Whether :meth:`flush` would add anything but rounding."""
        if self._rows_hold_gradients and bool(self.core[:, -1].any() or self.experts[:, -1].any()):
            return True
        sleeping = self.influenced & ~self.awake
        if self.tree is None or not bool(sleeping.any()):
            return False
        total, handed_out = self._deferred_rows(sleeping)[sleeping], self.handed_out[sleeping]
        least = 64 * torch.finfo(total.dtype).eps * torch.maximum(total.abs(), handed_out.abs()).amax(1, keepdim=True)
        return bool(((total - handed_out).abs() > least).any())

    @full_precision
    def begin(self, streams: Tensor, core: Tensor, experts: Tensor) -> None:
        """Give streams that start anew the influence of their initial state; no step may have been taken since.

        Args:
            streams: boolean mask ``(B,)``.
            core: ``dh_0/dθ`` of the core parameters, ``(B, H, N_core)``.
            experts: that of the experts' parameters, ``(B, E, H, N_expert)``.
        """
        self.core[streams, :-1] = core[streams]
        self.experts.unflatten(0, (self.batch_size, -1))[streams, :, :-1] = experts[streams]
        self.influenced[streams] = experts[streams].flatten(2).any(2)
        self.last_update[streams] = self.commits

    @full_precision
    def discard(self) -> None:
        """Drop every deferred gradient."""
        sleeping = self.influenced & ~self.awake
        if bool(sleeping.any()):
            self.handed_out = torch.where(sleeping.unsqueeze(-1), self._deferred_rows(sleeping), self.handed_out)
        self.core[:, -1] = 0
        self.experts[:, -1] = 0

    @full_precision
    def commit(self) -> None:
        """Move the influence through the steps of the window, and append them to the tree as one segment."""
        if not self.window:
            return
        self._wake_expiring()
        kind, last = type(self.window[0]), self.window[-1]
        moved = kind.commit_(self.window, self.core, self.experts, self.num_slots, self._ops)
        if moved is not None:
            self._pass_on(moved)
        self.commits += 1
        self._new_window()
        self._plan_again(last.routing)

    def _wake_expiring(self) -> None:
        """Before a commit: bring experts up to date whose Jacobians it pushes out of the tree."""
        if self.tree is None:
            return
        oldest_kept = self.commits + 1 - self.tree.capacity
        expiring = (self.influenced & ~self.awake & (self.last_update < oldest_kept)).nonzero()
        if len(expiring):
            self.events["expiries"] += len(expiring)
            self._catch_up(expiring)

    def _pass_on(self, moved: Moved) -> None:
        """Move the experts that a committed window did not use as well, or keep its map for them in the tree."""
        if self.tree is None:
            idle = self.awake.flatten().index_fill(0, moved.experts, False).view_as(self.awake).nonzero()
            self._apply(moved.Jh, moved.write, moved.support, None, idle)
            return
        self._append(self.tree, moved.Jh, moved.write, moved.support)
        self.influenced |= self.awake
        current = self.awake | ~self.influenced
        self.last_update[current] = self.commits + 1
        self.handed_out[current] = 0
        self.awake.zero_()

    @full_precision
    def reset(self, streams: Tensor) -> None:
        """Start some streams anew: form the deferred gradients of their sleepers, then clear their influence.

        Args:
            streams: boolean mask ``(B,)``.
        """
        if not bool(streams.all()):
            self.commit()
        self._form_deferred(self.influenced & ~self.awake & streams.unsqueeze(1))
        self.core[streams, :-1] = 0
        self.experts.view(self.batch_size, self.groups.num_experts, *self.experts.shape[1:])[streams, :, :-1] = 0
        self.influenced[streams] = False
        self.handed_out[streams] = 0
        self.last_update[streams] = self.commits
        if self.tree is not None:
            self.tree.reset(streams)
        if self.window:  # all streams start anew: nothing later needs it
            last = self.window[-1]
            self._new_window()
            self.awake.fill_(self.tree is None)
            self._plan_again(last.routing)

    def matrices(self) -> dict[str, Tensor]:
        """Influence ``dh/dθ`` of every parameter now, ``(B, H, *shape)``; commits and wakes every sleeper first."""
        self.commit()
        self._catch_up((self.influenced & ~self.awake).nonzero())
        experts = self.experts.view(self.batch_size, self.groups.num_experts, *self.experts.shape[1:])
        out = {p.name: _shaped(self.core[:, :-1, p.columns], p.shape) for p in self.groups.core}
        for p in self.groups.expert:
            out[p.name] = _shaped(experts[:, :, :-1, p.columns].transpose(1, 2), p.shape)
        return out

    def norms(self) -> tuple[Tensor, Tensor]:
        """Frobenius norms of the influence as it is stored: core ``(B,)`` and experts ``(B, E)``.

        Steps of the window are not in it, and a sleeping expert's is that of its last update.
        """
        core = torch.linalg.vector_norm(self.core[:, :-1], dim=(1, 2))
        experts = torch.linalg.vector_norm(self.experts[:, :-1], dim=(1, 2))
        return core, experts.view(self.batch_size, self.groups.num_experts)

    def cap_(self, largest: float) -> tuple[int, float]:
        """Scale every matrix whose norm exceeds ``largest`` down to it; the gradient is then no longer exact.

        Loss rows, which are gradients already formed, stay as they are.

        Returns:
            How many matrices were scaled, and the largest norm there was.
        """
        scaled, highest = 0, 0.0
        for P, norms in zip((self.core, self.experts), self.norms(), strict=True):
            over = (norms.flatten() > largest).nonzero().flatten()
            highest = max(highest, float(norms.max()) if norms.numel() else 0.0)
            scaled += len(over)
            P[over, :-1] *= (largest / norms.flatten()[over]).view(-1, 1, 1)
        return scaled, highest

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume bit for bit, the window included; nothing is committed.

        Raises:
            RuntimeError: if the window holds steps of a class that cannot be saved; commit it before.
        """
        return {
            **{name: getattr(self, name).clone() for name in _TENSORS},
            "window": [captured.state_dict() for captured in self.window],
            "parameters": [(p.name, p.start) for p in self.groups.all],
            "commits": self.commits,
            "plan": None if self.plan is None else {name: getattr(self.plan, name) for name in PLAN_FIELDS},
            "intervals": (self._steps_since_flush, self._flush_interval, self._planned_interval),
            "events": dict(self.events),
            "tree": None if self.tree is None else self.tree.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], restore: Restore) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: what it returned.
            restore: makes each piece of its window again.

        Raises:
            ValueError: if it came from other shapes or another way to catch up; nothing is changed then.
        """
        self._check_parameters(state)
        saved = None if state["plan"] is None else Plan(**state["plan"])
        self._check_plan(saved)
        window = [restore(captured) for captured in state["window"]]
        tree = None if saved is None or saved.eager else self._new_tree(saved)
        if tree is not None:
            tree.load_state_dict(state["tree"])
        self.plan, self.tree = saved, tree
        self._steps_since_flush, self._flush_interval, self._planned_interval = state["intervals"]
        for name in _TENSORS:
            getattr(self, name).copy_(state[name])
        self._rows_hold_gradients = True
        self.commits = state["commits"]
        self.events = Counter(state["events"])
        self.window = window
        self.window_key = object()

    def _check_parameters(self, state: dict[str, Any]) -> None:
        """Refuse a saved state of other parameters or shapes."""
        expected_parameters = [(p.name, p.start) for p in self.groups.all]
        given = [(name, start) for name, start in state["parameters"]]
        if given != expected_parameters:
            raise ValueError(
                f"state must be of a cell with parameters {expected_parameters}, got {given}: it is of another cell"
            )
        for name in _TENSORS:
            expected, got = getattr(self, name), state[name]
            if expected.shape != got.shape or expected.dtype != got.dtype:
                raise ValueError(
                    f"{name} must be {expected.dtype} of shape {tuple(expected.shape)},"
                    f" got {got.dtype} {tuple(got.shape)}: the state is of another cell, batch size or dtype"
                )

    def _check_plan(self, saved: Plan | None) -> None:
        """Refuse a saved state whose experts are kept in another way than this learner was asked for."""
        if saved is None:
            return
        eager = self.catch_up == "eager" or not self.groups.num_experts
        if (eager or self.catch_up != "auto") and saved.eager != eager:
            raise ValueError(
                f"the state was saved {'with' if saved.eager else 'without'} catch_up='eager', this learner has"
                f" catch_up={self.catch_up!r}: use the same catch_up"
            )
        if self.buffer != "auto" and not saved.eager and saved.buffer != self.buffer:
            raise ValueError(f"the state must come from a learner with capacity {self.buffer}, got {saved.buffer}")

    def adopt(self, other: Influence) -> None:
        """Take over the influence of an object for the same cell with fewer parameters; new columns stay zero."""
        other.commit()
        mine, theirs = ({p.name: p for p in groups.all} for groups in (self.groups, other.groups))
        for name, p in theirs.items():
            source = other.experts if p.expert else other.core
            target = self.experts if p.expert else self.core
            target[..., mine[name].columns] = source[..., p.columns]
        if other.groups.num_experts == self.groups.num_experts:
            for name in ("last_update", "influenced", "awake", "handed_out"):
                getattr(self, name).copy_(getattr(other, name))
        else:
            self.last_update.fill_(other.commits)
        self.window_loss_row.copy_(other.window_loss_row)
        self._rows_hold_gradients = True
        self.commits, self.events = other.commits, other.events
        self._steps_since_flush, self._flush_interval = other._steps_since_flush, other._flush_interval
        self._planned_interval, self.commit_every = other._planned_interval, other.commit_every
        if other.plan is not None and other.groups.num_experts == self.groups.num_experts:
            self.plan, self.tree = other.plan, other.tree
        elif self.tree is not None:
            self.tree.begin_at(other.commits)

    def _new_window(self) -> None:
        self.window = []
        self.window_loss_row.zero_()
        self.window_key = object()

    def _rows(self, pairs: Tensor) -> Tensor:
        """Rows of ``experts`` that belong to (stream, expert) pairs ``(M, 2)``."""
        return pairs[:, 0] * self.groups.num_experts + pairs[:, 1]

    def _apply(self, Jh: Tensor, write: Tensor, support: Tensor, loss_row: Tensor | None, pairs: Tensor) -> None:
        """Move the matrices of some (stream, expert) pairs through a map without immediate Jacobian."""
        self._ops.influence_update_(
            self.experts, Jh, write, support, loss_row, pairs[:, 0].contiguous(), self._rows(pairs), [], [], []
        )

    def _catch_up(self, pairs: Tensor) -> None:
        """Bring sleeping (stream, expert) pairs ``(M, 2)`` to the entry of the window, deferred gradient included.

        The deferred gradient is ``(u_total - u_handed_out) P``, with ``u_total`` the loss row of everything since their
        last update and of the window. Afterwards the window's own part counts as handed out.
        """
        if self.tree is None or not len(pairs):
            return
        self._rows_hold_gradients = True
        streams, experts = pairs.T
        rows = self._rows(pairs)
        handed_out = self.handed_out[streams, experts]
        if bool(handed_out.any()):
            self._ops.loss_row_(self.experts, -handed_out, rows)
        starts = self.last_update[streams, experts]
        gaps = self.commits - starts
        by_product = self._by_product(gaps)
        merged, replayed = (by_product & (gaps > 0)).nonzero().flatten(), (~by_product & (gaps > 0)).nonzero().flatten()
        if len(merged):
            keys, inverse = torch.stack((streams[merged], starts[merged])).unique(dim=1, return_inverse=True)
            node = self.tree.suffixes(keys[0], keys[1])
            self._ops.influence_update_(
                self.experts, node.blocks, node.rows, node.cols, node.loss_row, inverse, rows[merged], [], [], []
            )
            self.events["products"] += keys.shape[1]
        if len(replayed):
            self.tree.replay_(self.experts, streams[replayed], rows[replayed], starts[replayed])
            self.events["replays"] += int(gaps[replayed].max())
        window_loss_row = self.window_loss_row.index_select(0, streams)
        if bool(window_loss_row.any()):
            self._ops.loss_row_(self.experts, window_loss_row, rows)
        self.handed_out[streams, experts] = window_loss_row
        self.last_update[streams, experts] = self.commits

    def _by_product(self, gaps: Tensor) -> Tensor:
        """Which of the gaps ``(M,)`` are bridged by a merged product, ``(M,)`` bool."""
        if self.plan is None or self.tree is None:
            return torch.zeros_like(gaps, dtype=torch.bool)
        if self.plan.product_from is not None:
            return gaps >= (self.plan.product_from or torch.iinfo(gaps.dtype).max)
        newest = next(self.tree.segments(self.commits - 1))[1] if int(gaps.max()) > 1 else None
        if newest is None:
            return torch.zeros_like(gaps, dtype=torch.bool)
        kw, ks = newest.rows.shape[1], newest.cols.shape[1]
        product = (gaps * kw).clamp(max=self.num_slots) * (gaps * ks).clamp(max=self.num_slots)
        return product < gaps * kw * ks

    def _deferred_rows(self, pairs: Tensor) -> Tensor:
        """Loss row vectors since the last update of sleeping pairs, ``(B, E, H)``; ``pairs (B, E)`` bool."""
        assert self.tree is not None
        starts = torch.where(pairs, self.last_update, self.commits)
        return self.tree.loss_rows(starts, self.window_loss_row)

    def _form_deferred(self, sleeping: Tensor) -> None:
        """Add the deferred gradients of sleeping pairs to their loss rows; ``sleeping (B, E)`` bool."""
        pairs = sleeping.nonzero()
        if not len(pairs) or self.tree is None:
            return
        streams, experts = pairs.T
        total = self._deferred_rows(sleeping)[streams, experts]
        deferred = total - self.handed_out[streams, experts]
        if bool(deferred.any()):
            self._rows_hold_gradients = True
            self.events["payments"] += int(deferred.any(1).sum())
            self._ops.loss_row_(self.experts, deferred, self._rows(pairs))
            self.handed_out[streams, experts] = total

    def _take_loss_rows(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over the streams, and zero, the loss rows of the core and of (stream, expert) pairs ``(M, 2)``."""
        core = self.core[:, -1].sum(0)
        self.core[:, -1] = 0
        if not self.groups.num_experts:
            return core, self.groups.zero_gradients(core)[1]
        rows, loss_rows = self._rows(pairs), self.experts[:, -1]
        _, taken = self.groups.zero_gradients(self.core)
        taken.index_add_(0, pairs[:, 1], loss_rows.index_select(0, rows))
        loss_rows.index_fill_(0, rows, 0.0)
        return core, taken

    def _append(self, tree: CircularTree, Jh: Tensor, write: Tensor, support: Tensor) -> None:
        """Append the current window to the tree, with its loss row."""
        outside = self.window_loss_row.scatter(1, slot_entries(support, self.slot_size), 0.0)
        if bool(outside.any()):  # a loss on copied slots of the new state: the support covers every slot
            every = torch.arange(self.num_slots, device=write.device).expand(self.batch_size, -1)
            support = torch.cat((support, every), 1)
            Jh = torch.cat((Jh, Jh.new_zeros(*Jh.shape[:2], outside.shape[1])), 2)
        tree.append_segment(Jh, write, support, self.window_loss_row)


def check_finite(step: int, values: dict[str, Tensor]) -> None:
    """Refuse values ``(B, ...)`` that hold NaN or infinity.

    Raises:
        NonFiniteError: for the first of them, with its streams.
    """
    for name, value in values.items():
        if cmath.isfinite(value.detach().sum().item()):
            continue  # one pass, unlike a mask of every number; too strict only where the sum overflows
        bad = ~torch.isfinite(value.detach()).flatten(1).all(1)
        if bool(bad.any()):
            raise NonFiniteError(step, bad.nonzero().flatten().tolist(), name)


def _shaped(columns: Tensor, shape: torch.Size) -> Tensor:
    """Columns of one parameter ``(..., n)`` in the parameter's own shape."""
    return columns.reshape(*columns.shape[:-1], *shape)


_TENSORS = ("core", "experts", "last_update", "influenced", "awake", "handed_out", "window_loss_row")
