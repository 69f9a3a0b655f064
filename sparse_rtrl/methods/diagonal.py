"""The influence of a diagonal cell, exact and about as large as its parameters."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_rtrl.diagonal_cell import DiagonalCell, observe
from sparse_rtrl.diagonal_engine import DiagonalEngine
from sparse_rtrl.influence import check_finite
from sparse_rtrl.methods.past import check_like, too_late
from sparse_rtrl.parameter_uses import SegmentGraph
from sparse_rtrl.parameters import RecurrentParameter
from sparse_rtrl.verify import Verifier


class Diagonal:
    """What ``Carry`` keeps for a :class:`~sparse_rtrl.DiagonalCell` by the exact method, as a :class:`Past` does it.

    The cell tells of every run; closing a segment captures its steps from their inputs and states.

    Args:
        cell: the cell.
        commit_every: steps that a window may collect before the influence is updated; ``"auto"`` is 1.
    """

    name: ClassVar[str] = "diagonal"

    def __init__(self, cell: DiagonalCell, commit_every: int | str = "auto", verifier: Verifier | None = None) -> None:
        self.cell = cell
        self.commit_every = commit_every
        self.segments = 0
        self.parameters: list[RecurrentParameter] = []
        self.like: Tensor | None = None
        self._engine: DiagonalEngine | None = None
        self._runs: list[tuple[Tensor, list[Tensor], list[int]]] = []
        self._restarted: Tensor | None = None
        observe(cell, self._note)

    def _note(self, rows: Tensor, states: list[Tensor]) -> None:
        if torch.is_grad_enabled() and states[0].requires_grad:
            versions = [p._version for p in self.cell.parameters()]
            if self._runs and not torch.equal(self._runs[-1][1][-1], states[0]):
                self._runs = []  # of a stream that was left
            self._runs.append((rows.detach().clone(), [state.detach() for state in states], versions))

    def _entries(self, flat: Tensor) -> Tensor:
        """State entries ``(B, *state_shape)`` at the front of a flat state ``(B, H)``."""
        like = self.cell.initial_entries(1)
        parts = 2 if like.is_complex() else 1
        entries = flat[:, : parts * like[0].numel()].reshape(len(flat), *like.shape[1:], *[2] * (parts - 1))
        return torch.view_as_complex(entries.contiguous()) if parts == 2 else entries

    def close(self, end: Tensor, entry: Tensor, graph: SegmentGraph, selected: list[RecurrentParameter]) -> None:
        """See :meth:`Past.close`; the graph is not needed.

        Raises:
            RuntimeError: if the state was changed between runs of the cell, or a parameter since.
            ValueError: if the batch size, dtype or device changed.
        """
        check_like(self.like, end)
        check_finite(self.segments, {"the state": end})
        runs = self._chain(self._entries(entry.detach()), self._entries(end.detach()))
        if self._engine is None:
            self._engine = DiagonalEngine(self.cell, len(end))
            self._engine.influence.commit_every = 1 if self.commit_every == "auto" else int(self.commit_every)
            self.like = end.new_empty(*end.shape, 0)
        self.parameters = selected
        states = [runs[0][1][0], *(state for _, states, _ in runs for state in states[1:])]
        engine = self._engine
        with torch.enable_grad():
            projections, values = self.cell.projected(torch.cat([rows for rows, _, _ in runs]))
        engine.admit(projections)
        if engine.influence.is_full:
            engine.influence.commit()
        engine.influence.record(projections, values, states, engine.steps)
        engine.steps += len(states) - 1
        self._runs, self._restarted = [], None
        self.segments += 1

    def _chain(self, entry: Tensor, end: Tensor) -> list[tuple[Tensor, list[Tensor], list[int]]]:
        """The runs of the segment, checked: each starts where the one before it ended."""
        runs = self._runs
        if runs and self._restarted is not None:
            restarted = self._restarted.view(-1, *[1] * (entry.dim() - 1))
            entry = torch.where(restarted, runs[0][1][0], entry)
        if not runs or not torch.equal(runs[0][1][0], entry) or not torch.equal(runs[-1][1][-1], end):
            raise RuntimeError(
                "the state that carry got is not what the cell made of the one that carry returned last: hand it on as"
                " it is, and start streams anew with carry.reset(mask) between segments"
            )
        if runs[0][2] != [p._version for p in self.cell.parameters()]:
            raise RuntimeError(
                "a parameter changed before carry was called: call h = carry(h) right after the forward pass, before"
                " the optimizer's step"
            )
        return runs

    def gradients(self, index: int, u: Tensor) -> dict[str, Tensor]:
        """See :meth:`Past.gradients`."""
        engine = self._engine
        if engine is None:
            return {}
        position = index - (self.segments - len(engine.influence.window))
        if position < 0:
            raise too_late()
        found = engine.past_gradients(position, self._entries(u), index)
        with torch.enable_grad():
            tensors = [t for projection in self.cell.projected(self.cell.zero_rows(1))[0] for t in projection.tensors]
        pairs = [(t, g) for t, g in zip(tensors, found, strict=True) if g is not None and t.requires_grad]
        trainable = [p for p in self.parameters if p.trainable]
        gradients = torch.autograd.grad(
            [t for t, _ in pairs], [p.tensor for p in trainable], [g for _, g in pairs], allow_unused=True
        )
        return {p.name: g for p, g in zip(trainable, gradients, strict=True) if g is not None}

    def reset(self, streams: Tensor) -> None:
        """See :meth:`Past.reset`."""
        self._runs = []
        self._restarted = streams if self._restarted is None else streams | self._restarted
        if self._engine is not None:
            self._engine.influence.reset(streams)

    def influence(self) -> dict[str, Tensor]:
        """See :meth:`Past.influence`; dense, ``(B, H, *shape)`` with ``H`` the entries, complex ones as such."""
        if self._engine is None:
            return {}
        lead = 1 + len(self.cell.state_shape)
        return {n: P.flatten(1, lead - 1) for n, P in self._engine.dense_influence().items()}

    def kept_bytes(self) -> int:
        """See :meth:`Past.kept_bytes`."""
        return 0 if self._engine is None else self._engine.influence.kept_bytes

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Past.state_dict`."""
        like = self.like
        return {
            "method": self.name,
            "segments": self.segments,
            "like": None if like is None else like.clone(),
            "kept": None if self._engine is None else self._engine.influence.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], selected: list[RecurrentParameter]) -> None:
        """See :meth:`Past.load_state_dict`."""
        if state["method"] != self.name:
            raise ValueError(f"state must be of method {self.name!r}, got {state['method']!r}")
        if state["like"] is not None:
            engine = DiagonalEngine(self.cell, len(state["like"]))
            engine.influence.load_state_dict(state["kept"])
            engine.influence.commit_every = 1 if self.commit_every == "auto" else int(self.commit_every)
            self._engine, self.like, self.parameters = engine, state["like"].clone(), selected
        self._runs, self._restarted = [], None
        self.segments = state["segments"]
