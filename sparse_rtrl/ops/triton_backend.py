"""The Triton kernels as operations: registered for CUDA tensors, and under names of their own with a precision.

Triton is imported at the first call, not before: it is optional, and importing it takes a while.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import torch

from sparse_rtrl.errors import BackendError

Precision: TypeAlias = Literal["ieee", "tf32x3", "tf32"]
"""Of products on a GPU: float32 arithmetic, its emulation by three TF32 products, or one TF32 product."""

DTYPES = (torch.float32, torch.float64)
"""What an engine may ask for; the operations themselves also take an influence in bfloat16."""

_UPDATE = "Tensor Jh, Tensor write, Tensor support, Tensor? loss_row"
_FACTORS = "Tensor[] deltas, Tensor[] zs, int[] offsets"
_RING = "Tensor rows, Tensor cols, Tensor blocks, Tensor loss_rows, Tensor count"
_CATCH_UP = f"{_RING}, Tensor streams, Tensor groups, Tensor starts, int slot_size"
_ROUNDING = 'str precision="ieee", Tensor(b!)? seed=None'

SCHEMAS = {
    "influence_update_": f"Tensor(a!) P, {_UPDATE}, Tensor streams, Tensor groups, {_FACTORS}, {_ROUNDING}",
    "loss_row_": "Tensor(a!) P, Tensor u, Tensor groups, Tensor(b!)? seed=None",
    "catch_up_": f"Tensor(a!) P, {_CATCH_UP}, {_ROUNDING}",
    "catch_up_update_": f"Tensor(a!) P, {_CATCH_UP}, {_UPDATE}, {_FACTORS}, {_ROUNDING}",
    "diagonal_update_": ("Tensor(a!) P, Tensor decay, Tensor delta, Tensor z, Tensor(b!)? g=None, Tensor? u=None"),
    "diagonal_loss_": "Tensor(a!) g, Tensor P, Tensor u",
}
"""Arguments of each operation that has a kernel."""

WITHOUT_PRECISION = ("loss_row_", "diagonal_update_", "diagonal_loss_")
"""Operations that multiply no matrices."""


def _launcher(name: str) -> Callable[..., None]:
    def launch(*args: Any, **kwargs: Any) -> None:
        from sparse_rtrl import triton_kernels

        getattr(triton_kernels, name)(*args, **kwargs)

    return launch


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Fake of an operation in place."""


def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def register(library: torch.library.Library, names: tuple[str, ...]) -> None:
    """Define ``triton_<name>`` for every kernel, and serve CUDA tensors of the operations in ``names`` with kernels.

    An operation that a compiled library already serves on CUDA stays with it.
    """
    for name, arguments in SCHEMAS.items():
        library.define(f"triton_{name}({arguments}) -> ()")
        library.impl(f"triton_{name}", _launcher(name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"sparse_rtrl::triton_{name}", _nothing, lib=library)
        served = name in names and torch._C._dispatch_has_kernel_for_dispatch_key(f"sparse_rtrl::{name}", "CUDA")
        if name in names and installed() and not served:
            library.impl(name, _launcher(name), "CUDA")


class TritonOperations:
    """The operations with Triton kernels in one precision; other names come from another namespace.

    Args:
        precision: of the products.
        others: where the operations without a kernel come from.
    """

    def __init__(self, precision: Precision, others: Any) -> None:
        self.precision = precision
        self._others = others

    def __getattr__(self, name: str) -> Any:
        if name not in SCHEMAS:
            return getattr(self._others, name)
        operation = getattr(torch.ops.sparse_rtrl, f"triton_{name}")
        if name in WITHOUT_PRECISION:
            return operation
        return lambda *args: operation(*args, precision=self.precision)


def select(device: torch.device, dtype: torch.dtype, precision: Precision, others: Any) -> TritonOperations:
    """The operations with Triton kernels.

    Args:
        device: of the tensors: CUDA, or the CPU for the interpreter.
        dtype: of the influence.
        precision: of the products.
        others: where the operations without a kernel come from.

    Raises:
        ValueError: on another precision.
        BackendError: if Triton cannot serve the device and dtype, with the remedy.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {get_args(Precision)}, got {precision!r}")
    if not installed():
        raise BackendError(
            "backend 'triton' needs the package triton: install it with 'pip install sparse_rtrl[triton]', or use"
            " backend='auto'"
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendError(
            "backend 'triton' runs on CUDA tensors, the tensors are on cpu: use backend='auto', or set"
            " TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter, which is slow"
        )
    if dtype not in DTYPES or (dtype == torch.float64 and precision != "ieee"):
        raise BackendError(
            f"backend 'triton' is for float32, and float64 in precision 'ieee', got {dtype} and {precision!r}: use"
            " backend='reference'"
        )
    return TritonOperations(precision, others)
