"""The picture of slots over one sequence: that it shows what the cell did."""

import json

import pytest
import torch
from typer.testing import CliRunner

from sparse_rtrl.cli import app
from sparse_rtrl.cli.slot_picture import plot_slots, trace_slots
from sparse_rtrl.training.tasks import IGNORE

TINY = ["--length", 24, "--batch-size", 2, "--updates", 2, "--slot-size", 4, "--eval-sequences", 5, "--token-shift"]


def train(folder, *options):
    arguments = [str(each) for each in ("train", *TINY, *options, "--runs", folder.parent, "--name", folder.name)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("write_to", ["important", "least_used"])
def test_it_shows_what_the_cell_did(tmp_path, write_to):
    options = ["--task", "recall", "--pairs", 2, "--num-slots", 5, "--read-slots", 3, "--write-slots", 2]
    settings = train(tmp_path / "it", *options, "--segment", 4, "--write-to", write_to)
    trace = trace_slots(tmp_path / "it", settings)
    steps = len(trace.tokens)
    assert trace.norms.shape == trace.reads.shape == trace.writes.shape == (steps, 5)
    assert (trace.reads.sum(1) == 3).all() and ((trace.writes > 0).sum(1) <= 2).all()
    assert int((trace.target != IGNORE).sum()) == 2 and trace.writes.sum() > 0
    changed = trace.norms[1:] != trace.norms[:-1]
    assert (trace.writes[1:][changed] > 0).all()  # content changes only where it is written
    axes = plot_slots(trace, "it").axes[0]
    assert torch.equal(torch.from_numpy(axes.images[0].get_array().data), trace.norms.T)
    assert axes.get_title().startswith("it: ") and "of 2 answers right" in axes.get_title()
    (tmp_path / "it" / "model.pt").unlink()  # the newest checkpoint has the same model
    again = trace_slots(tmp_path / "it", settings)
    assert torch.equal(again.norms, trace.norms)


def test_where_there_is_nothing_to_draw(tmp_path):
    assert trace_slots(tmp_path / "gru", train(tmp_path / "gru", "--method", "gru-bptt")) is None
    settings = train(tmp_path / "slots")
    for path in ("model.pt", *(p.relative_to(tmp_path / "slots") for p in (tmp_path / "slots").glob("checkpoints/*"))):
        (tmp_path / "slots" / path).unlink()
    assert trace_slots(tmp_path / "slots", settings) is None
    page = CliRunner().invoke(app, ["report", str(tmp_path / "gru"), "--out", str(tmp_path / "page")])
    assert page.exit_code == 0 and not list((tmp_path / "page").glob("slots-*"))
