"""The calls of a module between two calls of ``carry``: what went in, what came out, and whether they are a chain.

A segment is a chain of steps if the state that ``carry`` returned goes into the first call as it is, the state that
each call returns goes into the next, and the last one is the state that ``carry`` gets; nothing else that needs a
gradient goes in. Then the module's function is all there is between the two states, and can be traced.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device)
"""Arguments that are part of what a step is, beside its tensors."""


@dataclass(frozen=True)
class Call:
    """One call of the module.

    Attributes:
        args, kwargs: its arguments.
        result: what it returned.
        versions: for each tensor in them, in order, how often it had been changed in place when the call ended.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    versions: list[int]


@dataclass(frozen=True)
class Form:
    """What the calls of a chain have in common.

    Attributes:
        spec: structure of the arguments ``(args, kwargs)``.
        leaves: for each argument what it is: ``("plain", type, value)``, ``("state", i)`` for the ``i``-th tensor of
            the state, ``("tensor", shape, dtype)`` for another tensor.
        results: which leaves of the result are the tensors of the state.
    """

    spec: Any
    leaves: tuple[Any, ...]
    results: tuple[int, ...]


@dataclass(frozen=True)
class Chain:
    """A chain of calls.

    Attributes:
        form: what they have in common.
        inputs: for each call its tensors beside the state.
        states: the tensors of the state before each call, and behind the last.
    """

    form: Form
    inputs: list[list[Tensor]]
    states: list[list[Tensor]]


class NoChain(Exception):
    """The calls are no chain; says why."""


class _Hook:
    """The hook on a module; a copy of the module keeps one that does nothing."""

    __name__ = "note_call"  # scripting a module asks for it

    def __init__(self, calls: Calls | None = None) -> None:
        self._calls = None if calls is None else weakref.ref(calls)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if torch.compiler.is_compiling():
            return  # what is compiled is not seen
        calls = None if self._calls is None else self._calls()
        if calls is not None and calls.listening:
            calls.note(args, kwargs, result)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


@dataclass(eq=False)
class Calls:
    """Notes the calls of a module.

    Attributes:
        module: the module.
        listening: whether calls are noted: from :meth:`begin` to :meth:`end`.
    """

    module: nn.Module
    listening: bool = False
    _entry: list[weakref.ref[Tensor]] = field(default_factory=list)
    """Not held on to: behind the state stands the learner, which would never be freed."""
    _entry_versions: list[int] = field(default_factory=list)
    _current: set[int] = field(default_factory=set)
    """The tensors that a next step may get: those of the entry, or what the last call returned."""
    _noted: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        handle = self.module.register_forward_hook(_Hook(self), with_kwargs=True)
        weakref.finalize(self, handle.remove)

    def note(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note one call, if it gets a tensor of the state that was returned last."""
        if not torch.is_grad_enabled():
            return  # an evaluation beside the stream: what it returns has no graph
        if torch.is_autocast_enabled("cpu"):
            return  # a trace would not know of it
        given: list[Tensor] = []
        _tensors(args, given)
        _tensors(kwargs, given)
        if not any(id(t) in self._current for t in given):
            return  # something else than a step; held on to, it would keep all that is behind it
        returned: list[Tensor] = []
        _tensors(result, returned)
        versions = [t._version for t in (*given, *returned)]
        self._noted.append(Call(args, kwargs, result, versions))
        self._current = {id(t) for t in returned}

    def begin(self, entry: list[Tensor]) -> None:
        """Note calls from now on.

        Args:
            entry: the tensors of the state that ``carry`` returns, each of any shape ``(..., B, ...)``.
        """
        self._entry, self._noted, self.listening = [weakref.ref(t) for t in entry], [], True
        self._entry_versions = [t._version for t in entry]
        self._current = {id(t) for t in entry}

    def end(self) -> list[Call]:
        """Note no more calls, and forget those that were noted.

        Returns:
            What was noted.
        """
        noted, self._noted, self.listening = self._noted, [], False
        self._current = set()
        return noted

    def chain(self, noted: list[Call], end: list[Tensor]) -> Chain:
        """The noted calls as a chain from the entry to a state.

        Args:
            noted: what :meth:`end` returned.
            end: the tensors of that state, each of any shape ``(..., B, ...)``.

        Raises:
            NoChain: saying why they are none.
        """
        if not noted:
            raise NoChain("the module was not called with the state as it was returned")
        results = _places(end, pytree.tree_leaves(noted[-1].result))
        if results is None:
            raise NoChain("the state is not what the module returned last, but something made of it")
        entry = [t for ref in self._entry if (t := ref()) is not None]
        if len(entry) != len(self._entry):
            raise NoChain("the module was not called with the state as it was returned")
        state, form = entry, None
        versions = self._entry_versions
        inputs, states = [], [state]
        structure: Any = None
        for call in noted:
            leaves: list[Any] = []
            own = _flatten((call.args, call.kwargs), leaves)
            structure = own if structure is None else structure
            returned: list[Any] = []
            _flatten(call.result, returned)
            tensors = [leaf for leaf in (*leaves, *returned) if isinstance(leaf, Tensor)]
            noted_versions = dict(zip(map(id, tensors), call.versions, strict=True))
            if [noted_versions.get(id(t)) for t in state] != versions:
                raise NoChain("a call of the module did not get the state of the call before as it was returned")
            others, kinds = _others(leaves, state, noted_versions)
            if form is None:
                form = Form(pytree.tree_flatten((call.args, call.kwargs))[1], kinds, results)
            if kinds != form.leaves or own != structure:
                raise NoChain("the calls of the segment differ in their arguments")
            state = _at(results, returned)
            versions = [noted_versions[id(t)] for t in state]
            inputs.append(others)
            states.append(state)
        if [t._version for t in end] != versions:
            raise NoChain("the state was changed in place after the module had returned it")
        assert form is not None
        return Chain(form, inputs, states)


def _others(leaves: list[Any], state: list[Tensor], versions: dict[int, int]) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The tensors among arguments beside the state, and what each argument is.

    Raises:
        NoChain: if one of them cannot be traced.
    """
    by_id = {id(t): i for i, t in enumerate(state)}
    others: list[Tensor] = []
    kinds: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if id(leaf) in by_id:
                kinds.append(("state", by_id[id(leaf)]))
                continue
            if leaf.requires_grad:
                raise NoChain("an input of the module needs a gradient")
            if leaf._version != versions[id(leaf)]:
                raise NoChain("an input of the module was changed in place after it had been used")
            if leaf.is_sparse or leaf.layout is not torch.strided or type(leaf) is not Tensor:
                raise NoChain(f"an input of the module is a {type(leaf).__name__} of layout {leaf.layout}")
            kinds.append(("tensor", tuple(leaf.shape), leaf.dtype))
            others.append(leaf)
        elif type(leaf) in PLAIN:
            kinds.append(("plain", type(leaf), leaf))  # with its type: 1 equals True
        else:
            raise NoChain(f"an argument of the module is a {type(leaf).__name__}")
    if {k[1] for k in kinds if k[0] == "state"} != set(range(len(state))):
        raise NoChain("a call of the module did not get the whole state")
    return others, tuple(kinds)


def _at(results: tuple[int, ...], returned: list[Any]) -> list[Tensor]:
    """The tensors of the state among what a call returned.

    Raises:
        NoChain: if they are not there.
    """
    if max(results) >= len(returned) or not all(isinstance(returned[i], Tensor) for i in results):
        raise NoChain("the calls of the segment differ in what they return")
    return [returned[i] for i in results]


def _places(wanted: list[Tensor], among: list[Any]) -> tuple[int, ...] | None:
    """Where tensors stand among others, by identity."""
    found = []
    for tensor in wanted:
        place = next((i for i, leaf in enumerate(among) if leaf is tensor), None)
        if place is None:
            return None
        found.append(place)
    return tuple(found)


def _tensors(value: Any, out: list[Tensor]) -> None:
    """Append every tensor in a nest, in the order of its leaves."""
    if isinstance(value, Tensor):
        out.append(value)
    elif type(value) in (tuple, list):
        for part in value:
            _tensors(part, out)
    elif value and not isinstance(value, PLAIN):
        out += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _flatten(value: Any, leaves: list[Any]) -> Any:
    """Append the leaves of a nest as pytree orders them; returns its structure, which compares fast."""
    if type(value) in (tuple, list):
        return type(value), [_flatten(part, leaves) for part in value]
    if isinstance(value, (Tensor, *PLAIN)):
        leaves.append(value)
        return None
    if type(value) is dict and not value:
        return dict
    found, spec = pytree.tree_flatten(value)
    leaves += found
    return spec
