"""Influence of a diagonal recurrence: captured segments, their commit, and the gradient through the past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_rtrl import ops
from sparse_rtrl.diagonal_cell import DiagonalCell, Mapped, Projection
from sparse_rtrl.diagonal_structure import TOLERANCE, Layout, derivatives
from sparse_rtrl.errors import ContractError
from sparse_rtrl.influence import check_finite
from sparse_rtrl.precision import full_precision


@dataclass(frozen=True)
class DiagonalSegment:
    """The map of one or more consecutive steps, entry by entry.

    Attributes:
        steps: how many steps ``n``.
        decay: ``dh_end/dh_entry``, ``(B, *state_shape)``.
        deltas: per projection ``dh_end/dy_t``, ``(n, B, *state_shape)``; None where nothing is kept.
        zs: per projection what multiplies its weight and bias, ``(B, n, J)``; None where nothing is kept.
    """

    steps: int
    decay: Tensor
    deltas: list[Tensor | None]
    zs: list[Tensor | None]


class DiagonalInfluence:
    """Storage and movement of the influence of a diagonal cell's projections on its state.

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
        self.layouts = layouts
        self.matrices: list[Tensor | None] = [
            None if layout is None else like.new_zeros(batch_size, layout.rows[0] * layout.rows[1], count)
            for layout, count in zip(layouts, columns, strict=True)
        ]
        """Per projection ``P (B, R, J)``, the rows as :meth:`Layout.reduce` orders them."""
        self.commit_every = 1
        """Steps that the window may collect."""
        self.window: list[DiagonalSegment] = []
        self.window_key: object = object()

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

    @full_precision
    def capture(
        self, cell: DiagonalCell, projections: tuple[Projection, ...], states: list[Tensor], number: int
    ) -> DiagonalSegment:
        """Capture the steps between the given states, all together. Changes nothing.

        Args:
            cell: the cell.
            projections: of the ``n * B`` rows of the steps.
            states: entries before the first and after each step, ``(B, *state_shape)``.
            number: number of the first step, for messages.

        Raises:
            NonFiniteError: if a derivative holds NaN or infinity.
            ContractError: if a derivative varies where :func:`find_layouts` saw that it does not.
        """
        steps, batch = len(states) - 1, states[0].shape[0]
        before = states[0] if steps == 1 else torch.cat(states[:-1])
        decays, by_value = derivatives(cell, before.detach(), projections, self.kept)
        totals = [decays.sum(), *(d.sum() for d in by_value if d is not None)]
        if not bool(torch.isfinite(torch.stack(totals).sum().abs())):
            values = {"the state Jacobian": decays}
            values |= {f"the derivative by value {i} of project": d for i, d in enumerate(by_value) if d is not None}
            check_finite(number, {name: v.unflatten(0, (steps, batch)).transpose(0, 1) for name, v in values.items()})
        self._check_layouts(decays, by_value)
        decays = decays.reshape(steps, batch, *decays.shape[1:])
        deltas = [None if d is None else d.reshape(decays.shape) for d in by_value]
        decay, deltas = _to_the_end(decays, deltas)
        return DiagonalSegment(steps, decay, deltas, self._inputs(projections, steps, batch))

    def _inputs(self, projections: tuple[Projection, ...], steps: int, batch: int) -> list[Tensor | None]:
        """What multiplies each projection's weight and bias, ``(B, n, J)``; those of one input are made once."""
        known: dict[tuple[int, bool], Tensor] = {}
        out: list[Tensor | None] = []
        for projection, matrix in zip(projections, self.matrices, strict=True):
            if matrix is None:
                out.append(None)
                continue
            dtype = matrix.dtype.to_real() if matrix.is_complex() else matrix.dtype
            if not isinstance(projection, Mapped):
                out.append(matrix.new_ones(batch, steps, 1, dtype=dtype))
                continue
            key = id(projection.x), projection.bias is None
            if key not in known:
                x = projection.x.detach().to(dtype)
                if projection.bias is not None:
                    x = torch.cat((x, x.new_ones(x.shape[0], 1)), dim=1)
                known[key] = x.reshape(steps, batch, -1).transpose(0, 1).contiguous()
            out.append(known[key])
        return out

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

    @property
    def is_full(self) -> bool:
        """Whether the window holds as many steps as it may."""
        return sum(segment.steps for segment in self.window) >= self.commit_every

    def record(self, segment: DiagonalSegment) -> None:
        """Add a captured segment to the window."""
        self.window.append(segment)

    def commit(self) -> None:
        """Move the influence through the window, ``P <- decay ⊙ P + F``, and empty it."""
        self._commit(None)

    @full_precision
    def _commit(self, u: Tensor | None) -> list[Tensor | None]:
        """Commit; with ``u``, the gradient through the influence as it was before, taken in the same pass."""
        gradients: list[Tensor | None] = [None] * len(self.matrices)
        if not self.window:
            return gradients
        decay, deltas, zs = self._joined()
        decays: dict[Layout, Tensor] = {}
        for number, (layout, matrix, delta, z) in enumerate(zip(self.layouts, self.matrices, deltas, zs, strict=True)):
            if layout is None or matrix is None or delta is None or z is None:
                continue
            carried = query = None
            if u is not None:
                if layout.rows[0] == layout.rows[2] == 1:
                    carried = torch.zeros_like(matrix[0])
                    query = layout.query(u).flatten(1).contiguous()
                else:
                    gradients[number] = self._carried(layout, matrix, u)
            if layout not in decays:
                decays[layout] = layout.reduce(decay).contiguous()
            rows = layout.reduce(delta).permute(1, 2, 0).contiguous()
            self._operations.diagonal_update_(matrix, decays[layout], rows, z, carried, query)
            if carried is not None:
                gradients[number] = layout.unquery(carried.unsqueeze(1))
        self.window = []
        self.window_key = object()
        return gradients

    def _joined(self) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        """The segments of the window as one."""
        if len(self.window) == 1:
            only = self.window[0]
            return only.decay, only.deltas, only.zs
        after = torch.stack([segment.decay for segment in self.window])
        decay, ends = _products(after)
        deltas: list[Tensor | None] = []
        for parts in zip(*(segment.deltas for segment in self.window), strict=True):
            some = [part * end for part, end in zip(parts, ends, strict=True) if part is not None]
            deltas.append(torch.cat(some) if some else None)
        zs = []
        for inputs in zip(*(segment.zs for segment in self.window), strict=True):
            present = [z for z in inputs if z is not None]
            zs.append(torch.cat(present, 1) if present else None)
        return decay, deltas, zs

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
        if position == 0:
            if self.is_full and len(self.window) == 1:
                return self._commit(u)  # nothing that is still to come can need the influence as it is now
            return self.carried(u)
        by_value: list[list[Tensor]] = [[] for _ in self.layouts]
        inputs: list[list[Tensor]] = [[] for _ in self.layouts]
        for segment in reversed(self.window[:position]):
            for i, (layout, delta, z) in enumerate(zip(self.layouts, segment.deltas, segment.zs, strict=True)):
                if layout is not None and delta is not None and z is not None:
                    by_value[i].append(layout.by_value(u * delta.conj()).flatten(0, 1))
                    inputs[i].append(z.transpose(0, 1).flatten(0, 1))
            u = u * segment.decay.conj()
        out: list[Tensor | None] = []
        for layout, matrix, rows, zs in zip(self.layouts, self.matrices, by_value, inputs, strict=True):
            if layout is None or matrix is None:
                out.append(None)
                continue
            direct = torch.cat(rows).t() @ torch.cat(zs).to(matrix.dtype)
            out.append(direct + self._carried(layout, matrix, u))
        return out

    def reset(self, streams: Tensor) -> None:
        """Commit, then forget the past of the streams in ``streams (B,)`` bool."""
        self.commit()
        self.window_key = object()
        for matrix in self.matrices:
            if matrix is not None:
                matrix[streams] = 0

    def state_dict(self) -> dict[str, Any]:
        """The influence matrices and the window; nothing is committed."""
        return {
            "matrices": [None if matrix is None else matrix.clone() for matrix in self.matrices],
            "window": [vars(segment) for segment in self.window],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of another cell or batch size; nothing is changed then.
        """
        saved = [None if m is None else tuple(m.shape) for m in state["matrices"]]
        own = [None if m is None else tuple(m.shape) for m in self.matrices]
        if saved != own:
            raise ValueError(f"state is of another cell or batch size: its matrices are {saved}, those here {own}")
        for matrix, stored in zip(self.matrices, state["matrices"], strict=True):
            if matrix is not None:
                matrix.copy_(stored)
        self.window = [DiagonalSegment(**segment) for segment in state["window"]]
        self.window_key = object()

    def norms(self) -> tuple[Tensor, Tensor]:
        """Frobenius norms of the stored influence, ``(B,)``, and those of the experts, of which there are none."""
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


def _products(decays: Tensor) -> tuple[Tensor, Tensor]:
    """Product of ``decays (n, ...)``, and for each the product of those after it."""
    products = decays.flip(0).cumprod(0).flip(0)
    return products[0], torch.cat((products[1:], torch.ones_like(products[:1])))


def _to_the_end(decays: Tensor, deltas: list[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
    """Take derivatives of each step's state to the last one's: ``δ_t <- a_n ... a_{t+1} δ_t``."""
    if decays.shape[0] == 1:
        return decays[0], deltas
    decay, ends = _products(decays)
    return decay, [None if delta is None else delta * ends for delta in deltas]
