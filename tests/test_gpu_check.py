"""The command for a GPU machine, without the GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench import gpu_check

ROOT = Path(__file__).parent.parent


def test_dry_run(tmp_path):
    out = tmp_path / "report.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "bench.gpu_check", "--dry-run", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    report = json.loads(out.read_text())
    assert report["dry_run"] and report["machine"]["commit"] and report["status"]["tests"] == 0
    shapes = {(row["name"], *row["shape"].values(), row["precision"]) for row in report["rows"]}
    assert len(shapes) == len(report["rows"]) == 23
    for row in report["rows"]:
        assert row["median_seconds"] is None and row["fraction_of_roof"] is None
        assert all(row["checked"].values()) and row["bitwise_repeatable"] and row["bytes"] > 0 and row["flops"] > 0
        assert set(row["error_against_float64"]) == {"kernel", "reference", "torch.compile"}
    learning = {row["name"]: row["relative_error"] for row in report["learning"]}
    assert set(learning) == {"bptt", "rtrl-1", "rtrl-1, CUDA graphs", "rtrl-64", "rtrl-64, CUDA graphs"}
    assert all(0 < error < 1e-5 for error in learning.values()) and not report["failures"]
    assert out.with_suffix(".png").exists() == ("no plot" not in done.stdout)


def test_what_is_wrong_is_not_timed(monkeypatch):
    """Each contestant is compared with float64 first; a kernel that is off by one part in a thousand gets no time."""
    monkeypatch.setattr(gpu_check, "median_seconds", lambda function, repeats: 1.0)
    roofs = {"copy": 1e9, "ieee": 1e9, "tf32x3": 1e9, "tf32": 1e9}
    arguments = gpu_check.make_update(1, 32, 64, 32, torch.device("cpu"))
    plain = gpu_check.reference.influence_update_

    def right(P, *rest, precision):
        plain(P, *rest)

    def wrong(P, *rest, precision):
        plain(P, *rest)
        P.mul_(1.001)

    monkeypatch.setattr(gpu_check, "compiled", lambda function, backend: function)
    rows = {}
    for kernel in (right, wrong):
        case = ("influence_update_", {"B": 1}, kernel, plain, arguments, (1e3, 1e6))
        rows[kernel] = gpu_check.measure(case, "ieee", roofs, repeats=1, dry_run=False)
    assert rows[right]["median_seconds"] == 1.0 and rows[right]["fraction_of_roof"] == pytest.approx(1e-3)
    assert rows[wrong]["median_seconds"] is None and not rows[wrong]["checked"]["kernel"]
    assert rows[wrong]["baseline_seconds"]["reference"] == 1.0
