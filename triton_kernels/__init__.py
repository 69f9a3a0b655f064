"""Triton kernels of the influence operations, and their launchers under the names of ``sparse_rtrl.ops.reference``.

CUDA tensors run on the device; CPU tensors run in Triton's interpreter, if ``TRITON_INTERPRET=1`` was set before this
package was imported. Every result is deterministic: no kernel uses atomics.
"""

from sparse_rtrl.triton_kernels.catch_up import catch_up_, catch_up_update_
from sparse_rtrl.triton_kernels.diagonal_update import diagonal_loss_, diagonal_update_
from sparse_rtrl.triton_kernels.influence_update import influence_update_
from sparse_rtrl.triton_kernels.launch import INTERPRETED, PRECISIONS
from sparse_rtrl.triton_kernels.loss_row import loss_row_

__all__ = [
    "INTERPRETED",
    "PRECISIONS",
    "catch_up_",
    "catch_up_update_",
    "diagonal_loss_",
    "diagonal_update_",
    "influence_update_",
    "loss_row_",
]
