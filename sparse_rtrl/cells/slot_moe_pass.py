"""The fused pass of ``SlotMoECell``; its operations are in ``csrc/slot_moe.h`` and ``csrc/cpu/slot_moe.inc``."""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_rtrl.cells.expert_bank import ExpertBank
from sparse_rtrl.cells.fused_pass import FusedPass, Kept
from sparse_rtrl.ops import dispatch

_WEIGHTS = (
    "slot_table",
    "key_value.weight",
    "control.weight",
    "control.bias",
    "core.weight",
    "experts.weight",
    "experts.bias",
)
"""Weights in the order of the operations."""
_METHODS = {"forward", "route", "transition", "update", "output"}
_TOGETHER = 2**14
"""Steps of streams that are evaluated in one call; what the operation keeps for a backward pass grows with it."""


class SlotMoEPass(FusedPass):
    """The fused pass of one cell.

    Args:
        cell: a :class:`~sparse_rtrl.SlotMoECell`, not of a subclass.
    """

    core: ClassVar[tuple[str, ...]] = (
        "slot_table",
        "query_token.weight",
        "query_token.bias",
        "key_value.weight",
        "control.weight",
        "control.bias",
        "core.weight",
    )
    expert: ClassVar[tuple[str, ...]] = ("experts.weight", "experts.bias")
    size_names: ClassVar[tuple[str, ...]] = ("num_heads", "read_slots", "write_slots", "top_k")

    def __init__(self, cell: Any) -> None:
        super().__init__(cell)
        self.options = (cell.read_weights,)
        self._softmax = cell.read_weights == "softmax"

    def as_written(self) -> bool:
        """See :meth:`FusedPass.as_written`."""
        cell = self.cell
        if torch.is_autocast_enabled("cpu") or not _METHODS.isdisjoint(vars(cell)):
            return False
        if (cell.read_weights,) != self.options:
            return False
        forwards = [nn.Linear.forward] * 4 + [ExpertBank.forward]
        modules: list[nn.Module] = [cell.query_token, cell.key_value, cell.control, cell.core, cell.experts]
        for module, forward in zip(modules, forwards, strict=True):
            if type(module).forward is not forward or "forward" in vars(module):
                return False
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return not any(getattr(module, name) for module in (cell, *modules) for name in hooks)

    def weights(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        """See :meth:`FusedPass.weights`."""
        return [tensors[name] for name in _WEIGHTS]

    def forward(self, xs: Tensor, state: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :meth:`FusedPass.forward`."""
        query_token = F.linear(xs, tensors["query_token.weight"], tensors["query_token.bias"])
        found: tuple[Tensor, Tensor, Tensor, Tensor] = dispatch.slot_moe_forward(
            state.contiguous(),
            query_token,
            self.weights(tensors),
            *self.sizes,
            self.cell.write_to == "least_used",
            self._softmax,
        )
        return found

    def outputs(self, xs: Tensor, slots: Tensor, index: Tensor) -> Tensor:
        """See :meth:`FusedPass.outputs`."""
        support = index[..., : -self.cell.top_k].flatten(0, 1)
        outputs: Tensor = self.cell.output(xs.flatten(0, 1), slots.flatten(0, 1), support)
        return outputs.unflatten(0, xs.shape[:2])

    @torch.no_grad()
    def evaluate(self, xs: Tensor, state: Tensor) -> tuple[Tensor, Tensor] | None:
        """See :meth:`FusedPass.evaluate`."""
        cell = self.cell
        biased = isinstance(cell.control.bias, Tensor) and isinstance(cell.experts.bias, Tensor)
        if not (biased and self.available("auto", state.device, state.dtype) and self.as_written()):
            return None
        if cell.slot_table.dtype != state.dtype:
            return None
        tensors = {name: operator.attrgetter(name)(cell) for name in (*self.core, *self.expert)}  # parametrized or not
        outputs = []
        for part in xs.split(max(1, _TOGETHER // max(1, len(state)))):
            state, slots, _, index = self.forward(part, state, tensors)
            outputs.append(self.outputs(part, slots, index))
        return torch.cat(outputs), state

    def pull_back_(self, v: Tensor, core: Tensor, experts: Tensor, cotangent: Tensor | None, kept: Kept) -> None:
        """See :meth:`FusedPass.pull_back_`."""
        dispatch.slot_moe_pull_back_(v, core, experts, cotangent, *kept, *self.sizes[:3], self._softmax)

    def transfer_(self, phi: Tensor, kept: Kept) -> None:
        """See :meth:`FusedPass.transfer_`."""
        dispatch.slot_moe_transfer_(phi, *kept, *self.sizes[:3], self._softmax)

    def add_immediate_(self, core: Tensor, experts: Tensor, phi: Tensor, rows: Tensor, kept: Kept) -> None:
        """See :meth:`FusedPass.add_immediate_`."""
        dispatch.slot_moe_commit_(core, experts, phi, rows, *kept, *self.sizes[:3], self._softmax)
