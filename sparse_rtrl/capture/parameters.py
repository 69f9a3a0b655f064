"""Which parameters of a cell carry influence, in which group, and in which columns of its influence matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_rtrl.cells.expert_bank import ExpertBank
from sparse_rtrl.cells.slot_cell import SlotCell


@dataclass(frozen=True)
class RecurrentParameter:
    """A trainable tensor that the state depends on.

    A parametrized weight (``torch.nn.utils.parametrize``) is carried as its effective weight, the value that the
    module uses; its gradient is pulled back through the parametrization when it is handed out.

    Attributes:
        name: qualified name of the tensor, ``module.attribute``.
        module: module that owns it.
        attribute: its name there.
        expert: whether it is a stacked ``(E, ...)`` parameter of an expert bank.
        shape: its shape; without the expert dimension for an expert parameter.
        start: its first column in the influence matrices of its group.
    """

    name: str
    module: nn.Module
    attribute: str
    expert: bool
    shape: torch.Size
    start: int

    @property
    def columns(self) -> slice:
        """Its columns in the influence matrices of its group."""
        return slice(self.start, self.start + self.shape.numel())

    @property
    def tensor(self) -> Tensor:
        """The tensor the module uses now, in its own shape; evaluates the parametrization of a parametrized weight."""
        return getattr(self.module, self.attribute)

    @property
    def trainable(self) -> bool:
        """Whether it, or any tensor behind its parametrization, requires a gradient."""
        return any(source.requires_grad for source in self.sources)

    @property
    def sources(self) -> list[nn.Parameter]:
        """The parameters behind it: those of its parametrization, or itself."""
        return _sources(self.module, self.attribute)


def _sources(module: nn.Module, attribute: str) -> list[nn.Parameter]:
    """The parameters behind an attribute: those of its parametrization, or itself."""
    if parametrize.is_parametrized(module, attribute):
        return list(module.parametrizations[attribute].parameters())  # type: ignore[index, union-attr]
    return [getattr(module, attribute)]


def _tensors_of(cell: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every parameter and parametrized weight of a cell as (name, owner, attribute), parametrizations left out."""
    for prefix, module in cell.named_modules():
        if isinstance(module, parametrize.ParametrizationList) or ".parametrizations." in f".{prefix}.":
            continue
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if parametrize.is_parametrized(module):
            names += list(module.parametrizations)  # type: ignore[arg-type]
        for name in names:
            yield f"{prefix}.{name}" if prefix else name, module, name


class _TakenParameters:
    """The parameters behind the tensors that were taken so far: none may be carried twice."""

    def __init__(self) -> None:
        self._plain: set[int] = set()
        self._in_parametrizations: set[int] = set()

    def take(self, name: str, sources: list[nn.Parameter], parametrized: bool) -> bool:
        """Take the parameters behind a tensor; False if it is one that was taken under another name.

        Raises:
            ValueError: if a parametrization shares one of its parameters with another tensor.
        """
        ids = {id(source) for source in sources}
        if not parametrized and ids <= self._plain:
            return False
        if ids & self._in_parametrizations or (parametrized and ids & self._plain):
            raise ValueError(f"the parametrization of {name} shares a part of its parameters with another tensor")
        (self._in_parametrizations if parametrized else self._plain).update(ids)
        return True


def _shape_in_bank(name: str, shape: torch.Size, num_experts: int) -> torch.Size:
    """Shape of one expert's part of a stacked parameter.

    Raises:
        ValueError: if it is not stacked over the experts.
    """
    if len(shape) == 0 or shape[0] != num_experts:
        raise ValueError(
            f"expert parameter {name} must have num_experts = {num_experts} as its first dimension,"
            f" got shape {tuple(shape)}"
        )
    return shape[1:]


@dataclass(frozen=True)
class ParameterGroups:
    """The parameters that carry influence: the core group, and one group of the same columns per expert.

    Attributes:
        core: parameters that are always active.
        expert: stacked parameters of the experts.
        num_experts: ``E``; 0 without expert parameters.
    """

    core: list[RecurrentParameter]
    expert: list[RecurrentParameter]
    num_experts: int

    @classmethod
    def of_cell(cls, cell: SlotCell) -> ParameterGroups:
        """The trainable recurrent parameters of a cell; those under ``cell.readout`` are left out.

        Raises:
            ValueError: if an expert parameter is not stacked over the experts or is shared with another module.
        """
        banks = [module for module in cell.modules() if isinstance(module, ExpertBank)]
        in_banks = {id(module) for bank in banks for module in bank.modules()}
        tensors = list(_tensors_of(cell))
        expert_sources = {
            id(source) for _, owner, name in tensors if id(owner) in in_banks for source in _sources(owner, name)
        }
        core: list[RecurrentParameter] = []
        experts: list[RecurrentParameter] = []
        taken = _TakenParameters()
        for name, owner, attribute in tensors:
            sources = _sources(owner, attribute)
            if name == "readout" or name.startswith("readout.") or not any(source.requires_grad for source in sources):
                continue
            expert = id(owner) in in_banks
            if not expert and expert_sources.intersection(map(id, sources)):
                raise ValueError(f"parameter {name} is shared between an expert bank and another module")
            if not taken.take(name, sources, parametrize.is_parametrized(owner, attribute)):
                continue
            shape = getattr(owner, attribute).shape
            if expert:
                shape = _shape_in_bank(name, shape, cell.num_experts)
            group = experts if expert else core
            start = group[-1].columns.stop if group else 0
            group.append(RecurrentParameter(name, owner, attribute, expert, shape, start))
        return cls(core, experts, cell.num_experts if experts else 0)

    @property
    def core_columns(self) -> int:
        """Columns of a core influence matrix, ``N_core``."""
        return self.core[-1].columns.stop if self.core else 0

    @property
    def expert_columns(self) -> int:
        """Columns of an expert's influence matrix, ``N_expert``."""
        return self.expert[-1].columns.stop if self.expert else 0

    @property
    def all(self) -> list[RecurrentParameter]:
        """Core parameters, then expert parameters."""
        return self.core + self.expert

    @property
    def count(self) -> int:
        """Number of recurrent parameters, all experts included."""
        return self.core_columns + self.num_experts * self.expert_columns

    def zero_gradients(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros for gradients by columns: core ``(N_core,)``, experts ``(E, N_expert)``, in the dtype of ``like``."""
        return like.new_zeros(self.core_columns), like.new_zeros(self.num_experts, self.expert_columns)

    def split(self, core: Tensor, experts: Tensor) -> list[Tensor]:
        """Cut gradients by columns into one per parameter in its own shape, in the order of :attr:`all`.

        Args:
            core: ``(N_core,)``.
            experts: ``(E, N_expert)``.
        """
        return [core[p.columns].view(p.shape) for p in self.core] + [
            experts[:, p.columns].reshape(-1, *p.shape) for p in self.expert
        ]
