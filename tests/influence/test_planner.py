"""The planner in Python against the compiled one, and planning where nothing was built."""

import importlib
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_rtrl.influence.plan
from sparse_rtrl import RTRL, SlotMoECell
from sparse_rtrl.influence import planner

SIZES = {
    "num_slots": 4,
    "slot_size": 32,
    "read_slots": 2,
    "write_slots": 2,
    "num_experts": 256,
    "top_k": 2,
    "expert_columns": 1056,
    "batch_size": 1,
    "commit_every": 1,
    "flush_every": 64.0,
    "buffer": 0,
    "itemsize": 4,
}
sizes = st.fixed_dictionaries(
    {
        "num_slots": st.sampled_from([1, 2, 4, 64]),
        "slot_size": st.sampled_from([1, 8, 128]),
        "read_slots": st.integers(0, 4),
        "write_slots": st.integers(0, 4),
        "num_experts": st.sampled_from([0, 1, 2, 8, 256, 4096]),
        "top_k": st.integers(0, 4),
        "expert_columns": st.sampled_from([0, 1, 1056, 65536]),
        "batch_size": st.sampled_from([1, 16]),
        "commit_every": st.sampled_from([1, 4, 32]),
        "flush_every": st.sampled_from([1.0, 7.5, 1e4]),
        "buffer": st.sampled_from([0, 1, 5, 64, 1000]),
        "itemsize": st.sampled_from([2, 4, 8]),
    }
)
rates = st.fixed_dictionaries(
    {},
    optional={
        "flops": st.floats(1e7, 1e13),
        "bytes": st.floats(1e7, 1e12),
        "lazy_seconds": st.floats(0, 1e-3),
        "query_seconds": st.floats(0, 1e-3),
        "margin": st.floats(0, 1.5),
    },
)


@given(sizes=sizes, rates=rates)
@settings(max_examples=60, deadline=None)
def test_both_planners_decide_alike(sizes, rates):
    compiled = pytest.importorskip("sparse_rtrl._planner").plan(**sizes, **rates)
    found = planner.plan(**sizes, **rates)
    # Compilers may round a product and a sum together.
    for row, expected in zip(found.pop("table"), compiled.pop("table"), strict=True):
        assert row.pop("path") == expected.pop("path")
        assert row == pytest.approx(expected, rel=1e-12)
    assert found == compiled


@pytest.mark.parametrize("name", ["num_slots", "slot_size", "batch_size", "commit_every", "itemsize", "top_k"])
def test_sizes_out_of_range_are_refused_alike(name):
    least = 0 if name == "top_k" else 1
    message = f"^{name} must be at least {least}, got {least - 1}$"
    with pytest.raises(ValueError, match=message):
        planner.plan(**{**SIZES, name: least - 1})
    with pytest.raises(ValueError, match=message):
        pytest.importorskip("sparse_rtrl._planner").plan(**{**SIZES, name: least - 1})


def test_learners_plan_alike_without_the_compiled_planner(monkeypatch):
    def decision():
        torch.manual_seed(0)
        cell = SlotMoECell(4, 16, 4, 64, 1, read_slots=2, write_slots=2, output_size=2)
        learner = RTRL(cell, batch_size=2, commit_every=2)
        for _ in range(3):
            learner(torch.randn(2, 4))
        return learner._engine.influence.plan

    with_it = decision()
    monkeypatch.setattr(sparse_rtrl.influence.plan, "planner", planner)
    assert decision() == with_it and with_it.table
    # And where the module cannot be imported.
    monkeypatch.setitem(sys.modules, "sparse_rtrl._planner", None)
    monkeypatch.delattr(sparse_rtrl, "_planner", raising=False)
    spec = importlib.util.find_spec("sparse_rtrl.influence.plan")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "other_plan", module)
    spec.loader.exec_module(module)
    assert module.planner is planner
