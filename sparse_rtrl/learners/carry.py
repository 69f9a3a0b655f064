"""Exact gradients through the whole past for any recurrent module, by changing the line that detaches its state."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_rtrl.capture.parameter_uses import SegmentGraph, walk
from sparse_rtrl.capture.parameters import RecurrentParameter
from sparse_rtrl.capture.verify import Verifier, Verify
from sparse_rtrl.cells.diagonal_cell import DiagonalCell
from sparse_rtrl.errors import ContractError, DisagreementError
from sparse_rtrl.influence.carry_estimate import CarryEstimate, estimate_carry
from sparse_rtrl.influence.estimate import DiagonalEstimate, estimate
from sparse_rtrl.learners.carry_check import Step, compare_with_bptt
from sparse_rtrl.learners.engine import checked_mask
from sparse_rtrl.learners.entry import EnterSegment, graph_is_kept
from sparse_rtrl.learners.hidden_state import HiddenStates
from sparse_rtrl.learners.methods import METHODS, Diagonal, Exact, Method, Past
from sparse_rtrl.ops.precision import full_precision


class _Entry:
    """The state that enters a segment: receives ``dL/dh_entry`` in the backward pass and answers with gradients."""

    def __init__(self, carry: Carry, index: int, selected: list[RecurrentParameter], tensors: list[Tensor]) -> None:
        self.carry = carry
        self.index = index
        self.selected = selected
        self.tensors = tensors
        self.trainable = [tensor.requires_grad for tensor in tensors]
        self.used = False
        self.before: list[Tensor] = []
        """The parameters when losses went back, the same for all of them, if more may come or the segment was open."""
        self.returned = self.time = 0
        """Numbers of autograd's nodes: when the segment began, and when the last loss went back while it was open."""
        self.thread = threading.get_ident()  # autograd counts in every thread by itself

    def check_unchanged(self, nodes: Sequence[Any]) -> None:
        """Refuse a segment if parameters changed since its entry, or since its graph was made.

        Args:
            nodes: nodes of that graph.
        """
        for parameter, tensor in zip(self.selected, self.tensors, strict=True):
            if getattr(parameter.module, parameter.attribute, None) is not tensor:
                raise RuntimeError(
                    f"{parameter.name} was removed, or replaced by another object, after carry had returned the state"
                    " of this segment: do it before h = carry(h), and after it make a new Carry if names change"
                )
        # A loss of what carry returned may go backwards before the segment runs, and its parameters change then.
        ran_before = any(
            self.returned < node._sequence_nr() < self.time for node in nodes if hasattr(node, "_sequence_nr")
        )
        for parameter, before in zip(self.selected, self.before if ran_before else [], strict=False):
            if not torch.equal(parameter.tensor.detach(), before):
                raise RuntimeError(
                    f"{parameter.name} changed before carry was called: call h = carry(h) right after the forward pass,"
                    " before backward and the optimizer's step"
                )

    def gradients(self, u: Tensor) -> list[Tensor | None]:
        if self.carry._capturing:  # a capture differentiates at fixed entry state
            return [None] * len(self.selected)
        self._check_same_parameters()
        found = self.carry._past.gradients(self.index, u)
        for parameter, trainable in zip(self.selected, self.trainable, strict=True):
            if not trainable and parameter.tensor.requires_grad and parameter.name in found:
                raise RuntimeError(
                    f"{parameter.name} was unfrozen after carry had returned the state of this segment, so its gradient"
                    " through the past has nowhere to go: unfreeze parameters before h = carry(h)"
                )
        self.used = True
        if self.index == self.carry._past.segments and threading.get_ident() == self.thread:
            self.time = _time()
        return [_as_gradient(found[p.name], p.tensor) if p.name in found else None for p in self.selected]

    def _check_same_parameters(self) -> None:
        """Refuse a loss of a segment if parameters changed since another one went back: its graph has the new ones.

        Fused optimizers and ``.data`` change them without torch's noticing.
        """
        if not self.used:
            more_may_come = graph_is_kept() or self.index == self.carry._past.segments
            self.before = [p.tensor.detach().clone() for p in self.selected] if more_may_come else []
            return
        if not self.before:
            raise RuntimeError(
                "backward was called twice through the same segment: call it with retain_graph=True for all losses of a"
                " segment but the last, or add them up and call it once"
            )
        for parameter, before in zip(self.selected, self.before, strict=True):
            if not torch.equal(parameter.tensor.detach(), before):
                raise RuntimeError(
                    f"{parameter.name} changed between two calls of backward through the same segment: call backward or"
                    " torch.autograd.grad for each of its losses before the optimizer's step"
                )


def _time() -> int:
    """The number that autograd gives to the next node it makes."""
    with torch.enable_grad():
        return int(torch.zeros((), requires_grad=True).view(()).grad_fn._sequence_nr())  # type: ignore[union-attr]


def _as_gradient(gradient: Tensor, tensor: Tensor) -> Tensor:
    """A gradient in the dtype of its parameter; that of a complex one from pairs of real numbers."""
    return (torch.complex(gradient[..., 0], gradient[..., 1]) if tensor.is_complex() else gradient).to(tensor.dtype)


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
    with ``θ`` the parameters that reach the state; :meth:`estimate` says what that comes to.

    The state may be a tensor, a tuple or any nest of them; several layers are carried as one joint state, which is
    exact. For a :class:`~sparse_rtrl.DiagonalCell` the influence is about as large as its parameters. Streams that
    restart inside the nest (``torch.where(mask, h0, h)`` on what ``carry`` returned) lose their
    influence by themselves. Dropout is exact too: the gradient is that of the masks that were drawn.

    For those who cannot afford the exact gradient there are approximations. Each is exact within a segment, and differs
    in what it keeps of the past (``q``: state entries that a parameter reaches within a segment; numbers and
    multiply-adds per stream):

    ============= ============================= ======================= ==========================================
    ``method``    keeps                         update of a segment     source
    ============= ============================= ======================= ==========================================
    ``exact``     ``(H + 1) |θ|``, everything   ``(n H + H^2) |θ|``     Williams & Zipser 1989; Schmidhuber 1992
    ``snap1``     ``q |θ|``, the entries that   ``(n + q) q |θ|``       Menick et al. 2021, SnAp-1
                  are reached within a segment
    ``rflo``      ``q |θ|``, moved by the       ``(n + q) q |θ|``       Murray 2019; Bellec et al. 2020 (e-prop)
                  element-wise part of ``J``
    ``uoro``      ``H + |θ|``, an unbiased      ``n |θ|``               Tallec & Ollivier 2018
                  estimate of rank one
    ``truncated`` nothing                       0                       Williams & Peng 1990, truncated BPTT
    ============= ============================= ======================= ==========================================

    ``exact``, ``snap1`` and ``rflo`` also capture with one backward pass per state entry, batched, ``n H |θ|``;
    ``uoro`` with three in all. The classes in :mod:`sparse_rtrl.learners.methods` define each of them for any module.

    Args:
        module: the module whose trainable parameters are carried, as far as they reach the state. Parameters that are
            unfrozen or added later join with zero influence, and a notice.
        commit_every: segments between two influence updates of the exact method; its gradient is exact whatever it is.
            ``"auto"`` lets a window grow to about ``min(H, 64)`` steps.
        include: names of parameters or submodules to carry; None for all.
        exclude: names of parameters or submodules to leave out: their gradient is truncated at the segment.
        batch_dim: dimension of the streams in the tensors of the state; 1 for the state of ``nn.LSTM``.
        method: what is kept of the past.
        generator: source of the random signs of ``"uoro"``; None for torch's default one.
        verify: which segments are compared with an ordinary backward pass: ``"sample"`` (one in 64, at random),
            ``"always"``, ``"never"``, or one in so many. A fault that is there in every segment stays unnoticed for
            ``k`` segments with probability ``(1 - 1/64)^k``: 37 % for 64, 0.1 % for 440.
        capture: ``"dense"`` captures every parameter by ordinary backward passes, one per stream and state entry:
            exact for any module whose streams are independent, slower. ``"auto"`` does so only where it must.
    """

    def __init__(
        self,
        module: nn.Module,
        commit_every: int | Literal["auto"] = "auto",
        include: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        batch_dim: int = 0,
        method: Method = "exact",
        generator: torch.Generator | None = None,
        verify: Verify = "sample",
        capture: Literal["auto", "dense"] = "auto",
    ) -> None:
        include = None if include is None else list(include)
        exclude = list(exclude or ())
        if commit_every != "auto" and (not isinstance(commit_every, int) or commit_every < 1):
            raise ValueError(f"commit_every must be 'auto' or an int of at least 1, got {commit_every!r}")
        if method not in METHODS:
            raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
        if generator is not None and method != "uoro":
            raise ValueError(f"generator is for method 'uoro', got one for method {method!r}, which draws nothing")
        if capture not in ("auto", "dense"):
            raise ValueError(f"capture must be 'auto' or 'dense', got {capture!r}")
        lazy = [name for name, p in module.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
        if lazy:
            raise ValueError(f"module has parameters without a shape yet, {lazy}: run it once before Carry(module)")
        self._options: dict[str, Any] = {"commit_every": commit_every, "batch_dim": batch_dim, "method": method}
        self._options |= {"include": include, "exclude": exclude, "generator": generator, "capture": capture}
        self.module = module
        self.commit_every = commit_every
        self.batch_dim = batch_dim
        self.capture = capture
        self.method: Method = method
        self._include, self._exclude = include, exclude
        self._check_selection()
        self._past: Past | Diagonal
        self._verifier = Verifier(verify)
        if isinstance(module, DiagonalCell) and method == "exact" and capture == "auto":
            self._past = Diagonal(module, commit_every, self._verifier)
        else:
            self._past = METHODS[method](commit_every, generator, self._verifier, capture == "dense")
        self._trace()
        self._trainable = {p.name for p in self._selected() if p.trainable}
        self._entry: Tensor | None = None
        self._opened: _Entry | None = None
        self._capturing = False
        self._hidden = HiddenStates(module)
        self._resumed = False
        """Whether the influence is that of the state which comes next, so that its graph has been captured before."""
        self._saved_entry: Tensor | None = None
        """That state, ``(B, H)``."""

    @torch.compiler.disable(reason="carry reads the autograd graph that the segment left behind")
    def __call__(self, state: Any) -> Any:
        """Close a segment, or start the first one.

        Inside a function given to ``torch.compile`` this is a graph break.

        Args:
            state: the state that the module returned, with its graph. At the start of a stream any state; one with a
                graph (a trained first state, that of an encoder in the module, the state after a first step from
                ``None``) starts with the influence ``dh/dθ``.

        Returns:
            The same state for the next segment, cut off from the graph; a backward pass that reaches it continues
            through the influence.

        Raises:
            RuntimeError: if gradients are disabled, if the graph of the segment is gone or outdated (``carry`` was
                called after ``backward`` or after the optimizer's step), or if the state does not come from the last
                one. The influence is left as it was.
            ContractError: if streams of the batch influence each other, as under batch norm in training.
            NonFiniteError: if the state or a Jacobian is not finite.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("carry needs gradients, but they are disabled (no_grad): leave it out when evaluating")
        leaves, structure = pytree.tree_flatten(state)
        if isinstance(self._past, Exact):
            self._past.hear([leaf for leaf in leaves if _is_number(leaf)])
        end = self._flat(leaves)
        selected = self._selected()
        self._check_shapes(selected)
        self._check_resumed(end)
        if self.method != "truncated":
            if self._entry is not None or (end.requires_grad and not self._resumed):
                self._capture_segment(end, self._entry, selected)
        self._resumed = False
        if self.method != "truncated":
            self._hidden.watch(end)
            self._verifier.ignore_hooks()
        self._note_joining(selected)
        tensors = [p.tensor for p in selected]
        self._opened = _Entry(self, self._past.segments, selected, tensors)
        begin = end.detach()
        if self.method != "truncated":
            # Requires a gradient by itself, so that the segment has a graph even while every parameter is frozen.
            begin = EnterSegment.apply(self._opened, begin.requires_grad_(), *tensors)
        self._entry = begin
        # Copies, which the caller may write to: h[done] = 0.
        parts = self._unflat(begin, leaves)
        if isinstance(self._past, Exact):
            self._past.listen([part for part in parts if _is_number(part)])
        self._opened.returned = _time()
        return pytree.tree_unflatten(parts, structure)

    def reset(self, streams: Tensor | None = None) -> None:
        """Forget the past of some streams; call it after ``backward``, and give them a new state yourself.

        Args:
            streams: boolean mask ``(B,)``; None for all, after which ``h = carry(h0)`` starts anew.
        """
        like = self._past.like
        if streams is not None and not isinstance(streams, Tensor):
            raise ValueError(f"streams must be a bool mask (B,), or None for all, got {streams!r}")
        if like is not None:
            self._past.reset(checked_mask(streams, like.shape[0], like.device))
        if streams is None:
            self._entry = self._opened = None
            self._resumed, self._saved_entry = False, None

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Call :meth:`flush` before every step of an optimizer.

        Returns:
            A handle with ``remove()``.
        """
        return optimizer.register_step_pre_hook(lambda *_: self.flush())

    def flush(self) -> None:
        """Make sure that ``.grad`` is complete and that the parameters may change now.

        Nothing is ever deferred: what goes through the past is in ``.grad`` when ``backward`` returns, so that clipping
        and accumulation need no call. What :meth:`attach` adds is that an optimizer's step in the wrong place of the
        loop stops before it changes a parameter, not only at the next ``carry(h)``.

        Raises:
            RuntimeError: if the loss of a segment went backwards and the segment is still open.
            DisagreementError: on a CUDA device, if a captured segment disagreed with an ordinary backward pass.
        """
        if self._opened is not None and self._opened.used and self._opened.index == self._past.segments:
            raise RuntimeError(
                "the optimizer would step while a segment is open: call h = carry(h) right after the forward pass,"
                " before backward and step"
            )
        self._verifier.settle()

    def influence(self) -> dict[str, Tensor]:
        """Influence ``dh/dθ`` of every carried parameter, ``(B, H, *shape)``; the state's tensors side by side.

        That of an approximate method is what it stands for, zeros included. For a complex parameter it is
        ``dh/d Re θ + i dh/d Im θ``.
        """
        pairs = {p.name for p in self._past.parameters if isinstance(p, _ComplexParameter)}
        return {
            name: torch.complex(P[..., 0], P[..., 1]) if name in pairs else P
            for name, P in self._past.influence().items()
        }

    @property
    def kept_bytes(self) -> int:
        """Bytes kept of the past now."""
        return self._past.kept_bytes()

    def estimate(self, state: Any) -> CarryEstimate | DiagonalEstimate:
        """Work out what carrying costs, before anything is allocated.

        Args:
            state: a state, for its sizes and dtype. The one that the module returned after ``carry(h0)``, with its
                graph, tells which parameters reach the state; otherwise every trainable parameter counts.

        Returns:
            The costs; printed, they come with their formulas.
        """
        end = self._flat(pytree.tree_flatten(state)[0])
        if isinstance(self._past, Diagonal):
            return estimate(self._past.cell, len(end))
        graph = walk(end, None if self._entry is None else self._entry.grad_fn)
        trainable = [p for p in self._selected() if p.trainable]
        reached = [p for p in trainable if id(p.tensor) in graph.accumulators]
        return estimate_carry(self.method, [p.shape for p in reached or trainable], end)

    def check(self, step: Step, xs: Sequence[Any], state: Any) -> dict[str, float]:
        """Compare the gradient of a new ``Carry`` with these options with backpropagation through the whole past.

        This ``Carry`` and ``.grad`` do not change. The loss is a random combination of every new state.

        Args:
            step: runs one segment: ``step(x, state)`` returns the new state, such as ``lambda x, h: model(x, h)[1]``.
            xs: its inputs, one per segment; three or more, so that there is a past to carry.
            state: the first state.

        Returns:
            Relative error by parameter name.

        Raises:
            ContractError: naming the parameters whose error is more than rounding; an approximate method has some.
        """
        fresh = Carry(self.module, **{**self._options, "verify": "always", "generator": None})
        return compare_with_bptt(fresh, step, xs, state)

    def __copy__(self) -> Carry:
        """An independent ``Carry`` of the same module, which goes on from where this one stands."""
        shared: list[Any] = [*self.module.modules(), *self.module.parameters(), *self.module.buffers()]
        return copy.deepcopy(self, {id(each): each for each in shared})

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the graph of the segment that is open: a copy goes on with ``h = carry(h)``."""
        self._verifier.settle()
        resumed = self._resumed or self._entry is not None
        saved = self._saved_entry if self._entry is None else self._entry.detach().clone()
        self._hidden.forget()
        return {**vars(self), "_entry": None, "_opened": None, "_resumed": resumed, "_saved_entry": saved}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._trace()

    def _trace(self) -> None:
        """Let the exact method trace the module's calls."""
        if isinstance(self._past, Exact) and self.capture == "auto":
            self._past.trace(self.module, self.batch_dim, self._flat, self._unflat)

    def state_dict(self) -> dict[str, Any]:
        """What is kept, after committing. Resume with it and ``h = carry(h)`` on the saved state."""
        entry = self._saved_entry if self._entry is None else self._entry.detach().clone()
        started = self._resumed or self._entry is not None
        return {"version": 1, "started": started, "entry": entry if started else None, **self._past.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: if it does not fit the module or the method.
        """
        if not isinstance(state, Mapping) or state.get("version") != 1:
            version = state.get("version") if isinstance(state, Mapping) else state
            raise ValueError(f"state must be of version 1, got {version!r}")
        self._past.load_state_dict(state, self._selected())
        self._entry = self._opened = None
        self._resumed = state.get("started", state["like"] is not None)
        self._saved_entry = state.get("entry")

    def _flat(self, leaves: list[Any]) -> Tensor:
        """The floating-point tensors of a state side by side, ``(B, H)``, at least float32; complex ones as pairs."""
        # Not view_as_real: its backward pass asks for memory that is aligned to pairs.
        pairs = [(leaf.real, leaf.imag) if leaf.is_complex() else (leaf,) for leaf in leaves if _is_number(leaf)]
        parts = [torch.stack(pair, -1) if len(pair) == 2 else pair[0] for pair in pairs]
        if not parts:
            raise ValueError("state must hold at least one floating-point tensor")
        sizes = {part.shape[self.batch_dim] if part.dim() > self.batch_dim else None for part in parts}
        if len(sizes) > 1 or None in sizes:
            shapes = [tuple(part.shape) for part in parts]
            raise ValueError(f"the state's tensors must agree in dimension batch_dim = {self.batch_dim}, got {shapes}")
        dtype = torch.float32
        for part in parts:
            dtype = torch.promote_types(dtype, part.dtype)
        if not any(part.numel() for part in parts):
            raise ValueError(f"state must hold numbers, got tensors of shapes {[tuple(p.shape) for p in parts]}")
        rows = [part.movedim(self.batch_dim, 0) for part in parts]
        return torch.cat([row.reshape(len(row), row.shape[1:].numel()).to(dtype) for row in rows], dim=1)

    def _unflat(self, flat: Tensor, leaves: list[Any]) -> list[Any]:
        """The tensors of a state from ``(B, H)``, in the shapes and dtypes of ``leaves``."""
        out, start = [], 0
        for leaf in leaves:
            if _is_number(leaf):
                like = torch.view_as_real(leaf) if leaf.is_complex() else leaf
                shape = like.movedim(self.batch_dim, 0).shape
                size = shape[1:].numel()
                part = flat[:, start : start + size].reshape(shape).movedim(0, self.batch_dim).to(like.dtype).clone()
                out.append(torch.complex(part[..., 0], part[..., 1]) if leaf.is_complex() else part)
                start += size
            else:
                out.append(leaf)
        return out

    @full_precision
    def _capture_segment(self, end: Tensor, entry: Tensor | None, selected: list[RecurrentParameter]) -> None:
        """Capture the segment between ``entry`` and ``end``, both ``(B, H)``; without an entry, one from nowhere."""
        try:
            self._capturing = True
            if entry is None or not self._capture_by_tape(end, entry, selected):
                self._capture_by_graph(end, entry, selected)
        except ContractError as error:
            if isinstance(error, DisagreementError) or not (norms := self._batch_norms()):
                raise
            remedy = "put it into eval mode, or take a norm that works within a stream"
            told = f"{', '.join(norms)} is a batch norm in training: {remedy}"
            raise ContractError([*error.violations, told]) from error
        except RuntimeError as error:
            if (explained := _explained(error)) is None:
                raise
            raise explained from error
        finally:
            self._capturing = False

    def _capture_by_tape(self, end: Tensor, entry: Tensor, selected: list[RecurrentParameter]) -> bool:
        """Capture the segment by the row tape of the module's calls; False if its graph has to serve."""
        opened = self._opened
        if not isinstance(self._past, Exact) or opened is None or opened.used or entry.shape != end.shape:
            return False
        return self._past.close_by_tape(end, entry, selected, opened.check_unchanged)

    def _capture_by_graph(self, end: Tensor, entry: Tensor | None, selected: list[RecurrentParameter]) -> None:
        """Capture the segment from its autograd graph."""
        graph = walk(end, None if entry is None else entry.grad_fn)
        if entry is not None and entry.grad_fn not in graph.consumers:
            raise RuntimeError(
                "state does not depend on the state that carry returned last: give carry the state that the module"
                " returned, with its graph; before a new sequence call carry.reset()"
            )
        self._check_reached(graph)
        if self._opened is not None:
            self._opened.check_unchanged(graph.nodes)
        if entry is not None and entry.shape != end.shape:
            raise ValueError(
                f"state must keep its size (B, H): the state that carry returned last has {tuple(entry.shape)} numbers,"
                f" this one {tuple(end.shape)}. Start with the whole state, or with carry(state) after the first step"
            )
        if entry is None:
            self._past.begin(end, graph, selected)
        else:
            self._past.close(end, entry, graph, selected)

    def _batch_norms(self) -> list[str]:
        """Names of the batch norms that are in training."""
        return [
            name
            for name, module in self.module.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        ]

    def _check_reached(self, graph: SegmentGraph) -> None:
        """Refuse what reaches the state but is not carried: other trainable tensors, and states of earlier segments."""
        if any(isinstance(getattr(node, "entry", None), _Entry) for node in graph.nodes):
            raise RuntimeError(
                "the state depends on a state that carry returned earlier than the last one, or on one of another"
                " Carry: use only what the last h = carry(h) returned, or detach the older one"
            )
        own = {id(p) for p in self.module.parameters()}
        for variable, _ in graph.accumulators.values():
            if id(variable) not in own:
                raise RuntimeError(
                    f"a trainable tensor of shape {tuple(variable.shape)} reaches the state but is no parameter of the"
                    " module given to Carry: give Carry a module that holds it, or detach what is computed from it. (A"
                    " first state that a module makes by itself with requires_grad=True is such a tensor: pass it a"
                    " first state instead)"
                )

    def _check_resumed(self, end: Tensor) -> None:
        """Refuse a first state after loading or copying that is not the saved one: a segment would be lost."""
        saved = self._saved_entry if self._resumed else None
        if saved is not None and not torch.equal(end.detach(), saved.to(end.device)):
            raise RuntimeError(
                "the influence that was loaded or copied belongs to another state: call h = carry(h) with the saved"
                " state before the next step, or carry.reset() before a new sequence"
            )

    def _check_shapes(self, selected: list[RecurrentParameter]) -> None:
        """Refuse parameters whose shape changed since they are carried."""
        carried = {p.name: p.shape for p in self._past.parameters}
        for p in selected:
            if p.name in carried and p.shape != carried[p.name]:
                raise RuntimeError(
                    f"parameter {p.name} had shape {tuple(carried[p.name])} when it was first carried and has"
                    f" {tuple(p.shape)} now: make a new Carry after changing a module"
                )

    def _note_joining(self, selected: list[RecurrentParameter]) -> None:
        """Warn of parameters that join while a stream is carried."""
        trainable = {p.name for p in selected if p.tensor.requires_grad}
        new = sorted(trainable - self._trainable) if self._past.segments else []
        if new:
            warnings.warn(
                f"{', '.join(new)}: unfrozen or added while streams are carried; from now on the gradient counts,"
                " without what happened before",
                stacklevel=4,
            )
        self._trainable = trainable

    def _check_selection(self) -> None:
        names = [p.name for p in _parameters_of(self.module)]
        for argument, patterns in (("include", self._include or []), ("exclude", self._exclude)):
            idle = [pattern for pattern in patterns if not any(_matches(name, [pattern]) for name in names)]
            if idle:
                raise ValueError(f"{argument} names {idle}, but the parameters are {names}")
        selected = self._selected()
        if not any(p.trainable for p in selected):
            raise ValueError("module has no trainable parameter to carry")
        sparse = [p.name for p in selected if getattr(p.module, "sparse", False) and p.attribute == "weight"]
        if sparse:
            raise ValueError(
                f"module has parameters with sparse gradients, {sparse}, but gradients through the past are dense: use"
                " nn.Embedding(..., sparse=False), or exclude them"
            )

    def _selected(self) -> list[RecurrentParameter]:
        """Parameters that may be carried, frozen ones included; their columns are not yet assigned."""
        return [
            p
            for p in _parameters_of(self.module)
            if (self._include is None or _matches(p.name, self._include)) and not _matches(p.name, self._exclude)
        ]


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _matches(name: str, patterns: list[str]) -> bool:
    """Whether a parameter's name is among names of parameters and submodules."""
    return any(name == pattern or name.startswith(f"{pattern}.") for pattern in patterns)


def _parameters_of(module: nn.Module) -> list[RecurrentParameter]:
    """Every parameter of a module, each once."""
    seen: set[int] = set()
    out: list[RecurrentParameter] = []
    for prefix, owner in module.named_modules():
        for attribute, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                name = f"{prefix}.{attribute}" if prefix else attribute
                if parameter.is_complex():
                    pairs = torch.Size((*parameter.shape, 2))
                    out.append(_ComplexParameter(name, owner, attribute, False, pairs, 0))
                else:
                    out.append(RecurrentParameter(name, owner, attribute, False, parameter.shape, 0))
    return out


class _ComplexParameter(RecurrentParameter):
    """A complex parameter, carried as pairs of real numbers: its shape here ends in 2."""


def _explained(error: RuntimeError) -> RuntimeError | None:
    """What an error of autograd says about the user's loop; None if it has another cause."""
    for words, meaning in _MEANINGS.items():
        if words in str(error):
            return RuntimeError(meaning)
    return None


_MEANINGS = {
    "second time": (
        "carry was called after backward, which frees the graph of the segment: call h = carry(h) right after the"
        " forward pass, before backward"
    ),
    "modified by an inplace operation": (
        "a tensor of the segment's graph changed before carry was called: call h = carry(h) right after the forward"
        " pass, before the optimizer's step"
    ),
    "donated buffers": (
        "a function that torch.compile made frees its buffers in its first backward pass, but carry needs several: set"
        " torch._functorch.config.donated_buffer = False before it is compiled"
    ),
}
"""Words of autograd's errors, and what they mean here."""
