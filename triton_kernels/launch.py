"""What every launcher shares: checks that name the argument, number formats, and the launch itself."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sparse_rtrl.errors import BackendError

PRECISIONS = ("ieee", "tf32x3", "tf32")
"""Of the products: float32 arithmetic, its emulation by three TF32 products on the matrix units, one TF32 product."""

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in the interpreter; Triton reads ``TRITON_INTERPRET`` when a kernel is defined."""

STORAGE = (torch.float32, torch.float64, torch.bfloat16)


def run(kernel: Any, programs: int, arguments: tuple[Any, ...], **constants: Any) -> None:
    """Launch a kernel on a one-dimensional grid; the only place that does."""
    if programs:
        with torch.cuda.device_of(arguments[0]):  # nothing for tensors on the CPU
            kernel[(programs,)](*arguments, **constants)


def check_device(P: Tensor) -> None:
    """Refuse tensors that the kernels cannot reach.

    Raises:
        BackendError: with the remedy.
    """
    if P.device.type == "cuda":
        if INTERPRETED:
            raise BackendError("Triton kernels run in the interpreter (TRITON_INTERPRET=1): unset it to use the GPU")
    elif P.device.type != "cpu" or not INTERPRETED:
        raise BackendError(
            f"Triton kernels are for CUDA tensors, got {P.device}: use backend='auto', or set TRITON_INTERPRET=1 before"
            " the first import of sparse_rtrl to run them on CPU tensors in the interpreter"
        )


def check_influence(P: Tensor, precision: str, seed: Tensor | None) -> torch.dtype:
    """Check influence matrices, and return the dtype that everything else must have.

    Args:
        P: ``(G, H + 1, N)``; float32, float64 or bfloat16, the columns side by side.
        precision: of the products, one of ``PRECISIONS``.
        seed: of the stochastic rounding into bfloat16, ``()`` int64; None otherwise.

    Raises:
        BackendError: if the device does not fit.
        TypeError: on another dtype.
        ValueError: on a wrong shape, layout, precision or seed.
    """
    check_device(P)
    if P.dtype not in STORAGE:
        raise TypeError(f"P must be float32, float64 or bfloat16, got {P.dtype}")
    if P.dim() != 3 or P.shape[1] < 1 or (P.shape[2] > 1 and P.stride(2) != 1):
        raise ValueError(
            f"P must have shape (G, H + 1, N) with columns of stride 1, got {tuple(P.shape)} with strides {P.stride()}"
        )
    if P.shape[2] >= 2**31:
        raise ValueError(f"P must have fewer than 2**31 columns, got {P.shape[2]}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if P.dtype == torch.float64 and precision != "ieee":
        raise ValueError(f"precision must be 'ieee' for float64, got {precision!r}")
    if P.dtype != torch.bfloat16:
        return P.dtype
    if seed is None:
        raise ValueError("seed must be an int64 tensor of shape (): P is bfloat16 and rounded stochastically, got None")
    check("seed", seed, torch.int64, (), P.device)
    return torch.float32


def check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...], device: torch.device) -> Tensor:
    """A contiguous version of a tensor, after checking its dtype, device and shape (None: any size).

    Raises:
        TypeError: on another dtype.
        ValueError: on another device or shape.
    """
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as P is, got {tensor.device}")
    if tensor.dim() != len(shape) or any(s is not None and s != t for s, t in zip(shape, tensor.shape, strict=True)):
        wanted = str(tuple(shape)).replace("None", "*")
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
    return tensor.contiguous()


def check_slot_size(name: str, jacobian: Tensor, slots: Tensor, hidden: int) -> int:
    """Slot size ``D`` that follows from the last dimension of a Jacobian and the slots it stands for.

    Raises:
        ValueError: if it is no whole number that divides the state size.
    """
    size, rest = divmod(jacobian.shape[-1], max(slots.shape[-1], 1))
    if size < 1 or rest or hidden % size:
        raise ValueError(
            f"{name} must have ks * D columns with D a divisor of H = {hidden}, got {jacobian.shape[-1]} for"
            f" {slots.shape[-1]} slots"
        )
    return size


def stored(P: Tensor) -> Tensor:
    """The tensor that kernels see: bfloat16 as int16, which every version of the interpreter handles."""
    return P.view(torch.int16) if P.dtype == torch.bfloat16 else P


def next_seed(seed: Tensor | None) -> None:
    """Advance the seed after a call, on the device, so that no two calls round with the same numbers."""
    if seed is not None:
        seed.add_(1)
