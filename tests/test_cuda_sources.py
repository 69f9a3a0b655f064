"""The CUDA kernel bodies compile; no GPU is needed for that."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_kernels_compile(tmp_path, architecture):
    out = tmp_path / "kernels.cubin"
    command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-cubin", "-Werror", "all-warnings", "-Xptxas", "-v"]
    done = subprocess.run([*command, str(CSRC / "cuda/map_kernels.cu"), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("merge_level", "suffix_product", "catch_up"):
        for scalar in ("f32", "f64"):
            assert f"{name}_{scalar}".encode() in out.read_bytes()
