"""Influence of a diagonal recurrence: recorded and captured steps, their commit, and the gradient through the past."""

from __future__ import annotations

import cmath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_rtrl import ops
from sparse_rtrl.diagonal_cell import DiagonalCell, Mapped, Projection
from sparse_rtrl.diagonal_structure import TOLERANCE, Layout, derivatives
from sparse_rtrl.errors import ContractError, NonFiniteError
from sparse_rtrl.influence import check_finite
from sparse_rtrl.precision import full_precision

MAX_WINDOW = 16
"""Most steps that a window collects unless it is told otherwise."""

_SMALL_WINDOW = 16 << 20
"""Bytes that capturing a window may take for a moment even where the influence is small."""


@dataclass(frozen=True)
class RecordedSteps:
    """What one or more consecutive steps were run with: enough to differentiate them later.

    Attributes:
        number: number of the first step.
        steps: how many steps ``n``.
        before: state entries before each, ``(n * B, *state_shape)``.
        values: per projection its value at that time, ``(n * B, *shape)``, or of the shape of a learned one.
        inputs: per projection what its weight multiplied, ``(n * B, J)``; None without a map, or where nothing is kept.
        biased: per projection whether it has a bias.
    """

    number: int
    steps: int
    before: Tensor
    values: list[Tensor]
    inputs: list[Tensor | None]
    biased: list[bool]


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


class DiagonalInfluence:
    """Storage and movement of the influence of a diagonal cell's projections on its state.

    Steps are recorded as they are run, with copies of what may change afterwards. Their derivatives are taken together,
    in one pass, when a loss or a commit needs them.

    Args:
        cell: the cell.
        layouts: of its projections, from :func:`~sparse_rtrl.diagonal_structure.find_layouts`; None where none is kept.
        columns: numbers per row of each projection: its inputs, and one for a bias.
        batch_size: streams ``B``.
        backend: what computes, see :func:`sparse_rtrl.ops.select`.
    """

    def __init__(
        self,
        cell: DiagonalCell,
        layouts: list[Layout | None],
        columns: list[int],
        batch_size: int,
        backend: ops.Backend = "auto",
    ) -> None:
        like = cell.initial_entries(1)
        real = like.dtype.to_real() if like.is_complex() else like.dtype
        self._operations = ops.select(backend, like.device, real)
        self.cell = cell
        self.batch_size = batch_size
        self.layouts = layouts
        self.matrices: list[Tensor | None] = [
            None if layout is None else like.new_zeros(batch_size, layout.rows[0] * layout.rows[1], count)
            for layout, count in zip(layouts, columns, strict=True)
        ]
        """Per projection ``P (B, R, J)``, the rows as :meth:`Layout.reduce` orders them."""
        self.commit_every = 1
        """Steps that the window may collect."""
        self.commit_at_loss = False
        """Whether a loss of the newest segment commits the window, full or not."""
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
        like = next(matrix for matrix in self.matrices if matrix is not None)
        self.layouts[number] = layout
        self.matrices[number] = like.new_zeros(len(like), layout.rows[0] * layout.rows[1], columns)

    @property
    def kept(self) -> list[bool]:
        """For which projections influence is kept."""
        return [layout is not None for layout in self.layouts]

    @property
    def kept_bytes(self) -> int:
        """Bytes of all influence matrices."""
        return sum(matrix.numel() * matrix.element_size() for matrix in self.matrices if matrix is not None)

    @property
    def is_full(self) -> bool:
        """Whether the window holds as many steps as it may."""
        return sum(self.window) >= self.commit_every

    def suggested_window(self) -> int:
        """Steps to collect in a window: up to :data:`MAX_WINDOW`, in little memory beside the influence."""
        like = self.cell.initial_entries(1)
        # The state, its derivative, and the values and theirs, once more while they are taken and joined.
        per_step = 4 * (1 + sum(self.kept)) * self.batch_size * like.numel() * like.element_size()
        return min(MAX_WINDOW, max(1, max(_SMALL_WINDOW, self.kept_bytes // 8) // per_step))

    def record(
        self, projections: tuple[Projection, ...], values: list[Tensor], states: list[Tensor], number: int
    ) -> None:
        """Add the steps between some states to the window, as a segment.

        Args:
            projections: of the ``n * B`` rows of the steps.
            values: their values.
            states: entries before the first and after each step, ``(B, *state_shape)``.
            number: number of the first step, for messages.
        """
        steps = len(states) - 1
        copies: dict[int, Tensor] = {}
        inputs: list[Tensor | None] = []
        for projection, matrix in zip(projections, self.matrices, strict=True):
            if matrix is None or not isinstance(projection, Mapped):
                inputs.append(None)
                continue
            x = projection.x
            if id(x) not in copies:  # often a view of what the caller passed, who may use that memory again
                copies[id(x)] = x.detach().to(_real(matrix), copy=True)
            inputs.append(copies[id(x)])
        kept = [value.detach().clone() for value in values]  # parameters, inputs or parts of an output, perhaps
        before = states[0].detach() if steps == 1 else torch.cat(states[:-1]).detach()
        biased = [isinstance(projection, Mapped) and projection.bias is not None for projection in projections]
        self._recorded.append(RecordedSteps(number, steps, before, kept, inputs, biased))
        self.window.append(steps)

    @full_precision
    def _capture(self, forgotten: Tensor | None = None) -> CapturedSteps:
        """The derivatives of all steps of the window; those that are only recorded are captured together.

        Args:
            forgotten: streams ``(B,)`` bool whose derivatives nobody needs.

        Raises:
            NonFiniteError: if a derivative holds NaN or infinity; nothing is changed then.
            ContractError: if a derivative varies where :func:`find_layouts` saw that it does not; the same.
        """
        if self._recorded:
            recorded, dims = self._recorded, len(self.cell.state_shape)
            before = _joined([part.before for part in recorded])
            values = []
            for parts in zip(*(part.values for part in recorded), strict=True):
                if len(parts) > 1 and parts[0].dim() == dims:  # the same for all rows of a part, not of all parts
                    parts = tuple(v.expand(len(p.before), *v.shape) for v, p in zip(parts, recorded, strict=True))
                values.append(_joined(parts))
            decays, by_value = derivatives(self.cell, before, values, self.kept)
            if forgotten is not None:  # they may hold NaN, for which these streams start anew
                mask = forgotten.repeat(len(decays) // self.batch_size).view(-1, *[1] * dims)
                decays = decays.masked_fill(mask, 0)
                by_value = [None if d is None else d.masked_fill(mask, 0) for d in by_value]
            self._check_derivatives(decays, by_value)
            decays = decays.view(-1, self.batch_size, *decays.shape[1:])
            deltas = [None if d is None else d.view(decays.shape) for d in by_value]
            new = CapturedSteps(decays, deltas, self._inputs())
            self._captured = new if self._captured is None else _appended(self._captured, new)
            self._recorded = []
        assert self._captured is not None
        return self._captured

    def _inputs(self) -> list[Tensor | None]:
        """What multiplied each projection's weight and bias in the recorded steps, ``(B, n, J)``.

        Those of one input are made once.
        """
        recorded = self._recorded
        steps = sum(part.steps for part in recorded)
        known: dict[tuple[object, ...], Tensor] = {}
        out: list[Tensor | None] = []
        by_projection = zip(*(part.inputs for part in recorded), strict=True)
        for matrix, biased, parts in zip(self.matrices, recorded[0].biased, by_projection, strict=True):
            if matrix is None:
                out.append(None)
                continue
            rows = [part for part in parts if part is not None]
            key = (biased, *map(id, rows))
            if key not in known:
                if rows:
                    x = _joined(rows)
                    x = torch.cat((x, x.new_ones(x.shape[0], 1)), dim=1) if biased else x
                    known[key] = x.view(steps, self.batch_size, -1).transpose(0, 1).contiguous()
                else:  # a learned value
                    known[key] = matrix.new_ones(self.batch_size, steps, 1, dtype=_real(matrix))
            out.append(known[key])
        return out

    def _check_derivatives(self, decays: Tensor, by_value: list[Tensor | None]) -> None:
        named = {"the state Jacobian": decays}
        named |= {f"the derivative by value {i} of project": d for i, d in enumerate(by_value) if d is not None}
        if not cmath.isfinite(torch.stack([d.sum() for d in named.values()]).sum().item()):
            numbers = [part.number + step for part in self._recorded for step in range(part.steps)]
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
        """Commit; with ``u``, the gradient through the influence as it was before, if possible in the same pass."""
        gradients: list[Tensor | None] = [None] * len(self.matrices)
        steps = self._capture(forgotten)
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
        """Gradient ``u · P`` of every projection, ``(M, J)``, for ``u (B, *state_shape)``."""
        return [
            None if layout is None or matrix is None else self._carried(layout, matrix, u)
            for layout, matrix in zip(self.layouts, self.matrices, strict=True)
        ]

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
    def loss_gradient(self, position: int, u: Tensor, number: int) -> list[Tensor | None]:
        """Gradient through the past before a segment of the window, per projection ``(M, J)``.

        Args:
            position: place of the segment in the window.
            u: gradient of the loss by the entries of the state that entered it, ``(B, *state_shape)``.
            number: number of its first step, for messages.

        Raises:
            NonFiniteError: if ``u`` is not finite.
        """
        check_finite(number, {"the gradient by the state": u})
        u = u.resolve_conj()
        before = sum(self.window[:position])
        direct: list[Tensor | None] = [None] * len(self.layouts)
        if before:
            direct, u = self._through(before, u)
        newest = position == len(self.window) - 1
        if newest and (self.commit_at_loss or (self.is_full and position == 0)):
            past = self._commit(u)  # nothing that is still to come needs the influence as it is now
        else:
            past = self.carried(u)
        return [p if p is None or d is None else p + d for p, d in zip(past, direct, strict=True)]

    def _through(self, count: int, u: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """Take a gradient back through the first steps of the window.

        Args:
            count: how many.
            u: gradient of the loss by the entries after them, ``(B, *state_shape)``.

        Returns:
            The gradient of each projection in these steps, ``(M, J)``, and that by the entries before them.
        """
        steps = self._capture()
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

        The window is committed for the others; of all streams it is forgotten too, whatever it holds.

        Args:
            streams: mask ``(B,)`` bool; None for all.
        """
        if streams is None or bool(streams.all()):
            self._empty_window()
        elif self.window:
            self._commit(None, streams)
        self.window_key = object()
        for matrix in self.matrices:
            if matrix is not None:
                matrix[slice(None) if streams is None else streams] = 0

    def state_dict(self) -> dict[str, Any]:
        """The influence matrices and the window; nothing is captured or committed."""
        return {
            "version": 2,
            "matrices": [None if matrix is None else matrix.clone() for matrix in self.matrices],
            "window": list(self.window),
            "captured": None if self._captured is None else vars(self._captured),
            "recorded": [vars(part) for part in self._recorded],
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
        saved, own = (
            [None if m is None else (m.dtype, tuple(m.shape)) for m in matrices]
            for matrices in (state["matrices"], self.matrices)
        )
        if saved != own:
            raise ValueError(
                f"state is of another cell, dtype or batch size: its matrices are {saved}, those here {own}"
            )
        device = self.cell.initial_entries(1).device
        for matrix, stored in zip(self.matrices, state["matrices"], strict=True):
            if matrix is not None:
                matrix.copy_(stored)
        self._empty_window()
        self.window = list(state["window"])
        captured, recorded = _on(device, state["captured"]), _on(device, state["recorded"])
        self._captured = None if captured is None else CapturedSteps(**captured)
        self._recorded = [RecordedSteps(**part) for part in recorded]

    def norms(self) -> tuple[Tensor, Tensor]:
        """Frobenius norms of the stored influence, ``(B,)``, and those of the experts, of which there are none.

        Steps of the window are not in it.
        """
        stored = [matrix for matrix in self.matrices if matrix is not None]
        per_matrix = torch.stack([torch.linalg.vector_norm(matrix, dim=(1, 2)) for matrix in stored])
        norms = torch.linalg.vector_norm(per_matrix, dim=0)
        return norms, norms.new_zeros(len(norms), 0)

    def cap_(self, largest: float) -> tuple[int, float]:
        """As :meth:`sparse_rtrl.influence.Influence.cap_`, for the streams whose norm exceeds ``largest``."""
        norms, _ = self.norms()
        over = (norms > largest).nonzero().flatten()
        for matrix in self.matrices:
            if matrix is not None:
                matrix[over] *= (largest / norms[over]).view(-1, 1, 1)
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


def _real(matrix: Tensor) -> torch.dtype:
    return matrix.dtype.to_real() if matrix.is_complex() else matrix.dtype


def _on(device: torch.device, saved: Any) -> Any:
    """What ``state_dict`` returned, with its tensors on a device."""
    if isinstance(saved, Tensor):
        return saved.to(device)
    if isinstance(saved, dict):
        return {name: _on(device, value) for name, value in saved.items()}
    return [_on(device, value) for value in saved] if isinstance(saved, list) else saved
