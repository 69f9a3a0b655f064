"""What ties a learner to an optimizer: deferred gradients are added before each step, never to a changed one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Attachment:
    """Adds deferred gradients before every step of an optimizer.

    A deferred gradient must be added to ``.grad`` as the backward passes left it. If ``.grad`` was clipped, unscaled or
    otherwise changed since, adding would be wrong, so the step is refused. To notice this, ``.grad`` is copied each
    time that something is accumulated into it.

    Args:
        optimizer: the optimizer.
        flush: adds deferred gradients to ``.grad``.
        defers: whether it would add anything.
        parameters: those that are watched.

    Raises:
        ValueError: if the optimizer evaluates the loss several times in a step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        flush: Callable[[], None],
        defers: Callable[[], bool],
        parameters: Sequence[nn.Parameter],
    ) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "optimizer must take one gradient per step, got LBFGS: it evaluates the loss several times in a step,"
                " and every evaluation would move the streams on"
            )
        self.optimizer = optimizer
        self._flush, self._defers = flush, defers
        self._parameters: list[nn.Parameter] = []
        self._seen: dict[int, Tensor] = {}
        self._handles: list[Any] = [optimizer.register_step_pre_hook(self._before_step)]
        self.watch(parameters)

    def watch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Watch the gradients of these parameters from now on, beside those that are watched already."""
        if len(parameters) <= len(self._parameters) or not self._handles:
            return
        known = {id(p) for p in self._parameters}
        for parameter in parameters:
            if id(parameter) in known:
                continue
            self._parameters.append(parameter)
            if parameter.grad is not None:
                self._seen[id(parameter)] = parameter.grad.clone()
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._copy))

    def remove(self) -> None:
        """Leave further steps alone."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def flushes(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether the optimizer holds all of these parameters, and is given deferred gradients before it steps."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return bool(self._handles) and all(id(p) in held for p in parameters)

    def _copy(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        kept = self._seen.get(id(parameter))
        if (
            kept is None
            or kept.shape != gradient.shape
            or kept.dtype != gradient.dtype
            or kept.device != gradient.device
        ):
            self._seen[id(parameter)] = gradient.clone()
        else:
            kept.copy_(gradient)

    def _changed(self, parameter: nn.Parameter) -> bool:
        gradient, kept = parameter.grad, self._seen.get(id(parameter))
        if gradient is None or not bool(gradient.any()):
            return False  # cleared
        if kept is None or kept.shape != gradient.shape:
            return True
        return not bool(((gradient == kept) | (gradient.isnan() & kept.isnan())).all())

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(callable(argument) for argument in (*args, *kwargs.values())):
            raise RuntimeError(
                "step was given a closure: its zero_grad and backward come after deferred gradients were added. Call"
                " backward first, then step() without a closure"
            )
        if any(map(self._changed, self._parameters)) and self._defers():
            raise RuntimeError(
                ".grad was changed (clipped, unscaled, multiplied) since the backward pass, and gradients of sleeping"
                " experts are still deferred: call learner.flush() after backward and before changing .grad. No step"
                " was taken; zero_grad() and discard() drop this gradient"
            )
        self._flush()
