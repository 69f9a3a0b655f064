"""The training loop: it steps when it says, learns with every method, and reports honest accuracy."""

import itertools
import math

import pytest
import torch
from torch import nn

from sparse_rtrl.cells import SlotMoECell
from sparse_rtrl.errors import DivergenceError
from sparse_rtrl.training.baselines import BPTT, TBPTT, DenseJacobianRTRL, RecurrentNetwork
from sparse_rtrl.training.evaluation import Accuracy, evaluate, wilson_interval
from sparse_rtrl.training.gradient_method import GradientMethod, SparseRTRL, Tally, answer_loss, unroll
from sparse_rtrl.training.tasks import IGNORE, Batch, Copy, Curriculum, Haystack
from sparse_rtrl.training.trainer import Trainer, Training, train


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def build_cell():
    return SlotMoECell(
        input_size=8, slot_size=8, num_slots=3, num_experts=3, top_k=2, read_slots=2, write_slots=2, output_size=4
    )


METHODS = {
    "rtrl": lambda batch_size: SparseRTRL(build_cell(), batch_size, segment=4),
    "bptt": lambda batch_size: BPTT(build_cell()),
    "tbptt": lambda batch_size: TBPTT(build_cell(), segment=4),
    "gru-bptt": lambda batch_size: BPTT(RecurrentNetwork("gru", 8, 16, 4)),
    "jacrev": lambda batch_size: DenseJacobianRTRL(build_cell()),
}


class Answers(nn.Module):
    """A model that answers every step with the class of the input token."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def initial_state(self, batch_size):
        return torch.zeros(batch_size)

    def forward(self, x, state):
        return self.scale * x, state


class Scripted(GradientMethod):
    """Yields given tallies and leaves a gradient of one per asked answer."""

    def __init__(self, tallies):
        self.model = Answers()
        self.tallies = tallies
        self.segment = 5 // len(tallies)  # of sequences of length 5
        self.completed = 0
        self.resets = []

    def reset(self, streams=None):
        self.resets.append(streams)
        self.remaining = iter(self.tallies)

    def learn(self, x, target, divisor):
        tally = next(self.remaining)
        grad = torch.tensor(float(tally.asked))
        self.model.scale.grad = grad if self.model.scale.grad is None else self.model.scale.grad + grad
        return tally

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def complete_gradient(self):
        self.completed += 1


def test_answer_loss_counts_only_what_is_asked():
    outputs = torch.zeros(2, 2, 3, requires_grad=True)
    with torch.no_grad():
        outputs[0, 0, 2] = 5.0
    target = torch.tensor([[2, IGNORE], [IGNORE, 1]])
    loss, tally = answer_loss(outputs, target)
    expected = -math.log(math.exp(5) / (math.exp(5) + 2)) + math.log(3)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert (tally.correct, tally.asked) == (1, 2)
    assert tally.mean_loss == pytest.approx(expected / 2, rel=1e-5)
    assert tally.accuracy == 0.5
    assert math.isnan(Tally().mean_loss) and math.isnan(Tally().accuracy)


def test_unroll_of_a_cell_is_its_steps():
    cell = build_cell()
    x = torch.randn(5, 3, 8)
    outputs, end = unroll(cell, x, cell.initial_state(3))
    state = cell.initial_state(3)
    for t in range(5):
        output, _, state = cell(x[t], state)
        assert torch.equal(outputs[t], output)
    assert torch.equal(end, state)


@pytest.mark.parametrize(("per_segment", "steps"), [(False, 1), (True, 2)])
def test_trainer_steps_once_per_batch_or_per_asking_segment(per_segment, steps):
    method = Scripted([Tally(1.0, 0, 1), Tally(), Tally(), Tally(), Tally(3.0, 2, 2)])
    trainer = Trainer(method, step_per_segment=per_segment)
    calls = []
    trainer.optimizer.register_step_pre_hook(lambda *args: calls.append(float(method.model.scale.grad)))
    tally = trainer.train_batch(Haystack(5, 2).sample())
    assert tally == Tally(4.0, 2, 3)
    assert len(calls) == steps == method.completed
    assert calls == pytest.approx([1.0] * steps)  # clipped to norm 1
    assert method.model.scale.grad is None


def test_clipping_can_be_switched_off():
    method = Scripted([Tally(1.0, 0, 7)])
    trainer = Trainer(method, clip_norm=None)
    calls = []
    trainer.optimizer.register_step_pre_hook(lambda *args: calls.append(float(method.model.scale.grad)))
    trainer.train_batch(Haystack(5, 2).sample())
    assert calls == [7.0]


def test_the_norm_of_the_gradient_is_that_before_clipping():
    trainer = Trainer(Scripted([Tally(1.0, 0, 7)]))
    assert math.isnan(trainer.gradient_norm)
    trainer.train_batch(Haystack(5, 2).sample())
    assert trainer.gradient_norm == 7.0


def test_weight_decay_is_decoupled_from_the_gradient():
    # Without a gradient AdamW multiplies by 1 - learning_rate * weight_decay; L2 in the gradient would move by about
    # the learning rate.
    trainer = Trainer(Scripted([Tally()]), learning_rate=0.1, weight_decay=0.5)
    trainer.method.model.scale.grad = torch.zeros(())
    trainer.train_batch(Haystack(5, 2).sample())
    assert trainer.method.model.scale.item() == pytest.approx(0.95)
    with pytest.raises(ValueError, match="weight_decay must be at least 0, got -1"):
        Trainer(Scripted([Tally()]), weight_decay=-1.0)


class Broken(nn.Module):
    """Answers that are not finite from a step of its life on."""

    def __init__(self, bad_step):
        super().__init__()
        self.readout = nn.Linear(6, 4)
        self.bad_step = bad_step

    def initial_state(self, batch_size):
        return torch.zeros(batch_size, 1)

    def forward(self, x, state):
        steps = state + torch.arange(1, len(x) + 1).view(-1, 1, 1)
        return torch.where(steps > self.bad_step, math.inf, 1.0) * self.readout(x), steps[-1]


def test_divergence_names_the_first_bad_step_and_does_not_step():
    task = Copy(10, 2)  # asks at its last 5 steps
    model = Broken(bad_step=17)
    method = TBPTT(model, segment=4)
    method.reset = lambda streams=None: None
    trainer = Trainer(method)
    training = Training(trainer, task, updates=5)
    seen = []
    with pytest.raises(DivergenceError, match="at step 17, in update 2: the loss is") as caught:
        for progress in training.segments():
            seen.append((progress.update, progress.complete))
            before = model.readout.weight.clone()
    assert (caught.value.step, caught.value.update) == (17, 2)
    assert seen == [(0, False), (0, False), (1, True), (1, False)]
    assert torch.equal(model.readout.weight, before) and torch.isfinite(before).all()


def test_a_gradient_that_is_not_finite_is_not_stepped_with():
    method = Scripted([Tally(1.0, 0, 1)])
    method.learn = lambda x, target, divisor: setattr(method.model.scale, "grad", torch.tensor(math.inf)) or Tally()
    with pytest.raises(DivergenceError, match="at step 4, in update 1: the norm of the gradient is inf"):
        list(Training(Trainer(method), Haystack(5, 2), updates=2).segments())
    assert method.model.scale.item() == 1.0


def test_learning_rate_goes_linearly_to_its_end():
    trainer = Trainer(Scripted([Tally(1.0, 0, 1)]), learning_rate=0.4, final_learning_rate=0.2)
    rates = []
    for _ in train(trainer, Haystack(5, 2), updates=3):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.4, 0.3, 0.2])


@pytest.mark.parametrize("name", ["bptt", "gru-bptt", "jacrev", "rtrl"])
def test_every_exact_method_learns_a_short_haystack(name):
    if name == "rtrl":
        pytest.importorskip("sparse_rtrl.learners.rtrl")
    task = Haystack(5, 16, seed=1)
    trainer = Trainer(METHODS[name](16), learning_rate=1e-2)
    before = evaluate(trainer.method.model, Haystack(5, 64, seed=2), 128).value
    for _progress in train(trainer, task, updates=80):
        pass
    after = evaluate(trainer.method.model, Haystack(5, 64, seed=2), 128)
    assert before < 0.6
    assert after.value > 0.9


def test_methods_on_the_same_cell_get_the_same_gradient():
    pytest.importorskip("sparse_rtrl.learners.rtrl")
    torch.set_default_dtype(torch.float64)
    cell = build_cell()
    batch = Haystack(14, 3, min_distance=6).sample()
    gradients = {}
    for name, method in {
        "bptt": BPTT(cell),
        "rtrl": SparseRTRL(cell, 3, segment=4),
        "jacrev": DenseJacobianRTRL(cell),
        "tbptt": TBPTT(cell, segment=4),
    }.items():
        cell.zero_grad()
        list(method.segments(batch))
        method.complete_gradient()
        gradients[name] = torch.cat([p.grad.flatten() for p in cell.parameters()])
    expected = gradients.pop("bptt")
    errors = {name: ((g - expected).norm() / expected.norm()).item() for name, g in gradients.items()}
    assert errors["rtrl"] < 1e-12 and errors["jacrev"] < 1e-12
    assert errors["tbptt"] > 1e-2


@pytest.mark.parametrize("per_segment", [False, True])
def test_rtrl_trains_batch_after_batch(per_segment):
    pytest.importorskip("sparse_rtrl.learners.rtrl")
    trainer = Trainer(METHODS["rtrl"](4), step_per_segment=per_segment)
    before = [p.detach().clone() for p in trainer.parameters]
    tallies = [p.tally for p in train(trainer, Curriculum(Haystack(5, 4), 5, 12, 4), updates=4)]
    assert all(tally.asked == 4 and math.isfinite(tally.loss) for tally in tallies)
    moved = [not torch.equal(p, q) for p, q in zip(trainer.parameters, before, strict=True)]
    assert all(moved)


def test_training_reports_progress_and_stops_in_time():
    trainer = Trainer(METHODS["gru-bptt"](4))
    stream = Curriculum(Haystack(5, 4), 5, 8, updates=4)
    progress = list(train(trainer, stream, updates=4))
    assert [p.update for p in progress] == [1, 2, 3, 4]
    assert [p.length for p in progress] == [5, 6, 7, 8]
    assert [p.tokens for p in progress] == [20, 44, 72, 104]
    assert progress[-1].tokens_per_second == pytest.approx(104 / progress[-1].seconds)
    assert len(list(train(trainer, stream, updates=100, max_seconds=0.0))) == 1


def test_training_is_reproducible():
    def run():
        torch.manual_seed(3)
        trainer = Trainer(METHODS["tbptt"](4))
        return [p.tally.loss for p in train(trainer, Haystack(6, 4, seed=3), updates=3)]

    assert run() == run()


def test_evaluate_takes_exactly_the_sequences_asked_for():
    class Fixed:
        batch_size = 4

        def sample(self):
            # Streams 0 and 1 are answered rightly, 2 and 3 wrongly, at one step each.
            x = torch.eye(3)[torch.tensor([[0, 1, 2, 0]])]
            return Batch(x, torch.tensor([[0, 1, 1, 1]]))

    assert evaluate(Answers(), Fixed(), 6) == Accuracy(correct=4, asked=6, sequences=6)
    assert evaluate(Answers(), Fixed(), 3) == Accuracy(correct=2, asked=3, sequences=3)
    with pytest.raises(ValueError, match="num_sequences must be at least 1, got 0"):
        evaluate(Answers(), Fixed(), 0)


def test_evaluate_runs_long_sequences_in_pieces(monkeypatch):
    monkeypatch.setattr("sparse_rtrl.training.evaluation._TOGETHER", 5 * 4)
    lengths = []

    class Counts(torch.nn.Module):
        """Answers at the last step whether an odd number of ones was seen, which pieces alone cannot know."""

        def initial_state(self, batch_size):
            return torch.zeros(batch_size)

        def forward(self, x, state):
            lengths.append(len(x))
            sums = state + x[..., 1].cumsum(0)
            return torch.nn.functional.one_hot((sums % 2).long(), 2).float(), sums[-1]

    class Parity:
        batch_size = 4

        def sample(self):
            tokens = torch.randint(2, (12, 4), generator=torch.Generator().manual_seed(0))
            target = torch.full((12, 4), IGNORE)
            target[-1] = tokens.sum(0) % 2
            return Batch(torch.nn.functional.one_hot(tokens, 2).float(), target)

    assert evaluate(Counts(), Parity(), 4) == Accuracy(correct=4, asked=4, sequences=4)
    assert lengths == [5, 5, 2]


@pytest.mark.parametrize(
    ("share", "trials", "low", "high"),
    # Values of Newcombe, Statistics in Medicine 1998, table I, method 3.
    [
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0.0, 20, 0.0, 0.1611),
        (1 / 29, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_matches_published_values(share, trials, low, high):
    assert wilson_interval(share, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_stays_in_range_and_counts_sequences():
    assert wilson_interval(1.0, 1000)[1] == 1.0
    few = Accuracy(correct=90, asked=100, sequences=10).interval
    many = Accuracy(correct=90, asked=100, sequences=100).interval
    assert few[1] - few[0] > many[1] - many[0]
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        wilson_interval(0.5, 0)


def test_batches_are_cut_without_losing_steps():
    cell = build_cell()
    batch = Haystack(11, 3).sample()
    sizes = [1, 4, 11, 50]
    for size, count in zip(sizes, [11, 3, 1, 1], strict=True):
        tallies = list(itertools.islice(TBPTT(cell, segment=size).segments(batch), 20))
        assert len(tallies) == count
        assert sum(t.asked for t in tallies) == 3
