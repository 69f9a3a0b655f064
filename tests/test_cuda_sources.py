"""The CUDA sources without a GPU: kernels emulated on the host against the reference, and what nvcc makes of them."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from emulated_cuda import COMPILER, FORWARD, REVERSE, SHUFFLED, EmulatedCuda
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_problem import check_tree_operations

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
SMALL = 16 * 1024
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
    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    def check(data):
        emulated.set(data.draw(st.sampled_from([FORWARD, REVERSE, SHUFFLED])), most_shared_bytes)
        covered.update(check_tree_operations(emulated, data.draw, dtype, [1, 3, 8, 17]))

    check()
    assert min(covered[name] for name in ("wrapped", "merged", "products")) > 2
