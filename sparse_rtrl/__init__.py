"""Exact online gradients for recurrent networks with slot memory and mixtures of experts."""

from sparse_rtrl._moved import find_moved_modules
from sparse_rtrl.cells import (
    ELSTMCell,
    LRUCell,
    MambaCell,
    RetentionCell,
    RWKVCell,
    SlotMoECell,
    SparseLatentMoECell,
)
from sparse_rtrl.cells.diagonal_cell import DiagonalCell, Given, Learned, Mapped
from sparse_rtrl.cells.expert_bank import ExpertBank, expert_linear
from sparse_rtrl.cells.slot_cell import Routing, SlotCell
from sparse_rtrl.errors import ContractError, DisagreementError, NonFiniteError
from sparse_rtrl.influence.estimate import Estimate, estimate
from sparse_rtrl.influence.tree import CircularTree, Node
from sparse_rtrl.learners.block_rtrl import BlockRTRL, get_expert_latent_activated
from sparse_rtrl.learners.carry import Carry
from sparse_rtrl.learners.check_cell import check_cell
from sparse_rtrl.learners.diagonal_rtrl import DiagonalRTRL
from sparse_rtrl.learners.diagonal_stack import DiagonalStack, PerLayerApproximation
from sparse_rtrl.learners.rtrl import RTRL, Evaluation
from sparse_rtrl.learners.slot_rtrl import SlotRTRL

find_moved_modules()

__version__ = "0.2.0"

__all__ = [
    "RTRL",
    "BlockRTRL",
    "Carry",
    "CircularTree",
    "ContractError",
    "DiagonalCell",
    "DiagonalRTRL",
    "DiagonalStack",
    "DisagreementError",
    "ELSTMCell",
    "Estimate",
    "Evaluation",
    "ExpertBank",
    "Given",
    "LRUCell",
    "Learned",
    "MambaCell",
    "Mapped",
    "Node",
    "NonFiniteError",
    "PerLayerApproximation",
    "RWKVCell",
    "RetentionCell",
    "Routing",
    "SlotCell",
    "SlotMoECell",
    "SlotRTRL",
    "SparseLatentMoECell",
    "check_cell",
    "estimate",
    "expert_linear",
    "get_expert_latent_activated",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
