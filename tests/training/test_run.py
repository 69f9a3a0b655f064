"""Long runs: resumed bit for bit from anywhere, stopped by signals and by divergence, logged."""

import copy
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparse_rtrl.cells import SlotMoECell
from sparse_rtrl.cells.slot_cell import Routing
from sparse_rtrl.cli import app
from sparse_rtrl.cli.experiment import build_stream, build_trainer
from sparse_rtrl.training.baselines import TBPTT, DenseJacobianRTRL, RecurrentNetwork
from sparse_rtrl.training.checkpoint import CheckpointFolder, load_checkpoint, save_checkpoint
from sparse_rtrl.training.gradient_method import SparseRTRL, answer_loss, unroll
from sparse_rtrl.training.metrics import METRICS
from sparse_rtrl.training.routing_usage import RoutingUsage
from sparse_rtrl.training.run import Run
from sparse_rtrl.training.runlog import EVENTS, RunLog, read_lines
from sparse_rtrl.training.tasks import IGNORE, Batch
from sparse_rtrl.training.trainer import Trainer, Training
from tools.kill_resume import CONFIG, differences

CONFIG = replace(CONFIG, updates=3, length=26, start_length=24, commit_every=5)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def training_of(config):
    return Training(build_trainer(config), build_stream(config), config.updates)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def finish(config, state):
    """Go on from a state in a new training; the state it ends in."""
    training = training_of(config)
    training.load_state_dict(state)
    for _ in training.segments():
        pass
    return training.state_dict()


def saved_everywhere(config):
    """The states after every segment of a run that is saved all the time, and the one it ends in."""
    training = training_of(config)
    states = [through_a_file(training.state_dict())]
    for _ in training.segments():
        states.append(through_a_file(training.state_dict()))
    return states


@pytest.mark.parametrize(
    "changes",
    [
        {"catch_up": "replay"},
        {"catch_up": "product", "step_per_segment": True},
        {"cell": "sparse-latent-moe", "catch_up": "replay"},
        {"catch_up": "auto", "buffer": "auto", "commit_every": "auto", "influence_cap": 2.0},
        {"method": "tbptt", "step_per_segment": True},
        {"method": "jacrev", "updates": 2, "num_experts": 2, "length": 8, "start_length": None},
        {"method": "gru-bptt"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_resuming_from_anywhere_is_bit_for_bit(changes):
    config = replace(CONFIG, **changes)
    undisturbed = finish(config, training_of(config).state_dict())
    states = saved_everywhere(config)
    assert differences(undisturbed, states[-1]) == [], "saving changed the run"
    for state in states[2 : -1 : max(1, len(states) // 3)]:
        assert differences(undisturbed, finish(config, state)) == []


@pytest.fixture(scope="module")
def lazy_states():
    torch.set_num_threads(1)
    return saved_everywhere(CONFIG)


def influence_of(state):
    return state["trainer"]["method"]["learner"]["influence"]


def test_checkpoints_fall_into_windows_and_into_the_sleep_of_experts(lazy_states):
    middle = [s for s in lazy_states if 0 < len(influence_of(s)["window"]) < CONFIG.commit_every and s["done"]]
    asleep = [s for s in middle if bool((influence_of(s)["influenced"] & ~influence_of(s)["awake"]).any())]
    assert len(asleep) > 3 and any(map(behind, asleep))
    events = influence_of(lazy_states[-1])["events"]
    assert min(events[name] for name in ("wakes", "replays", "payments")) > 0


def behind(state):
    """Whether an expert sleeps that the tree must bring up to date."""
    influence = influence_of(state)
    asleep = influence["influenced"] & ~influence["awake"]
    return bool((asleep & (influence["last_update"] < influence["commits"])).any())


def drop_influence(state):
    influence_of(state)["core"].zero_()


def drop_window(state):
    influence_of(state)["window"] = []


def drop_tree(state):
    for part in influence_of(state)["tree"]["rings"]:
        for ring in part:
            ring.zero_()


def drop_sleep(state):
    influence_of(state)["influenced"].fill_(False)


def drop_deferred(state):
    influence_of(state)["window_loss_row"].zero_()
    influence_of(state)["handed_out"].add_(1e-3)


def drop_state(state):
    state["trainer"]["method"]["learner"]["state"].zero_()


def drop_gradient(state):
    state["trainer"]["gradients"] = [None] * len(state["trainer"]["gradients"])


def drop_optimizer(state):
    for entry in state["trainer"]["optimizer"]["state"].values():
        entry["exp_avg_sq"].zero_()


def drop_position_in_batch(state):
    state["done"] -= 4


def drop_position_in_stream(state):
    state["stream"]["task"]["generator"] = torch.Generator().manual_seed(99).get_state()


@pytest.mark.parametrize(
    "drop",
    [
        drop_influence,
        drop_window,
        drop_tree,
        drop_sleep,
        drop_deferred,
        drop_state,
        drop_optimizer,
        drop_position_in_batch,
        drop_position_in_stream,
    ],
)
def test_a_checkpoint_that_lacks_something_leads_elsewhere(lazy_states, drop):
    state = copy.deepcopy(next(s for s in reversed(lazy_states) if s["done"] and behind(s)))
    drop(state)
    model = finish(CONFIG, state)["trainer"]["model"]
    assert differences(model, lazy_states[-1]["trainer"]["model"]) != []


def test_gradients_of_a_batch_in_progress_are_saved():
    config = replace(CONFIG, task="anbn", task_options={}, length=12, start_length=None, updates=2)
    states = saved_everywhere(config)
    state = next(s for s in states if s["done"] == 8 and s["update"] == 1)
    assert any(bool(g.any()) for g in state["trainer"]["gradients"] if g is not None)
    assert differences(finish(config, copy.deepcopy(state)), states[-1]) == []
    drop_gradient(state)
    assert differences(finish(config, state)["trainer"]["model"], states[-1]["trainer"]["model"]) != []


def test_what_the_capture_found_out_is_saved():
    # A learner that has captured nothing yet captures its first step alone, which may round differently.
    config = replace(CONFIG, cell="sparse-latent-moe", updates=1, length=8, start_length=None)
    states = saved_everywhere(config)
    before, after = (state["trainer"]["method"]["learner"]["capture"] for state in (states[0], states[-1]))
    assert before["checked"] == [] and after["checked"]
    training = training_of(config)
    training.load_state_dict(states[-1])
    assert training.state_dict()["trainer"]["method"]["learner"]["capture"] == after


def test_random_states_are_restored(lazy_states):
    training = training_of(CONFIG)
    torch.manual_seed(5)
    state = {**lazy_states[3], "random": training.state_dict()["random"]}
    expected = torch.rand(3)
    training.load_state_dict(state)
    assert torch.equal(torch.rand(3), expected)


def test_killed_at_random_moments():
    tool = Path(__file__).parents[2] / "tools" / "kill_resume.py"
    arguments = [sys.executable, str(tool), "--fork", "--kills", "3", "--updates", "12"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tool.parents[1])}
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kills" in result.stdout and ": 0 differences" in result.stdout


def invoke(*arguments, status=0):
    result = CliRunner().invoke(app, ["train", *map(str, arguments)], env={"COLUMNS": "300"})
    assert result.exit_code == status, result.output
    return result.output


TINY = ("--batch-size", 2, "--slot-size", 8, "--length", 14, "--eval-sequences", 4, "--updates", 5)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_the_run_goes_on_later(name, tmp_path, monkeypatch):
    assert threading.current_thread() is threading.main_thread()
    invoke(*TINY, "--runs", tmp_path, "--name", "undisturbed")
    original, handlers = RunLog.metrics, [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]

    def metrics(log, row):
        original(log, row)
        if row["update"] == 2:
            os.kill(os.getpid(), getattr(signal, name))

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "metrics", metrics)
        output = invoke(*TINY, "--runs", tmp_path, "--name", "it", "--keep-checkpoints", 1, status=75)
    folder = tmp_path / "it"
    assert f"{name}: saved after update 2" in output and not (folder / "model.pt").exists()
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert "fresh sequences" in invoke("--resume", folder)
    events = read_lines(folder / "events.jsonl")
    names = [event["event"] for event in events if event["event"] != "checkpoint"]
    assert names == ["started", "interrupted", "resumed", "finished"] and set(names) <= set(EVENTS)
    assert [event["signal"] for event in events if event["event"] == "interrupted"] == [name]
    assert len(list((folder / "checkpoints").iterdir())) == 1
    one, two = (torch.load(tmp_path / run / "model.pt", weights_only=True) for run in ("undisturbed", "it"))
    assert differences(one, two) == []
    metrics_of = [read_lines(tmp_path / run / "metrics.jsonl") for run in ("undisturbed", "it")]
    assert [row["update"] for row in metrics_of[1]] == [1, 2, 3, 4, 5] and differences(*metrics_of) == []


def test_a_run_that_diverges_names_the_step_and_a_checkpoint_from_before(tmp_path):
    output = invoke(*TINY, "--lr", 1e30, "--checkpoint-every", 1, "--runs", tmp_path, "--name", "it", status=2)
    folder = tmp_path / "it"
    event = read_lines(folder / "events.jsonl")[-1]
    assert event["event"] == "diverged" and event["checkpoints"][-1] in output
    assert f"diverged at step {event['step']}" in output and "Traceback" not in output
    states = [load_checkpoint(Path(path))["training"] for path in event["checkpoints"]]
    assert len(states) == 2 and all(state["step"] <= event["step"] for state in states)
    for state in states:
        assert all(bool(torch.isfinite(p).all()) for p in state["trainer"]["model"].values())
    # The update of 1e30 ruined the newest one, though every number in it is finite.
    lower = ("--lr", 1e-3, "--final-lr", 1e-3)
    assert "diverged" in invoke("--resume", folder, *lower, status=2)
    assert "fresh sequences" in invoke("--resume", event["checkpoints"][0], *lower)
    assert json.loads((folder / "config.json").read_text())["learning_rate"] == 1e-3
    resumed = next(e for e in read_lines(folder / "events.jsonl") if e["event"] == "resumed")
    assert resumed["changed"] == ["final_learning_rate", "learning_rate"]


def test_resume_refuses_what_it_cannot_do(tmp_path):
    invoke(*TINY, "--runs", tmp_path, "--name", "it", "--checkpoint-every", 2)
    folder = tmp_path / "it"
    assert "slot_size cannot differ" in invoke("--resume", folder, "--slot-size", 16, status=2)
    assert "must be the folder of a run" in invoke("--resume", tmp_path, status=2)
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    good, metrics = newest.read_bytes(), (folder / "metrics.jsonl").read_bytes()
    for content, message in (
        (good[:-1], "is truncated"),
        (good[:-1] + bytes([good[-1] ^ 1]), "is damaged"),
        (b"something else", "is not a checkpoint of sparse_rtrl"),
    ):
        newest.write_bytes(content)
        before = {p.name: p.read_bytes() for p in (folder / "checkpoints").iterdir()}
        output = invoke("--resume", folder, status=2)
        assert message in output and "resume from an earlier one by its path" in output
        assert before == {p.name: p.read_bytes() for p in (folder / "checkpoints").iterdir()}
        assert metrics == (folder / "metrics.jsonl").read_bytes()
    save_checkpoint(newest, {"of": "another program"})
    assert "is no checkpoint of a run" in invoke("--resume", folder, status=2)
    model = torch.load(folder / "model.pt", weights_only=True)
    earlier = sorted((folder / "checkpoints").iterdir())[-2]
    invoke("--resume", earlier)
    assert differences(model, torch.load(folder / "model.pt", weights_only=True)) == []
    assert newest.read_bytes() == good or load_checkpoint(newest)["training"]["update"] == 5
    assert newest.with_name(newest.name + ".aside").exists()


class Bytes:
    """Bytes in a row, streams that go on from batch to batch, and now and then a new sequence."""

    input_size, output_size, batch_size = 256, 256, 3

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while True:
            start, self.position = self.position, self.position + 7
            steps = torch.arange(start, start + 7).view(-1, 1) + 11 * torch.arange(3)
            x = torch.nn.functional.one_hot(steps % 256, 256).float()
            yield Batch(x, (steps + 1) % 256, torch.tensor([start % 3 == 0, False, False]))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def small_cell(size=256):
    sizes = {"slot_size": 8, "num_slots": 3, "num_experts": 3, "top_k": 2, "read_slots": 2, "write_slots": 2}
    return SlotMoECell(input_size=size, output_size=size, **sizes)


@pytest.mark.parametrize("make", [lambda: SparseRTRL(small_cell(), 3, 4), lambda: TBPTT(small_cell(), 4)])
def test_an_endless_stream_is_learned_online_logged_and_resumed(make, tmp_path):
    def run(folder, state=None):
        torch.manual_seed(0)
        training = Training(Trainer(make(), step_per_segment=True), Bytes(), 9)
        folder.mkdir()
        checkpoints = CheckpointFolder(folder / "checkpoints", keep=5)
        with RunLog(folder) as log:
            run = Run(training, log, checkpoints, {}, checkpoint_every=3, log_every=2)
            if state:
                run.load_state_dict(state)
            assert run.carry_out() is None
        states = [load_checkpoint(path) for path in checkpoints.paths()]
        return states, read_lines(folder / "metrics.jsonl")

    states, rows = run(tmp_path / "one")
    assert [state["training"]["update"] for state in states] == [0, 3, 6, 9]
    found, later_rows = run(tmp_path / "two", states[1])
    assert differences(states[-1], found[-1]) == []
    assert [row["update"] for row in rows] == [2, 4, 6, 8, 9] and set(rows[0]) <= set(METRICS)
    assert differences(rows[1:], later_rows) == []  # the first of them averages over an update before the checkpoint
    assert rows[0]["bits_per_byte"] == pytest.approx(rows[0]["loss"] / math.log(2))
    assert rows[0]["tokens"] == 42
    if "expert_load" in rows[0]:
        assert sum(rows[0]["expert_load"]) == pytest.approx(2) and sum(rows[0]["slot_reads"]) == pytest.approx(2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SparseRTRL(small_cell(5), 3, 4),
        lambda: TBPTT(small_cell(5), 4),
        lambda: DenseJacobianRTRL(small_cell(5)),
        lambda: TBPTT(RecurrentNetwork("gru", 5, 6, 5), None),
    ],
)
def test_streams_go_on_from_batch_to_batch_unless_they_are_reset(make):
    torch.manual_seed(0)
    method = make()
    mask = torch.tensor([False, True, False])
    x, target = torch.randn(14, 3, 5), torch.randint(5, (14, 3))
    list(method.segments(Batch(x[:7], target[:7])))
    found = sum(tally.loss for tally in method.segments(Batch(x[7:], target[7:], mask)))

    def expected(mask):
        model, losses = method.model, []
        for stream, new in enumerate(mask.tolist()):
            mine, asked = x[:, stream : stream + 1], target[:, stream : stream + 1]
            begin = 7 if new else 0
            outputs, _ = unroll(model, mine[begin:], model.initial_state(1))
            losses.append(answer_loss(outputs[7 - begin :], asked[7:])[1].loss)
        return sum(losses)

    assert found == pytest.approx(expected(mask), rel=1e-5)
    assert found != pytest.approx(expected(~mask), rel=1e-4)


def test_the_influence_is_capped_and_that_is_logged():
    torch.manual_seed(0)
    batch = Batch(torch.randn(8, 3, 5), torch.full((8, 3), IGNORE))
    free, capped = SparseRTRL(small_cell(5), 3, 4), SparseRTRL(small_cell(5), 3, 4, influence_cap=0.5)
    capped.model.load_state_dict(free.model.state_dict())
    for method in (free, capped):
        list(method.segments(batch))
    core, experts = free.learner.influence_norms()
    assert core.shape == (3,) and experts.shape == (3, 3) and float(core.min()) > 0.5
    assert free.events() == [] and all(float(n.max()) <= 0.5001 for n in capped.learner.influence_norms())
    (event,) = capped.events()
    assert event["event"] in EVENTS and event["cap"] == 0.5 and event["times"] > 3 and event["norm"] > 0.5
    assert capped.events() == []
    with pytest.raises(ValueError, match="influence_cap must be positive or None, got 0"):
        SparseRTRL(small_cell(5), 3, 4, influence_cap=0.0)
    with pytest.raises(ValueError, match="influence_cap must be None for the method bptt"):
        replace(CONFIG, method="bptt", influence_cap=1.0)


def test_routing_is_counted():
    usage = RoutingUsage(batch_size=2, num_slots=3, num_experts=4)
    routings = [
        Routing(torch.tensor([[r], [0]]), torch.tensor([[0, 1], [w, 2]]), torch.tensor([[e], [3]]))
        for r, w, e in ((0, 0, 1), (1, 0, 1), (2, 1, 0))
    ]
    usage.count(routings)
    usage.count(routings[:1])
    row = usage.metrics()
    assert row["expert_load"] == [0.125, 0.375, 0.0, 0.5] and row["slot_reads"] == [0.75, 0.125, 0.125]
    assert row["slot_writes"] == pytest.approx([7 / 8, 5 / 8, 4 / 8])
    # Stream 0 used expert 0 one step ago and expert 1 now; stream 1 used expert 3 now.
    assert row["sleep_mean"] == pytest.approx(1 / 3) and row["sleep_max"] == 1
    assert usage.metrics()["expert_load"] == [0.0] * 4
