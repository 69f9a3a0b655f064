"""The influence of a diagonal cell, exact and about as large as its parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_rtrl.capture.diagonal_structure import differs
from sparse_rtrl.capture.parameter_uses import GraphNode, SegmentGraph, walk
from sparse_rtrl.capture.parameters import RecurrentParameter
from sparse_rtrl.capture.verify import Verifier
from sparse_rtrl.cells.diagonal_cell import DiagonalCell, Projection, observe
from sparse_rtrl.errors import ContractError
from sparse_rtrl.influence.diagonal import RecordedSteps, recorded_steps
from sparse_rtrl.influence.sparse import check_finite
from sparse_rtrl.learners.diagonal_engine import DiagonalEngine, check_inputs, pull_back
from sparse_rtrl.learners.methods.past import check_like, too_late


@dataclass(frozen=True)
class _Run:
    """A run of the cell inside a segment.

    Attributes:
        recorded: copies of what it was run with.
        projections: with their graph.
        values: the tensors of the graph that the copies must agree with.
        first: the state entries that entered, ``(B, *state_shape)``, with their graph.
        last: those that left.
    """

    recorded: RecordedSteps
    projections: tuple[Projection, ...]
    values: list[Tensor]
    first: Tensor
    last: Tensor

    @property
    def is_as_it_ran(self) -> bool:
        """Whether all tensors that the backward pass or the next run needs are unchanged."""
        recorded, batch = self.recorded, len(self.first)
        copies = [*recorded.values, recorded.before[:batch]]
        if recorded.after is not None:
            copies.append(recorded.after[-batch:])
        live = [*self.values, self.first, self.last]
        return all(torch.equal(now.detach(), then) for now, then in zip(live, copies, strict=True))


class Diagonal:
    """What ``Carry`` keeps for a :class:`~sparse_rtrl.DiagonalCell` by the exact method, as a :class:`Past` does it.

    The cell reports every run; closing a segment records its steps as they ran.

    Args:
        cell: the cell.
        commit_every: steps that a window may collect before the influence is updated; ``"auto"`` is 1.
        verifier: says which segments are compared with an ordinary backward pass; none of them without it. A segment
            that went backwards before it was closed is not compared, as its graph is gone.
    """

    name: ClassVar[str] = "diagonal"

    def __init__(self, cell: DiagonalCell, commit_every: int | str = "auto", verifier: Verifier | None = None) -> None:
        self.cell = cell
        self.commit_every = commit_every
        self.verifier = Verifier("never") if verifier is None else verifier
        self.segments = 0
        self.parameters: list[RecurrentParameter] = []
        self.like: Tensor | None = None
        self._engine: DiagonalEngine | None = None
        self._runs: list[_Run] = []
        self._went_backwards = False
        """Whether a loss of the open segment went backwards."""
        observe(cell, self._note)

    def __getstate__(self) -> dict[str, Any]:
        # An open segment stays behind: its graph cannot be copied.
        return {**vars(self), "_runs": [], "_went_backwards": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        observe(self.cell, self._note)

    def _note(self, projections: tuple[Projection, ...], values: list[Tensor], states: list[Tensor]) -> None:
        first, last = states[0], states[-1]
        if not torch.is_grad_enabled() or not first.requires_grad:
            return
        if self._runs and not _goes_on(self._runs[-1].last, first):
            self._runs = []  # of a stream that was left, or a segment of another Carry
        with torch.no_grad():
            kept = [first.clone(), *states[1:-1], last.clone()]
        self._runs.append(_Run(recorded_steps(projections, values, kept, 0), projections, values, first, last))

    def _entries(self, flat: Tensor) -> Tensor:
        """State entries ``(B, *state_shape)`` at the front of a flat state ``(B, H)``."""
        parts = 2 if self.cell.complex_state else 1
        size = parts * self.cell.hidden_size
        entries = flat[:, :size].reshape(len(flat), *self.cell.state_shape, *[2] * (parts - 1))
        return torch.view_as_complex(entries.contiguous()) if parts == 2 else entries

    def _engine_for(self, end: Tensor, selected: list[RecurrentParameter]) -> DiagonalEngine:
        """The engine for a flat state ``(B, H)``."""
        check_like(self.like, end)
        if self._engine is None:
            self._engine = DiagonalEngine(self.cell, len(end))
            self._engine.influence.commit_every = self._window
            self.like = end.new_empty(*end.shape, 0)
        self.parameters = selected
        return self._engine

    @property
    def _window(self) -> int:
        return 1 if self.commit_every == "auto" else int(self.commit_every)

    def begin(self, end: Tensor, graph: SegmentGraph, selected: list[RecurrentParameter]) -> None:
        """Start streams from a state that has a graph: the initial state of the cell.

        Args:
            end: the state, ``(B, H)``, with its graph.
            graph: all of its graph.
            selected: parameters that may be carried.

        Raises:
            ContractError: if a stream's state depends on parameters otherwise than ``initial_entries`` does.
            ValueError: if the batch size, dtype or device changed.
        """
        check_finite(self.segments, {"the state": end})
        engine = self._engine_for(end, selected)
        engine.admit_initial()
        engine.influence.begin(self._started(end, None, torch.ones(len(end), dtype=torch.bool, device=end.device)))
        self._runs, self._went_backwards = [], False

    def close(self, end: Tensor, entry: Tensor, graph: SegmentGraph, selected: list[RecurrentParameter]) -> None:
        """See :meth:`Past.close`; the graph is not needed.

        Raises:
            RuntimeError: if the state was changed between runs of the cell, or a parameter since.
            ContractError: if the cell breaks its contract, if there is a hook on a state, or if a stream starts anew
                from a state that depends on parameters otherwise than ``initial_entries`` does.
            DisagreementError: see :class:`~sparse_rtrl.capture.verify.Verifier`.
            ValueError: if the batch size, dtype or device changed.
        """
        check_like(self.like, end)
        check_finite(self.segments, {"the state": end})
        cut = self._check_runs(end, entry)
        engine = self._engine_for(end, selected)
        engine.check_parameters()
        runs, parts, number = self._runs, [], engine.steps
        for run in runs:
            check_inputs(run.projections, entry.grad_fn)
            parts.append(replace(run.recorded, number=number))
            number += run.recorded.steps
        for run in runs:
            engine.admit(run.projections)
        if self.verifier.due() and not self._went_backwards:
            engine.verify(self.verifier, parts, runs[-1].projections, runs[0].first, runs[-1].last)
        if bool(cut.any()):
            started = self._started(runs[0].first, entry.grad_fn, cut)
            engine.influence.reset(cut)
            engine.influence.begin(started)
        if engine.influence.is_full:
            engine.influence.commit()
        engine.influence.record(parts)
        engine.steps = number
        self._runs, self._went_backwards = [], False
        self.segments += 1

    def _check_runs(self, end: Tensor, entry: Tensor) -> Tensor:
        """Check that each run of the segment starts where the one before it ended.

        Returns:
            Streams ``(B,)`` bool that do not go on from ``entry``, but were started anew.
        """
        runs = self._runs
        if not runs:
            raise _changed()
        if not all(run.is_as_it_ran for run in runs):
            raise RuntimeError(
                "a parameter changed before carry was called, or an input or a state was written to: call h = carry(h)"
                " right after the forward pass, before the optimizer's step"
            )
        if any(tensor._backward_hooks for run in runs for tensor in (run.first, run.last)):
            raise ContractError(
                ["a gradient hook on the state is no part of the influence: remove it, or hook the loss"]
            )
        cut = self._link(entry, runs[0].first, runs[0].first, of_entry=True)
        links = [(a.last, b.first, b.first) for a, b in pairwise(runs)]
        for source, target, entries in [*links, (runs[-1].last, end, self._entries(end))]:
            if target is not source and bool(self._link(source, target, entries).any()):
                raise RuntimeError(
                    "streams were started anew inside a segment: do it right after h = carry(h), before the next step"
                )
        return cut

    def _link(self, source: Tensor, target: Tensor, entries: Tensor, of_entry: bool = False) -> Tensor:
        """Check that a state is handed on as it is, and its gradient back.

        Args:
            source: the state that is handed on.
            target: what comes out.
            entries: the entries of ``target``, ``(B, *state_shape)``.
            of_entry: whether ``source`` is a flat state, not entries.

        Returns:
            Streams ``(B,)`` bool for which nothing of ``source`` is in ``target``.

        Raises:
            RuntimeError: for other streams whose state or gradient was changed on the way.
        """
        before = self._entries(source.detach()) if of_entry else source.detach()
        cut = torch.zeros(len(before), dtype=torch.bool, device=before.device)
        if not _is_passed_on(target, source):
            v = _random_like(before)
            (u,) = torch.autograd.grad(entries, source, v, retain_graph=True, allow_unused=True)
            u = torch.zeros_like(v) if u is None else self._entries(u) if of_entry else u
            cut = ~u.flatten(1).abs().amax(1).bool()
            if differs(u[~cut], v[~cut]):
                raise _changed()
            leaves = _leaves(entries, source.grad_fn)
            kept = v * ~cut.view(-1, *[1] * (v.dim() - 1))
            found = torch.autograd.grad(entries, leaves, kept, retain_graph=True, allow_unused=True) if leaves else ()
            if any(g is not None and bool(g.any()) for g in found):
                raise _changed()
        if not torch.equal(before[~cut], entries.detach()[~cut]):
            raise _changed()
        return cut

    def _started(self, state: Tensor, past: GraphNode, streams: Tensor) -> Tensor:
        """Streams that start from the initial entries with their graph, among those that start from ``state``.

        The others start from a state without a graph.

        Args:
            state: entries ``(B, *state_shape)``, or a flat state ``(B, H)``, with its graph.
            past: the node of the graph where the past begins, if there is one.
            streams: those that start, ``(B,)`` bool.

        Raises:
            ContractError: if one depends on trainable tensors otherwise than initial entries do.
        """
        engine = self._engine
        assert engine is not None
        none = torch.zeros_like(streams)
        leaves = _leaves(state, past)
        if not leaves:
            return none
        initial = engine.initial_entries()
        own = [] if initial is None else _leaves(initial, None)
        leaves += [leaf for leaf in own if not any(leaf is known for known in leaves)]
        v = _random_like(state.detach())

        def gradients(some: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            w = v * some.view(-1, *[1] * (v.dim() - 1))
            found = torch.autograd.grad(state, leaves, w, retain_graph=True, allow_unused=True)
            if initial is None:
                of_initial: tuple[Tensor | None, ...] = (None,) * len(leaves)
            else:
                w = w if w.shape == initial.shape and w.dtype == initial.dtype else self._entries(w)
                of_initial = torch.autograd.grad(initial, leaves, w, retain_graph=True, allow_unused=True)
            filled = [
                [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(each, leaves, strict=True)]
                for each in (found, of_initial)
            ]
            return filled[0], filled[1]

        def agree(found: list[Tensor], expected: list[Tensor]) -> bool:
            return not any(differs(a, b) for a, b in zip(found, expected, strict=True))

        if initial is not None and agree(*gradients(streams)):
            return streams
        started = none.clone()
        for stream in streams.nonzero().flatten().tolist():
            one = none.clone()
            one[stream] = True
            found, expected = gradients(one)
            if not any(bool(g.any()) for g in found):
                continue
            if not agree(found, expected):
                names = {id(p): name for name, p in self.cell.named_parameters()}
                what = [names.get(id(leaf), f"a tensor of shape {tuple(leaf.shape)}") for leaf in leaves]
                raise ContractError(
                    [
                        f"the state that stream {stream} starts from depends on {', '.join(what)} otherwise than"
                        " initial_entries of the cell does: start from cell.initial_state(batch_size), or from a state"
                        " without a graph, and call h = carry(h0) before the first step"
                    ]
                )
            started[stream] = True
        return started

    def gradients(self, index: int, u: Tensor) -> dict[str, Tensor]:
        """See :meth:`Past.gradients`."""
        self._went_backwards |= index == self.segments
        engine = self._engine
        if engine is None:
            return {}
        position = index - (self.segments - len(engine.influence.window))
        if position < 0 and index == self.segments - 1:
            raise RuntimeError(
                "the influence has moved past this segment with a loss of it that went back before this one: call"
                " backward with retain_graph=True for all losses of a segment but the last, or add them up"
            )
        if position < 0:
            raise too_late()
        found = engine.past_gradients(position, self._entries(u), index)
        trainable = [p for p in self.parameters if p.trainable]
        gradients = pull_back(engine.current_tensors(), found, [p.tensor for p in trainable])  # type: ignore[misc]
        return {p.name: _as_pairs(g) for p, g in zip(trainable, gradients, strict=True) if g is not None}

    def reset(self, streams: Tensor) -> None:
        """See :meth:`Past.reset`."""
        self._runs, self._went_backwards = [], False
        if self._engine is not None:
            self._engine.influence.reset(streams)

    def influence(self) -> dict[str, Tensor]:
        """See :meth:`Past.influence`; dense, ``(B, H, *shape)`` with ``H`` the entries, complex ones as such.

        That of a complex parameter comes as pairs of real numbers, ``(B, H, *shape, 2)``.
        """
        if self._engine is None:
            return {}
        found = {}
        for name, P in self._engine.dense_influence().items():
            flat = P.flatten(1, len(self.cell.state_shape))
            found[name] = _as_pairs(flat) if self.cell.get_parameter(name).is_complex() else flat
        return found

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
            "verifier": self.verifier.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], selected: list[RecurrentParameter]) -> None:
        """See :meth:`Past.load_state_dict`.

        Raises:
            ValueError: also if it is of another size or dtype of the state; nothing is changed then.
        """
        if state["method"] != self.name:
            raise ValueError(f"state must be of method {self.name!r}, got {state['method']!r}")
        engine, like = None, state["like"]
        if like is not None:
            zeros = self.cell.zero_rows(1)
            size = self.cell.hidden_size * (2 if self.cell.complex_state else 1)
            size += self.cell.input_size if self.cell.previous_input else 0
            if like.shape[1] != size or like.dtype != zeros.dtype:
                raise ValueError(
                    f"state is of another cell or dtype: (B, H) = {tuple(like.shape[:2])} of {like.dtype}, but H is"
                    f" {size} of {zeros.dtype} here"
                )
            engine = DiagonalEngine(self.cell, len(like))
            engine.influence.load_state_dict(state["kept"])
            engine.influence.commit_every = self._window
            like = like.to(zeros.device, copy=True)
        self._engine, self.like, self.parameters = engine, like, [] if engine is None else selected
        if "verifier" in state:  # older versions have none
            self.verifier.load_state_dict(state["verifier"])
        self._runs, self._went_backwards = [], False
        self.segments = state["segments"]


_PASSED_ON = frozenset(
    f"{name}Backward0"
    for name in ("View", "UnsafeView", "ReshapeAlias", "Slice", "Alias", "Clone", "ViewAsComplex", "ViewAsReal", "Cat")
)
"""Nodes that hand a state on, or one part of a flat state, as it is."""


def _is_passed_on(target: Tensor, source: Tensor) -> bool:
    """Whether only views and copies that leave everything in its place lie between two tensors of a graph."""
    node: GraphNode = target.grad_fn
    while node is not source.grad_fn:
        sources = [] if node is None else [s for s, _ in node.next_functions if s is not None]
        identity = node is not None and node.name() == "PermuteBackward0" and _is_identity(node._saved_dims)
        if len(sources) != 1 or not (identity or node.name() in _PASSED_ON):  # type: ignore[union-attr]
            return False
        node = sources[0]
    return True


def _as_pairs(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _is_identity(dims: tuple[int, ...]) -> bool:
    return list(dims) == list(range(len(dims)))


def _goes_on(last: Tensor, first: Tensor) -> bool:
    """Whether a run that starts from ``first`` goes on from the state that another one left."""
    return first is last or last.grad_fn in walk(first, last.grad_fn).consumers


def _leaves(tensor: Tensor, past: GraphNode) -> list[Tensor]:
    """The trainable leaves in a tensor's graph, as far as the node where the past begins."""
    return [variable for variable, _ in walk(tensor, past).accumulators.values()]


def _random_like(tensor: Tensor) -> Tensor:
    drawn = torch.randn(tensor.shape, dtype=tensor.dtype, device="cpu", generator=torch.Generator().manual_seed(0))
    return drawn.to(tensor.device)


def _changed() -> RuntimeError:
    return RuntimeError(
        "the state that carry got is not what the cell made of the one that carry returned last: hand it on as it is,"
        " and start streams anew right after h = carry(h)"
    )
