"""Influence of a diagonal recurrence: recorded and captured steps, their commit, and the gradient through the past."""

from __future__ import annotations

import cmath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_rtrl.capture.diagonal_structure import TOLERANCE, Layout, derivatives, differs
from sparse_rtrl.cells.diagonal_cell import DiagonalCell, Mapped, Projection
from sparse_rtrl.errors import ContractError, NonFiniteError
from sparse_rtrl.influence.sparse import check_finite
from sparse_rtrl.ops import dispatch
from sparse_rtrl.ops.precision import full_precision

MAX_WINDOW = 16
"""A window collects at most this many steps by default."""

_SMALL_WINDOW = 16 << 20
"""Bytes that capturing a window may always take for a moment, however small the influence is."""


@dataclass(frozen=True)
class RecordedSteps:
    """What one or more consecutive steps were run with: enough to differentiate them later.

    Attributes:
        number: number of the first step.
        steps: how many steps ``n``.
        before: state entries before each, ``(n * B, *state_shape)``.
        after: those after each; None in what older versions saved.
        values: per projection its value at that time, ``(n * B, *shape)``, or of the shape of a learned one.
        inputs: per projection what its weight multiplied, ``(n * B, J)``; None without a map.
        biased: per projection whether it has a bias.
        trained: per projection whether each of its tensors was trainable at that time: a frozen one has no influence
            on these steps.
    """

    number: int
    steps: int
    before: Tensor
    after: Tensor | None
    values: list[Tensor]
    inputs: list[Tensor | None]
    biased: list[bool]
    trained: list[list[bool]]


@dataclass(frozen=True)
class CapturedSteps:
    """The derivatives of consecutive steps, entry by entry.

    Attributes:
        decays: ``dh_t/dh_{t-1}`` of every step, ``(n, B, *state_shape)``.
        deltas: per projection ``dh_t/dy_t``, of the same shape; None where nothing is kept.
        zs: per projection what multiplies its weight and bias, ``(B, n, J)``; None where nothing is kept.
    """

    decays: Tensor
    deltas: list[Tensor | None]
    zs: list[Tensor | None]


def recorded_steps(
    projections: tuple[Projection, ...], values: list[Tensor], states: list[Tensor], number: int
) -> RecordedSteps:
    """What some steps were run with: copies of all that may change afterwards, except the states of a single step.

    Args:
        projections: of the ``n * B`` rows of the steps.
        values: their values, ``(n * B, ...)``.
        states: entries before the first and after each step, ``(B, *state_shape)``.
        number: number of the first step, for messages.
    """
    steps, batch = len(states) - 1, len(states[0])
    real = _real(states[0])
    copies: dict[int, Tensor] = {}
    inputs: list[Tensor | None] = []
    for projection in projections:
        if not isinstance(projection, Mapped):
            inputs.append(None)
            continue
        x = projection.x
        if id(x) not in copies:  # often a view of the caller's memory, who may reuse it
            copies[id(x)] = x.detach().to(real, copy=True)
        inputs.append(copies[id(x)])
    if steps == 1:
        before, after = states[0].detach(), states[1].detach()
    else:
        rows = torch.cat(states).detach()
        before, after = rows[:-batch], rows[batch:]
    return RecordedSteps(
        number,
        steps,
        before,
        after,
        [value.detach().clone() for value in values],  # parameters, inputs or parts of an output, perhaps
        inputs,
        [isinstance(projection, Mapped) and projection.bias is not None for projection in projections],
        [[tensor.requires_grad for tensor in projection.tensors] for projection in projections],
    )


class DiagonalInfluence:
    """Storage and movement of the influence of a diagonal cell's projections on its state.

    Where the initial state is trained, the influence of each stream's own initial entries on its current ones is kept
    too: one number per entry, the product of the decays since the stream's start. What is left, from initial entries to
    parameters, is the graph of ``initial_entries``.

    Steps are recorded as they are run, with copies of what may change afterwards. Their derivatives are taken together,
    in one pass, when a loss or a commit needs them.

    Args:
        cell: the cell.
        layouts: of its projections, from ``find_layouts``; None where none is kept.
        columns: numbers per row of each projection: its inputs, and one for a bias.
        batch_size: streams ``B``.
        backend: what computes, see :func:`sparse_rtrl.ops.dispatch.select`.
    """

    def __init__(
        self,
        cell: DiagonalCell,
        layouts: list[Layout | None],
        columns: list[int],
        batch_size: int,
        backend: dispatch.Backend = "auto",
    ) -> None:
        self._like = like = cell.zero_entries(0)
        self._backend: dispatch.Backend = backend
        self._operations = dispatch.select(backend, like.device, _real(like))
        self.cell = cell
        self.batch_size = batch_size
        self.layouts = layouts
        self.matrices: list[Tensor | None] = [
            None if layout is None else like.new_zeros(batch_size, layout.rows[0] * layout.rows[1], count)
            for layout, count in zip(layouts, columns, strict=True)
        ]
        """Per projection ``P (B, R, J)``, the rows as :meth:`Layout.reduce` orders them."""
        self.initial: Tensor | None = None
        """Influence of a stream's initial entries, ``(B, *state_shape)``; None where they are not trained."""
        self.commit_every = 1
        """Steps that the window may collect."""
        self.commit_at_loss = False
        """Whether a loss of the newest segment commits the window even if it is not full."""
        self.window: list[int] = []
        """Steps of each segment of the window."""
        self.window_key: object = object()
        self._captured: CapturedSteps | None = None
        """The first steps of the window."""
        self._recorded: list[RecordedSteps] = []
        """Those after them."""

    def add(self, number: int, layout: Layout, columns: int) -> None:
        """Keep the influence of one more projection from now on, starting at zero."""
        self.commit()
        self.layouts[number] = layout
        self.matrices[number] = self._like.new_zeros(self.batch_size, layout.rows[0] * layout.rows[1], columns)

    def add_initial(self) -> None:
        """Keep the influence of initial entries from now on, for the streams that :meth:`begin` from them."""
        self.commit()
        self.initial = self._like.new_zeros(self.batch_size, *self._like.shape[1:])

    def begin(self, streams: Tensor) -> None:
        """Streams ``(B,)`` bool take their first step, from the initial entries; they have no past in the window."""
        if self.initial is not None:
            self.initial[streams] = 1

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_operations"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._operations = dispatch.select(self._backend, self._like.device, _real(self._like))

    @property
    def kept(self) -> list[bool]:
        """For which projections influence is kept."""
        return [layout is not None for layout in self.layouts]

    @property
    def kept_bytes(self) -> int:
        """Bytes of all influence matrices."""
        return sum(matrix.numel() * matrix.element_size() for matrix in self._stored)

    @property
    def _stored(self) -> list[Tensor]:
        return [matrix for matrix in (*self.matrices, self.initial) if matrix is not None]

    @property
    def is_full(self) -> bool:
        """Whether the window holds as many steps as it may."""
        return sum(self.window) >= self.commit_every

    def suggested_window(self) -> int:
        """Steps to collect in a window: up to :data:`MAX_WINDOW`, if they need little memory beside the influence."""
        entries = self._like.shape[1:].numel() * self._like.element_size()
        # The state and the values, with a derivative each; all of it twice while derivatives are taken and joined.
        per_step = 4 * (1 + sum(self.kept)) * self.batch_size * entries
        return min(MAX_WINDOW, max(1, max(_SMALL_WINDOW, self.kept_bytes // 8) // per_step))

    def record(self, parts: list[RecordedSteps]) -> None:
        """Add consecutive steps to the window, as one segment."""
        self._recorded += parts
        self.window.append(sum(part.steps for part in parts))

    def _capture(self, forgotten: Tensor | None = None) -> CapturedSteps:
        """The derivatives of all steps of the window; those that are only recorded are captured together.

        Args:
            forgotten: streams ``(B,)`` bool whose derivatives nobody needs.

        Raises:
            NonFiniteError, ContractError: see :meth:`capture`; nothing is changed then.
        """
        if self._recorded:
            new = self.capture(self._recorded, forgotten)
            self._captured = new if self._captured is None else _appended(self._captured, new)
            self._recorded = []
        assert self._captured is not None
        return self._captured

    @full_precision
    def capture(self, recorded: list[RecordedSteps], forgotten: Tensor | None = None) -> CapturedSteps:
        """The derivatives of recorded steps, taken together. Changes nothing.

        Args:
            recorded: the steps.
            forgotten: streams ``(B,)`` bool whose derivatives nobody needs.

        Raises:
            NonFiniteError: if a derivative holds NaN or infinity.
            ContractError: if a derivative varies where :func:`find_layouts` saw that it does not, if ``step`` does not
                give the states that it gave when it ran, or if it reads a parameter itself.
        """
        dims = len(self.cell.state_shape)
        before = _joined([part.before for part in recorded])
        values = []
        for parts in zip(*(part.values for part in recorded), strict=True):
            if len(parts) > 1 and parts[0].dim() == dims:  # the same for all rows of a part, not of all parts
                parts = tuple(v.expand(len(p.before), *v.shape) for v, p in zip(parts, recorded, strict=True))
            values.append(_joined(parts))
        decays, by_value, new = derivatives(self.cell, before, values, self.kept)
        after = [part.after for part in recorded if part.after is not None]
        if forgotten is not None:  # they may hold NaN: that is why these streams start anew
            mask = forgotten.repeat(len(decays) // self.batch_size).view(-1, *[1] * dims)
            decays, new = decays.masked_fill(mask, 0), new.masked_fill(mask, 0)
            by_value = [None if d is None else d.masked_fill(mask, 0) for d in by_value]
            after = [a.masked_fill(mask[: len(a)], 0) for a in after]
        self._check_derivatives(recorded, decays, by_value)
        if len(after) == len(recorded) and differs(new, _joined(after)):
            raise ContractError(
                [
                    f"steps {recorded[0].number} to {recorded[-1].number + recorded[-1].steps - 1}: step does not give"
                    " the states that it gave when it ran: it draws random numbers, keeps a state of its own, or looks"
                    " at other rows than its own"
                ]
            )
        decays = decays.view(-1, self.batch_size, *decays.shape[1:])
        deltas = [None if d is None else d.view(decays.shape) for d in by_value]
        return CapturedSteps(decays, deltas, self._inputs(recorded))

    def _inputs(self, recorded: list[RecordedSteps]) -> list[Tensor | None]:
        """What multiplied each projection's weight and bias in recorded steps, ``(B, n, J)``; zero for frozen ones.

        Those of one input are made once.
        """
        known: dict[tuple[object, ...], Tensor] = {}
        out: list[Tensor | None] = []
        for number, matrix in enumerate(self.matrices):
            if matrix is None:
                out.append(None)
                continue
            trained = tuple(tuple(part.trained[number]) for part in recorded)
            key = (trained, *(id(part.inputs[number]) for part in recorded))
            if key not in known:
                rows = [self._input_rows(part, number) for part in recorded]
                z = _joined(rows).view(-1, self.batch_size, matrix.shape[2])
                known[key] = z.transpose(0, 1).contiguous()
            out.append(known[key])
        return out

    def _input_rows(self, part: RecordedSteps, number: int) -> Tensor:
        """What multiplied the weight and the bias of one projection, ``(n * B, J)``."""
        x, trained = part.inputs[number], part.trained[number]
        if x is None:  # a learned value
            return self._like.new_full((len(part.before), 1), float(trained[0]), dtype=_real(self._like))
        x = x if trained[0] else torch.zeros_like(x)
        return torch.cat((x, x.new_full((len(x), 1), float(trained[1]))), dim=1) if part.biased[number] else x

    def _check_derivatives(self, recorded: list[RecordedSteps], decays: Tensor, by_value: list[Tensor | None]) -> None:
        named = {"the state Jacobian": decays}
        named |= {f"the derivative by value {i} of project": d for i, d in enumerate(by_value) if d is not None}
        if not cmath.isfinite(torch.stack([d.sum() for d in named.values()]).sum().item()):
            numbers = [part.number + step for part in recorded for step in range(part.steps)]
            for number, *rows in zip(numbers, *(d.split(self.batch_size) for d in named.values()), strict=True):
                try:
                    check_finite(number, dict(zip(named, rows, strict=True)))
                except NonFiniteError as error:
                    raise NonFiniteError(error.step, error.streams, error.group, late=True) from None
        self._check_layouts(decays, by_value)

    def _check_layouts(self, decays: Tensor, by_value: list[Tensor | None]) -> None:
        errors = []
        for layout, derivative in zip(self.layouts, by_value, strict=True):
            if layout is None or derivative is None or layout.plain:
                continue
            if layout.compressed:
                errors += [layout.constant_error(decays), layout.constant_error(derivative)]
            if layout.windowed(derivative).shape != derivative.shape:
                errors.append(layout.outside(derivative))
        limit = TOLERANCE * torch.finfo(decays.dtype).eps
        if errors and float(torch.stack(errors).max()) > limit:
            raise ContractError(
                [
                    "a derivative of step varies along an axis of the state, or reaches entries, where it did not at"
                    " the random states and values of the start: step must not branch on the state or its values"
                ]
            )

    def commit(self) -> None:
        """Move the influence through the window, ``P <- decay ⊙ P + F``, and empty it.

        Raises:
            NonFiniteError: if a derivative of a step of the window holds NaN or infinity; nothing is changed then.
            ContractError: if one varies where it did not when the cell was looked at; nothing is changed then.
        """
        if self.window:
            self._commit(None)

    @full_precision
    def _commit(self, u: Tensor | None, forgotten: Tensor | None = None) -> list[Tensor | None]:
        """Commit; with ``u``, the gradient through the influence as it was before, if possible in the same pass.

        It has one entry per projection, and one for the initial entries, as :meth:`carried` has.
        """
        gradients: list[Tensor | None] = [None] * (len(self.matrices) + 1)
        steps = self._capture(forgotten)
        if self.initial is not None:
            gradients[-1] = None if u is None else u * self.initial.conj()
            self.initial.mul_(_products(steps.decays)[0])
        products: dict[Layout, tuple[Tensor, Tensor | None]] = {}
        of_projections = zip(self.layouts, self.matrices, steps.deltas, steps.zs, strict=True)
        for number, (layout, matrix, delta, z) in enumerate(of_projections):
            if layout is None or matrix is None or delta is None or z is None:
                continue
            carried = query = None
            if u is not None:
                if layout.rows[0] == layout.rows[2] == 1:
                    carried = torch.zeros_like(matrix[0])
                    query = layout.query(u).flatten(1).contiguous()
                else:
                    gradients[number] = self._carried(layout, matrix, u)
            if layout not in products:
                decay, ends = _products(layout.reduce(steps.decays))
                products[layout] = decay.contiguous(), ends
            decay, ends = products[layout]
            rows = layout.reduce(delta) if ends is None else layout.reduce(delta) * ends
            self._operations.diagonal_update_(matrix, decay, rows.permute(1, 2, 0).contiguous(), z, carried, query)
            if carried is not None:
                # Not a view, so that autograd may add to it in place.
                gradients[number] = carried if layout.plain else layout.unquery(carried.unsqueeze(1))
        self._empty_window()
        return gradients

    def _empty_window(self) -> None:
        self.window, self._captured, self._recorded = [], None, []
        self.window_key = object()

    def carried(self, u: Tensor) -> list[Tensor | None]:
        """Gradient ``u · P`` of every projection, ``(M, J)``, and of initial entries, for ``u (B, *state_shape)``."""
        of_projections = [
            None if layout is None or matrix is None else self._carried(layout, matrix, u)
            for layout, matrix in zip(self.layouts, self.matrices, strict=True)
        ]
        return [*of_projections, None if self.initial is None else u * self.initial.conj()]

    def _carried(self, layout: Layout, matrix: Tensor, u: Tensor) -> Tensor:
        """Gradient ``u · P`` of the rows of a projection, ``(M, J)``."""
        _, kept, queried = layout.rows
        query = layout.query(u)  # (B, summed, kept, queried)
        rows = matrix.view(-1, kept, matrix.shape[2])  # streams and summed axes together
        if queried == 1:
            gradient = torch.zeros_like(rows[0])
            self._operations.diagonal_loss_(gradient, rows, query.flatten(2).flatten(0, 1).contiguous())
            return layout.unquery(gradient.unsqueeze(1))
        by_row = query.flatten(0, 1).permute(1, 2, 0)  # (kept, queried, B * summed)
        return layout.unquery(torch.bmm(by_row, rows.transpose(0, 1).conj()))

    @full_precision
    def loss_gradient(self, position: int, u: Tensor, number: int, last: bool = True) -> list[Tensor | None]:
        """Gradient through the past before a segment of the window.

        Args:
            position: place of the segment in the window.
            u: gradient of the loss by the entries of the state that entered it, ``(B, *state_shape)``.
            number: number of its first step, for messages.
            last: whether no other loss of that segment comes; a full window is then committed on the way.

        Returns:
            Per projection ``(M, J)``, and that of the initial entries, ``(B, *state_shape)``; None where none is kept.

        Raises:
            NonFiniteError: if ``u`` is not finite.
        """
        check_finite(number, {"the gradient by the state": u})
        u = u.resolve_conj()
        before = sum(self.window[:position])
        direct: list[Tensor | None] = [None] * len(self.layouts)
        if before:
            direct, u = self.through(self._capture(), before, u)
        newest = position == len(self.window) - 1
        if last and newest and (self.commit_at_loss or (self.is_full and position == 0)):
            past = self._commit(u)  # no later loss needs the influence as it is now
        else:
            past = self.carried(u)
        return [p if p is None or d is None else p + d for p, d in zip(past, (*direct, None), strict=True)]

    @full_precision
    def through(self, steps: CapturedSteps, count: int, u: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """Take a gradient back through the first of some steps.

        Args:
            steps: the steps.
            count: how many.
            u: gradient of the loss by the entries after them, ``(B, *state_shape)``.

        Returns:
            The gradient of each projection in these steps, ``(M, J)``, and that by the entries before them.
        """
        decay, ends = _products(steps.decays[:count])
        after = u if ends is None else u * ends.conj()
        out: list[Tensor | None] = []
        for layout, delta, z in zip(self.layouts, steps.deltas, steps.zs, strict=True):
            if layout is None or delta is None or z is None:
                out.append(None)
                continue
            rows = layout.by_value(after * delta[:count].conj()).flatten(0, 1)
            out.append(rows.t() @ z[:, :count].transpose(0, 1).flatten(0, 1).to(rows.dtype))
        return out, u * decay.conj()

    def reset(self, streams: Tensor | None = None) -> None:
        """Forget the past of streams.

        The window is committed for the others. If all streams are forgotten, the window is dropped, whatever it holds.

        Args:
            streams: mask ``(B,)`` bool; None for all.
        """
        if streams is None or bool(streams.all()):
            self._empty_window()
        elif self.window:
            self._commit(None, streams)
        self.window_key = object()
        for matrix in self._stored:
            matrix[slice(None) if streams is None else streams] = 0

    def state_dict(self) -> dict[str, Any]:
        """The influence matrices and the window; nothing is captured or committed."""
        return {
            "version": 2,
            "matrices": [None if matrix is None else matrix.clone() for matrix in self.matrices],
            "initial": None if self.initial is None else self.initial.clone(),
            "window": list(self.window),
            "captured": None if self._captured is None else _copied(vars(self._captured)),
            "recorded": [_copied(vars(part)) for part in self._recorded],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of another version, cell or batch size; nothing is changed then.
        """
        if state.get("version") != 2:
            raise ValueError(f"influence of a diagonal cell must be of version 2, got {state.get('version')!r}")
        if missing := {"matrices", "window", "captured", "recorded"} - set(state):
            raise ValueError(f"influence of a diagonal cell lacks {sorted(missing)}")
        stored = (*state["matrices"], state.get("initial"))  # older versions have no initial entries
        matrices = (*self.matrices, self.initial)
        saved, own = ([None if m is None else (m.dtype, tuple(m.shape)) for m in each] for each in (stored, matrices))
        if saved != own:
            raise ValueError(
                f"state is of another cell, dtype or batch size: its matrices are {saved}, those here {own}"
            )
        for matrix, values in zip(matrices, stored, strict=True):
            if matrix is not None:
                matrix.copy_(values)
        self._empty_window()
        self.window = list(state["window"])
        device = self._like.device
        captured, recorded = _copied(state["captured"], device), _copied(state["recorded"], device)
        self._captured = None if captured is None else CapturedSteps(**captured)
        # In what older versions saved, every kept tensor was trained, and it is not said where the steps ended.
        older = {"after": None, "trained": [[True, True]] * len(self.matrices)}
        self._recorded = [RecordedSteps(**{**older, **part}) for part in recorded]

    def norms(self) -> tuple[Tensor, Tensor]:
        """Frobenius norms of the stored influence, ``(B,)``, and those of the experts, of which there are none.

        Steps of the window are not in it.
        """
        per_matrix = torch.stack([torch.linalg.vector_norm(matrix.flatten(1), dim=1) for matrix in self._stored])
        norms = torch.linalg.vector_norm(per_matrix, dim=0)
        return norms, norms.new_zeros(len(norms), 0)

    def cap_(self, largest: float) -> tuple[int, float]:
        """As :meth:`sparse_rtrl.influence.sparse.Influence.cap_`, for the streams whose norm exceeds ``largest``."""
        norms, _ = self.norms()
        over = (norms > largest).nonzero().flatten()
        for matrix in self._stored:
            matrix[over] *= (largest / norms[over]).view(-1, *[1] * (matrix.dim() - 1))
        return len(over), float(norms.max())


def _products(decays: Tensor) -> tuple[Tensor, Tensor | None]:
    """Product of ``decays (n, ...)``, and for each the product of those after it; None for a single one."""
    if len(decays) == 1:
        return decays[0], None
    products = decays.flip(0).cumprod(0).flip(0)
    return products[0], torch.cat((products[1:], torch.ones_like(products[:1])))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows of several parts below each other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _appended(first: CapturedSteps, then: CapturedSteps) -> CapturedSteps:
    """The derivatives of steps and of those that follow them."""

    def joined(first: Tensor | None, then: Tensor | None, dim: int) -> Tensor | None:
        return None if first is None or then is None else torch.cat((first, then), dim)

    return CapturedSteps(
        torch.cat((first.decays, then.decays)),
        [joined(a, b, 0) for a, b in zip(first.deltas, then.deltas, strict=True)],
        [joined(a, b, 1) for a, b in zip(first.zs, then.zs, strict=True)],
    )


def _real(like: Tensor) -> torch.dtype:
    return like.dtype.to_real() if like.is_complex() else like.dtype


def _copied(saved: Any, device: torch.device | None = None) -> Any:
    """A copy of nested dicts and lists of tensors, on a device; tensors that were one object stay one."""
    known: dict[int, Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in known:
                known[id(value)] = value.to(device or value.device, copy=True)
            return known[id(value)]
        if isinstance(value, dict):
            return {name: copied(each) for name, each in value.items()}
        return [copied(each) for each in value] if isinstance(value, list) else value

    return copied(saved)
