"""Traces one step of a recurrent module, with its vector-Jacobian product, at one stream.

The result is one functional graph of core ATen operations: from parameters, inputs, the state before and a row vector
``v`` to the state behind, ``v dh'/dh`` and ``v dh'/dθ`` of every parameter. Whatever way a parameter takes to the new
state, it stands in that graph: coverage is read from it, not sampled.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_rtrl.capture.decompositions import DECOMPOSITIONS

StepFunction: TypeAlias = Callable[[list[Tensor], list[Tensor], Tensor], Tensor]
"""``step(parameters, inputs, state (H,)) -> new state (H,)`` of one stream."""


class NotTraceable(Exception):
    """A step that cannot be traced, or whose graph holds something that is not understood; says what."""


MAX_OPERATIONS = 3000
"""Operations of a step, with its backward pass, beyond which it is not traced."""


@dataclass(frozen=True)
class TracedStep:
    """A step and its vector-Jacobian product as one graph.

    Attributes:
        graph: its nodes; what needs no evaluation is removed.
        parameters, inputs: placeholders of the parameters and of the inputs.
        state: placeholder of the state before the step, ``(H,)``.
        row: placeholder of the row vector ``v``, ``(H,)``.
        new_state: the state behind the step, ``(H,)``.
        before: ``v dh'/dh``, ``(H,)``; None if the new state does not depend on the old one.
        gradients: ``v dh'/dθ`` in the parameter's shape, for each parameter; None where there is no path.
        constants: tensors that the step uses without getting them, of any shapes, with what they hold.
    """

    graph: fx.GraphModule
    parameters: list[fx.Node]
    inputs: list[fx.Node]
    state: fx.Node
    row: fx.Node
    new_state: fx.Node
    before: fx.Node | None
    gradients: list[fx.Node | None]
    constants: list[tuple[Tensor, Tensor]]


def trace_step(step: StepFunction, parameters: Sequence[Tensor], inputs: Sequence[Tensor], state: Tensor) -> TracedStep:
    """Trace a step by running it once, forwards and backwards, and recording every operation.

    Args:
        step: what is traced.
        parameters: values of the parameters ``(...)``; those that require a gradient are differentiated.
        inputs: its other inputs at one stream, ``(...)``.
        state: the state before it, ``(H,)``.

    Raises:
        NotTraceable: if the step draws random numbers, branches on data, changes its inputs, or uses a trainable tensor
            that is not among its arguments; with the operation and, where it is known, the line of the user's code.
    """
    _refuse_own_backward(step, parameters, inputs, state)
    try:
        return _by_recording(step, parameters, inputs, state)
    except _NotFunctional:
        return _by_export(step, parameters, inputs, state)


class _Cuts(TorchFunctionMode):
    """Refuses what lets a backward pass be another one than that of the operations that run forward."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _VALUES:
            raise NotTraceable(f"what it does depends on the values of a tensor: {func.__name__}")
        tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        cut = func in _CUTS or (not torch.is_grad_enabled() and func not in _LOOKS)
        if cut and any(t.requires_grad for t in tensors):
            name = getattr(func, "__name__", str(func))
            raise NotTraceable(
                f"it cuts the graph, or hooks into it, where its state or a parameter goes through: {name}"
            )
        return func(*args, **(kwargs or {}))


_CUTS = (
    *(Tensor.detach, Tensor.detach_, torch.detach, torch.detach_, Tensor.register_hook, Tensor.requires_grad_),
    *(Tensor.new_tensor, torch.tensor, torch.as_tensor, torch.asarray),
    Tensor.data.__get__,  # type: ignore[attr-defined]
)
_FORM = ("shape", "device", "dtype", "requires_grad", "is_cuda", "layout", "ndim", "is_sparse", "grad_fn", "is_leaf")
_LOOKS = (
    *(getattr(Tensor, name).__get__ for name in _FORM),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.__len__),
)
"""What only looks at a tensor's form."""
_VALUES = (
    *(Tensor.tolist, Tensor.numpy, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__),
    *(Tensor.__array__, Tensor.__format__),
)
"""What looks at its numbers."""


def _refuse_own_backward(
    step: StepFunction, parameters: Sequence[Tensor], inputs: Sequence[Tensor], state: Tensor
) -> None:
    """Refuse a step whose backward pass may change while what it computes forward stays the same.

    That is so with custom functions, hooks, and graphs that are cut: a slope in them could come from anywhere, and a
    trace would keep the one that it saw, where the state does not show it.

    Raises:
        NotTraceable: saying what was found.
    """
    weights = [p.detach().clone().requires_grad_(p.requires_grad) for p in parameters]
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), _Cuts():
            new_state = step(weights, [i.detach().clone() for i in inputs], state.detach().clone().requires_grad_())
    except NotTraceable:
        raise
    except Exception as error:  # whatever the user's code does
        raise NotTraceable(f"tracing it failed: {type(error).__name__}: {_first_line(error)}") from error
    stack, seen = [new_state.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            raise NotTraceable(f"it has a backward pass of its own: {node.name()}")
        stack += [source for source, _ in node.next_functions]


class _NotFunctional(Exception):
    """A tensor was changed in place and read through another view of its memory."""


class _Recorder(TorchDispatchMode):
    """Records the operations below autograd as a functional graph, while they run."""

    def __init__(self, table: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.table = table
        self.known: dict[int, tuple[Tensor, fx.Node, int]] = {}
        """Tensors by identity, with their node and how many changes of their memory it has seen."""
        self.changes: dict[int, list[tuple[int, int]]] = {}
        """Ranges of memory that were changed in place, by memory, in order."""
        self.given: set[int] = set()
        self.constants: list[tuple[Tensor, Tensor]] = []
        """Tensors that are used without being given, with what they hold."""

    def placeholder(self, name: str, tensor: Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        self.given.add(_memory(tensor))
        return self._know(tensor, node)

    def _know(self, tensor: Tensor, node: fx.Node) -> fx.Node:
        node.meta["val"] = tensor.detach()
        self.known[id(tensor)] = (tensor, node, len(self.changes.get(_memory(tensor), ())))
        return node

    def node_of(self, value: Any) -> Any:
        """The node of a tensor; a tensor that is not known yet is a constant."""
        if not isinstance(value, Tensor):
            return value
        found = self.known.get(id(value))
        if found is None:
            if value.requires_grad:
                raise NotTraceable(f"it uses a trainable tensor {tuple(value.shape)} that is none of its arguments")
            name = f"constant_{len(self.known)}"
            self.constants.append((value, value.detach().clone()))
            self.root.register_buffer(name, self.constants[-1][1])
            return self._know(value, self.graph.get_attr(name))
        first, last = _range(value)
        if any(a < last and first < b for a, b in self.changes.get(_memory(value), [])[found[2] :]):
            raise _NotFunctional
        return found[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # what is made of other operations is recorded as these
            found = self.table[func](*args, **kwargs) if func in self.table else func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
        _refuse_operation(func, args)
        target, changed = func, None
        if func._schema.is_mutable:
            target, changed = _functional(func), args[0]
            if _memory(changed) in self.given:
                raise NotTraceable(f"it changes one of its inputs in place: {func}")
        if self.table and len(self.graph.nodes) > MAX_OPERATIONS:
            raise NotTraceable(f"it takes more than {MAX_OPERATIONS} operations")
        arguments, options = pytree.tree_map(self.node_of, (args, kwargs))
        out = func(*args, **kwargs)
        node = self.graph.call_function(target, arguments, options)
        if changed is not None and torch.Tag.inplace_view not in func.tags:
            self.changes.setdefault(_memory(changed), []).append(_range(changed))
        self._know_result(out, node)
        return out

    def _know_result(self, out: Any, node: fx.Node) -> None:
        if isinstance(out, Tensor):
            self._know(out, node)
            return
        node.meta["val"] = [t.detach() if isinstance(t, Tensor) else t for t in out]
        for i, part in enumerate(out):
            if isinstance(part, Tensor):
                self._know(part, self.graph.call_function(operator.getitem, (node, i)))


def _refuse_operation(func: Any, args: tuple[Any, ...]) -> None:
    """Refuse an operation whose result another run of the graph would not give.

    Raises:
        NotTraceable: naming it.
    """
    if func is torch.ops.aten.embedding.default and any(args[3:5]):
        raise NotTraceable("its embedding scales gradients by how often a word occurs, or they are sparse")
    if torch.Tag.nondeterministic_seeded in func.tags:
        raise NotTraceable(f"it draws random numbers: {func}")
    by_index = func in (
        torch.ops.aten.index.Tensor,
        torch.ops.aten.index_put.default,
        torch.ops.aten.index_put_.default,
    )
    if by_index and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        raise NotTraceable(f"how many entries it takes depends on the values of a tensor: {func} with a mask")
    if not by_index and {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
        raise NotTraceable(f"what it does depends on the values of a tensor: {func}")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _range(tensor: Tensor) -> tuple[int, int]:
    """The places in its memory that a tensor spans."""
    first = int(tensor.storage_offset())
    if not tensor.numel():
        return first, first
    reach = sum(int(n - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + 1 + reach


def _functional(func: Any) -> Any:
    """The operation without its effect on the first argument."""
    namespace, name = func._schema.name.split("::")
    mutated = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None) if name.endswith("_") else None
    if packet is None or len(mutated) != 1 or mutated[0].name != func._schema.arguments[0].name:
        raise _NotFunctional
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    for overload in (getattr(packet, name) for name in packet.overloads()):
        if [(a.name, str(a.type)) for a in overload._schema.arguments] == wanted:
            return overload
    raise _NotFunctional


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    return {**core_aten_decompositions(), **DECOMPOSITIONS}


def _by_recording(
    step: StepFunction, parameters: Sequence[Tensor], inputs: Sequence[Tensor], state: Tensor
) -> TracedStep:
    weights = [p.detach().clone().requires_grad_(p.requires_grad) for p in parameters]
    others = [i.detach().clone() for i in inputs]
    before = state.detach().clone().requires_grad_()
    row = torch.randn(state.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(state)
    recorder = _Recorder(_decompositions())
    of_weights = [recorder.placeholder(f"parameter_{i}", t) for i, t in enumerate(weights)]
    of_inputs = [recorder.placeholder(f"input_{i}", t) for i, t in enumerate(others)]
    of_state, of_row = recorder.placeholder("state", before), recorder.placeholder("row", row)
    wanted = [t for t in (before, *weights) if t.requires_grad]
    try:
        with _plain_kernels(), torch.enable_grad(), recorder:
            new_state = step(list(weights), list(others), before).clone()
            if new_state.requires_grad:
                found = torch.autograd.grad(new_state, wanted, row, allow_unused=True)
    except (NotTraceable, _NotFunctional):
        raise
    except Exception as error:  # whatever the user's code does under tracing
        raise NotTraceable(f"tracing it failed: {type(error).__name__}: {_first_line(error)}") from error
    if not new_state.requires_grad:
        raise NotTraceable("its new state does not depend on anything that is differentiated")
    results = [recorder.node_of(t) for t in (new_state, *found)]
    recorder.graph.output(tuple(r for r in results if r is not None))
    recorder.graph.eliminate_dead_code()
    gradients = iter(results[2:])
    return TracedStep(
        fx.GraphModule(recorder.root, recorder.graph),
        of_weights,
        of_inputs,
        of_state,
        of_row,
        results[0],
        results[1],
        [next(gradients) if w.requires_grad else None for w in weights],
        recorder.constants,
    )


def record_operations(function: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor]) -> fx.GraphModule:
    """The operations that a function of tensors runs, as a graph for arguments of the same shapes; no gradients.

    Args:
        function: what runs, of tensors ``(...)`` to tensors.
        arguments: its arguments, ``(...)``.
    """
    recorder = _Recorder({})
    given = [a.detach() for a in arguments]
    for i, tensor in enumerate(given):
        recorder.placeholder(f"argument_{i}", tensor)
    with torch.no_grad(), recorder:
        results = function(*given)
    recorder.graph.output(tuple(recorder.node_of(t) for t in results))
    recorder.graph.eliminate_dead_code()
    for node in recorder.graph.nodes:
        node.meta.clear()  # the numbers of this run
    return fx.GraphModule(recorder.root, recorder.graph)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Let attention and recurrent layers be made of plain operations."""
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    mkldnn = torch.backends.mkldnn
    before = mkldnn.set_flags(_enabled=False, _fp32_precision=None)[0]
    try:
        with math:
            yield
    finally:
        mkldnn.set_flags(_enabled=before, _fp32_precision=None)


def _by_export(step: StepFunction, parameters: Sequence[Tensor], inputs: Sequence[Tensor], state: Tensor) -> TracedStep:
    """Trace with torch's own tracer, which follows memory that is changed through views; it takes longer."""
    count = len(parameters)

    def flat(*arguments: Tensor) -> tuple[Tensor]:
        new_state = step(list(arguments[:count]), list(arguments[count:-1]), arguments[-1])
        return (new_state.clone(),)  # an output must not be a view of an input

    primals = [p.detach().clone().requires_grad_(p.requires_grad) for p in parameters]
    primals += [*(i.detach().clone() for i in inputs), state.detach().clone().requires_grad_()]
    try:
        with _plain_kernels(), torch.enable_grad():
            graph: Any = aot_export_joint_simple(
                flat, tuple(primals), trace_joint=True, decompositions=_decompositions()
            )
    except Exception as error:
        raise NotTraceable(f"tracing it failed: {type(error).__name__}: {_first_line(error)}") from error
    graph.graph.eliminate_dead_code()
    _refuse_random(graph)
    _refuse_trainable_constants(graph)
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    (result,) = (node for node in graph.graph.nodes if node.op == "output")
    outputs: list[Any] = list(result.args[0])  # type: ignore[arg-type]
    if len(places) != len(primals) + 1 or len(outputs) != len(primals) + 1:
        raise NotTraceable("its new state does not depend on anything that is differentiated")
    return TracedStep(
        graph,
        places[:count],
        places[count:-2],
        places[-2],
        places[-1],
        outputs[0],
        outputs[-1],
        outputs[1 : 1 + count],
        [],
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:300]


def _refuse_random(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise NotTraceable(f"it draws random numbers: {describe(node)}")


def _refuse_trainable_constants(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.op == "get_attr" and isinstance(value := getattr(graph, str(node.target)), Tensor):
            if value.requires_grad:
                raise NotTraceable(f"it uses a trainable tensor {tuple(value.shape)} that is none of its arguments")


def describe(node: fx.Node) -> str:
    """An operation by its name, with the line of the user's code that it comes from if that is known."""
    trace = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip()]
    where = f" ({trace[-2]}: {trace[-1]})" if len(trace) > 1 else ""
    return f"{node.target}{where}"
