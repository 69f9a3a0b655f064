"""Capture of a module's segments by the row tape: it is traced once, then only coefficients are evaluated."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from sparse_rtrl.capture.calls import Chain
from sparse_rtrl.capture.linearize import Undecided
from sparse_rtrl.capture.parameters import RecurrentParameter
from sparse_rtrl.capture.tape import RowTape
from sparse_rtrl.capture.tape_rules import build_tape
from sparse_rtrl.capture.taped import StepStore, TapedStep, TapedSteps
from sparse_rtrl.capture.trace import NotTraceable, trace_step

logger = logging.getLogger(__name__)

MAX_KINDS = 16
"""Kinds of steps that one module may have; more of them mean that something changes at every step."""
FORWARD_ROUNDING = 1000
"""By how many times the rounding of the largest entry a state may differ that is computed for many streams at once."""
PLAIN_ATTRIBUTES = (int, float, bool, str, type(None))


@dataclass(eq=False)
class _Kind:
    """What is known of one kind of step.

    Attributes:
        tape: its tape; None if it cannot be traced, or disagreed with what ran.
        reason: why not.
        step: the tape with the columns of the parameters that are carried now.
        shared: what its tape needs of the parameters, and their values then.
        certain: whether a comparison with autograd has shown that it is right.
        constants: tensors that it uses beside its arguments: how to get each now, and what it held.
    """

    tape: RowTape | None
    reason: str = ""
    step: TapedStep | None = None
    shared: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    certain: bool = False
    constants: list[tuple[Callable[[], Any], Tensor]] = field(default_factory=list)

    def is_as_traced(self) -> bool:
        """Whether the tensors that the module uses beside its arguments still hold what they did."""
        for now, before in self.constants:
            tensor = now()
            if not isinstance(tensor, Tensor) or tensor.shape != before.shape or not torch.equal(tensor, before):
                return False
        return True


class NotTaped(Exception):
    """A segment that is left to the capture from the autograd graph; says why."""


class TapeCapture:
    """Captures chains of calls of a module.

    Args:
        module: the module.
        batch_dim: dimension of the streams in the state.
        flat: puts the tensors of a state side by side, ``(B, H)``.
        unflat: takes them apart again, in the shapes and dtypes of others.
    """

    def __init__(
        self,
        module: nn.Module,
        batch_dim: int,
        flat: Callable[[list[Any]], Tensor],
        unflat: Callable[[Tensor, list[Any]], list[Any]],
    ) -> None:
        self.module = module
        self.batch_dim = batch_dim
        self.flat = flat
        self.unflat = unflat
        self.carried: list[RecurrentParameter] = []
        self.kind: _Kind | None = None
        """The kind of the steps that were captured last."""
        self._kinds: dict[Any, _Kind] = {}
        self._store: StepStore | None = None
        self._weights: list[tuple[str, Tensor]] = []
        """Parameters and buffers of the module by name, as they are now."""
        self._dims: list[int | None] = []
        """Dimension of the streams in each input of the segment."""
        self._noted: set[str] = set()

    def carry(self, parameters: list[RecurrentParameter]) -> None:
        """Set the parameters that are carried, with their columns."""
        self.carried = parameters
        self._store = None
        for kind in self._kinds.values():
            kind.step = None

    def reached(self, chain: Chain, end: Tensor, selected: list[RecurrentParameter]) -> set[str]:
        """Names of the parameters that the calls of a chain let reach the state.

        Args:
            chain: the calls.
            end: the state behind them, ``(B, H)``.
            selected: parameters that may be carried.

        Raises:
            NotTaped: if the calls cannot be traced.
        """
        dtype = end.dtype
        if any(t.dtype != dtype or t.dim() <= self.batch_dim for state in chain.states for t in state):
            raise NotTaped(f"the state is not of dtype {dtype} throughout")
        self._weights = [*self.module.named_parameters(), *self.module.named_buffers()]
        self._dims = self._stream_dims(chain, end.shape[0])
        self.kind = self._kind(chain, selected)
        if self.kind.tape is None:
            raise NotTaped(self.kind.reason)
        names = {id(p.tensor): p.name for p in selected}
        reaches = zip(self._weights, self.kind.tape.reaches, strict=True)
        return {names[id(t)] for (_, t), r in reaches if r}

    def begin_window(self) -> None:
        """Begin a new store; the steps before are committed."""
        self._store = None

    def segment(self, chain: Chain, end: Tensor) -> TapedSteps:
        """Capture the chain of calls that :meth:`reached` was asked about.

        Args:
            chain: the calls.
            end: the state behind them, ``(B, H)``.

        Raises:
            NotTaped: if the trace computes something else than what ran, or might decide in another way.
        """
        kind, batch, count = self.kind, end.shape[0], len(chain.inputs)
        assert kind is not None and kind.tape is not None
        states = self._flat_states(chain)  # (n + 1, B, H)
        weights = [t.detach() for _, t in self._weights]
        if kind.step is None:
            starts = {id(p.tensor): p.start for p in self.carried}
            kind.step = TapedStep(kind.tape, [starts.get(id(t), -1) for _, t in self._weights])
        dims = self._dims
        inputs = [
            _by_streams(torch.stack([step[i] for step in chain.inputs]), dim, batch) for i, dim in enumerate(dims)
        ]
        linearizer = kind.step.linearizer
        try:
            if not kind.weights or not all(map(torch.equal, kind.weights, weights)):
                kind.weights = [w.clone() for w in weights]
                kind.shared = linearizer.shared(weights, inputs)
            found = linearizer(weights, inputs, states[:-1].flatten(0, 1))
        except Undecided as error:
            raise NotTaped("in some of its steps a decision, such as a ReLU's, hangs on rounding") from error
        except (RuntimeError, NotImplementedError) as error:  # what vmap has no rule for
            self.refuse(f"its steps cannot be evaluated together: {error}")
            raise NotTaped(kind.reason) from error
        if kind.step.tape.per_step[-1]:
            sizes = [t.numel() // batch for t in chain.states[0]]
            parts = (found.pop().view_as(states[1:]).split(sizes, 2), states[1:].split(sizes, 2))
            for computed, ran in zip(*parts, strict=True):
                self._check_forward(computed, ran)
        if self._store is None or self._store.step is not kind.step or self._store.batch_size != batch:
            self._store = StepStore(kind.step, batch)
        return self._store.append(found, kind.shared, count)

    def _flat_states(self, chain: Chain) -> Tensor:
        """The states before and behind every call, ``(n + 1, B, H)``; their tensors side by side."""
        parts = []
        for tensors in zip(*chain.states, strict=True):
            if any(t.shape != tensors[0].shape for t in tensors):
                raise NotTaped("the state changes its shape within the segment")
            parts.append(torch.stack([t.detach() for t in tensors]).movedim(1 + self.batch_dim, 1))
        flat = [p.reshape(*p.shape[:2], -1) for p in parts]
        return flat[0] if len(flat) == 1 else torch.cat(flat, 2)

    def refuse(self, reason: str) -> None:
        """Leave the kind of the last steps to the graph from now on."""
        assert self.kind is not None
        self.kind.tape = self.kind.step = None
        self.kind.reason = reason

    def note(self, reason: str) -> None:
        """Tell once why segments are captured from the autograd graph."""
        if reason not in self._noted:
            self._noted.add(reason)
            logger.info("captured from the autograd graph, exact but slower: %s", reason)

    def _check_forward(self, computed: Tensor, ran: Tensor) -> None:
        """Refuse a trace that computes another part of the states than what was produced, both ``(n, B, size)``."""
        if not ran.numel():
            return
        error, size = float((computed - ran).abs_().amax()), float(ran.abs().amax())
        if error <= FORWARD_ROUNDING * torch.finfo(ran.dtype).eps * size or not math.isfinite(size):
            return  # what is not finite is refused elsewhere
        raise NotTaped(
            "the traced step gives another state than the module did: parameters changed since, streams of the batch"
            " influence each other, or the module depends on something that is neither an argument nor an attribute"
        )

    def _stream_dims(self, chain: Chain, batch: int) -> list[int | None]:
        """The dimension of the streams in every input; None if all streams share it. What ran shows whether it fits."""
        out: list[int | None] = []
        for tensor in chain.inputs[0]:
            fitting = [d for d in (self.batch_dim, 0) if tensor.dim() > d and tensor.shape[d] == batch]
            out.append(fitting[0] if fitting else None)
        return out

    def _kind(self, chain: Chain, selected: list[RecurrentParameter]) -> _Kind:
        dims = self._dims
        shapes = tuple((tuple(t.shape), t.dtype) for t in chain.states[0])
        trainable = tuple(id(p.tensor) for p in selected if p.tensor.requires_grad)
        weights = tuple((name, t.dtype) for name, t in self._weights)
        key = (chain.form, shapes, tuple(dims), trainable, weights, _attributes(self.module))
        if key in self._kinds and not self._kinds[key].is_as_traced():
            self._kinds[key, len(self._kinds)] = self._kinds.pop(key)  # counts, but is not found again
        if key not in self._kinds:
            if len(self._kinds) >= MAX_KINDS:
                return _Kind(None, "attributes of the module, or its arguments, change all the time")
            self._kinds[key] = self._traced(chain, dims, set(trainable))
        return self._kinds[key]

    def _traced(self, chain: Chain, dims: list[int | None], trainable: set[int]) -> _Kind:
        """Trace the module at the first stream of the first call."""
        named = self._weights
        values = [t.detach().requires_grad_(id(t) in trainable) for _, t in named]
        like = [_stream(t.detach(), self.batch_dim) for t in chain.states[0]]
        inputs = [t if dim is None else _stream(t, dim) for t, dim in zip(chain.inputs[0], dims, strict=True)]
        form = chain.form

        def step(weights: list[Tensor], others: list[Tensor], state: Tensor) -> Tensor:
            parts = self.unflat(state.unsqueeze(0), like)
            given = iter(others)
            leaves: list[Any] = []
            for leaf in form.leaves:
                if leaf[0] == "plain":
                    leaves.append(leaf[2])
                else:
                    leaves.append(parts[leaf[1]] if leaf[0] == "state" else next(given))
            args, kwargs = pytree.tree_unflatten(leaves, form.spec)
            by_name = {name: w for (name, _), w in zip(named, weights, strict=True)}
            returned = pytree.tree_leaves(functional_call(self.module, by_name, args, kwargs))
            return self.flat([returned[i] for i in form.results]).squeeze(0)

        dtypes = {t.dtype for t in (*values, *inputs) if t.is_floating_point()} | {t.dtype for t in like}
        try:
            if len(dtypes) > 1:
                raise NotTraceable(f"it computes in several dtypes, {sorted(map(str, dtypes))}")
            holders = _holders(self.module)
            with _attributes_restored(self.module), torch.device("cpu"):
                traced = trace_step(step, values, inputs, self.flat(like).squeeze(0))
                constants = [(holders.get(id(t), partial(_itself, t)), held) for t, held in traced.constants]
                return _Kind(build_tape(traced, values), constants=constants)
        except NotTraceable as error:
            return _Kind(None, str(error))


def _stream(tensor: Tensor, dim: int) -> Tensor:
    """The first stream, in a dimension of size one."""
    return tensor.narrow(dim, 0, 1)


def _by_streams(steps: Tensor, dim: int | None, batch: int) -> Tensor:
    """An input of all steps ``(n, ...)`` as ``(n * B, ...)`` in the shape of one stream."""
    if dim is None:
        return steps.unsqueeze(1).expand(len(steps), batch, *steps.shape[1:]).flatten(0, 1)
    return steps.movedim(1 + dim, 1).flatten(0, 1).unsqueeze(dim + 1)


def _attributes(module: nn.Module) -> tuple[Any, ...]:
    """What the modules are and the plain values that their attributes hold: code may branch on them."""
    out: list[Any] = []
    for owner in module.modules():
        out.append(id(owner))
        for name, value in vars(owner).items():
            if name not in _MODULE_FIELDS or name == "training":
                out.append((name, _plain(value)))
        for hooks in (owner._forward_hooks, owner._forward_pre_hooks, owner._backward_hooks, owner._backward_pre_hooks):
            out += [key for key, hook in hooks.items() if not type(hook).__module__.startswith("sparse_rtrl.")]
    return tuple(out)


def _plain(value: Any, depth: int = 4) -> Any:
    """The plain values in an attribute: itself, those of a container, those of an object's own attributes."""
    if type(value) in PLAIN_ATTRIBUTES:
        return type(value), value  # 1 equals True
    if depth == 0 or isinstance(value, (Tensor, nn.Module, type)):
        return None
    if isinstance(value, dict):
        return tuple((str(name), _plain(part, depth - 1)) for name, part in value.items()) if len(value) < 32 else None
    if isinstance(value, (list, tuple)):
        return tuple(_plain(part, depth - 1) for part in value) if len(value) < 32 else None
    return _plain(vars(value), depth - 1) if hasattr(value, "__dict__") else None


def _holders(module: nn.Module) -> dict[int, Callable[[], Any]]:
    """For each tensor in an attribute, or in a container there, by identity, how to get what is there now."""
    out: dict[int, Callable[[], Any]] = {}
    for owner in module.modules():
        for name, value in vars(owner).items():
            if isinstance(value, Tensor):
                out[id(value)] = partial(getattr, owner, name, None)
            elif isinstance(value, (list, tuple, dict)) and name not in _MODULE_FIELDS:
                for place, part in value.items() if isinstance(value, dict) else enumerate(value):
                    if isinstance(part, Tensor):
                        out[id(part)] = partial(_part_of, owner, name, place)
    return out


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _part_of(owner: nn.Module, name: str, place: Any) -> Any:
    try:
        return getattr(owner, name)[place]
    except (AttributeError, IndexError, KeyError):
        return None


@contextmanager
def _attributes_restored(module: nn.Module) -> Iterator[None]:
    """Let attributes of modules be afterwards what they were before: a traced call may have put its tensors there."""
    kept = [(owner, dict(vars(owner))) for owner in module.modules()]
    inner = [
        (value, value.copy())
        for _, attributes in kept
        for name, value in attributes.items()
        if isinstance(value, (list, dict, set)) and name not in _MODULE_FIELDS
    ]
    try:
        yield
    finally:
        for owner, attributes in kept:
            vars(owner).clear()
            vars(owner).update(attributes)
        for value, before in inner:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)


_MODULE_FIELDS = frozenset(vars(nn.Module()))
