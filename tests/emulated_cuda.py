"""The CUDA operations on rings, their kernels emulated on the host: same names and arguments as in ``ops``."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
FORWARD, REVERSE, SHUFFLED = range(3)
COMPILER = shutil.which("c++") or shutil.which("g++")


class EmulatedCuda:
    """Compiles the kernels for the host into ``folder``."""

    def __init__(self, folder: Path) -> None:
        library = folder / "emulated_cuda.so"
        flags = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas"]
        command = [COMPILER, *flags, str(ROOT / "tests/cpp/emulated_cuda.cpp"), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.library = ctypes.CDLL(str(library))

    def set(self, order: int = FORWARD, most_shared_bytes: int = 227 * 1024) -> None:
        """Order in which the threads of a block take turns, and the shared memory that a block can have."""
        self.library.set_emulation(order, ctypes.c_int64(most_shared_bytes))

    def _call(self, name, dtype, *arguments):
        function = getattr(self.library, f"{name}_{'f32' if dtype == torch.float32 else 'f64'}")
        function.restype = ctypes.c_char_p
        given = []
        for argument in arguments:
            if argument is None or isinstance(argument, torch.Tensor):
                assert argument is None or argument.is_contiguous()
                given.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
            else:
                given.append(ctypes.c_int64(argument) if isinstance(argument, int) else argument)
        problem = function(*given)
        if problem is not None:
            raise RuntimeError(problem.decode())

    @staticmethod
    def _rings(rows, cols, blocks, loss_rows):
        levels = list(zip(rows, cols, blocks, loss_rows, strict=True))
        pointers = (ctypes.c_void_p * (4 * len(levels)))(*(t.data_ptr() for level in levels for t in level))
        numbers = [n for r, c, _, _ in levels for n in (len(r), r.shape[2], c.shape[2])]
        return pointers, (ctypes.c_int64 * len(numbers))(*numbers), rows[0].shape[1]

    def tree_append_(
        self, rows, cols, blocks, loss_rows, count, Jh, write, support, loss_row, first, num_slots, slot_size
    ):
        tree = (ctypes.c_int(len(rows)), *self._rings(rows, cols, blocks, loss_rows), num_slots, slot_size)
        widths = write.shape[1], support.shape[1]
        given = (Jh.contiguous(), write.contiguous(), support.contiguous(), loss_row)
        self._call("tree_append", Jh.dtype, *tree, count, first, *given, *widths)

    def suffix_product(
        self, rows, cols, blocks, loss_rows, count, streams, starts, num_rows, num_cols, num_slots, slot_size
    ):
        tree = (ctypes.c_int(len(rows)), *self._rings(rows, cols, blocks, loss_rows), num_slots, slot_size)
        products, height, width = len(streams), num_rows * slot_size, num_cols * slot_size
        nan = float("nan")
        out = (
            streams.new_full((products, num_rows), -1),
            streams.new_full((products, num_cols), -1),
            blocks[0].new_full((products, height, width), nan),
            blocks[0].new_full((products, width), nan),
        )
        given = (count, streams, starts, products, *out, num_rows, num_cols)
        self._call("suffix_product", blocks[0].dtype, *tree, *given)
        return out

    def catch_up_(self, P, rows, cols, blocks, loss_rows, count, streams, groups, starts, slot_size):
        ring = self._rings([rows], [cols], [blocks], [loss_rows])
        given = (P, P.shape[1], P.shape[2], slot_size, count, streams, groups, starts, len(groups))
        self._call("catch_up", P.dtype, *ring, *given)

    def suffix_loss_rows(self, rows, cols, blocks, loss_rows, count, starts, newest, slot_size):
        out = newest.new_full((*starts.shape, newest.shape[1]), float("nan"))
        ring = self._rings([rows], [cols], [blocks], [loss_rows])
        given = (slot_size, newest.shape[1], count, starts, newest, out, starts.shape[1])
        self._call("suffix_loss_rows", newest.dtype, *ring, *given)
        return out
