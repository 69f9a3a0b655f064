"""The operations of the engine: one schema each, a fake for tracing, and the implementation that each device uses.

Schemas are defined here in Python, so the package imports without any compiled part. The reference serves every
device; a compiled implementation registers itself for its dispatch key and is then picked by the tensor's device.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch

from sparse_rtrl.errors import BackendError
from sparse_rtrl.ops import reference, triton_backend

Backend: TypeAlias = Literal["auto", "reference", "cpp", "cuda", "triton"]
COMPILED_DTYPES = (torch.float32, torch.float64)
"""What the compiled operations are for; other dtypes run on the reference."""
COMPILED = {"cpp": ("cpu", "SPARSE_RTRL_CPP"), "cuda": ("cuda", "SPARSE_RTRL_CUDA")}
"""Device of each compiled backend, and the environment variable that makes its build a must."""

_WINDOW = (
    "Tensor[] inputs, Tensor[] saved, Tensor[] index, Tensor[] weights, int[] columns, int heads, int read, int write,"
    " bool softmax=False"
)

SCHEMAS = {
    "influence_update_": (
        "(Tensor(a!) P, Tensor Jh, Tensor write, Tensor support, Tensor? loss_row, Tensor streams, Tensor groups,"
        " Tensor[] deltas, Tensor[] zs, int[] offsets) -> ()"
    ),
    "loss_row_": "(Tensor(a!) P, Tensor u, Tensor groups) -> ()",
    "tree_append_": (
        "(Tensor(a!)[] rows, Tensor(b!)[] cols, Tensor(c!)[] blocks, Tensor(d!)[] loss_rows, Tensor(e!) count,"
        " Tensor Jh, Tensor write, Tensor support, Tensor? loss_row, int first, int num_slots, int slot_size) -> ()"
    ),
    "suffix_product": (
        "(Tensor[] rows, Tensor[] cols, Tensor[] blocks, Tensor[] loss_rows, Tensor count, Tensor streams,"
        " Tensor starts, int num_rows, int num_cols, int num_slots, int slot_size) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "catch_up_": (
        "(Tensor(a!) P, Tensor rows, Tensor cols, Tensor blocks, Tensor loss_rows, Tensor count, Tensor streams,"
        " Tensor groups, Tensor starts, int slot_size) -> ()"
    ),
    "catch_up_update_": (
        "(Tensor(a!) P, Tensor rows, Tensor cols, Tensor blocks, Tensor loss_rows, Tensor count, Tensor streams,"
        " Tensor groups, Tensor starts, int slot_size, Tensor Jh, Tensor write, Tensor support, Tensor? loss_row,"
        " Tensor[] deltas, Tensor[] zs, int[] offsets) -> ()"
    ),
    "suffix_loss_rows": (
        "(Tensor rows, Tensor cols, Tensor blocks, Tensor loss_rows, Tensor count, Tensor starts, Tensor newest,"
        " int slot_size) -> Tensor"
    ),
    "diagonal_update_": (
        "(Tensor(a!) P, Tensor decay, Tensor delta, Tensor z, Tensor(b!)? g=None, Tensor? u=None) -> ()"
    ),
    "diagonal_loss_": "(Tensor(a!) g, Tensor P, Tensor u) -> ()",
    "rows_back_": (
        "(Tensor(a!) v, Tensor(b!) deltas, Tensor program, Tensor[] index, Tensor[] numbers, Tensor? cotangents,"
        " int[] taps, int steps, int batch, int stream, int rows, int before) -> ()"
    ),
    "slot_moe_forward": (
        "(Tensor state, Tensor query_token, Tensor[] weights, int heads, int read, int write, int top_k,"
        " bool least_used=False, bool softmax=False) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "slot_moe_pull_back_": (f"(Tensor(a!) v, Tensor(b!) core, Tensor(c!) experts, Tensor? cotangent, {_WINDOW}) -> ()"),
    "slot_moe_transfer_": f"(Tensor(a!) phi, {_WINDOW}) -> ()",
    "slot_moe_commit_": f"(Tensor(a!) core, Tensor(b!) experts, Tensor(c!) phi, Tensor rows, {_WINDOW}) -> ()",
}
"""Arguments and results of each operation. Its definition is the function of its name in ``reference``, its compiled
version is registered under its name in ``csrc/``, its Triton launcher is the function of its name in
``triton_kernels/``. ``slot_moe_*`` are compiled for the CPU only; what they must equal is the code of the cell."""

NAMES = tuple(name for name in SCHEMAS if hasattr(reference, name))
"""Operations that every backend has."""


def _nothing(*arguments: Any) -> None:
    """Fake of an operation in place."""


def _fake_suffix_product(
    rows, cols, blocks, loss_rows, count, streams, starts, num_rows, num_cols, num_slots, slot_size
):
    products = streams.shape[0]
    return (
        streams.new_empty(products, num_rows),
        streams.new_empty(products, num_cols),
        blocks[0].new_empty(products, num_rows * slot_size, num_cols * slot_size),
        blocks[0].new_empty(products, num_cols * slot_size),
    )


def _fake_suffix_loss_rows(rows, cols, blocks, loss_rows, count, starts, newest, slot_size):
    return newest.new_empty(*starts.shape, newest.shape[1])


def _fake_slot_moe_forward(state, query_token, weights, heads, read, write, top_k, least_used=False, softmax=False):
    steps, batch, width = query_token.shape
    size = width // 2
    saved = size * (3 + read + 2 * write + 2 * read + 2 * write) + read * heads + top_k * (size + 1)
    return (
        torch.empty_like(state),
        state.new_empty(steps, batch, read + write, size),
        state.new_empty(steps, batch, saved),
        state.new_empty(steps, batch, read + write + top_k, dtype=torch.int64),
    )


FAKES: dict[str, Any] = {
    "suffix_product": _fake_suffix_product,
    "suffix_loss_rows": _fake_suffix_loss_rows,
    "slot_moe_forward": _fake_slot_moe_forward,
}
"""Shapes of what an operation returns, for those that return something."""

_library = torch.library.Library("sparse_rtrl", "DEF")

for _name, _schema in SCHEMAS.items():
    _library.define(f"{_name}{_schema}")
    torch.library.register_fake(f"sparse_rtrl::{_name}", FAKES.get(_name, _nothing), lib=_library)
for _name in NAMES:
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def _load_compiled(library: str) -> str:
    """Load compiled operations if they were built; returns why they are not there, or nothing."""
    path = Path(__file__).parents[1] / f"{library}.so"
    if library == "_cuda" and torch.version.cuda is None:
        return "this torch was built for the CPU"
    if not path.exists():
        return "they were not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} could not be loaded: {error}"
    return ""


compiled_problem = _load_compiled("_cpu")
"""Why the compiled CPU operations are missing; empty if they are there."""
cuda_problem = _load_compiled("_cuda")
"""Why the compiled CUDA operations are missing; empty if they are there."""

triton_backend.register(_library, tuple(triton_backend.SCHEMAS))

influence_update_ = torch.ops.sparse_rtrl.influence_update_
loss_row_ = torch.ops.sparse_rtrl.loss_row_
tree_append_ = torch.ops.sparse_rtrl.tree_append_
suffix_product = torch.ops.sparse_rtrl.suffix_product
catch_up_ = torch.ops.sparse_rtrl.catch_up_
catch_up_update_ = torch.ops.sparse_rtrl.catch_up_update_
suffix_loss_rows = torch.ops.sparse_rtrl.suffix_loss_rows
diagonal_update_ = torch.ops.sparse_rtrl.diagonal_update_
diagonal_loss_ = torch.ops.sparse_rtrl.diagonal_loss_
rows_back_ = torch.ops.sparse_rtrl.rows_back_

# The recurrence of SlotMoECell as a whole; compiled for the CPU only, see cells/slot_moe_pass.py.
slot_moe_forward = torch.ops.sparse_rtrl.slot_moe_forward
slot_moe_pull_back_ = torch.ops.sparse_rtrl.slot_moe_pull_back_
slot_moe_transfer_ = torch.ops.sparse_rtrl.slot_moe_transfer_
slot_moe_commit_ = torch.ops.sparse_rtrl.slot_moe_commit_


def select(
    backend: Backend, device: torch.device, dtype: torch.dtype, precision: triton_backend.Precision = "ieee"
) -> Any:
    """The operations of a backend, as a namespace with the names in ``NAMES``.

    Args:
        backend: ``"auto"`` takes what is built for the device and dtype, else the reference; ``"reference"`` is plain
            PyTorch; ``"cpp"`` is the compiled CPU operations; ``"cuda"`` the compiled CUDA operations: those of the
            tree and ``catch_up_``, while all others run as with ``"auto"``; ``"triton"`` the Triton kernels:
            ``influence_update_``, ``loss_row_``, ``catch_up_`` and those of diagonal recurrences, while all others run
            as with ``"auto"``.
        device: of the tensors.
        dtype: of the influence, of a complex one its real dtype.
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
    if backend == "reference" or (backend == "auto" and dtype not in COMPILED_DTYPES):
        return reference
    if backend == "auto":
        _tell_of_reference(device.type)
    else:
        _check_compiled(backend, device, dtype)
    return _DISPATCHED


def _check_compiled(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a backend of compiled operations that is not there for the device and dtype.

    Raises:
        BackendError: with the remedy.
    """
    kind, _ = COMPILED[backend]
    problem = compiled_problem if backend == "cpp" else cuda_problem
    if device.type != kind:
        raise BackendError(f"backend '{backend}' is for {kind}, the tensors are on {device}: use backend='auto'")
    if dtype not in COMPILED_DTYPES:
        raise BackendError(f"backend '{backend}' is for float32 and float64, got {dtype}: use backend='reference'")
    if problem:
        raise BackendError(
            f"backend '{backend}' needs the compiled operations for {kind}: {problem}. {_remedy(kind)}, or use"
            " backend='auto' or 'reference'"
        )


def fused(backend: Backend, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend has the compiled passes of whole cells for a device and dtype."""
    if backend not in ("auto", "cpp") or device.type != "cpu" or dtype not in COMPILED_DTYPES:
        return False
    return not compiled_problem


def _remedy(kind: str) -> str:
    """How to get the compiled operations for a kind of device."""
    (variable,) = (variable for device, variable in COMPILED.values() if device == kind)
    tools = {"cpu": "torch and a C++ compiler", "cuda": "torch for CUDA, a C++ compiler and nvcc"}[kind]
    return f"Build them with '{variable}=1 pip install --no-build-isolation .' where {tools} are installed"


_told: set[str] = set()


def _tell_of_reference(kind: str) -> None:
    """Warn, once for each kind of device, that the reference stands in for compiled operations."""
    problem = {"cpu": compiled_problem, "cuda": cuda_problem}.get(kind)
    if problem and kind not in _told:
        _told.add(kind)
        warnings.warn(
            f"the compiled operations for {kind} are missing ({problem}); plain PyTorch stands in for them: exact, but"
            f" slower. {_remedy(kind)}; backend='reference' asks for plain PyTorch and says nothing",
            stacklevel=3,
        )


class _Dispatched:
    """The operations of this module, looked up at each call."""

    def __getattr__(self, name: str) -> Any:
        if name not in NAMES:
            raise AttributeError(f"there is no operation {name!r}; there are {NAMES}")
        return globals()[name]


_DISPATCHED = _Dispatched()
