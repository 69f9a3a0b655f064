"""What is registered in one place is offered, built, explained and tested everywhere else."""

import inspect
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import diagonal_oracle
import pytest
import torch
from typer.testing import CliRunner

import sparse_rtrl
from sparse_rtrl import cells
from sparse_rtrl.cells.diagonal_cell import DiagonalCell
from sparse_rtrl.cells.registry import CELLS, CellSizes
from sparse_rtrl.cells.slot_cell import SlotCell
from sparse_rtrl.cli.app import app
from sparse_rtrl.cli.comparisons import label_of
from sparse_rtrl.cli.experiment import METHODS, RunConfig, build_method, build_stream, build_trainer
from sparse_rtrl.cli.run_plots import CURVES, HEAT_MAPS
from sparse_rtrl.learners import methods
from sparse_rtrl.training.corpora import CORPORA
from sparse_rtrl.training.metrics import METRICS
from sparse_rtrl.training.tasks import TASKS

ROOT = Path(__file__).parents[2]
SIZES = CellSizes(slot_size=4, num_slots=4, num_experts=3, top_k=2, read_slots=2, write_slots=1)


@pytest.mark.parametrize("command", ["train", "compare direct", "compare scaling", "compare trials"])
@pytest.mark.parametrize("option", ["method", "cell", "task"])
def test_the_command_line_offers_what_is_registered(command, option):
    names = {"method": METHODS, "cell": CELLS, "task": {**TASKS, **(CORPORA if command == "train" else {})}}[option]
    refused = CliRunner().invoke(app, [*command.split(), f"--{option}", "nothing"], env={"COLUMNS": "400"})
    assert refused.exit_code == 2
    offered = refused.output.partition("is not one of")[2]
    assert set(re.findall(r"'([\w-]+)'", offered)) == set(names)


def test_every_ready_cell_is_registered_and_public():
    ready = {getattr(cells, name) for name in cells.__all__}
    assert {cell.kind for cell in CELLS.values()} == ready
    assert all(getattr(sparse_rtrl, kind.__name__) is kind for kind in ready)


@pytest.mark.parametrize("name", CELLS)
def test_a_registered_cell_is_built_estimated_and_checked(name):
    cell = CELLS[name].build(3, 2, SIZES)
    state = (
        sum(map(torch.Tensor.numel, states)) if isinstance(states := cell.initial_state(1), tuple) else states.numel()
    )
    assert state >= SIZES.num_slots * SIZES.slot_size
    assert sparse_rtrl.estimate(cell, 2).influence_bytes > 0
    generator = torch.Generator().manual_seed(0)
    cell = cell.double()
    shifted = isinstance(cell, DiagonalCell) and cell.previous_input
    x = torch.randn(2, 6 if shifted else 3, generator=generator, dtype=torch.float64)
    state = cell.initial_state(2) if isinstance(cell, SlotCell) else cell.initial_entries(2)
    sparse_rtrl.check_cell(cell, x, torch.randn(state.shape, generator=generator, dtype=state.dtype))
    if isinstance(cell, DiagonalCell):
        assert CELLS[name].kind in {type(diagonal_oracle.make_cell(case)) for case in diagonal_oracle.CELLS}


@pytest.mark.parametrize("name", METHODS)
def test_a_registered_method_trains(name):
    config = RunConfig(method=name, slot_size=4, length=12, batch_size=2, num_experts=2, updates=1)
    trainer = build_trainer(config)
    trainer.train_batch(next(iter(build_stream(config))))
    assert trainer.gradient_norm > 0
    assert label_of(config) and "{" not in label_of(config)
    weighted = replace(config, lyapunov_weight=0.1) if METHODS[name].regularized else None
    if weighted:
        assert build_method(weighted).metrics() is not None
    else:
        with pytest.raises(ValueError, match="lyapunov_weight"):
            replace(config, lyapunov_weight=0.1)


@pytest.mark.parametrize("name", [*TASKS, *METHODS, *CELLS, *CORPORA])
def test_the_page_of_the_command_line_names_what_is_registered(name):
    assert f"`{name}`" in (ROOT / "docs" / "command_line.md").read_text()


def test_a_metric_is_drawn_as_it_says():
    assert {*CURVES, *HEAT_MAPS} == {metric for metric in METRICS.values() if metric.title}
    assert all(name == metric.name and metric.meaning for name, metric in METRICS.items())


def test_methods_of_carry_are_those_of_its_signature():
    choosing = (ROOT / "docs" / "choosing.md").read_text() + (ROOT / "docs" / "carry.md").read_text()
    assert all(f'"{name}"' in choosing or f"`{name}`" in choosing for name in methods.METHODS)


def test_a_new_task_cell_and_metric_take_one_edit_each(tmp_path):
    """Registered in a module of its own, they are offered, trained, logged and drawn."""
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "from sparse_rtrl.cells.registry import register_cell\n"
        "from sparse_rtrl.cells.lru import LRUCell\n"
        "from sparse_rtrl.training.tasks import Task, register_task\n"
        "from sparse_rtrl.training.metrics import METRICS, Metric\n"
        "from sparse_rtrl.training.gradient_method import SparseRTRL\n"
        "@register_cell('small-lru', lambda of: {'hidden_size': of.num_slots})\n"
        "class SmallLRU(LRUCell): pass\n"
        "@register_task('parity')\n"
        "class Parity(Task):\n"
        "    input_size = output_size = 2\n"
        "    min_length = 1\n"
        "    def _draw(self):\n"
        "        tokens = self._integers(2, self.batch_size, self.length)\n"
        "        return tokens, tokens.cumsum(1) % 2\n"
        "METRICS['window'] = Metric('window', 'steps in the window', 'Window', 'steps')\n"
        "told = SparseRTRL.metrics\n"
        "SparseRTRL.metrics = lambda self: told(self) | {'window': float(self.learner.commit_every)}\n"
        "from sparse_rtrl.cli.app import app\n"
        "options = 'train --task parity --cell small-lru --length 8 --updates 2 --batch-size 2 --name own'\n"
        "app(options.split(), standalone_mode=False)\n"
        "app(['report', 'runs/own'])\n"
    )
    done = subprocess.run([sys.executable, "own.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs" / "own" / "metrics.jsonl").read_text().splitlines()]
    assert [row["window"] for row in rows] == [8.0, 8.0]
    assert (tmp_path / "report" / "window.png").exists()


def test_an_operation_has_one_name_everywhere():
    from sparse_rtrl.ops import dispatch, reference, triton_backend

    compiled = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cpp"))
    launchers = "".join(path.read_text() for path in (ROOT / "triton_kernels").glob("*.py"))
    assert len(dispatch.SCHEMAS) > 10
    for name in dispatch.SCHEMAS:
        assert getattr(dispatch, name) is getattr(torch.ops.sparse_rtrl, name)
        returns = len(getattr(dispatch, name).default._schema.returns)
        assert (name in dispatch.FAKES) == (returns > 0), name
        assert name not in dispatch.NAMES or inspect.getdoc(getattr(reference, name)), name
        assert f'm.impl("{name}"' in compiled or name in triton_backend.SCHEMAS, f"{name} has no compiled version"
    for name in triton_backend.SCHEMAS:
        assert name in dispatch.NAMES and f"\ndef {name}(" in launchers
