"""What every way to keep the past does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_rtrl.capture.graph_capture import GraphCapture
from sparse_rtrl.capture.parameter_uses import SegmentGraph, without_hooks, without_reducers
from sparse_rtrl.capture.parameters import RecurrentParameter
from sparse_rtrl.capture.segment import Factors
from sparse_rtrl.capture.verify import OTHER_STREAMS, SQUARING, STATE, Verifier, tolerance_of
from sparse_rtrl.influence.sparse import check_finite


class Past(ABC):
    """What is kept of the past of a module, and answers with the gradient that goes through it.

    Segments are numbered; :meth:`close` captures one, :meth:`gradients` continues a backward pass that has reached the
    state which entered one.

    Args:
        commit_every: segments between two updates of the influence, for the methods that can wait.
        generator: source of random numbers, for the methods that draw some; None for torch's default one.
        verifier: which segments are compared with an ordinary backward pass; None for none.
        dense: whether every immediate Jacobian is captured densely.
    """

    name: ClassVar[str]

    def __init__(
        self,
        commit_every: int | str = "auto",
        generator: torch.Generator | None = None,
        verifier: Verifier | None = None,
        dense: bool = False,
    ) -> None:
        self.commit_every = commit_every
        self.generator = generator
        self.verifier = Verifier("never") if verifier is None else verifier
        self.dense = dense
        self.segments = 0
        self.parameters: list[RecurrentParameter] = []
        """What is carried; parameters join when they first reach the state."""
        self.like: Tensor | None = None
        """An empty tensor ``(B, H, 0)``: sizes, dtype and device of what is kept; None before there is any."""
        self._capture = GraphCapture([], [], dense=dense)

    def begin(self, end: Tensor, graph: SegmentGraph, selected: list[RecurrentParameter]) -> None:
        """Capture a state that starts streams with a graph: a segment from nowhere, ``J = 0`` and ``F = dh/dθ``.

        Args:
            end: the state, ``(B, H)``, with its graph.
            graph: the graph behind it.
            selected: parameters that may be carried.

        Raises:
            ContractError, MemoryError, NonFiniteError: as :meth:`close`.
        """
        self._capture_segment(end, None, graph, selected)

    def close(self, end: Tensor, entry: Tensor, graph: SegmentGraph, selected: list[RecurrentParameter]) -> None:
        """Capture a segment.

        Args:
            end: state that left it, ``(B, H)``, with its graph.
            entry: state that entered it, ``(B, H)``.
            graph: the graph between them.
            selected: parameters that may be carried.

        Raises:
            ContractError: if the streams influence each other.
            MemoryError: if what must be kept does not fit into memory.
            NonFiniteError: if the state or a Jacobian is not finite.
        """
        self._capture_segment(end, entry, graph, selected)

    def _capture_segment(
        self, end: Tensor, entry: Tensor | None, graph: SegmentGraph, selected: list[RecurrentParameter]
    ) -> None:
        self._make_room({p.name for p in selected if id(p.tensor) in graph.accumulators}, end, selected)
        self._close(end, entry, graph)
        self.segments += 1

    def _make_room(self, reached: set[str], end: Tensor, selected: list[RecurrentParameter]) -> None:
        """Carry the parameters that reach the state ``end (B, H)``, by name, beside those that are carried already."""
        check_like(self.like, end)
        known = {p.name for p in self.parameters}
        if self.like is None or not reached <= known:
            self._admit([p for p in selected if p.name in reached | known], end)

    def _admit(self, parameters: list[RecurrentParameter], end: Tensor) -> None:
        """Carry these parameters from now on; those that are new have no influence yet."""
        placed: list[RecurrentParameter] = []
        for parameter in parameters:
            placed.append(replace(parameter, start=placed[-1].columns.stop if placed else 0))
        self._allocate(placed, end)
        self.parameters = placed
        self.like = end.new_empty(*end.shape, 0)
        starts = [p.start for p in placed]
        self._capture = GraphCapture([p.name for p in placed], starts, self._capture.noted, self.dense)

    @abstractmethod
    def _allocate(self, parameters: list[RecurrentParameter], end: Tensor) -> None:
        """Make room for the influence of ``parameters``, taking over that of ``self.parameters``."""

    def _jacobians(
        self, end: Tensor, entry: Tensor | None, graph: SegmentGraph, cotangents: Tensor | None = None
    ) -> tuple[Tensor, Factors]:
        """State Jacobian ``(B, n, H)`` and immediate Jacobians of a segment, checked."""
        J, factors = self._capture.segment(end, entry, [p.tensor for p in self.parameters], graph, cotangents)
        values = {"the state": end, "the state Jacobian": J, "the immediate Jacobian": factors.delta}
        check_finite(self.segments, values)
        if self.verifier.due():
            # With given cotangents the rows are combinations of entries, and so is what is sent back.
            like = end if cotangents is None else end.detach()[:, : len(cotangents)]
            stream, c = self.verifier.cotangent(like)
            back = c if cotangents is None else torch.einsum("bn,nbh->bh", c, cotangents)
            self._verify(end, entry, graph, stream, back, *_products(J, factors, c, self.parameters))
        return J, factors

    def _verify(
        self,
        end: Tensor,
        entry: Tensor | None,
        graph: SegmentGraph,
        stream: int,
        cotangent: Tensor,
        u: Tensor,
        direct: Tensor,
    ) -> None:
        """Compare what was captured of a segment with one ordinary backward pass.

        Args:
            end: state that left the segment, ``(B, H)``, with its graph.
            entry: state that entered it, or None.
            graph: the graph between them.
            stream: the one stream that ``cotangent`` is for.
            cotangent: what is sent back, ``(B, H)``.
            u: what the captured Jacobians make of it at the entry, ``(B, H)``.
            direct: the gradient of the parameters that they give at fixed entry state, ``(|θ|,)``.

        Raises:
            DisagreementError: if they differ by more than rounding.
        """
        tensors = [(p, p.tensor) for p in self.parameters]
        tensors = [(p, t) for p, t in tensors if t.requires_grad]
        inputs = [*([] if entry is None else [entry]), *(t for _, t in tensors)]
        with without_hooks([t for _, t in tensors]), without_reducers(graph):
            truth = list(torch.autograd.grad(end, inputs, cotangent, retain_graph=True, allow_unused=True))
        found: dict[str, Tensor] = {}
        expected: dict[str, Tensor | None] = {}
        if entry is not None:
            own = torch.zeros(len(end), 1, dtype=torch.bool, device=end.device)
            own[stream] = True
            back = truth.pop(0)
            back = torch.zeros_like(u) if back is None else back
            found[STATE], expected[STATE] = u[stream], back[stream]
            found[OTHER_STREAMS], expected[OTHER_STREAMS] = torch.zeros_like(u), back.masked_fill(own, 0)
        for (p, _), g in zip(tensors, truth, strict=True):
            found[p.name] = direct[p.columns].view(p.shape)
            expected[p.name] = torch.view_as_real(g.resolve_conj()) if g is not None and g.is_complex() else g
        dtypes = {end.dtype, *graph.floating_dtypes()}
        squaring = graph.has(SQUARING)
        tolerance = max(tolerance_of(dtype, squaring) for dtype in dtypes)
        self.verifier.compare(self.segments, stream, found, expected, tolerance, _REASONS)

    @abstractmethod
    def _close(self, end: Tensor, entry: Tensor | None, graph: SegmentGraph) -> None:
        """Capture a segment of the parameters that are carried; ``entry`` is None for one from nowhere."""

    @abstractmethod
    def gradients(self, index: int, u: Tensor) -> dict[str, Tensor]:
        """Gradients through the past before segment ``index``, for ``u = dL/dh`` at its entry, ``(B, H)``, by name.

        Raises:
            RuntimeError: if that segment is no longer kept.
            NonFiniteError: if ``u`` is not finite.
        """

    @abstractmethod
    def reset(self, streams: Tensor) -> None:
        """Forget the past of the streams in ``streams (B,)`` bool."""

    @abstractmethod
    def influence(self) -> dict[str, Tensor]:
        """The influence ``dh/dθ`` that the method stands for, ``(B, H, *shape)`` by name, up to date."""

    @abstractmethod
    def kept_bytes(self) -> int:
        """Bytes that are kept between segments."""

    def state_dict(self) -> dict[str, Any]:
        """What is kept, up to date."""
        like = self.like
        return {
            "verifier": self.verifier.state_dict(),
            "method": self.name,
            "segments": self.segments,
            "names": [p.name for p in self.parameters],
            "shapes": [tuple(p.shape) for p in self.parameters],
            "like": None if like is None else like.clone(),
            "kept": None if like is None else self._save(),
        }

    def load_state_dict(self, state: dict[str, Any], selected: list[RecurrentParameter]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of another method or of other parameters; nothing is changed then.
        """
        missing = {"method", "segments", "names", "like", "kept"} - set(state)
        if missing:
            raise ValueError(f"state lacks {sorted(missing)}")
        if state["method"] != self.name:
            raise ValueError(f"state must be of method {self.name!r}, got {state['method']!r}")
        by_name = {p.name: p for p in selected}
        unknown = [name for name in state["names"] if name not in by_name]
        if unknown:
            raise ValueError(f"state holds the influence of {unknown}, which the module does not have or not carry")
        shapes = state.get("shapes", [tuple(by_name[name].shape) for name in state["names"]])
        for name, shape in zip(state["names"], shapes, strict=True):
            if tuple(by_name[name].shape) != tuple(shape):
                raise ValueError(
                    f"state holds the influence of {name} of shape {tuple(shape)}, the module's has"
                    f" {tuple(by_name[name].shape)}"
                )
        before = dict(vars(self))
        try:
            self._restore(state, by_name)
        except Exception:
            vars(self).clear()
            vars(self).update(before)
            raise

    def _restore(self, state: dict[str, Any], by_name: dict[str, RecurrentParameter]) -> None:
        """Replace everything by a saved state; what was kept before is released, not overwritten."""
        like = state["like"]
        self.parameters = []
        self.like = None
        self._forget()
        if like is not None:
            self._admit([by_name[name] for name in state["names"]], like.new_zeros(like.shape[:2]))
            self._load(state["kept"])
        self.segments = state["segments"]
        if "verifier" in state:
            self.verifier.load_state_dict(state["verifier"])

    @abstractmethod
    def _forget(self) -> None:
        """Drop everything that is kept."""

    @abstractmethod
    def _save(self) -> Any:
        """What is kept, for :meth:`state_dict`."""

    @abstractmethod
    def _load(self, kept: Any) -> None:
        """Restore what :meth:`_save` returned, for the same parameters."""


_REASONS = (
    "Likely reasons: a hook or custom backward pass that changes gradients, streams that influence each other, a"
    " parameter or state that changed after the forward pass, or an operation that is captured wrongly. Nothing was"
    " recorded. Carry(..., capture='dense') captures every parameter by ordinary backward passes (exact for streams"
    " that are independent, slower); Carry(..., exclude=[...]) leaves parameters out"
)


def _products(J: Tensor, factors: Factors, c: Tensor, parameters: list[RecurrentParameter]) -> tuple[Tensor, Tensor]:
    """``c J (B, H)`` and ``c F`` summed over the streams ``(|θ|,)``, for coefficients ``c (B, n)`` of the rows."""
    direct = c.new_zeros(parameters[-1].columns.stop if parameters else 0)
    rows = torch.bmm(c.unsqueeze(1), factors.delta).squeeze(1)
    for term in factors.terms:
        delta = rows[:, term.delta_slice]
        value = delta.sum(0) if term.z is None else (delta.reshape(-1, term.m).T @ term.z.flatten(0, 1)).flatten()
        direct[term.offset : term.offset + value.numel()] += value
    return torch.bmm(c.unsqueeze(1), J).squeeze(1), direct


def check_like(like: Tensor | None, end: Tensor) -> None:
    """Refuse a state ``end (B, H)`` that differs from those before, ``like (B, H, 0)``.

    Raises:
        ValueError: with both.
    """
    if like is not None and (like.shape[:2] != end.shape or like.dtype != end.dtype or like.device != end.device):
        raise ValueError(
            f"state must keep its size, dtype and device, (B, H) = {tuple(like.shape[:2])}, {like.dtype} on"
            f" {like.device}; got {tuple(end.shape)}, {end.dtype} on {end.device}. For other streams make a new Carry"
        )


def too_late() -> RuntimeError:
    """The error of a backward pass that reaches a segment which is no longer kept."""
    return RuntimeError(
        "backward came too late: the influence has moved past this segment. Call backward before the next"
        " carry(h) or reset; a larger commit_every only moves the point from which it is too late"
    )
