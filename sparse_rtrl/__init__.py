"""Exact online gradients for recurrent networks with slot memory and mixtures of experts."""

from sparse_rtrl.block_rtrl import BlockRTRL, get_expert_latent_activated
from sparse_rtrl.carry import Carry
from sparse_rtrl.cells import (
    ELSTMCell,
    LRUCell,
    MambaCell,
    RetentionCell,
    RWKVCell,
    SlotMoECell,
    SparseLatentMoECell,
)
from sparse_rtrl.check import check_cell
from sparse_rtrl.diagonal_cell import DiagonalCell, Given, Learned, Mapped
from sparse_rtrl.diagonal_stack import DiagonalStack, PerLayerApproximation
from sparse_rtrl.errors import ContractError, NonFiniteError
from sparse_rtrl.estimate import Estimate, estimate
from sparse_rtrl.expert_bank import ExpertBank, expert_linear
from sparse_rtrl.learner import RTRL, Evaluation
from sparse_rtrl.slot_cell import Routing, SlotCell
from sparse_rtrl.tree import CircularTree, Node

__version__ = "0.2.0"

__all__ = [
    "RTRL",
    "BlockRTRL",
    "Carry",
    "CircularTree",
    "ContractError",
    "DiagonalCell",
    "DiagonalStack",
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
    "SparseLatentMoECell",
    "check_cell",
    "estimate",
    "expert_linear",
    "get_expert_latent_activated",
]
