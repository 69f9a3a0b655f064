"""Ready cells with slot memory and experts."""

from sparse_rtrl.cells.slot_moe import SlotMoECell
from sparse_rtrl.cells.sparse_latent_moe import SparseLatentMoECell

__all__ = ["SlotMoECell", "SparseLatentMoECell"]
