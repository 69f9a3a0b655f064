"""The command line, end to end on tiny runs."""

import csv
import json

import pytest
import torch
from typer.testing import CliRunner

from sparse_rtrl.cli import app, comparisons
from sparse_rtrl.cli.experiment import ExperimentError, RunConfig, run_job
from sparse_rtrl.training.metrics import METRICS
from sparse_rtrl.training.runlog import read_lines

TINY = ["--batch-size", "2", "--updates", "3", "--eval-sequences", "20", "--slot-size", "8", "--length", "12"]


def invoke(*arguments, status=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def experiments_in_this_process(monkeypatch):
    """Spares the start of a process for each experiment; that both come to the same has a test of its own."""

    def run(job, on_event=None):
        job = json.loads(json.dumps({key: value for key, value in job.items() if key != "deadline"}))
        *progress, result = (json.loads(json.dumps(event)) for event in run_job(job))
        for event in progress:
            if on_event is not None:
                on_event(event)
        return result

    monkeypatch.setattr(comparisons, "run_in_process", run)


def test_help_teaches():
    for command in ((), ("train",), ("compare",), ("compare", "direct"), ("compare", "scaling"), ("compare", "trials")):
        assert "--help" in invoke(*command, "--help")
    for command in ("train", "demo", "check", "env"):
        assert "Example" in invoke(command, "--help")


def test_env_names_versions_and_backends():
    output = invoke("env")
    assert "torch" in output and "2." in output


@pytest.mark.parametrize("method", ["rtrl", "bptt", "tbptt", "jacrev", "gru-bptt"])
def test_train_keeps_everything_in_a_run_folder(method, tmp_path):
    output = invoke("train", "-m", method, *TINY, "--runs", tmp_path, "--name", "it", "--evaluate-at", 16)
    folder = tmp_path / "it"
    assert "chance 25.0%" in output and "length 16" in output
    rows = read_lines(folder / "metrics.jsonl")
    assert [row["update"] for row in rows] == [1, 2, 3]
    assert all(row["tokens_per_second"] > 0 and set(row) <= set(METRICS) for row in rows)
    assert json.loads((folder / "config.json").read_text())["method"] == method
    assert "16" in json.loads((folder / "results.json").read_text())["accuracy"]
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert list(folder.glob("events.out.tfevents.*")) and (folder / "model.pt").exists()


@pytest.mark.parametrize("cell", ["lru", "retention", "rwkv", "mamba", "elstm"])
def test_diagonal_cells_train_and_pass_the_gradient_check(cell, tmp_path):
    assert "fresh sequences" in invoke("train", "--cell", cell, *TINY, "--segment", 1, "--runs", tmp_path)
    output = invoke("check", "--cell", cell, "--length", 5, "--slot-size", 2, "--num-slots", 2)
    assert "gradients agree" in output


@pytest.mark.parametrize("task", ["haystack", "copy", "anbn", "recall"])
def test_every_task_trains(task, tmp_path):
    arguments = ["--batch-size", "2", "--updates", "2", "--eval-sequences", "4", "--slot-size", "8", "--segment", "4"]
    output = invoke("train", "--task", task, "--length", 40, *arguments, "--runs", tmp_path, "--name", "it")
    assert "fresh sequences" in output
    start = json.loads((tmp_path / "it" / "config.json").read_text())["start_length"]
    assert start == {"recall": 16 + 5}.get(task, 12)  # the shortest sequence with nothing asked within a segment


def test_options_of_retention_and_of_the_influence(tmp_path):
    options = ["--cell", "retention", "--token-shift", "--decay", 1.0]
    options += ["--task", "recall", "--pairs", 2, "--segment", 4, "--length", 24]
    options += ["--batch-size", 16, "--updates", 100, "--slot-size", 8, "--eval-sequences", 100]
    invoke("train", *options, "--runs", tmp_path, "--name", "it")
    accuracy = json.loads((tmp_path / "it" / "results.json").read_text())["accuracy"]["24"]
    assert accuracy["value"] > 0.9  # without the shift no cell can tell which value belongs to which key
    options = json.loads((tmp_path / "it" / "config.json").read_text())["cell_options"]
    assert options == {"token_shift": True, "decay": 1.0}
    invoke("train", *TINY, "--commit-every", "3", "--runs", tmp_path, "--name", "three")
    assert json.loads((tmp_path / "three" / "config.json").read_text())["commit_every"] == 3
    output = invoke("train", *TINY, "--commit-every", "0", "--runs", tmp_path, status=2)
    assert "--commit-every must be auto or a number of at least 1, got 0" in output
    for option, value, cell in (("--decay", 0.5, "retention"), ("--write-to", "least_used", "slot-moe")):
        output = invoke("train", "--cell", "lru", option, value, "--runs", tmp_path, status=2)
        assert f"{option} is for the cell {cell}, got cell lru" in output


def test_the_slot_cell_remembers_pairs(tmp_path):
    options = ["--task", "recall", "--pairs", 2, "--segment", 4, "--length", 24, "--batch-size", 32, "--updates", 300]
    options += [
        "--commit-every",
        32,
        "--token-shift",
        "--write-to",
        "least_used",
        "--write-slots",
        1,
        "--read-slots",
        4,
    ]
    invoke("train", *options, "--eval-sequences", 100, "--runs", tmp_path, "--name", "it")
    accuracy = json.loads((tmp_path / "it" / "results.json").read_text())["accuracy"]["24"]
    assert accuracy["value"] > 0.95
    config = json.loads((tmp_path / "it" / "config.json").read_text())
    assert config["cell_options"] == {"write_to": "least_used"} and config["token_shift"]
    output = invoke("train", "--write-to", "anywhere", "--runs", tmp_path, status=2)
    assert "write_to must be 'important' or 'least_used', got 'anywhere'" in output


def test_train_on_real_data_and_resume(tmp_path):
    fasta = tmp_path / "x.fa"
    fasta.write_text(">a\nACGTTGCATTTGACNNAGATTAGAC\n>b\nGATTACAGATTACA\n")
    tiny = ["--batch-size", "2", "--length", "8", "--segment", "4", "--slot-size", "4", "--runs", tmp_path]
    output = invoke("train", "--task", "bytes", *tiny, "--updates", 3, "--name", "b", "--lyapunov-weight", "0.1")
    assert "bits per symbol" in output and "fresh sequences" not in output
    rows = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert all(6 < row["bits_per_byte"] < 10 and abs(row["lyapunov"]) < 1 for row in rows)
    bits = json.loads((tmp_path / "b" / "results.json").read_text())["bits_per_symbol"]
    assert bits["stream"] == pytest.approx(sum(row["bits_per_byte"] for row in rows) / 3)
    assert bits["last_tenth"] == pytest.approx(rows[-1]["bits_per_byte"])

    options = [*tiny, "--task", "fasta", "--corpus", fasta, "--reset-at-borders", "--lyapunov-weight", "0.1"]
    options += ["--lr", "0.01", "--final-lr", "0.01"]
    for name, updates in (("whole", 6), ("begun", 3)):
        invoke("train", *options, "--updates", updates, "--name", name)
    invoke("train", "--resume", tmp_path / "begun", "--updates", 6)
    whole, resumed = (torch.load(tmp_path / name / "model.pt") for name in ("whole", "begun"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "begun")]
    assert [json.loads(line)["lyapunov"] for line in logs[0]] == [json.loads(line)["lyapunov"] for line in logs[1]]


def test_experiments_have_processes_of_their_own(request):
    config = RunConfig(slot_size=8, length=12, batch_size=2, updates=3, eval_sequences=20, eval_lengths=(12,))
    alone = comparisons.compare_methods([config], time_budget=200, repeats=1)[0]
    with pytest.raises(ExperimentError, match=r"^rtrl ended with exit status 1: ValueError: length must be"):
        comparisons.probe_cost(config, 0)
    request.getfixturevalue("experiments_in_this_process")
    here = comparisons.compare_methods([config], time_budget=200, repeats=1)[0]
    assert alone.updates == here.updates == 3 and alone.accuracy == here.accuracy
    assert [event["loss"] for event in alone.history] == [event["loss"] for event in here.history]
    assert min(alone.probe.peak_bytes, alone.probe.seconds_per_token) > 0


@pytest.mark.usefixtures("experiments_in_this_process")
def test_demo_ends_with_a_table_and_a_picture(tmp_path):
    options = [*TINY, "--runs", tmp_path, "--name", "demo", "--time-budget", 1000, "--recall-updates", 2]
    options += ["--parallel", 1]
    output = invoke("demo", *options)
    recall = json.loads((tmp_path / "demo-recall" / "results.json").read_text())["outcomes"]
    assert [outcome["updates"] for outcome in recall] == [2, 2]
    for word in ("sparse RTRL, segment 8", "BPTT", "TBPTT(8)", "chance", "25.0%", "peak memory", "time per token"):
        assert word in output
    assert (tmp_path / "demo" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    outcomes = json.loads((tmp_path / "demo" / "results.json").read_text())["outcomes"]
    assert [o["probe"]["peak_bytes"] > 0 for o in outcomes] == [True] * 3


@pytest.mark.usefixtures("experiments_in_this_process")
def test_compare_direct_and_trials_and_scaling(tmp_path):
    output = invoke(
        *("compare", "direct", *TINY, "-m", "gru-bptt", "--parallel", 1, "--runs", tmp_path, "--name", "direct")
    )
    assert "GRU" in output and "chance" in output
    tiny = [a for a in TINY if a not in ("--length", "12")]
    output = invoke(
        *("compare", "trials", *tiny, "-m", "rtrl", "--trials", 2, "--length", 12, "--evaluate-at", 20),
        *("--parallel", 1, "--runs", tmp_path, "--name", "trials"),
    )
    with (tmp_path / "trials" / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["length"], r["scored_at"], r["seed"]) for r in rows[:4]] == [
        ("12", "12", "0"),
        ("12", "12", "1"),
        ("12", "20", "0"),
        ("12", "20", "1"),
    ]
    output = invoke(
        *("compare", "scaling", "-m", "bptt", "--length", 16, "--length", 32, "--batch-size", 2),
        *("--slot-size", 8, "--repeats", 1, "--runs", tmp_path, "--name", "scaling"),
    )
    assert "peak memory" in output and (tmp_path / "scaling" / "scaling.png").exists()


def test_check_passes_and_fails_with_its_exit_status(monkeypatch):
    output = invoke("check", "--length", 5, "--length", 17, "--slot-size", 4)
    assert "all 48 gradients agree" in output and "control.bias" in output
    from sparse_rtrl.influence.sparse import Influence

    original = Influence.loss_gradient
    monkeypatch.setattr(
        Influence, "loss_gradient", lambda self, position, u, step: original(self, position, 1.01 * u, step)
    )
    assert "are off" in invoke("check", "--length", 17, "--slot-size", 4, status=1)


def test_plan_prints_its_decision_and_the_cost_of_each_way():
    rare = invoke("plan", "--num-experts", 256, "--flush-every", 64)
    assert "lazy: keep" in rare and all(path in rare for path in ("eager", "replay", "product", "auto"))
    assert "eager: move every expert" in invoke("plan", "--num-experts", 4, "--flush-every", 1)
    measured = invoke("plan", "--measure")
    assert "measured flops" in measured and "measured bytes" in measured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--top-k", 9], "top_k must be at most num_experts=4, got 9"),
        (["train", "--length", 3], "length"),
        (["train", "--corpus", "x"], "corpus and reset_at_borders are for the tasks bytes, fasta, got haystack"),
        (["train", "--task", "fasta"], "corpus must name a file or a folder of them for the task fasta"),
        (["train", "--task", "bytes", "--corpus", "/nowhere"], "there is no /nowhere"),
        (["train", "-m", "gru-bptt", "--lyapunov-weight", 1], "lyapunov_weight must be None for the method gru-bptt"),
        (["train", "--batch-size", 0], "batch_size must be at least 1, got 0"),
        (["compare", "direct", "-m", "rtrl", "-m", "rtrl"], "methods must be distinct"),
        (["check", "--length", 0], "length must be at least 1, got 0"),
        (["check", "--catch-up", "lazy"], "catch_up must be one of"),
        (["plan", "--buffer", 0], "buffer must be"),
        (["plan", "--cell", "lru"], "cell must have experts to plan for"),
        (["train", "--cell", "lru", "-m", "jacrev"], "method jacrev is for the cells slot-moe"),
        (["plan", "--flush-every", 0], "flush_every must be"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path):
    runs = [] if arguments[0] in ("check", "plan") else ["--runs", tmp_path]
    output = invoke(*arguments, *runs, status=2)
    assert message in output and "Traceback" not in output
