"""Compiles every launch of the Triton kernels ahead of time, without a GPU: one JSON object per kernel on stdout.

Run in a process without ``TRITON_INTERPRET``: ``python tests/compile_kernels.py``. The launchers run as they are, up to
the launch, which is replaced by a compilation for sm_80 and sm_90; so what is compiled is what is shipped.
"""

import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_rtrl import triton_kernels
from sparse_rtrl.triton_kernels import launch

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
MATRIX_UNITS = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync)\S+\.(tf32|f64)\b")
TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.int16: "*i16"}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


def compile_launch(capability, kernel, arguments, constants):
    """Compile a kernel for the types, alignments and constants that a launch would specialise it for."""
    names = kernel.arg_names
    signature, attributes, fixed = {}, {}, {}
    for index, (name, value) in enumerate(zip(names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif value == 1:
            signature[name], fixed[name], aligned = "constexpr", 1, False
        else:
            signature[name], aligned = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    fixed |= constants
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, fixed, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def describe(compiled):
    """Registers, stack (spills go there), shared memory and matrix instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "spilled": int(stack) + int(local),
        "shared": compiled.metadata.shared,
        "matrix_units": sorted(set(MATRIX_UNITS.findall(compiled.asm["ptx"]))),
    }


def update_arguments(w, dtype, columns=256, tau=2):
    """Arguments of an influence update with all its parts; a bfloat16 influence has float32 factors."""
    D, factors = 16, torch.float32 if dtype == torch.bfloat16 else dtype
    kw = w // D
    slots = torch.zeros(1, kw, dtype=torch.int64)
    one = torch.zeros(1, dtype=torch.int64)
    return [
        torch.empty(1, 1024 + 1, columns, dtype=dtype),
        torch.empty(1, w, 2 * w, dtype=factors),
        slots,
        torch.cat((slots, slots), 1),
        torch.empty(1, 2 * w, dtype=factors),
        one,
        one,
        [torch.empty(1, w, tau, 16, dtype=factors)],
        [torch.empty(1, tau, 16, dtype=factors)],
        [0],
    ]


def catch_up_arguments(hidden, w, dtype, capacity=4):
    """Arguments of a catch-up with the update of the current step."""
    P, Jh, write, support, u, streams, groups, deltas, zs, offsets = update_arguments(w, dtype)
    D = 16
    slots = torch.zeros(capacity, 1, w // D, dtype=torch.int64)
    nodes = (slots, torch.cat((slots, slots), 2), Jh.expand(capacity, -1, -1, -1), u.expand(capacity, -1, -1))
    count = torch.tensor(capacity)
    ring = (*nodes, count, streams, groups, torch.zeros_like(groups), D)
    return [P[:, : hidden + 1], *ring, Jh, write, support, u, deltas, zs, offsets]


UPDATES = (
    (16, torch.float32, ("ieee",)),
    (32, torch.float32, ("tf32x3",)),
    (64, torch.float32, launch.PRECISIONS),
    (128, torch.float32, ("ieee", "tf32x3")),
    (256, torch.float32, ("ieee", "tf32x3")),
    (64, torch.float64, ("ieee",)),
    (64, torch.bfloat16, ("ieee",)),
)
"""Written rows, dtype of the influence and precisions of the updates that are compiled."""

CATCH_UPS = (
    (64, 64, torch.float32, "ieee"),
    (256, 64, torch.float32, "ieee"),
    (256, 128, torch.float32, "tf32x3"),
    (128, 32, torch.bfloat16, "ieee"),
)
"""State size, written rows, dtype of the influence and precision of the catch-ups that are compiled."""


DIAGONALS = (
    (512, torch.float32, True),
    (512, torch.complex64, True),
    (512, torch.float32, False),
    (22, torch.complex64, True),
    (1, torch.float32, True),
    (1, torch.complex64, True),
    (512, torch.float64, True),
    (512, torch.complex128, True),
)
"""Columns and dtype of the influence of the diagonal updates that are compiled, and whether they form the gradient."""


def diagonal_arguments(columns, dtype, batch=2, rows=64, tau=3):
    """Arguments of an update of a diagonal recurrence with its gradient."""
    return [
        torch.empty(batch, rows, columns, dtype=dtype),
        torch.empty(batch, rows, dtype=dtype),
        torch.empty(batch, rows, tau, dtype=dtype),
        torch.empty(batch, tau, columns, dtype=dtype.to_real()),
        torch.empty(rows, columns, dtype=dtype),
        torch.empty(batch, rows, dtype=dtype),
    ]


def launches():
    """Names and calls of what is compiled: every tile shape and every kind of arithmetic and storage at least once."""
    for w, dtype, precisions in UPDATES:
        for precision in precisions:
            arguments, seed = update_arguments(w, dtype), torch.tensor(0) if dtype == torch.bfloat16 else None
            name = f"influence_update w={w} {str(dtype)[6:]} {precision}"
            yield name, functools.partial(triton_kernels.influence_update_, *arguments, precision, seed)
    for hidden, w, dtype, precision in CATCH_UPS:
        arguments, seed = catch_up_arguments(hidden, w, dtype), torch.tensor(0) if dtype == torch.bfloat16 else None
        name = f"catch_up_update H={hidden} w={w} {str(dtype)[6:]} {precision}"
        yield name, functools.partial(triton_kernels.catch_up_update_, *arguments, precision, seed)
    arguments = catch_up_arguments(256, 64, torch.float32)[:10]
    yield "catch_up H=256 w=64 float32 ieee", functools.partial(triton_kernels.catch_up_, *arguments)
    P, u, group = torch.empty(1, 65, 256), torch.empty(1, 64), torch.zeros(1, dtype=torch.int64)
    yield "loss_row float32 ieee", functools.partial(triton_kernels.loss_row_, P, u, group)
    for columns, dtype, loss in DIAGONALS:
        arguments = diagonal_arguments(columns, dtype)[: 6 if loss else 4]
        name = f"diagonal_update J={columns} {str(dtype)[6:]} {'with' if loss else 'without'} loss ieee"
        yield name, functools.partial(triton_kernels.diagonal_update_, *arguments)
    P, _, _, _, g, u = diagonal_arguments(512, torch.complex64)
    yield "diagonal_loss complex64 ieee", functools.partial(triton_kernels.diagonal_loss_, g, P, u)


def compile_instead(name, kernel, programs, arguments, **constants):
    """What takes the place of a launch."""
    for capability in (80, 90):
        row = {"name": name, "kernel": kernel.fn.__name__, "capability": capability}
        print(json.dumps(row | describe(compile_launch(capability, kernel, arguments, dict(constants)))), flush=True)


def main():
    assert not launch.INTERPRETED, "unset TRITON_INTERPRET"
    launch.check_device = lambda P: None
    for name, call in launches():
        launch.run = functools.partial(compile_instead, name)
        call()


if __name__ == "__main__":
    sys.exit(main())
