"""Triton kernels on the rings that a tree leaves behind, beside the other operations on them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_problem import check_tree_operations

from sparse_rtrl.ops import dispatch

pytest.importorskip("triton")


@given(data=st.data())
@settings(max_examples=5, deadline=None, derandomize=True, database=None)
def test_operations_on_rings(data):
    """Whatever the widths, at counts before and after the rings wrap."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = dispatch.select("triton", device, torch.float64)
    check_tree_operations(module, data.draw, torch.float64, [3], device)
