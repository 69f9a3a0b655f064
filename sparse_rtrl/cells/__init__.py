"""Ready cells: with slot memory and experts, and diagonal recurrences."""

from sparse_rtrl.cells.elstm import ELSTMCell
from sparse_rtrl.cells.lru import LRUCell
from sparse_rtrl.cells.mamba import MambaCell
from sparse_rtrl.cells.retention import RetentionCell
from sparse_rtrl.cells.rwkv import RWKVCell
from sparse_rtrl.cells.slot_moe import SlotMoECell
from sparse_rtrl.cells.sparse_latent_moe import SparseLatentMoECell

__all__ = [
    "ELSTMCell",
    "LRUCell",
    "MambaCell",
    "RWKVCell",
    "RetentionCell",
    "SlotMoECell",
    "SparseLatentMoECell",
]
