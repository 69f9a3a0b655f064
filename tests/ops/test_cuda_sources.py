"""The CUDA sources without a GPU: kernels emulated on the host against the reference, and what nvcc makes of them."""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from emulated_cuda import COMPILER, FORWARD, REVERSE, SHUFFLED, EmulatedCuda
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_problem import check_tree_operations

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SMALL = 32 * 1024
"""Shared memory that makes the launcher take narrow column tiles already for small states."""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler on the PATH")
    return EmulatedCuda(tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("most_shared_bytes", [227 * 1024, SMALL], ids=["wide", "narrow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_emulated_kernels(emulated, dtype, most_shared_bytes):
    covered = Counter()

    @given(data=st.data())
    @settings(max_examples=14, deadline=None, derandomize=True, database=None)
    def check(data):
        emulated.set(data.draw(st.sampled_from([FORWARD, REVERSE, SHUFFLED])), most_shared_bytes)
        covered.update(check_tree_operations(emulated, data.draw, dtype, [1, 3, 8, 17]))

    check()
    assert min(covered[name] for name in ("wrapped", "merged", "products")) > 0


def compile_kernels(folder):
    """Machine code for both architectures in one call of nvcc; returns what ptxas says."""
    flags = ["-std=c++17", "-O3", "--threads", "2", "-Werror", "all-warnings", "-Xptxas", "-v"]
    flags += [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ("80", "90")]
    command = ["nvcc", *flags, "-c", str(CSRC / "cuda/tree_kernels.cu"), "-o", str(folder / "tree_kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
def test_kernels_compile_without_spills(tmp_path):
    """Every kernel for every dtype and tile width, with its registers and nothing in local memory."""
    said = compile_kernels(tmp_path)
    kernels = Counter(re.findall(r"Compiling entry function '\S*?\d([a-z_]+)_kernel\S*' for 'sm_\d+'", said))
    both = 2  # architectures
    assert kernels == {
        "write_leaf": 2 * both,
        "merge_level": 4 * both,
        "advance_count": both,
        "suffix_product": 4 * both,
        "catch_up": 4 * both,
        "suffix_loss_rows": 2 * both,
    }
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(frames) == sum(kernels.values())
    assert set(frames) == {("0", "0", "0")}, said


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on the PATH")
def test_the_registration_compiles():
    """As far as the headers of a torch without CUDA go."""
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Werror", "-fvisibility=hidden", f"-isystem{include}"]
    macro = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"
    command = [COMPILER, *flags, macro, str(CSRC / "cuda/operations.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def load_set_up():
    spec = importlib.util.spec_from_file_location("set_up", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_build_of_cuda_is_decided_without_a_device(tmp_path, monkeypatch):
    """By the torch at hand and nvcc; what is missing is named where the build is a must."""
    set_up = load_set_up()

    def torch_built_for(cuda):
        (tmp_path / "version.py").write_text(f"cuda = {cuda!r}\n")
        monkeypatch.setattr(set_up, "torch_folder", lambda: tmp_path)

    monkeypatch.setattr(set_up, "find_nvcc", lambda: "/opt/cuda/bin/nvcc")
    torch_built_for("13.0")
    (extension,) = set_up.cuda_extensions("auto")
    assert extension.name == "sparse_rtrl._cuda" and extension.optional and "torch_cuda" in extension.libraries
    assert extension.sources == ["csrc/cuda/tree_kernels.cu", "csrc/cuda/operations.cpp"]
    assert not set_up.cuda_extensions("1")[0].optional
    torch_built_for(None)
    assert set_up.cuda_extensions("auto") == []
    with pytest.raises(
        SystemExit, match=r"SPARSE_RTRL_CUDA=1, but the CUDA operations need a torch that was built for"
    ):
        set_up.cuda_extensions("1")
    torch_built_for("13.0")
    monkeypatch.setattr(set_up, "find_nvcc", lambda: None)
    assert set_up.cuda_extensions("auto") == []
    with pytest.raises(SystemExit, match=r"the CUDA operations need nvcc of the CUDA toolkit"):
        set_up.cuda_extensions("1")
    monkeypatch.setenv("SPARSE_RTRL_CUDA", "0")
    assert set_up.choice("SPARSE_RTRL_CUDA") == "0"
    monkeypatch.setenv("SPARSE_RTRL_CUDA", "yes")
    with pytest.raises(SystemExit, match="SPARSE_RTRL_CUDA must be 0, 1 or auto, got 'yes'"):
        set_up.extensions()


def test_architectures(monkeypatch):
    set_up = load_set_up()
    monkeypatch.delenv("SPARSE_RTRL_CUDA_ARCH", raising=False)
    targets = ["compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"]
    assert set_up.architecture_flags() == [f"-gencode=arch={target}" for target in targets]
    monkeypatch.setenv("SPARSE_RTRL_CUDA_ARCH", "89")
    assert set_up.architecture_flags() == [
        "-gencode=arch=compute_89,code=sm_89",
        "-gencode=arch=compute_89,code=compute_89",
    ]
    monkeypatch.setenv("SPARSE_RTRL_CUDA_ARCH", "ampere")
    with pytest.raises(SystemExit, match="SPARSE_RTRL_CUDA_ARCH must be a list such as '80 90', got 'ampere'"):
        set_up.architecture_flags()
