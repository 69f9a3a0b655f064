"""One module through Carry against backpropagation through the whole past, and what came of it."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sparse_rtrl
from sparse_rtrl import Carry
from sparse_rtrl.capture import taped
from sparse_rtrl.learners.methods import Exact

EXACT = 1e-12
"""Largest relative error of an exact gradient in float64."""

STEPS = 10

DENSE = "the dense one is computed instead"
"""Part of the note that Carry gives of parameters on the dense path."""

Run = Callable[[nn.Module, Tensor, Any], tuple[Any, Any]]


@dataclass
class Recurrence:
    """A module, and how one drives it.

    Attributes:
        module: what is given to Carry.
        run: ``(module, x (n, ...), state) -> (outputs, state)``, a segment of ``n`` steps.
        inputs: ``(STEPS, ...)``.
        state: the first state.
        batch_dim: dimension of the streams in the state's tensors.
        bare: whether the first state, often None, goes to the module and not through Carry.
        begin: called before a pass over the inputs, for modules that keep something inside.
        detach: called after every segment that Carry closes, for modules that keep something inside.
        run_bptt: as ``run``, for BPTT, where plain autograd needs copies of what the module overwrites.
    """

    module: nn.Module
    run: Run
    inputs: Tensor
    state: Any
    batch_dim: int = 0
    bare: bool = False
    begin: Callable[[nn.Module], None] = field(default=lambda module: None)
    detach: Callable[[nn.Module], None] = field(default=lambda module: None)
    run_bptt: Run | None = None

    def to(self, dtype: torch.dtype) -> Recurrence:
        """A copy in another dtype; of a module that has not run yet."""
        state = pytree.tree_map(lambda leaf: leaf.to(dtype) if _is_float(leaf) else leaf, self.state)
        return replace(self, module=copy.deepcopy(self.module).to(dtype), inputs=self.inputs.to(dtype), state=state)


@dataclass
class Outcome:
    """What a row of the table says.

    Attributes:
        verdict: ``"exact"``, ``"refused"``, ``"wrong"``, or ``"foreign error"`` where an error is not the library's.
        errors: largest relative error of a parameter's gradient, by segment length.
        rounding: the same for BPTT where float32 arithmetic is involved.
        truncated: the same for truncated BPTT: what the past contributes.
        paths: how the segments were captured.
        dense: names of the parameters on the dense path.
        carried: how many parameters are carried.
        message: of the refusal or error.
        state: shapes of the state's tensors.
        streams: how many.
    """

    verdict: str = "exact"
    errors: dict[int, float] = field(default_factory=dict)
    rounding: float = 0.0
    truncated: float = 0.0
    paths: set[str] = field(default_factory=set)
    dense: set[str] = field(default_factory=set)
    carried: int = 0
    message: str = ""
    state: str = ""
    streams: int = 0

    def settle(self, verdict: str, message: str = "") -> None:
        """Keep the worst verdict of all segment lengths."""
        order = ["exact", "refused", "foreign error", "wrong"]
        if order.index(verdict) > order.index(self.verdict):
            self.verdict, self.message = verdict, message


def compare(
    recurrence: Recurrence, dtype: torch.dtype, arithmetic: torch.dtype, lengths: tuple[int, ...] = (1, 3)
) -> Outcome:
    """Run Carry in segments of each length against BPTT through the whole past.

    Where float32 arithmetic is involved, the truth is BPTT in float64, and Carry may have twice the error of BPTT in
    the arithmetic at hand and a rounding unit.

    Args:
        recurrence: the module and its loop; the module has not run yet.
        dtype: of the module and its inputs.
        arithmetic: the coarsest dtype that the module computes in.
        lengths: of the segments.
    """
    precise, recurrence = recurrence.to(torch.float64), recurrence.to(dtype)
    outcome = Outcome()
    for length in lengths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with without_rounding():
                truth, state = _bptt(precise, length)
                outcome.truncated = max(outcome.truncated, relative_error(_bptt(precise, length, cut=True)[0], truth))
            leaves = [leaf for leaf in pytree.tree_leaves(state) if _is_float(leaf)]
            outcome.state = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
            outcome.streams = leaves[0].shape[recurrence.batch_dim]
            allowed = EXACT
            if arithmetic == torch.float32:
                rounding = relative_error(_bptt(recurrence, length)[0], truth)
                outcome.rounding = max(outcome.rounding, rounding)
                allowed = 2 * rounding + torch.finfo(arithmetic).eps
        try:
            found = _carried(recurrence, length, outcome)
        except Exception as error:
            own = _raised_by_the_library(error)
            outcome.settle("refused" if own else "foreign error", f"{type(error).__name__}: {error}")
            continue
        outcome.errors[length] = relative_error(found, truth)
        if not outcome.errors[length] <= allowed:
            outcome.settle("wrong")
    return outcome


def without_rounding() -> AbstractContextManager[Any]:
    """``tensor.float()`` makes float64: some modules cast with it on the way."""
    return patch.object(Tensor, "float", Tensor.double)


def relative_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Largest relative error of any parameter's gradient; a gradient that should be zero has to be zero."""
    worst = 0.0
    for name, expected in truth.items():
        difference = float((found[name].double() - expected.double()).norm())
        size = float(expected.norm())
        worst = max(worst, difference / size if size else (float("inf") if difference else 0.0))
    return worst


def _segments(recurrence: Recurrence, length: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, STEPS, length):
        yield start, recurrence.inputs[start : start + length]


def _loss(outputs: Any, state: Any, seed: int) -> Tensor:
    """Distance of the outputs and of the new state from random targets."""
    generator = torch.Generator().manual_seed(seed)
    total: Any = 0.0
    for value in pytree.tree_leaves((outputs, state)):
        if _is_float(value):
            target = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
            total = total + ((value - target) ** 2).sum()
    return total


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            parameter.grad = None
    return found


def _bptt(recurrence: Recurrence, length: int, cut: bool = False) -> tuple[dict[str, Tensor], Any]:
    recurrence.begin(recurrence.module)
    state, total = _fresh(recurrence.state), 0.0
    for start, x in _segments(recurrence, length):
        outputs, state = (recurrence.run_bptt or recurrence.run)(recurrence.module, x, state)
        total = total + _loss(outputs, state, start)
        if cut:
            state = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, state)
    total.backward()
    return _gradients(recurrence.module), state


def _carried(recurrence: Recurrence, length: int, outcome: Outcome) -> dict[str, Tensor]:
    module = recurrence.module
    recurrence.begin(module)
    with _captures_noted(outcome), warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        try:
            carry = Carry(module, batch_dim=recurrence.batch_dim)
            state = _fresh(recurrence.state)
            if not recurrence.bare:
                state = carry(state)
            for start, x in _segments(recurrence, length):
                outputs, end = recurrence.run(module, x, state)
                state = carry(end)
                _loss(outputs, end, start).backward()
                recurrence.detach(module)
            outcome.carried = len(carry.influence())
        finally:
            found = _gradients(module)
            texts = [str(note.message) for note in notes]
            for names in (text.split(":")[0] for text in texts if DENSE in text):
                outcome.dense.update(names.split(", "))
    return found


@contextmanager
def _captures_noted(outcome: Outcome) -> Iterator[None]:
    """Note how each segment is captured, where the library decides it."""
    record = Exact._record

    def noting(self: Exact, captured: Any, steps: int) -> None:
        outcome.paths.add("tape" if isinstance(captured, taped.TapedSteps) else "factors")
        record(self, captured, steps)

    Exact._record = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Exact._record = record  # type: ignore[method-assign]


def _raised_by_the_library(error: Exception) -> bool:
    """Whether it comes from a ``raise`` of the library, and not from something that it called."""
    home = Path(sparse_rtrl.__file__).parent
    last = traceback.extract_tb(error.__traceback__)[-1]
    return home in Path(last.filename).parents and (last.line or "").startswith("raise")


def _fresh(state: Any) -> Any:
    """A copy, because some modules write into the state that they are given."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, state)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
