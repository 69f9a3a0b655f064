"""What every way to keep the past does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_rtrl.graph_capture import GraphCapture
from sparse_rtrl.influence import check_finite
from sparse_rtrl.jacobian import Factors
from sparse_rtrl.parameter_uses import SegmentGraph
from sparse_rtrl.parameters import RecurrentParameter


class Past(ABC):
    """What is kept of the past of a module, and answers with the gradient that goes through it.

    Segments are numbered; :meth:`close` captures one, :meth:`gradients` continues a backward pass that has reached the
    state which entered one.

    Args:
        commit_every: segments between two updates of the influence, for the methods that can wait.
        generator: source of random numbers, for the methods that draw some; None for torch's default one.
    """

    name: ClassVar[str]

    def __init__(self, commit_every: int | str = "auto", generator: torch.Generator | None = None) -> None:
        self.commit_every = commit_every
        self.generator = generator
        self.segments = 0
        self.parameters: list[RecurrentParameter] = []
        """What is carried; parameters join when they first reach the state."""
        self.like: Tensor | None = None
        """An empty tensor ``(B, H, 0)``: sizes, dtype and device of what is kept; None before there is any."""
        self._capture = GraphCapture([], [])

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
        check_like(self.like, end)
        known = {p.name for p in self.parameters}
        reached = {p.name for p in selected if id(p.tensor) in graph.accumulators}
        if self.like is None or not reached <= known:
            self._admit([p for p in selected if p.name in reached | known], end)
        self._close(end, entry, graph)
        self.segments += 1

    def _admit(self, parameters: list[RecurrentParameter], end: Tensor) -> None:
        """Carry these parameters from now on; those that are new have no influence yet."""
        placed: list[RecurrentParameter] = []
        for parameter in parameters:
            placed.append(replace(parameter, start=placed[-1].columns.stop if placed else 0))
        self._allocate(placed, end)
        self.parameters = placed
        self.like = end.new_empty(*end.shape, 0)
        self._capture = GraphCapture([p.name for p in placed], [p.start for p in placed], self._capture.noted)

    @abstractmethod
    def _allocate(self, parameters: list[RecurrentParameter], end: Tensor) -> None:
        """Make room for the influence of ``parameters``, taking over that of ``self.parameters``."""

    def _jacobians(
        self, end: Tensor, entry: Tensor, graph: SegmentGraph, cotangents: Tensor | None = None
    ) -> tuple[Tensor, Factors]:
        """State Jacobian ``(B, n, H)`` and immediate Jacobians of a segment, checked."""
        J, factors = self._capture.segment(end, entry, [p.tensor for p in self.parameters], graph, cotangents)
        values = {"the state": end, "the state Jacobian": J, "the immediate Jacobian": factors.delta}
        check_finite(self.segments, values)
        return J, factors

    @abstractmethod
    def _close(self, end: Tensor, entry: Tensor, graph: SegmentGraph) -> None:
        """Capture a segment of the parameters that are carried."""

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
            "method": self.name,
            "segments": self.segments,
            "names": [p.name for p in self.parameters],
            "like": None if like is None else like.clone(),
            "kept": None if like is None else self._save(),
        }

    def load_state_dict(self, state: dict[str, Any], selected: list[RecurrentParameter]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of another method or of other parameters; nothing is changed then.
        """
        if state["method"] != self.name:
            raise ValueError(f"state must be of method {self.name!r}, got {state['method']!r}")
        by_name = {p.name: p for p in selected}
        unknown = [name for name in state["names"] if name not in by_name]
        if unknown:
            raise ValueError(f"state holds the influence of {unknown}, which the module does not have or not carry")
        like = state["like"]
        if like is not None:
            self.parameters = []
            self.like = None
            self._forget()
            self._admit([by_name[name] for name in state["names"]], like.new_zeros(like.shape[:2]))
            self._load(state["kept"])
        self.segments = state["segments"]

    @abstractmethod
    def _forget(self) -> None:
        """Drop everything that is kept."""

    @abstractmethod
    def _save(self) -> Any:
        """What is kept, for :meth:`state_dict`."""

    @abstractmethod
    def _load(self, kept: Any) -> None:
        """Restore what :meth:`_save` returned, for the same parameters."""


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
        " carry(h) or reset, or raise commit_every"
    )
