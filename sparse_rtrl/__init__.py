"""Exact online gradients for recurrent networks with slot memory and mixtures of experts."""

from sparse_rtrl.expert_bank import ExpertBank, expert_linear
from sparse_rtrl.slot_cell import Routing, SlotCell

__version__ = "0.1.0"

__all__ = ["ExpertBank", "Routing", "SlotCell", "expert_linear"]
