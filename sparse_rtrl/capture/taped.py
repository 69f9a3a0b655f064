"""Captured steps as a row tape and its coefficients, and what is done with a window of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sparse_rtrl.capture.linearize import Linearizer
from sparse_rtrl.capture.tape import RowTape, Use
from sparse_rtrl.cells.slot_cell import Routing
from sparse_rtrl.ops import dispatch

SCRATCH_BYTES = 32 * 2**20
"""Scratch memory for what the tape keeps of the steps of a commit; half of a stream's influence if that is more."""
TILE_BYTES = 2**20
"""Columns of the influence that are moved together, for one stream."""


class _Scratch:
    """Memory by name that is used again: fresh memory costs more than what is done with it."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}

    def take(self, name: str, size: int, like: Tensor) -> Tensor:
        """The first ``size`` numbers of the memory of a name, ``(size,)``, with any values, of a dtype and device."""
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size or kept.dtype != like.dtype or kept.device != like.device:
            kept = self._kept[name] = like.new_empty(size)
        return kept[:size]


class TapedStep:
    """A traced step: its tape, what evaluates it, and the columns that its parameters have in the influence.

    Args:
        tape: its tape.
        starts: first column of each parameter of the tape; -1 for one that is not carried.
    """

    def __init__(self, tape: RowTape, starts: Sequence[int]) -> None:
        self.tape = tape
        self.linearizer = Linearizer(tape)
        self.uses = [use for use in tape.uses if starts[use.parameter] >= 0]
        self.starts = list(starts)
        self.program = tape.program()
        # Weight and bias of a map share their delta.
        self.kept = list(dict.fromkeys((use.row, use.tau, use.m) for use in self.uses))
        self.taps = [number for tap in self.kept for number in tap]
        self.entries = sum(tau * m for _, tau, m in self.kept)
        self.scratch = _Scratch()

    def column(self, use: Use) -> int:
        """First column of a use."""
        return self.starts[use.parameter] + use.offset


class StepStore:
    """The coefficients of consecutive steps of one kind side by side, so that a window of them needs no copy.

    Args:
        step: the kind of step.
        batch_size: streams ``B``.
    """

    def __init__(self, step: TapedStep, batch_size: int) -> None:
        self.step = step
        self.batch_size = batch_size
        self.count = 0
        tape = step.tape
        places = [i for i, per_step in enumerate(tape.per_step[:-1]) if per_step]
        self._kept_numbers = [tape.places <= i < tape.places + tape.numbers for i in places]
        self._kept: list[Tensor] = []
        """What differs between steps, ``(capacity, B, ...)``; without the new state, which is not needed again."""
        self._shared: list[Tensor] = []
        self._varying: list[Tensor] | None = None
        """What is the same unless parameters change, ``(capacity, ...)``; None while they have not."""

    def append(self, per_step: list[Tensor], shared: list[Tensor], count: int) -> TapedSteps:
        """Keep ``count`` steps, newest last.

        Args:
            per_step: from the linearizer, ``(count * B, ...)`` each.
            shared: what it gave for all steps, ``(...)`` each; the same list object while parameters are the same.
            count: how many steps.
        """
        first, last = self.count, self.count + count
        new = [t.unflatten(0, (count, self.batch_size)) for t in per_step]
        if first == 0:
            self._kept, self._shared, self._varying = new, shared, None
        else:
            self._kept = [_grown(kept, part, first) for kept, part in zip(self._kept, new, strict=True)]
            if self._varying is None and shared is not self._shared:
                self._varying = [t.unsqueeze(0).expand(first, *t.shape) for t in self._shared]
            if self._varying is not None:
                lines = [t.unsqueeze(0).expand(count, *t.shape) for t in shared]
                self._varying = [_grown(kept, line, first) for kept, line in zip(self._varying, lines, strict=True)]
        self.count = last
        return TapedSteps(self, first, count)

    def total(self, first: int, last: int) -> Tensor:
        """Sum of all coefficients of the steps ``first ... last - 1``, ``()``."""
        # Every z is an input, or was computed on the way to the state: it shows there.
        numbers = [t for t, number in zip(self._kept, self._kept_numbers, strict=True) if number]
        sums = [t[first:last].sum() for t in numbers]
        return torch.stack(sums).sum() if sums else torch.zeros((), device="cpu")

    def operands(self, first: int, last: int) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        """Places, numbers and every ``z (steps, B, τ, j)`` of the steps ``first ... last - 1``."""
        kept = iter([t[first:last] for t in self._kept])
        varying = self._varying
        one = iter([t.unsqueeze(0) for t in self._shared] if varying is None else [t[first:last] for t in varying])
        tape = self.step.tape
        every = [next(kept) if per_step else next(one) for per_step in tape.per_step[:-1]]
        joined = [
            t.flatten(0, 1) if per_step else t
            for t, per_step in zip(every[: tape.places + tape.numbers], tape.per_step, strict=False)
        ]
        count, batch = last - first, self.batch_size
        zs: list[Tensor | None] = []
        for z, per_step in zip(
            every[tape.places + tape.numbers :], tape.per_step[tape.places + tape.numbers :], strict=False
        ):
            zs.append(z if per_step else z.unsqueeze(1).expand(count, batch, *z.shape[1:]))
        return joined[: tape.places], joined[tape.places :], zs


def _grown(kept: Tensor, part: Tensor, first: int) -> Tensor:
    """``kept`` with ``part`` at ``first``; with room for as many lines again if there was none."""
    last = first + len(part)
    if len(kept) < last or not kept.is_contiguous():
        wider = kept.new_empty(2 * last, *kept.shape[1:])
        wider[:first] = kept[:first]
        kept = wider
    kept[first:last] = part
    return kept


@dataclass(frozen=True)
class TapedSteps:
    """Consecutive steps of all streams that ran the same traced step.

    Attributes:
        store: holds their coefficients.
        first: number of the first one there.
        count: how many.
    """

    store: StepStore
    first: int
    count: int

    @cached_property
    def routing(self) -> Routing:
        """One slot for the whole state, written in every step."""
        batch = self.store.batch_size
        none = torch.zeros(batch, 0, dtype=torch.int64, device="cpu")
        return Routing(none, torch.zeros(batch, 1, dtype=torch.int64, device="cpu"), none)

    def total(self) -> Tensor:
        """Sum of all its coefficients, ``()``: finite unless one of them is not, or the sum overflows."""
        return self.store.total(self.first, self.first + self.count)

    @property
    def experts(self) -> Tensor:
        """None, ``(B, 0)``."""
        return self.routing.experts

    @classmethod
    def pull_back(cls, window: Sequence[TapedSteps], v: Tensor, core: Tensor, experts: Tensor) -> Tensor:
        """See :meth:`~sparse_rtrl.captured.Captured.pull_back`."""
        row = v.unsqueeze(1).clone(memory_format=torch.contiguous_format)
        for store, first, last in reversed(_joined(window)):
            kept = row.new_empty((last - first) * len(row) * store.step.entries)
            for use, delta, z in _back(store, first, last, row, 0, kept):
                flat = delta.reshape(-1, use.m)
                to = core.as_strided((use.m, use.j), (use.m_stride, use.j_stride), store.step.column(use))
                if z is None:
                    to += flat.sum(0).unsqueeze(1)
                elif use.j_stride == 1:
                    to.addmm_(flat.T, z.reshape(-1, use.j))
                else:
                    to += flat.T @ z.reshape(-1, use.j)
        return row.squeeze(1)

    @classmethod
    def commit_(cls, window: Sequence[TapedSteps], core: Tensor, experts: Tensor, num_slots: int, ops: Any) -> None:
        """See :meth:`~sparse_rtrl.captured.Captured.commit_`.

        Steps go in blocks, and streams in groups, whose deltas fit into scratch memory of bounded size.
        """
        batch, hidden = core.shape[0], core.shape[1] - 1
        runs = _joined(window)
        per_step = max(1, max(store.step.entries for store, _, _ in runs) * hidden)
        room = max(SCRATCH_BYTES // core.element_size(), core[0].numel() // 2)
        scratch = runs[0][0].step.scratch
        for block in _blocks(runs, max(1, room // per_step)):
            steps = sum(last - first for _, first, last in block)
            streams = max(1, room // (steps * per_step))
            for stream in range(0, batch, streams):
                phi = torch.eye(hidden, dtype=core.dtype, device=core.device)
                phi = phi.expand(min(streams, batch - stream), -1, -1).contiguous()
                kept = scratch.take("deltas", steps * len(phi) * per_step, core)
                found: list[_Found] = []
                for store, first, last in reversed(block):
                    size = (last - first) * len(phi) * store.step.entries * hidden
                    found += [(store.step, *use) for use in _back(store, first, last, phi, stream, kept[:size])]
                    kept = kept[size:]
                _update_(core[stream : stream + len(phi)], phi, stream, found, scratch)

    def state_dict(self) -> dict[str, Any]:
        """Not kept: the window is committed before it is saved.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a window of taped steps cannot be saved: commit it first")


def _joined(window: Sequence[TapedSteps]) -> list[tuple[StepStore, int, int]]:
    """Runs of steps that stand side by side in one store."""
    out: list[tuple[StepStore, int, int]] = []
    for piece in window:
        if out and out[-1][0] is piece.store and out[-1][2] == piece.first:
            out[-1] = (piece.store, out[-1][1], piece.first + piece.count)
        else:
            out.append((piece.store, piece.first, piece.first + piece.count))
    return out


def _blocks(runs: list[tuple[StepStore, int, int]], room: int) -> list[list[tuple[StepStore, int, int]]]:
    """Runs cut into blocks of at most ``room`` steps, of about equal sizes, oldest first."""
    total = sum(last - first for _, first, last in runs)
    size = -(-total // -(-total // room))
    out: list[list[tuple[StepStore, int, int]]] = [[]]
    left = size
    for store, first, last in runs:
        while first < last:
            if left == 0:
                out.append([])
                left = size
            taken = min(left, last - first)
            out[-1].append((store, first, first + taken))
            first, left = first + taken, left - taken
    return out


_Found: TypeAlias = tuple[TapedStep, Use, Tensor, Tensor | None]
"""A kind of step, a use in it, its ``delta (steps, G, τ, m, w)`` and its ``z (steps, B, τ, j)``."""


def _back(
    store: StepStore, first: int, last: int, rows: Tensor, stream: int, deltas: Tensor
) -> list[tuple[Use, Tensor, Tensor | None]]:
    """Take rows ``(G, w, H)`` of the streams from ``stream`` on back through steps of a store, in place.

    Returns:
        For every use its ``delta (steps, G, τ, m, w)``, in the memory of ``deltas``, and ``z (steps, B, τ, j)``.
    """
    step, steps = store.step, last - first
    places, numbers, zs = store.operands(first, last)
    tape = step.tape
    dispatch.rows_back_(
        *(rows, deltas, step.program, places, numbers, None, step.taps, steps),
        *(store.batch_size, stream, tape.rows, tape.before),
    )
    parts, start = {}, 0
    for tap in step.kept:
        shape = torch.Size((steps, rows.shape[0], *tap[1:], rows.shape[1]))
        parts[tap] = deltas[start : start + shape.numel()].view(shape)
        start += shape.numel()
    return [(use, parts[use.row, use.tau, use.m], None if use.z < 0 else zs[use.z]) for use in step.uses]


def _update_(P: Tensor, phi: Tensor, stream: int, found: list[_Found], scratch: _Scratch) -> None:
    """``P[:, :H] <- phi P[:, :H] + sum of delta z``, in place, by tiles of a parameter's columns and streams.

    Args:
        P: influence of the streams from ``stream`` on, ``(G, H + 1, N)``.
        phi: ``(G, H, H)``.
        stream: number of the first one.
        found: what :func:`_back` gave.
        scratch: memory.
    """
    hidden = P.shape[1] - 1
    by_start: dict[int, list[_Found]] = {}
    for each in found:
        by_start.setdefault(each[0].starts[each[1].parameter], []).append(each)
    for first, last in pairwise(sorted({0, P.shape[2], *by_start})):
        uses = by_start.get(first, [])
        width = _tile(uses, last - first, hidden * P.element_size())
        for start in range(first, last, width):
            stop = min(start + width, last)
            for b in range(len(P)):
                old = P[b, :hidden, start:stop]
                new = scratch.take("columns", hidden * (stop - start), P).view(hidden, -1)
                torch.mm(phi[b], old, out=new)
                for use in uses:
                    _add_(new, start, stop, b, stream, use, scratch)
                old.copy_(new)


def _tile(uses: list[_Found], columns: int, bytes_per_column: int) -> int:
    """How many columns of a parameter are moved together: whole rows of its matrix, within bounded scratch."""
    inputs = {use.j for _, use, _, z in uses if z is not None} or {1}
    of_rows = all(
        use.j_stride == 1 and use.m_stride == use.j and use.offset % use.j == 0
        for _, use, _, z in uses
        if z is not None
    )
    if len(inputs) > 1 or not of_rows:
        return columns
    (j,) = inputs
    return min(columns, max(1, TILE_BYTES // (j * bytes_per_column)) * j)


def _add_(new: Tensor, start: int, stop: int, b: int, stream: int, found: _Found, scratch: _Scratch) -> None:
    """Add the immediate Jacobian of one use to the columns ``start ... stop - 1`` of stream ``b``, ``(H, columns)``."""
    step, use, delta, z = found
    hidden, columns = new.shape
    offset = step.column(use)
    # Outputs of the map that lie in the tile; a tile of anything but whole rows has all of them.
    low = max(0, (start - offset) // use.m_stride)
    high = min(use.m, (stop - offset) // use.m_stride) if start > offset or stop < offset + use.m * use.j else use.m
    if high <= low:
        return
    of_stream = delta[:, b, :, low:high].reshape(-1, (high - low) * hidden)  # (T, m w)
    if z is None:
        value = of_stream.sum(0).view(-1, hidden, 1)
    else:
        value = scratch.take("value", (high - low) * hidden * use.j, new).view(-1, use.j)
        torch.mm(of_stream.T, z[:, stream + b].reshape(-1, use.j), out=value)
        value = value.view(-1, hidden, use.j)
    strides = (use.m_stride, columns, use.j_stride)
    new.as_strided(value.shape, strides, offset + low * use.m_stride - start).add_(value)
