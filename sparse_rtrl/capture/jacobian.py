"""Capture of a step's state Jacobian and factored immediate Jacobians by one ordinary backward pass.

``SlotCell.update`` works row by row of the batch. Its inputs are repeated ``w + 2`` times, once per written state entry
and twice more, and one backward pass with the identity as cotangent gives all rows of the Jacobians at once; the last
two copies show whether rows influence each other. Where ``update`` hands a parameter to a known linear map
``y = W z``, the map is evaluated with detached parameters, and the backward pass is asked for ``delta = dh[write]/dy``;
together with ``z`` that is the immediate Jacobian, factored. A parameter that the pass reaches all the same was used in
another way, and takes dense immediate Jacobians.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparse_rtrl.capture.factor_capture import FactorCapture, Piece, coarser, flat_row
from sparse_rtrl.capture.parameters import ParameterGroups, RecurrentParameter
from sparse_rtrl.capture.segment import ROUTING_PARTS, Factors, StepJacobian, Term
from sparse_rtrl.capture.verify import OTHER_STREAMS, STATE, Verifier, tolerance_of
from sparse_rtrl.cells.slot_cell import Routing, SlotCell, gather_slots
from sparse_rtrl.errors import ContractError
from sparse_rtrl.ops.precision import full_precision
from sparse_rtrl.ops.reference import slot_entries

ROWS_TOGETHER = 4096
"""Steps are captured together up to this many rows, one per stream and written state entry. It bounds the memory."""


class JacobianCapture:
    """Captures steps of one cell, remembering which of its parameters need the dense path.

    Every captured step is checked by itself: what it recomputes must equal what ran, each stream's Jacobian must be its
    own, and no trainable tensor may be reached in a way that is not accounted for. Whenever ``update`` uses its
    parameters in a new pattern of calls and shapes, the captured factors are also compared once with an ordinary
    backward pass; a parameter whose factors disagree takes the dense path from then on.

    Args:
        cell: the cell.
        groups: its recurrent parameters.
        dense: whether every parameter takes the dense path, and the state Jacobian with them.
    """

    def __init__(self, cell: SlotCell, groups: ParameterGroups, dense: bool = False) -> None:
        self.cell = cell
        self.groups = groups
        self.all_dense = dense
        self.dense: set[str] = {p.name for p in groups.all} if dense else set()
        self._checked: set[Any] = set()
        self._weights: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """What was found out about ``update``. It decides which steps are captured together, and so their rounding."""
        return {"dense": sorted(self.dense), "checked": sorted(self._checked, key=repr)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if not self.all_dense:
            self.dense, self._checked = set(state["dense"]), set(state["checked"])

    def step(
        self,
        x: Tensor,
        state: Tensor,
        routing: Routing,
        tensors: list[Tensor],
        ran: Tensor | None = None,
        flag: Tensor | None = None,
    ) -> StepJacobian:
        """Capture one step.

        Args:
            x: input of the step, ``(B, ...)``.
            state: state that entered it, ``(B, S, D)``, detached.
            routing: what it touched.
            tensors: the tensors the cell uses for its recurrent parameters, in the order of ``groups.all``.
            ran: the new content of the written slots that the step produced, ``(B, kw, D)``.
            flag: a number of type bool on the device, cleared where a check fails; without it a check raises.

        Returns:
            State Jacobian and factored immediate Jacobians.

        Raises:
            ContractError: if rows of the batch influence each other, what is recomputed is not what ran, or the new
                state depends on a trainable tensor that is not carried.
        """
        tracked = {id(t): p for t, p in zip(tensors, self.groups.all, strict=True) if t.requires_grad}
        with without_hooks(self.groups):
            while True:
                dense_before = len(self.dense)
                step, signature, tolerance = self._captured(x, state, routing, tensors, tracked, ran, flag)
                if len(self.dense) > dense_before:
                    continue  # a parameter turned out to need the dense path: capture again without its factors
                if signature in self._checked:
                    return step
                wrong = self._disagreeing(step, x, state, routing, tensors, tolerance)
                # At a state of zeros, where streams begin, a weight that multiplies the state shows nothing.
                generator = torch.Generator(device="cpu").manual_seed(1)
                probe = torch.randn(state.shape, device="cpu", generator=generator, dtype=torch.float64).to(state)
                probed, probed_signature, tolerance = self._captured(x, probe, routing, tensors, tracked, None, None)
                if probed_signature == signature:
                    wrong |= self._disagreeing(probed, x, probe, routing, tensors, tolerance)
                self._checked.add(signature)
                if not wrong:
                    return step
                self._note_dense(wrong)

    def steps(
        self,
        xs: Tensor,
        states: list[Tensor],
        routings: list[Routing],
        tensors: list[Tensor],
        ran: list[Tensor] | None,
        flag: Tensor | None = None,
    ) -> list[StepJacobian]:
        """Capture consecutive steps together: once they have run, their streams are rows of one larger batch.

        Args:
            xs: inputs ``(n, B, ...)``.
            states: state that entered each step, ``(B, S, D)``, detached.
            routings: what each step touched.
            tensors: as for :meth:`step`.
            ran: the new content of the written slots of each step, ``(B, kw, D)``; None if none of them was run.
            flag: as for :meth:`step`.

        Returns:
            What :meth:`step` returns for each of them.
        """
        out: list[StepJacobian] = []
        while len(out) < len(states):
            first = len(out)
            content = None if ran is None else ran[first]
            last = first + self._steps_together(routings[first:], states[first])
            if last == first + 1:
                out.append(self.step(xs[first], states[first], routings[first], tensors, content, flag))
            else:
                joined = Routing(
                    *(torch.cat([getattr(r, part) for r in routings[first:last]]) for part in ROUTING_PARTS)
                )
                state = torch.cat(states[first:last])
                content = None if ran is None else torch.cat(ran[first:last])
                captured = self.step(xs[first:last].flatten(0, 1), state, joined, tensors, content, flag)
                out += _split(captured, [self._carried(routing) for routing in routings[first:last]])
        return out

    def compare(
        self,
        step: StepJacobian,
        x: Tensor,
        state: Tensor,
        routing: Routing,
        tensors: list[Tensor],
        verifier: Verifier,
        number: int,
    ) -> None:
        """Compare a captured step with an ordinary backward pass through the cell's own ``update``.

        Args:
            step: the captured step.
            x: its input ``(B, ...)``.
            state: state that entered it, ``(B, S, D)``, detached.
            routing: what it touched.
            tensors: as for :meth:`step`.
            verifier: draws the cotangent and judges.
            number: number of the step, for messages.

        Raises:
            DisagreementError: if they disagree.
        """
        with without_hooks(self.groups), torch.enable_grad(), Precision(state.dtype) as precision:
            entry = state.detach().requires_grad_()
            h_read, h_write = gather_slots(entry, routing.read), gather_slots(entry, routing.write)
            content, _ = self.cell.update(x, h_read, h_write, routing)
            stream, cotangent = verifier.cotangent(content)
            used = [t for t in tensors if t.requires_grad]
            refuse_untracked(content, [entry, *tensors], self.cell)
            of_entry, *truth = gradients(content, [entry, *used], cotangent)
        v = cotangent.to(state.dtype).flatten(1)
        core, experts = self.groups.zero_gradients(v)
        step.add_direct_gradient_(v, core, experts)
        split = zip(tensors, self.groups.all, self.groups.split(core, experts), strict=True)
        found = {p.name: g for t, p, g in split if t.requires_grad}
        expected = dict(zip(found, truth, strict=True))
        columns = slot_entries(routing.support, state.shape[2])
        through = torch.zeros_like(state).flatten(1).scatter_add_(1, columns, _through(v, step.Jh))
        others = [b for b in range(len(state)) if b != stream]
        for name, rows in ((STATE, [stream]), (OTHER_STREAMS, others)):
            found[name] = through[rows]
            expected[name] = None if of_entry is None else of_entry.flatten(1)[rows]
        verifier.compare(number, stream, found, expected, precision.tolerance, DISAGREEMENT)

    def _steps_together(self, routings: list[Routing], state: Tensor) -> int:
        """How many of the next steps are captured together: those of equal shapes, within bounded memory."""
        if self.dense or not self._checked:
            return 1  # dense rows cost the square of the batch, and which parameters need them shows at the first step
        shapes = [[getattr(r, part).shape for part in ROUTING_PARTS] for r in routings]
        rows = routings[0].write.numel() * state.shape[2]
        most = max(1, ROWS_TOGETHER // max(rows, 1))
        return next((i for i, shape in enumerate(shapes[:most]) if shape != shapes[0]), min(most, len(shapes)))

    def _carried(self, routing: Routing) -> Routing:
        """The routing without experts where no expert carries influence: all frozen, or not stacked."""
        return routing if self.groups.num_experts else replace(routing, experts=routing.experts[:, :0])

    def _note_dense(self, names: set[str]) -> None:
        new = sorted(names - self.dense)
        self.dense |= names
        if new:
            warnings.warn(
                f"{', '.join(new)}: used in a way whose immediate Jacobian is not captured as factors; the dense one is"
                " computed instead (exact, slower). nn.Linear, nn.LayerNorm, nn.Embedding and ExpertBank are captured",
                stacklevel=2,
            )

    def _captured(
        self,
        x: Tensor,
        state: Tensor,
        routing: Routing,
        tensors: list[Tensor],
        tracked: dict[int, RecurrentParameter],
        ran: Tensor | None,
        flag: Tensor | None,
    ) -> tuple[StepJacobian, Any, float]:
        """A step, the signature of how it uses parameters, and the error that rounding explains."""
        batch, slot_size = state.shape[0], state.shape[2]
        width = routing.write.shape[1] * slot_size
        kept = self._carried(routing)
        core = Factors(state.new_zeros(batch, width, 0), ())
        expert = Factors(state.new_zeros(batch, kept.experts.shape[1], width, 0), ())
        if width == 0:
            none = state.new_zeros(batch, 0, routing.support.shape[1] * slot_size)
            return StepJacobian(none, kept, core, expert), None, 0.0
        dtype, Jh = state.dtype, None
        signature: list[Any] = [self.cell.training]
        if not self.all_dense:
            Jh, core, expert, shapes, dtype = self._expanded(x, state, routing, tensors, tracked, ran, flag)
            signature += shapes
        if self.dense:
            Jh, pieces, dtype = self._dense(x, state, routing, tensors, tracked, ran, Jh, dtype)
            signature += [(p.name, tuple(delta.shape)) for p, delta, _ in pieces]
            core = _joined(core, [piece for piece in pieces if not piece[0].expert])
            expert = _joined(expert, [piece for piece in pieces if piece[0].expert])
        assert Jh is not None
        return StepJacobian(Jh, kept, core, expert), tuple(signature), tolerance_of(dtype)

    def _expanded(
        self,
        x: Tensor,
        state: Tensor,
        routing: Routing,
        tensors: list[Tensor],
        tracked: dict[int, RecurrentParameter],
        ran: Tensor | None,
        flag: Tensor | None,
        again: bool = False,
    ) -> tuple[Tensor, Factors, Factors, list[Any], torch.dtype]:
        """One backward pass of repeated rows: ``Jh``, factors, their names and shapes, and the coarsest dtype.

        Each stream is repeated once for every written entry, and twice more. The first extra copy has a cotangent of
        zero, so its gradients must be zero. The second has a random combination of all cotangents, so its gradients
        must be the same combination of theirs. If not, rows influence each other, or a map got them in another order.
        """
        batch, slot_size = state.shape[0], state.shape[2]
        width = routing.write.shape[1] * slot_size
        copies = width + 2
        h = _gather_support(state, routing).repeat_interleave(copies, 0).requires_grad_()
        # Copies: an update may change them in place, which autograd refuses for the parts of a split.
        h_read, h_write = (part.clone() for part in h.split((routing.read.shape[1], routing.write.shape[1]), dim=1))
        repeated = routing.repeat_interleave(copies)
        capture = FactorCapture(tracked, batch, copies, routing.experts, repeated.experts, set(self.dense), state.dtype)
        with capture:
            content = self._run_repeated(x, h_read, h_write, repeated, copies)
        touched_in_place = {
            p.name for call in capture.calls if call.y._version != call.version for p in call.parameters
        }
        self._note_dense(touched_in_place - self.dense)
        watched = [
            (p.name, t)
            for t, p in zip(tensors, self.groups.all, strict=True)
            if id(t) in tracked and p.name not in self.dense
        ]
        others = self._others()
        weights = self._random_weights(batch, width, state)
        cotangent = torch.cat(
            (
                torch.eye(width + 1, width, dtype=content.dtype, device=content.device).expand(batch, -1, -1),
                weights.to(content.dtype).unsqueeze(1),
            ),
            1,
        )
        inputs = [h, *(call.y for call in capture.calls), *(t for _, t in watched), *(p for _, p in others)]
        found = gradients(content, inputs, cotangent.reshape(content.shape))
        of_h, of_calls, rest = found[0], found[1 : 1 + len(capture.calls)], found[1 + len(capture.calls) :]
        self._note_reached(watched, others, rest)
        Jh = state.new_zeros(batch, copies, h[0].numel()) if of_h is None else of_h.view(batch, copies, -1)
        pieces = [
            piece
            for call, grad in zip(capture.calls, of_calls, strict=True)
            if grad is not None
            for piece in call.build(grad)
            if piece[0].name not in self.dense
        ]
        # They refer back to the capture: the expanded graph would live until a garbage collection.
        capture.calls.clear()
        joined, terms = zip(
            *(
                _side_by_side([piece for piece in pieces if piece[0].expert is kind], 0, state)
                for kind in (False, True)
            ),
            strict=True,
        )
        tolerance = tolerance_of(capture.coarsest)
        checked = [Jh, *(rows for rows in joined if rows is not None)]
        idle, mixed = zip(*(_row_problems(rows, weights, tolerance) for rows in checked), strict=True)
        nothing = Jh.new_zeros((), dtype=torch.bool)
        differs = nothing if ran is None else _differs(content, ran, copies, tolerance)
        if flag is not None:
            # Without ``mixed``, which a kink may cause too: to tell the two apart takes a look at values.
            flag.logical_and_(~(torch.stack([*idle, differs]).any() & torch.isfinite(Jh.sum())))
        elif bool(torch.stack([*idle, *mixed, differs]).any()):
            if ran is not None and bool(differs):
                self._refuse_difference(content.detach(), x, state, routing, ran, tolerance)
            if all(bool(torch.isfinite(rows).all()) for rows in checked):  # what is not finite is refused elsewhere
                _refuse_coupled(bool(idle[0]), again and bool(mixed[0]))
                if again:
                    # Rows in another order, or an influence through the input alone: the dense path is for those.
                    bad = {p.name for p, d, _ in pieces if any(_row_problems(d.flatten(-2), weights, tolerance))}
                    self._note_dense(bad | self.dense)
                else:  # at a kink, rounding alone may do that: once more from a state nearby
                    self._expanded(x, nearby(state), routing, tensors, tracked, None, None, again=True)
        none = state.new_zeros(batch, self._carried(routing).experts.shape[1], width, 0)
        core, expert = (
            Factors(without if rows is None else rows[..., :width, :].contiguous(), kind)
            for rows, kind, without in zip(joined, terms, (state.new_zeros(batch, width, 0), none), strict=True)
        )
        shapes = [(p.name, tuple(delta.shape)) for p, delta, _ in pieces]
        return Jh[:, :width].to(state.dtype).contiguous(), core, expert, shapes, capture.coarsest

    def _run_repeated(self, x: Tensor, h_read: Tensor, h_write: Tensor, repeated: Routing, copies: int) -> Tensor:
        """Written content of every stream repeated ``copies`` times, ``(B * copies, kw, D)``.

        Raises:
            ContractError: if the cell cannot run on that many rows.
        """
        try:
            with torch.enable_grad():
                return self.cell.transition(x.repeat_interleave(copies, 0), h_read, h_write, repeated)
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, (ContractError, torch.OutOfMemoryError, torch.AcceleratorError)):
                raise
            raise ContractError(
                [
                    f"update ran on {len(x)} rows but not on {len(x) * copies}, each of them repeated: it depends on"
                    f" the number of rows ({type(error).__name__}: {error})"
                ]
            ) from error

    def _others(self) -> list[tuple[str, Tensor]]:
        """Trainable parameters of the cell that are not carried, by name."""
        carried = {id(source) for p in self.groups.all for source in p.sources}
        return [(name, p) for name, p in self.cell.named_parameters() if p.requires_grad and id(p) not in carried]

    def _note_reached(
        self,
        watched: list[tuple[str, Tensor]],
        others: list[tuple[str, Tensor]],
        found: Sequence[Tensor | None],
    ) -> None:
        """Look at which parameters a backward pass reached that the capture did not see.

        A recognised use is evaluated with detached parameters: what is reached all the same is used in another way.

        Args:
            watched: carried parameters by name.
            others: those that are not carried.
            found: gradients of both, in that order.

        Raises:
            ContractError: if one is reached that is not carried, or has a sparse gradient.
        """
        reached = {name for (name, _), g in zip(watched + others, found, strict=True) if g is not None}
        if outside := [name for name, _ in others if name in reached]:
            raise ContractError([_not_carried(name) for name in outside])
        if sparse := [name for (name, _), g in zip(watched, found, strict=False) if g is not None and g.is_sparse]:
            raise ContractError(
                [f"{', '.join(sparse)} has sparse gradients, which cannot be carried; use sparse=False"]
            )
        self._note_dense(reached | self.dense)

    def _random_weights(self, batch: int, width: int, like: Tensor) -> Tensor:
        """Weights ``(B, w)`` of a combination of rows, another one for every stream; the same in every step."""
        key = (batch, width, like.dtype, like.device)
        if key not in self._weights:
            generator = torch.Generator(device="cpu").manual_seed(4)
            self._weights[key] = torch.randn(batch, width, device="cpu", generator=generator, dtype=torch.float64).to(
                like
            )
        return self._weights[key]

    def _dense(
        self,
        x: Tensor,
        state: Tensor,
        routing: Routing,
        tensors: list[Tensor],
        tracked: dict[int, RecurrentParameter],
        ran: Tensor | None,
        Jh: Tensor | None,
        coarsest: torch.dtype,
    ) -> tuple[Tensor, list[Piece], torch.dtype]:
        """Dense immediate Jacobians, one backward row per written state entry, of the parameters that need them.

        Where ``Jh`` is None the state Jacobian is taken in the same pass.
        """
        chosen = [(tracked[id(t)], t) for t in tensors if id(t) in tracked and tracked[id(t)].name in self.dense]
        batch = state.shape[0]
        with torch.enable_grad(), Precision(coarsest) as precision:
            h = _gather_support(state, routing).requires_grad_()
            h_read, h_write = (p.clone() for p in h.split((routing.read.shape[1], routing.write.shape[1]), dim=1))
            content = self.cell.transition(x, h_read, h_write, routing)
            if Jh is None and ran is not None and bool(_differs(content, ran, 1, precision.tolerance)):
                self._refuse_difference(content.detach(), x, state, routing, ran, precision.tolerance)
            grads = gradients_of_rows(content, [h, *(t for _, t in chosen)], batch)
        if Jh is None:
            width = content[0].numel()
            blocks = state.new_zeros(batch, width, *h.shape) if grads[0] is None else grads[0]
            blocks = blocks.flatten(3).to(state.dtype)  # (B, w, B, r)
            Jh = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
            coupled = blocks.any(3).any(1).fill_diagonal_(False)
            if bool(coupled.any()):
                streams = [tuple(pair) for pair in coupled.nonzero().tolist()]
                raise ContractError([_COUPLED.format(f"(stream, other) = {streams}")])
        pieces: list[Piece] = []
        for (parameter, _), grad in zip(chosen, grads[1:], strict=True):
            if grad is None:
                continue
            if parameter.expert:  # (B, w, E, ...) to the active experts, (B, k, w, 1, n)
                delta = grad.flatten(3).transpose(1, 2)
                idle = delta.any(-1).any(2).scatter(1, routing.experts, False)
                if bool(idle.any()):
                    experts = sorted(set(idle.nonzero()[:, 1].tolist()))
                    raise ContractError([f"inactive experts {experts} have influence through {parameter.name}"])
                active = routing.experts.view(batch, -1, 1, 1).expand(-1, -1, *delta.shape[2:])
                pieces.append((parameter, delta.gather(1, active).unsqueeze(3), None))
            else:
                pieces.append((parameter, flat_row(grad), None))
        return Jh, pieces, precision.coarsest

    def _refuse_difference(
        self, content: Tensor, x: Tensor, state: Tensor, routing: Routing, ran: Tensor, tolerance: float
    ) -> None:
        """Say why what was recomputed is not what ran; return if rounding explains it after all."""

        def parts(h: Tensor) -> tuple[Tensor, Tensor]:
            return gather_slots(h, routing.read), gather_slots(h, routing.write)

        with torch.no_grad():
            again, _ = self.cell.update(x, *parts(state), routing)
            if bool(_differs(again, ran, 1, tolerance)):
                raise ContractError(
                    [
                        "what is recomputed of the step is not what ran: update draws random numbers or keeps a state"
                        " of its own, or the input, the state that entered or a parameter is not the one that it ran"
                        " with"
                    ]
                )
            captured = self.cell.transition(x, *parts(state), routing)
            if bool(_differs(captured, ran, 1, tolerance)):
                raise ContractError(["transition must return the written slots that update returns first; they differ"])
            generator = torch.Generator(device="cpu").manual_seed(2)
            noise = torch.randn(state.shape, device="cpu", generator=generator, dtype=torch.float64).to(state)
            near = state * (1 + 4 * torch.finfo(state.dtype).eps * noise)
            moved = (self.cell.transition(x, *parts(near), routing) - ran).abs().amax()
        error = (content.unflatten(0, (len(ran), -1)) - ran.unsqueeze(1)).abs().flatten(1).amax(1)
        if bool(error.amax() <= 32 * moved):
            return  # the step magnifies rounding
        streams = (error > tolerance * ran.abs().amax()).nonzero().flatten().tolist()
        raise ContractError([_COUPLED.format(f"streams {streams} get another new state when the rows are repeated")])

    def _disagreeing(
        self, step: StepJacobian, x: Tensor, state: Tensor, routing: Routing, tensors: list[Tensor], tolerance: float
    ) -> set[str]:
        """Names of parameters whose factors disagree with an ordinary backward pass for a random cotangent.

        Raises:
            ContractError: if the state Jacobian does, or the new state depends on a tensor that is not carried.
        """
        used = [(p, t) for p, t in zip(self.groups.all, tensors, strict=True) if t.requires_grad]
        with torch.enable_grad():
            h = _gather_support(state, routing).requires_grad_()
            h_read, h_write = (p.clone() for p in h.split((routing.read.shape[1], routing.write.shape[1]), dim=1))
            content = self.cell.transition(x, h_read, h_write, routing)
            generator = torch.Generator(device="cpu").manual_seed(0)
            cotangent = torch.randn(content.shape, device="cpu", generator=generator, dtype=torch.float64).to(content)
            refuse_untracked(content, [h, *tensors], self.cell)
            of_h, *truth = gradients(content, [h, *(t for _, t in used)], cotangent)
        v = cotangent.to(step.Jh.dtype).flatten(1)
        core, experts = self.groups.zero_gradients(v)
        step.add_direct_gradient_(v, core, experts)
        found = dict(zip((p.name for p in self.groups.all), self.groups.split(core, experts), strict=True))
        through = _through(v, step.Jh).view(h.shape)
        if _wrong(through, of_h, tolerance, 0.0):
            raise ContractError(
                [f"the state Jacobian that was captured disagrees with an ordinary backward pass. {DISAGREEMENT}"]
            )
        scale = max((float(g.abs().max()) for g in truth if g is not None), default=0.0)
        return {
            p.name
            for (p, _), g in zip(used, truth, strict=True)
            if p.name not in self.dense and _wrong(found[p.name], g, tolerance, 1e-2 * scale)
        }


DISAGREEMENT = (
    "Likely reasons: rows of the batch that influence each other in the backward pass, a hook or autograd.Function"
    " whose backward pass is not linear, or a parameter or the input changed in place. capture='dense' takes every"
    " Jacobian by ordinary backward passes"
)
_COUPLED = (
    "the rows of the batch influence each other: {}. Statistics over the batch, capacity limits and the like are not"
    " carried; compute them row by row, or in route"
)


class Precision(TorchFunctionMode):
    """Notes the dtype of least precision that is computed in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.coarsest = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.coarsest = coarser(self.coarsest, result.dtype)
        return result

    @property
    def tolerance(self) -> float:
        """The error that its rounding explains."""
        return tolerance_of(self.coarsest)


def refuse_untracked(value: Tensor, carried: Sequence[Tensor], cell: nn.Module) -> None:
    """Refuse a value of any shape that depends on a trainable tensor other than those that are carried.

    Raises:
        ContractError: naming each.
    """
    names = {id(p): name for name, p in cell.named_parameters()}
    if value.grad_fn is None:
        return
    ends, known = {t.grad_fn for t in carried if t.grad_fn is not None}, {id(t) for t in carried}
    seen: set[Any] = set(ends)
    pending: list[Any] = [value.grad_fn]
    found: dict[int, Tensor] = {}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad" and id(leaf := node.variable) not in known:
            found[id(leaf)] = leaf
        pending += [after for after, _ in node.next_functions]
    if found:
        raise ContractError(
            [
                _not_carried(names.get(key, f"of shape {tuple(leaf.shape)}, from outside,"))
                for key, leaf in found.items()
            ]
        )


def _not_carried(name: str) -> str:
    return (
        f"the trainable tensor {name} reaches the state but is not carried: tensors under readout, from outside the"
        " cell, or put into it after the learner was built are not. Move or detach it, or build a new learner"
    )


@contextmanager
def without_hooks(groups: ParameterGroups) -> Iterator[None]:
    """Take gradient hooks of parameters off: a hook is meant for whole gradients, once."""
    hooked = [(source, source._backward_hooks) for p in groups.all for source in p.sources if source._backward_hooks]
    try:
        for source, _ in hooked:
            source._backward_hooks = None
        yield
    finally:
        for source, hooks in hooked:
            source._backward_hooks = hooks


def nearby(state: Tensor) -> Tensor:
    """A state a thousandth away, ``(B, S, D)``."""
    generator = torch.Generator(device="cpu").manual_seed(3)
    return state + 1e-3 * torch.randn(state.shape, device="cpu", generator=generator, dtype=torch.float64).to(state)


def _gather_support(state: Tensor, routing: Routing) -> Tensor:
    """Content of the slots read and of those written, ``(B, kr + kw, D)``."""
    return gather_slots(state.detach(), routing.support)


def gradients(
    value: Tensor, inputs: list[Tensor], cotangent: Tensor, retain_graph: bool = False
) -> list[Tensor | None]:
    """Gradients of a value of any shape, each in its input's own shape; None where there is no path."""
    if not value.requires_grad or not inputs:
        return [None] * len(inputs)
    return list(torch.autograd.grad(value, inputs, cotangent, retain_graph=retain_graph, allow_unused=True))


def gradients_of_rows(value: Tensor, inputs: list[Tensor], batch: int) -> list[Tensor | None]:
    """Dense Jacobians of a value of ``batch`` rows, each ``(batch, n, *shape)``; None where there is no path."""
    if not value.requires_grad or not inputs:
        return [None] * len(inputs)
    rows = value.numel()
    cotangents = torch.eye(rows, dtype=value.dtype, device=value.device).view(rows, *value.shape)
    options: dict[str, Any] = {"allow_unused": True, "retain_graph": True}
    found: list[Tensor | None]
    try:
        found = list(torch.autograd.grad(value, inputs, cotangents, is_grads_batched=True, **options))
    except RuntimeError:  # an operation without a batching rule: row by row
        by_row = [torch.autograd.grad(value, inputs, c, **options) for c in cotangents]
        columns = [[g for g in column if g is not None] for column in zip(*by_row, strict=True)]
        if any(g.is_sparse for column in columns for g in column):
            raise ContractError(
                ["a parameter has sparse gradients, which cannot be carried; use sparse=False"]
            ) from None
        found = [torch.stack(column) if column else None for column in columns]
    return [None if g is None else g.reshape(batch, rows // batch, *g.shape[1:]) for g in found]


def _differs(content: Tensor, ran: Tensor, copies: int, tolerance: float) -> Tensor:
    """Whether any copy of a stream differs from what ran, ``content (B * copies, kw, D)``; a number of type bool."""
    size = ran.detach().abs().flatten(1).amax(1)
    error = (content.detach().unflatten(0, (-1, copies)) - ran.detach().unsqueeze(1)).abs().flatten(1).amax(1)
    return (error > tolerance * torch.maximum(size, 1e-2 * size.amax())).any()


@full_precision
def _through(v: Tensor, Jh: Tensor) -> Tensor:
    """``v Jh`` of every stream, ``v (B, w)`` and ``Jh (B, w, r)`` to ``(B, r)``."""
    return torch.bmm(v.unsqueeze(1), Jh).squeeze(1)


def _wrong(found: Tensor, truth: Tensor | None, tolerance: float, least: float) -> bool:
    """Whether a gradient disagrees; the error is relative to its largest entry, or to a size if that is larger."""
    if truth is None:
        return bool(found.any())
    if not bool(torch.isfinite(truth).all()):
        return False  # such a step is refused elsewhere
    error, size = (float(t.abs().max()) if t.numel() else 0.0 for t in (found - truth, truth))
    return error > tolerance * max(size, least)


def _refuse_coupled(idle: bool, mixed: bool) -> None:
    """Refuse rows that influence each other: a row without cotangent has a gradient, or rows do not combine.

    Raises:
        ContractError: saying which.
    """
    if idle:
        raise ContractError([_COUPLED.format("the new state of one depends on the old state of another")])
    if mixed:
        raise ContractError(
            [
                "the Jacobian of a combination of state entries is not the combination of their Jacobians: rows of the"
                " batch influence each other, or a backward pass inside of update is not linear, as with clipping in a"
                " hook or an autograd.Function"
            ]
        )


def _split(captured: StepJacobian, routings: list[Routing]) -> list[StepJacobian]:
    """Take apart steps that were captured as one batch."""
    count = len(routings)

    def parts(factors: Factors) -> list[Factors]:
        zs = [[None] * count if term.z is None else term.z.chunk(count) for term in factors.terms]
        return [
            Factors(delta, tuple(replace(term, z=z[t]) for term, z in zip(factors.terms, zs, strict=True)))
            for t, delta in enumerate(factors.delta.chunk(count))
        ]

    Jhs = captured.Jh.chunk(count)
    every = zip(Jhs, routings, parts(captured.core), parts(captured.expert), strict=True)
    return [StepJacobian(*step) for step in every]


@full_precision
def _row_problems(rows: Tensor, weights: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Whether the last two of the copies of streams, core ``(B, c, n)`` or expert ``(B, k, c, n)``, do not fit.

    Returns:
        Whether the gradients of the copies of zero cotangent are not zero, and whether those of the other copies are
        not the combination of all by ``weights (B, w)``; numbers of type bool.
    """
    if not rows.numel():
        return rows.new_zeros((), dtype=torch.bool), rows.new_zeros((), dtype=torch.bool)
    batch, width = weights.shape
    rows = rows.reshape(batch, -1, width + 2, rows.shape[-1])
    own, idle, mixed = rows.split((width, 1, 1), dim=2)
    expected = torch.matmul(weights.to(rows.dtype).view(batch, 1, 1, width), own)
    size = expected.abs().flatten(1)
    size, error = size.amax(1), (mixed - expected).abs().flatten(1).amax(1)
    return idle.any(), (error > tolerance * torch.maximum(size, 1e-2 * size.amax())).any()


def _joined(factors: Factors, pieces: list[Piece]) -> Factors:
    """Factors with further pieces, already of the written entries alone, beside them."""
    delta, terms = _side_by_side(pieces, factors.delta.shape[-1], factors.delta)
    return factors if delta is None else Factors(torch.cat((factors.delta, delta), -1), factors.terms + terms)


def _side_by_side(pieces: list[Piece], start: int, like: Tensor) -> tuple[Tensor | None, tuple[Term, ...]]:
    """The deltas of pieces along the last dimension, and how to read them from entry ``start`` on."""
    terms = []
    for parameter, delta, z in pieces:
        tau, m = delta.shape[-2:]
        terms.append(Term(parameter.start, start, tau, m, None if z is None else z.to(like.dtype)))
        start += tau * m
    if not terms:
        return None, ()
    return torch.cat([delta.flatten(-2) for _, delta, _ in pieces], dim=-1).to(like.dtype), tuple(terms)
