"""Exact gradients through the whole past for any recurrent module, by changing the line that detaches its state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_rtrl.chain_capture import ChainCapture
from sparse_rtrl.entry import EnterSegment
from sparse_rtrl.estimate import check_memory
from sparse_rtrl.graph_capture import GraphCapture, SegmentGraph, walk
from sparse_rtrl.influence import Influence, check_finite
from sparse_rtrl.jacobian import Factors, StepJacobian
from sparse_rtrl.parameters import ParameterGroups, RecurrentParameter
from sparse_rtrl.slot_cell import Routing
from sparse_rtrl.step_chain import StepChain

MAX_WINDOW_STEPS = 64
"""Most maps of one parameter that ``commit_every="auto"`` lets a window collect."""

COMMIT_SECONDS, PULL_BACK_SECONDS, FLOPS = 5e-4, 2e-5, 1e11
"""What ``commit_every="auto"`` assumes of commits and of steps of a pull-back, beside arithmetic at that rate."""


class _Entry:
    """The state that enters a segment: receives ``dL/dh_entry`` in the backward pass and answers with gradients."""

    def __init__(self, carry: Carry, index: int) -> None:
        self.carry = carry
        self.index = index
        self.used = False

    def gradients(self, u: Tensor) -> list[Tensor | None]:
        if self.carry._capturing:  # a capture differentiates at fixed entry state
            return [None] * len(self.carry._selected)
        if self.used:
            raise RuntimeError("backward was called twice through the same segment; add its losses up and call it once")
        gradients = self.carry._gradients(self.index, u)
        self.used = True
        return gradients


class Carry:
    """Carries the influence of a module's parameters on its recurrent state across segments.

    .. code-block:: python

        carry = Carry(model)
        h = carry(h0)
        for x, y in stream:
            out, h = model(x, h)             # one or more steps
            h = carry(h)                     # after the forward, before backward and step
            criterion(out, y).backward()     # the gradient through the whole past
            optimizer.step()
            optimizer.zero_grad()

    Equal to BPTT through the whole past for parameters that did not change on the way; after an online update it is
    the gradient of the path taken (Williams & Zipser 1989). A segment of ``n`` steps costs ``2 H + H^2 / n``
    multiply-adds per parameter and step, and ``itemsize * B * (H + 1) * |θ|`` bytes at any length (Schmidhuber 1992),
    with ``θ`` the parameters that reach the state.

    The state may be a tensor, a tuple or any nest of them; several layers are carried as one joint state, which is
    exact. Streams that restart inside the nest (``torch.where(mask, h0, h)`` on what ``carry`` returned) lose their
    influence by themselves.

    Args:
        module: the module whose trainable parameters are carried, as far as they reach the state.
        commit_every: segments between two influence updates; the gradient is exact whatever it is. ``"auto"`` lets a
            window grow to about ``min(H, 64)`` steps.
        include: names of parameters or submodules to carry; None for all.
        exclude: names of parameters or submodules to leave out: their gradient is truncated at the segment.
        batch_dim: dimension of the streams in the tensors of the state; 1 for the state of ``nn.LSTM``.
    """

    def __init__(
        self,
        module: nn.Module,
        commit_every: int | Literal["auto"] = "auto",
        include: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        batch_dim: int = 0,
    ) -> None:
        if commit_every != "auto" and (not isinstance(commit_every, int) or commit_every < 1):
            raise ValueError(f"commit_every must be 'auto' or an int of at least 1, got {commit_every!r}")
        self.module = module
        self.commit_every = commit_every
        self.batch_dim = batch_dim
        self._selected = _select(module, include, exclude)
        self._groups: ParameterGroups | None = None
        self._influence: Influence | None = None
        self._capture: GraphCapture | None = None
        self._chain_capture: ChainCapture | None = None
        self._entry: Tensor | None = None
        self._segments = 0
        self._window_steps = 0
        self._capturing = False

    def __call__(self, state: Any) -> Any:
        """Close a segment, or start the first one.

        Args:
            state: the state that the module returned, with its graph; at the start of a stream any state.

        Returns:
            The same state for the next segment, cut off from the graph; a backward pass that reaches it continues
            through the influence.

        Raises:
            RuntimeError: if gradients are disabled, if the graph of the segment is gone or outdated (``carry`` was
                called after ``backward`` or after the optimizer's step), or if the state does not come from the last
                one. The influence is left as it was.
            NonFiniteError: if the state or a Jacobian is not finite.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("carry needs gradients, but they are disabled (no_grad): leave it out when evaluating")
        leaves, structure = pytree.tree_flatten(state)
        end = self._flat(leaves)
        if self._entry is not None:
            self._close_segment(end)
        entry = EnterSegment.apply(_Entry(self, self._segments), end.detach(), *self._selected_tensors())
        self._entry = entry
        return pytree.tree_unflatten(self._unflat(entry, leaves), structure)

    def reset(self, streams: Tensor | None = None) -> None:
        """Forget the past of some streams; call it after ``backward``, and give them a new state yourself.

        Args:
            streams: boolean mask ``(B,)``; None for all, after which ``h = carry(h0)`` starts anew.
        """
        if self._influence is not None:
            size = self._influence.batch_size
            mask = torch.ones(size, dtype=torch.bool) if streams is None else streams
            if mask.dtype != torch.bool or tuple(mask.shape) != (size,):
                raise ValueError(
                    f"streams must be a bool mask of shape ({size},), got {mask.dtype} {tuple(mask.shape)}"
                )
            self._influence.reset(mask.to(self._influence.core.device))
            self._window_steps = 0
        if streams is None:
            self._entry = None

    def influence(self) -> dict[str, Tensor]:
        """Influence ``dh/dθ`` of every carried parameter, ``(B, H, *shape)``; the state's tensors side by side."""
        return {} if self._influence is None else self._influence.matrices()

    def state_dict(self) -> dict[str, Any]:
        """The influence, after committing. Resume with it and ``h = carry(h)`` on the saved state."""
        saved: dict[str, Any] = {"version": 1, "segments": self._segments, "influence": None}
        if self._influence is not None and self._groups is not None:
            saved["influence"] = self._influence.state_dict()
            saved["names"] = [p.name for p in self._groups.core]
        return saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: if it does not fit the module.
        """
        if state.get("version") != 1:
            raise ValueError(f"state must be of version 1, got {state.get('version')!r}")
        if state["influence"] is not None:
            by_name = {p.name: p for p in self._selected}
            unknown = [name for name in state["names"] if name not in by_name]
            if unknown:
                raise ValueError(f"state holds the influence of {unknown}, which the module does not have or not carry")
            core = state["influence"]["core"]
            self._influence = None
            self._build([by_name[name] for name in state["names"]], core.shape[0], core.shape[1] - 1, core)
            assert self._influence is not None
            self._influence.load_state_dict(state["influence"])
        self._segments = state["segments"]
        self._entry = None
        self._window_steps = 0

    def _selected_tensors(self) -> list[Tensor]:
        return [p.tensor for p in self._selected]

    def _flat(self, leaves: list[Any]) -> Tensor:
        """The floating-point tensors of a state side by side, ``(B, H)``, at least float32."""
        parts = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not parts:
            raise ValueError("state must hold at least one floating-point tensor")
        sizes = {part.shape[self.batch_dim] if part.dim() > self.batch_dim else None for part in parts}
        if len(sizes) > 1 or None in sizes:
            shapes = [tuple(part.shape) for part in parts]
            raise ValueError(f"the state's tensors must agree in dimension batch_dim = {self.batch_dim}, got {shapes}")
        dtype = torch.promote_types(parts[0].dtype, torch.float32)
        return torch.cat([part.movedim(self.batch_dim, 0).flatten(1).to(dtype) for part in parts], dim=1)

    def _unflat(self, flat: Tensor, leaves: list[Any]) -> list[Any]:
        """The tensors of a state from ``(B, H)``, in the shapes and dtypes of ``leaves``."""
        out, start = [], 0
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                shape = leaf.movedim(self.batch_dim, 0).shape
                size = shape[1:].numel()
                part = flat[:, start : start + size].reshape(shape).movedim(0, self.batch_dim)
                out.append(part.to(leaf.dtype))
                start += size
            else:
                out.append(leaf)
        return out

    def _close_segment(self, end: Tensor) -> None:
        """Capture the segment that ``end (B, H)`` closes, and commit the window before it if it is full."""
        assert self._entry is not None
        graph = walk(end, self._entry.grad_fn)
        if self._entry.grad_fn not in graph.consumers:
            raise RuntimeError(
                "state does not depend on the state that carry returned last: give carry the state that the module"
                " returned, with its graph; before a new sequence call carry.reset()"
            )
        self._check_reached(list(graph.accumulators.values()))
        carried = set() if self._groups is None else {p.name for p in self._groups.core}
        reached = {p.name for p in self._selected if id(p.tensor) in graph.accumulators}
        if self._influence is None or not reached <= carried:
            self._build([p for p in self._selected if p.name in reached | carried], end.shape[0], end.shape[1], end)
        assert self._groups is not None and self._influence is not None
        if self._window_is_full(end.shape[1]):
            self._influence.commit()
            self._window_steps = 0
        try:
            self._capturing = True
            captured = self._captured(end, graph)
        except RuntimeError as error:
            if "second time" in str(error):
                raise RuntimeError(
                    "carry was called after backward, which frees the graph of the segment: call h = carry(h) right"
                    " after the forward pass, before backward"
                ) from error
            if "modified by an inplace operation" in str(error):
                raise RuntimeError(
                    "a tensor of the segment's graph changed before carry was called: call h = carry(h) right after the"
                    " forward pass, before the optimizer's step"
                ) from error
            raise
        finally:
            self._capturing = False
        if isinstance(captured, StepChain):
            steps = captured.count
            check_finite(
                self._segments, {"the state": end, "a Jacobian of the segment": captured.total().expand(len(end), 1)}
            )
        else:
            steps = max((term.tau for term in captured.core.terms), default=1)
            values = {
                "the state": end,
                "the state Jacobian": captured.Jh,
                "the immediate Jacobian": captured.core.delta,
            }
            check_finite(self._segments, values)
        self._influence.record([captured])
        self._segments += 1
        self._window_steps += steps

    def _captured(self, end: Tensor, graph: SegmentGraph) -> StepChain | StepJacobian:
        """The Jacobians of the segment, step by step if it is a chain of simple steps, else as one map."""
        assert self._entry is not None and self._groups is not None
        assert self._capture is not None and self._chain_capture is not None
        parameters = [p.tensor for p in self._groups.core]
        none = torch.zeros(end.shape[0], 0, dtype=torch.int64, device=end.device)
        whole = torch.zeros(end.shape[0], 1, dtype=torch.int64, device=end.device)
        routing = Routing(none, whole, none)
        chain = self._chain_capture.segment(end, self._entry, parameters, routing)
        if chain is not None:
            return chain
        J, factors = self._capture.segment(end, self._entry, parameters, graph)
        return StepJacobian(J, routing, factors, Factors(J.new_zeros(end.shape[0], 0, end.shape[1], 0), ()))

    def _window_is_full(self, hidden_size: int) -> bool:
        assert self._influence is not None
        if self.commit_every == "auto":
            batch, rows, columns = self._influence.core.shape
            steps = max(self._window_steps, 1)
            if steps >= min(hidden_size, MAX_WINDOW_STEPS):
                return True
            # A longer window shares the cost of a commit; in return every loss goes back through more of its steps.
            segments = len(self._influence.window)
            commit = COMMIT_SECONDS + 2.0 * batch * rows**2 * columns / FLOPS
            return segments * steps >= 2.0 * commit / PULL_BACK_SECONDS
        return len(self._influence.window) >= self.commit_every

    def _check_reached(self, leaves: list[tuple[nn.Parameter, Any]]) -> None:
        """Refuse trainable leaves that reach the state and do not belong to the module."""
        own = {id(p) for p in self.module.parameters()}
        for variable, _ in leaves:
            if id(variable) not in own:
                raise RuntimeError(
                    f"a trainable tensor of shape {tuple(variable.shape)} reaches the state but is no parameter of the"
                    " module given to Carry: give Carry a module that holds it, or detach what is computed from it"
                )

    def _build(self, parameters: list[RecurrentParameter], batch: int, hidden: int, like: Tensor) -> None:
        """Allocate the influence of some parameters, taking over what is there; new ones start at zero."""
        core: list[RecurrentParameter] = []
        for parameter in parameters:
            core.append(replace(parameter, start=core[-1].columns.stop if core else 0))
        groups = ParameterGroups(core, [], 0)
        check_memory(groups, hidden, batch, like)
        influence = Influence(groups, batch, 1, hidden, 1, "eager", like.dtype, like.device)
        if self._influence is not None:
            influence.adopt(self._influence)
            self._window_steps = 0
        self._groups, self._influence = groups, influence
        self._capture = GraphCapture([p.name for p in core], [p.start for p in core])
        self._chain_capture = ChainCapture(groups)

    def _gradients(self, index: int, u: Tensor) -> list[Tensor | None]:
        """Gradients of the selected parameters through the past before segment ``index``."""
        out: dict[str, Tensor] = {}
        if self._influence is not None and self._groups is not None:
            position = index - (self._segments - len(self._influence.window))
            if position < 0:
                raise RuntimeError(
                    "backward came too late: the influence has moved past this segment. Call backward before the next"
                    " carry(h) or reset, or raise commit_every"
                )
            core, experts = self._influence.loss_gradient(position, u, index)
            parts = self._groups.split(core, experts)
            out = {p.name: g.to(p.tensor.dtype) for p, g in zip(self._groups.core, parts, strict=True)}
        return [out.get(p.name) for p in self._selected]


def _select(
    module: nn.Module, include: Iterable[str] | None, exclude: Iterable[str] | None
) -> list[RecurrentParameter]:
    """Trainable parameters, chosen by the names of parameters or submodules; their columns are not yet assigned."""

    def matches(name: str, patterns: list[str]) -> bool:
        return any(name == pattern or name.startswith(f"{pattern}.") for pattern in patterns)

    names = [name for name, p in module.named_parameters() if p.requires_grad]
    wanted, unwanted = None if include is None else list(include), list(exclude or ())
    for argument, patterns in (("include", wanted or []), ("exclude", unwanted)):
        idle = [pattern for pattern in patterns if not any(matches(name, [pattern]) for name in names)]
        if idle:
            raise ValueError(f"{argument} names {idle}, but the trainable parameters are {names}")
    chosen = [n for n in names if (wanted is None or matches(n, wanted)) and not matches(n, unwanted)]
    if not chosen:
        raise ValueError("module has no trainable parameter to carry")
    selected = []
    for name in chosen:
        prefix, _, attribute = name.rpartition(".")
        owner = module.get_submodule(prefix)
        selected.append(RecurrentParameter(name, owner, attribute, False, getattr(owner, attribute).shape, 0))
    return selected
