"""The operations of the engine: one schema each, a fake for tracing, and the implementation that each device uses.

Schemas are defined here in Python, so the package imports without any compiled part. The reference serves every
device; a compiled implementation registers itself for its dispatch key and is then picked by the tensor's device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from sparse_rtrl import reference, triton_backend
from sparse_rtrl.errors import BackendError

Backend: TypeAlias = Literal["auto", "reference", "cpp", "triton"]
COMPILED_DTYPES = (torch.float32, torch.float64)
"""What the compiled CPU operations are for; other dtypes run on the reference."""

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

_library.define(
    "suffix_product(Tensor[] rows, Tensor[] cols, Tensor[] blocks, Tensor[] loss_rows, Tensor streams, Tensor paths,"
    " int num_rows, int num_cols, int num_slots, int slot_size) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "catch_up_(Tensor(a!) P, Tensor[] rows, Tensor[] cols, Tensor[] blocks, Tensor[] loss_rows, Tensor streams,"
    " Tensor groups, Tensor first, int slot_size) -> ()"
)
_library.define(
    "suffix_loss_rows(Tensor[] rows, Tensor[] cols, Tensor[] blocks, Tensor[] loss_rows, Tensor starts,"
    " Tensor newest, int slot_size) -> Tensor"
)

NAMES = ("influence_update_", "loss_row_", "tree_merge", "suffix_product", "catch_up_", "suffix_loss_rows")

for _name in NAMES:
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


@torch.library.register_fake("sparse_rtrl::suffix_product", lib=_library)
def _(rows, cols, blocks, loss_rows, streams, paths, num_rows, num_cols, num_slots, slot_size):
    count = streams.shape[0]
    return (
        streams.new_empty(count, num_rows),
        streams.new_empty(count, num_cols),
        blocks[0].new_empty(count, num_rows * slot_size, num_cols * slot_size),
        blocks[0].new_empty(count, num_cols * slot_size),
    )


@torch.library.register_fake("sparse_rtrl::catch_up_", lib=_library)
def _(P, rows, cols, blocks, loss_rows, streams, groups, first, slot_size):
    return None


@torch.library.register_fake("sparse_rtrl::suffix_loss_rows", lib=_library)
def _(rows, cols, blocks, loss_rows, starts, newest, slot_size):
    return newest.new_empty(*starts.shape, newest.shape[1])


def _load_compiled() -> str:
    """Load the compiled CPU operations if they were built; returns why they are not there, or nothing."""
    found = sorted(Path(__file__).parent.glob("_cpu.*.so")) + sorted(Path(__file__).parent.glob("_cpu.*.pyd"))
    if not found:
        return "they were not built"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} could not be loaded: {error}"
    return ""


compiled_problem = _load_compiled()
"""Why the compiled CPU operations are missing; empty if they are there."""

triton_backend.register(_library, ("influence_update_", "loss_row_"))

influence_update_ = torch.ops.sparse_rtrl.influence_update_
loss_row_ = torch.ops.sparse_rtrl.loss_row_
tree_merge = torch.ops.sparse_rtrl.tree_merge
suffix_product = torch.ops.sparse_rtrl.suffix_product
catch_up_ = torch.ops.sparse_rtrl.catch_up_
suffix_loss_rows = torch.ops.sparse_rtrl.suffix_loss_rows


def select(
    backend: Backend, device: torch.device, dtype: torch.dtype, precision: triton_backend.Precision = "ieee"
) -> Any:
    """The operations of a backend, as a namespace with the names in ``NAMES``.

    Args:
        backend: ``"auto"`` takes what is built for the device and dtype, else the reference; ``"reference"`` is plain
            PyTorch; ``"cpp"`` is the compiled CPU operations; ``"triton"`` is the Triton kernels.
        device: of the tensors.
        dtype: of the influence.
        precision: of the products of ``"triton"``; every other backend computes in the dtype itself.

    Raises:
        ValueError: on another backend, or a precision that the backend does not have.
        BackendError: if the backend is not there for the device and dtype, with the remedy.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    if backend == "triton":
        return triton_backend.select(device, dtype, precision, _DISPATCHED)
    if precision != "ieee":
        raise ValueError(f"precision must be 'ieee' for backend {backend!r}, got {precision!r}: use backend='triton'")
    if backend == "reference" or (backend == "auto" and device.type == "cpu" and dtype not in COMPILED_DTYPES):
        return reference
    if backend == "cpp":
        if device.type != "cpu":
            raise BackendError(f"backend 'cpp' is for the CPU, the tensors are on {device}: use backend='auto'")
        if dtype not in COMPILED_DTYPES:
            raise BackendError(f"backend 'cpp' is for float32 and float64, got {dtype}: use backend='reference'")
        if compiled_problem:
            raise BackendError(
                f"backend 'cpp' needs the compiled CPU operations: {compiled_problem}. Build them with"
                " 'SPARSE_RTRL_CPP=1 pip install --no-build-isolation .', or use backend='auto' or 'reference'"
            )
    return _DISPATCHED


class _Dispatched:
    """The operations of this module, looked up at each call."""

    def __getattr__(self, name: str) -> Any:
        return globals()[name]


_DISPATCHED = _Dispatched()
