"""The largest Lyapunov exponent of a cell along its streams, and a loss that keeps it near a target."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from sparse_rtrl.cells.slot_cell import SlotCell, gather_slots, scatter_slots

Step = Callable[[Tensor, Tensor], Tensor]
"""One step of a recurrence, ``(x, state) -> new state``; the state is ``(B, ...)``."""


def step_of(cell: SlotCell) -> Step:
    """The step of a slot cell on its whole state ``(B, S, D)``; routing is chosen from the state without a gradient."""

    def step(x: Tensor, state: Tensor) -> Tensor:
        with torch.no_grad():
            routing = cell.route(x, state)
        content = cell.transition(x, gather_slots(state, routing.read), gather_slots(state, routing.write), routing)
        return scatter_slots(state, routing.write, content.to(state.dtype))

    return step


class _TwiceDifferentiable(TorchFunctionMode):
    """Writes ``hardsigmoid`` out, whose derivative PyTorch cannot differentiate again, though it is constant."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.hardsigmoid:
            return (args[0] / 6 + 0.5).clamp(0, 1)
        return func(*args, **(kwargs or {}))


def _per_stream(values: Tensor, like: Tensor) -> Tensor:
    """Values ``(B,)`` with as many dimensions as ``like``."""
    return values.view(-1, *[1] * (like.dim() - 1))


@torch.no_grad()
def carry_tangent(step: Step, xs: Tensor, state: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Move tangent vectors along a segment, and add up the logarithms of their growth (Benettin et al. 1980).

    Every step multiplies the vector by the state Jacobian with one Jacobian-vector product in forward mode and brings
    it back to length 1.

    Args:
        step: one step of the recurrence.
        xs: inputs ``(n, B, ...)``.
        state: state that enters the segment, ``(B, ...)``.
        tangent: a vector per stream in the shape of ``state``, each of length 1.

    Returns:
        ``log |J_n ... J_1 v|``, ``(B,)``, and the vectors after the segment, of length 1. A vector that a Jacobian maps
        to zero stays zero, and each such step counts as the logarithm of the smallest number above zero.
    """
    smallest = torch.finfo(tangent.dtype).tiny
    growth = tangent.new_zeros(len(tangent))
    with parametrize.cached():
        for x in xs:
            state, tangent = torch.func.jvp(partial(step, x), (state,), (tangent,))  # type: ignore[misc]
            length = tangent.flatten(1).norm(dim=1).clamp_min(smallest)
            growth += length.log()
            tangent = tangent / _per_stream(length, tangent)
    return growth, tangent


def tangent_growth(step: Step, xs: Tensor, state: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    r"""As :func:`carry_tangent`, differentiable with respect to the parameters of ``step`` and to ``state``.

    With ``w`` the direction of ``J_n ... J_1 v`` the derivative of the logarithm of its length is

    .. math:: d \log \lVert J_n \cdots J_1 v \rVert = w^\top d(J_n \cdots J_1) v \,/\, \lVert J_n \cdots J_1 v \rVert,

    which is that of ``<g, v>`` at constant ``v`` and ``w``, where ``g = (J_n ... J_1)^T w`` is one backward pass
    through the segment. It is differentiated once more. Forward mode is not differentiated: in PyTorch the derivative
    of the forward derivative of ``layer_norm`` is wrong. ``tangent`` is taken as a constant, and a vector that became
    zero has the gradient zero.

    Args:
        step: its operations need second derivatives.
        xs: inputs ``(n, B, ...)``.
        state: state that enters the segment, ``(B, ...)``; it may belong to a graph.
        tangent: ``(B, ...)``, each of length 1.

    Returns:
        The logarithms ``(B,)``, and the vectors after the segment, detached and of length 1.
    """
    tangent = tangent.detach()
    growth, after = carry_tangent(step, xs, state.detach(), tangent)
    if not torch.is_grad_enabled():
        return growth, after
    entry = end = state if state.requires_grad else state.detach().requires_grad_()
    # A cache of its own: what was cached without gradients above would hide parametrized weights from the gradient.
    with _TwiceDifferentiable(), parametrize.cached():
        for x in xs:
            end = step(x, end)
    (pulled_back,) = torch.autograd.grad(end, entry, after, create_graph=True)
    alive = after.flatten(1).any(1)
    scale = torch.where(alive, torch.exp(-growth), 0.0)
    product = (pulled_back * tangent).flatten(1).sum(1) * scale  # 1 wherever the vector is alive
    return growth + (product - product.detach()), after


class LyapunovRegularizer:
    r"""The finite-time largest Lyapunov exponent along parallel streams, and its distance from a target as a loss.

    A tangent vector per stream is carried along, so that it turns towards the direction that grows fastest. For a
    segment of ``n`` steps from state ``h`` with tangent ``v`` of length 1 the loss is the mean over the streams of

    .. math:: (\lambda - \lambda_{target})^2, \qquad
              \lambda = \tfrac1n \log \lVert J_n \cdots J_1 v \rVert.

    Pushing exponents towards zero keeps gradients from vanishing and from exploding (Engelken 2023, "Gradient
    flossing"); there all exponents of a spectrum are penalised, here the largest.

    What its gradient is: the derivative of the segment's ``λ`` with respect to all parameters the state depends on, at
    fixed routing and fixed ``v``. With a learner, pass its ``entry_state``: the derivative then includes the whole past
    of the trajectory ``h``, exact for parameters that did not change on the way. The tangent that enters is a constant,
    so how earlier Jacobians turned it is left out; for a segment that begins with the stream nothing is left out.

    Args:
        cell: the cell.
        batch_size: streams ``B``.
        weight: of the loss in :meth:`loss`; with 0 the exponent is only watched, which costs less.
        target: exponent that is aimed at, in nats per step.
        seed: of the first tangent vectors.

    Raises:
        ValueError: if ``weight`` is negative or one of the numbers not finite.

    Source: G. Benettin, L. Galgani, A. Giorgilli, J.-M. Strelcyn, Lyapunov characteristic exponents for smooth
    dynamical systems, Meccanica 1980; R. Engelken, Gradient flossing: improving gradient descent through dynamic
    control of Jacobians, NeurIPS 2023.
    """

    def __init__(
        self, cell: SlotCell, batch_size: int, weight: float = 0.0, target: float = 0.0, seed: int = 0
    ) -> None:
        if not isinstance(cell, SlotCell):
            raise ValueError(f"cell must be a SlotCell for the Lyapunov exponent, got {type(cell).__name__}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be finite and at least 0, got {weight}")
        if not math.isfinite(target):
            raise ValueError(f"target must be finite, got {target}")
        self.cell = cell
        self.weight = weight
        self.target = target
        self._generator = torch.Generator().manual_seed(seed)
        self._step = step_of(cell)
        like = cell.initial_state(batch_size)
        self._tangent = torch.empty_like(like)
        self._growth = like.new_zeros(batch_size, dtype=torch.float64)
        self._steps = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        self._since_line = (0.0, 0)  # growth and steps since the last call of take_exponent
        self.reset()

    def reset(self, streams: Tensor | None = None) -> None:
        """Begin with new random tangent vectors.

        Args:
            streams: mask ``(B,)`` of the streams that start anew; None for all.
        """
        if streams is None:
            streams = torch.ones_like(self._steps, dtype=torch.bool)
        fresh = torch.randn(self._tangent.shape, generator=self._generator, dtype=torch.float64).to(self._tangent)
        fresh /= fresh.flatten(1).norm(dim=1).view(-1, 1, 1)
        self._tangent = torch.where(streams.view(-1, 1, 1), fresh, self._tangent)
        self._growth = self._growth.masked_fill(streams, 0.0)
        self._steps = self._steps.masked_fill(streams, 0)

    def loss(self, xs: Tensor, entry: Tensor) -> Tensor:
        """Take the exponent of a segment, move the tangent vectors along, and penalise its distance from the target.

        Args:
            xs: inputs of the segment, ``(n, B, ...)``.
            entry: state that entered it, ``(B, S, D)``: ``entry_state`` of a learner, whose gradient then goes through
                the past, or a detached state.

        Returns:
            ``weight`` times the mean over the streams of the squared distance, a scalar to add to the loss of the
            segment before its one backward pass; a constant 0 if ``weight`` is 0.
        """
        with torch.set_grad_enabled(self.weight > 0):
            growth, self._tangent = tangent_growth(self._step, xs, entry, self._tangent)
            exponent = growth / len(xs)
            loss = self.weight * (exponent - self.target).square().mean()
        self._growth = self._growth + growth.detach()
        self._steps = self._steps + len(xs)
        logarithm, steps = self._since_line
        self._since_line = (logarithm + float(growth.detach().sum()), steps + growth.numel() * len(xs))
        return loss

    @property
    def exponent(self) -> float:
        """Exponent over all steps since the streams began, in nats per step, over the streams; NaN before a step."""
        steps = int(self._steps.sum())
        return float(self._growth.sum()) / steps if steps else math.nan

    def take_exponent(self) -> float:
        """Exponent over the steps since the last call, in nats per step, over the streams; NaN if there were none."""
        growth, steps = self._since_line
        self._since_line = (0.0, 0)
        return growth / steps if steps else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Tangent vectors, sums and random state; with it the regularizer goes on bit for bit."""
        return {
            "tangent": self._tangent.clone(),
            "growth": self._growth.clone(),
            "steps": self._steps.clone(),
            "since_line": self._since_line,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: if its tangent vectors have another shape; nothing is changed then.
        """
        if state["tangent"].shape != self._tangent.shape:
            raise ValueError(
                f"state must have tangent vectors {tuple(self._tangent.shape)}, got {tuple(state['tangent'].shape)}"
            )
        self._tangent = state["tangent"].to(self._tangent).clone()
        self._growth, self._steps = state["growth"].to(self._growth).clone(), state["steps"].to(self._steps).clone()
        self._since_line = state["since_line"]
        self._generator.set_state(state["generator"])
