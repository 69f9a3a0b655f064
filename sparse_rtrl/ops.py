"""The operations of the engine: one schema each, a fake for tracing, and the implementation that each device uses.

Schemas are defined here in Python, so the package imports without any compiled part. The reference serves every
device; a compiled implementation registers itself for its dispatch key and is then picked by the tensor's device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_rtrl import reference

_library = torch.library.Library("sparse_rtrl", "DEF")

_library.define(
    "influence_update_(Tensor(a!) P, Tensor Jh, Tensor write, Tensor support, Tensor? loss_row, Tensor streams,"
    " Tensor groups, Tensor[] deltas, Tensor[] zs, int[] offsets) -> ()"
)
_library.define("loss_row_(Tensor(a!) P, Tensor u, Tensor groups) -> ()")
_library.define(
    "tree_merge(Tensor newer_rows, Tensor newer_cols, Tensor newer_blocks, Tensor newer_loss_row, Tensor older_rows,"
    " Tensor older_cols, Tensor older_blocks, Tensor older_loss_row, int num_slots, int slot_size)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)

for _name in ("influence_update_", "loss_row_", "tree_merge"):
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


@torch.library.register_fake("sparse_rtrl::influence_update_", lib=_library)
def _(P, Jh, write, support, loss_row, streams, groups, deltas, zs, offsets):
    return None


@torch.library.register_fake("sparse_rtrl::loss_row_", lib=_library)
def _(P, u, groups):
    return None


@torch.library.register_fake("sparse_rtrl::tree_merge", lib=_library)
def _(
    newer_rows: Tensor,
    newer_cols: Tensor,
    newer_blocks: Tensor,
    newer_loss_row: Tensor,
    older_rows: Tensor,
    older_cols: Tensor,
    older_blocks: Tensor,
    older_loss_row: Tensor,
    num_slots: int,
    slot_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = newer_rows.shape[0]
    num_rows = min(num_slots, newer_rows.shape[1] + older_rows.shape[1])
    num_cols = min(num_slots, newer_cols.shape[1] + older_cols.shape[1])
    return (
        newer_rows.new_empty(batch, num_rows),
        newer_cols.new_empty(batch, num_cols),
        newer_blocks.new_empty(batch, num_rows * slot_size, num_cols * slot_size),
        newer_loss_row.new_empty(batch, num_cols * slot_size),
    )


influence_update_ = torch.ops.sparse_rtrl.influence_update_
loss_row_ = torch.ops.sparse_rtrl.loss_row_
tree_merge = torch.ops.sparse_rtrl.tree_merge
