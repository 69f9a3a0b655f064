"""Capture, checks and influence of one cell: what every front end of the library runs on."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from sparse_rtrl import ops
from sparse_rtrl.errors import ContractError, NonFiniteError
from sparse_rtrl.estimate import check_memory
from sparse_rtrl.influence import Influence
from sparse_rtrl.jacobian import JacobianCapture, StepJacobian
from sparse_rtrl.parameters import ParameterGroups
from sparse_rtrl.plan import CatchUp
from sparse_rtrl.slot_cell import Routing, SlotCell


class Engine:
    """Capture and influence of one cell, shared by :class:`RTRL` and :class:`~sparse_rtrl.BlockRTRL`.

    Args:
        cell: the cell.
        batch_size: streams ``B``.
        buffer: segments kept for sleeping experts, or ``"auto"``.
        catch_up: how sleeping experts catch up, see :class:`~sparse_rtrl.influence.Influence`.
        backend: what computes, see :func:`sparse_rtrl.ops.select`.

    Raises:
        ContractError: if the cell has modules that couple the rows of a batch or draw random numbers.
        MemoryError: if the influence does not fit, with the numbers.
    """

    def __init__(
        self,
        cell: SlotCell,
        batch_size: int,
        buffer: int | Literal["auto"],
        catch_up: CatchUp,
        backend: ops.Backend = "auto",
    ) -> None:
        if not isinstance(cell, SlotCell):
            raise TypeError(f"cell must be a SlotCell, got {type(cell).__name__}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        refused = [
            f"{name or type(module).__name__} ({type(module).__name__}) {why}"
            for name, module in cell.named_modules()
            for why in _refusals(module)
        ]
        if refused:
            raise ContractError(refused)
        self.cell = cell
        self.batch_size = batch_size
        self.buffer: int | Literal["auto"] = buffer
        self.catch_up = catch_up
        self.backend: ops.Backend = backend
        self.steps = 0
        self._build()

    def _build(self) -> None:
        self.groups = ParameterGroups(self.cell)
        if not self.groups.all:
            raise ValueError("cell has no trainable recurrent parameter: there is no influence to carry")
        # Recurrent parameters that are frozen now, watched in case they are unfrozen later.
        self._frozen = [
            p for name, p in self.cell.named_parameters() if not p.requires_grad and not name.startswith("readout.")
        ]
        with torch.no_grad():
            tensors = self.tensors()
        self._expected = [(t.shape, t.dtype, t.device) for t in tensors]
        like = tensors[0]
        check_memory(self.groups, self.cell.hidden_size, self.batch_size, like)
        self.dtype, self.device = like.dtype, like.device
        self.capture = JacobianCapture(self.cell, self.groups)
        self.influence = Influence(
            self.groups,
            self.batch_size,
            self.cell.num_slots,
            self.cell.slot_size,
            self.buffer,
            self.catch_up,
            like.dtype,
            like.device,
            self.backend,
        )

    def tensors(self) -> list[Tensor]:
        """The tensors the cell uses now for its recurrent parameters, in the order of ``groups.all``."""
        return [p.tensor for p in self.groups.all]

    def checked_tensors(self) -> list[Tensor]:
        """As :meth:`tensors`, after checking that they are still those the influence was built for.

        Raises:
            RuntimeError: if a parameter changed its shape, dtype or device.
        """
        if any(p.requires_grad for p in self._frozen):
            self._unfreeze()
        tensors = self.tensors()
        for parameter, tensor, expected in zip(self.groups.all, tensors, self._expected, strict=True):
            now = (tensor.shape, tensor.dtype, tensor.device)
            if now != expected:
                raise RuntimeError(
                    f"parameter {parameter.name} was {_describe(*expected)} when the learner was built and is"
                    f" {_describe(*now)} now: build a new learner after changing a cell"
                )
        return tensors

    def _unfreeze(self) -> None:
        names = [
            name for name, p in self.cell.named_parameters() if any(p is f and f.requires_grad for f in self._frozen)
        ]
        warnings.warn(f"{', '.join(names)}: trainable from now on; its influence starts at zero", stacklevel=2)
        old = self.influence
        self._build()
        self.influence.adopt(old)

    def step(self, x: Tensor, state: Tensor, routing: Routing, tensors: list[Tensor]) -> StepJacobian:
        """Capture one step and check that its Jacobians are finite. Changes nothing.

        Args:
            x: ``(B, ...)``.
            state: state that enters the step, ``(B, S, D)``, detached.
            routing: what the step touches.
            tensors: from :meth:`checked_tensors`.

        Raises:
            NonFiniteError: if a Jacobian holds NaN or infinity.
        """
        step = self.capture.step(x, state, routing, tensors)
        total = step.Jh.sum() + step.core.delta.sum() + step.expert.delta.sum()
        if not torch.isfinite(total):
            self._raise_non_finite(step)
        return step

    def _raise_non_finite(self, step: StepJacobian) -> None:
        kinds = [("the state Jacobian", step.Jh), ("the immediate Jacobian of the core group", step.core.delta)]
        for name, value in kinds:
            bad = (~torch.isfinite(value.flatten(1))).any(1)
            if bool(bad.any()):
                raise NonFiniteError(self.steps, bad.nonzero().flatten().tolist(), name)
        bad = (~torch.isfinite(step.expert.delta)).flatten(2).any(2)  # (B, k)
        if bool(bad.any()):
            experts = sorted(set(step.routing.experts[bad].tolist()))
            streams = bad.any(1).nonzero().flatten().tolist()
            raise NonFiniteError(self.steps, streams, f"the immediate Jacobian of experts {experts}")

    def add_to_grad(self, core: Tensor, experts: Tensor) -> None:
        """Add gradients with respect to the carried tensors to ``.grad``, back through parametrizations."""
        for parameter, gradient in zip(self.groups.all, self.groups.split(core, experts), strict=True):
            if not parameter.trainable or not bool(gradient.any()):
                continue
            with torch.enable_grad():
                tensor = parameter.tensor
            if tensor.is_leaf:
                tensor.grad = gradient.clone() if tensor.grad is None else tensor.grad.add_(gradient)
            else:
                torch.autograd.backward(tensor, gradient)

    def flush(self) -> None:
        """Add to ``.grad`` what sleeping experts are owed and every loss row that was not handed out yet."""
        self.add_to_grad(*self.influence.flush())

    def check_routing(self, routing: Routing) -> None:
        """Check that a routing is well formed.

        Raises:
            ContractError: on wrong shapes or dtypes, and on duplicate or out-of-range indices.
        """
        for name, index, size, owner in (
            ("read", routing.read, self.cell.num_slots, "num_slots"),
            ("write", routing.write, self.cell.num_slots, "num_slots"),
            ("experts", routing.experts, self.cell.num_experts, "num_experts"),
        ):
            if index.dim() != 2 or index.shape[0] != self.batch_size or index.dtype != torch.int64:
                raise ContractError(
                    [f"routing.{name} must be int64 ({self.batch_size}, k), got {index.dtype} {tuple(index.shape)}"]
                )
            for stream, row in enumerate(index.tolist()):
                if len(set(row)) != len(row):
                    raise ContractError([f"routing.{name} must be distinct within a row, got {row} in stream {stream}"])
                if row and not (min(row) >= 0 and max(row) < size):
                    raise ContractError(
                        [f"routing.{name} must lie in 0 ... {owner} - 1 = {size - 1}, got {row} in stream {stream}"]
                    )


def _refusals(module: nn.Module) -> list[str]:
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
        return ["couples the rows of the batch in training; use a norm per row, or eval()"]
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
        return ["draws random numbers in training, so a captured step is not the step that ran; remove it, or eval()"]
    return []


def _describe(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f"{dtype} {tuple(shape)} on {device}"
