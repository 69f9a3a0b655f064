"""Each task against a slow oracle that answers by reading the tokens as a person would."""

import itertools

import pytest
import torch

from sparse_rtrl.training.tasks import IGNORE, TASKS, AnBn, Copy, Curriculum, Haystack, MultiQueryRecall


def tokens_of(batch):
    assert torch.equal(batch.x.sum(-1), torch.ones(batch.x.shape[:2])), "x is not one-hot"
    return batch.x.argmax(-1).t().tolist()


def answers_of(batch):
    """The asked answers of each stream as (step, class)."""
    return [[(t, c) for t, c in enumerate(row) if c != IGNORE] for row in batch.target.t().tolist()]


def solve_haystack(tokens):
    key = tokens.index(Haystack.KEY)
    return [(len(tokens) - 1, tokens[key + 1] - 4)]


def solve_copy(tokens, num_symbols=4):
    pattern = list(itertools.takewhile(lambda token: token < num_symbols, tokens))
    go = tokens.index(num_symbols + 1)
    return [(go + i, symbol) for i, symbol in enumerate(pattern)]


def solve_anbn(tokens):
    n = tokens.count(AnBn.A)
    assert tokens[: 2 * n] == [AnBn.A] * n + [AnBn.B] * n
    assert set(tokens[2 * n :]) <= {AnBn.END}
    return [(n + i, 0) for i in range(n - 1)] + [(2 * n - 1, 1)]


def solve_recall(tokens, num_values=4):
    query = max(tokens)
    memory, answers = {}, []
    for t, token in enumerate(tokens):
        if num_values <= token < query:
            if tokens[t - 1] == query and t > 0:
                answers.append((t, memory[token]))
            else:
                assert token not in memory, "a key came twice"
                memory[token] = tokens[t + 1]
    return answers


@pytest.mark.parametrize(
    ("task", "solve"),
    [
        (Haystack(5, 7), solve_haystack),
        (Haystack(31, 64), solve_haystack),
        (Copy(2, 7), solve_copy),
        (Copy(17, 64), solve_copy),
        (Copy(17, 64, pattern_length=3), solve_copy),
        (AnBn(2, 7), solve_anbn),
        (AnBn(21, 64), solve_anbn),
        (MultiQueryRecall(4, 7, num_pairs=1), solve_recall),
        (MultiQueryRecall(40, 64, num_pairs=5), solve_recall),
        (MultiQueryRecall(33, 64, num_pairs=6, num_queries=2, num_keys=6), solve_recall),
        (MultiQueryRecall(24, 64, num_pairs=3, min_distance=9), solve_recall),
    ],
)
def test_targets_are_what_an_oracle_answers(task, solve):
    for batch in itertools.islice(task, 3):
        assert batch.x.shape == (task.length, task.batch_size, task.input_size)
        assert batch.target.shape == (task.length, task.batch_size)
        assert batch.target.dtype == torch.int64
        answers = answers_of(batch)
        assert answers == [solve(tokens) for tokens in tokens_of(batch)]
        assert all(0 <= c < task.output_size for row in answers for _, c in row)


@pytest.mark.parametrize("name", TASKS)
def test_same_seed_same_batches_other_seed_other_batches(name):
    def draw(seed):
        torch.rand(3)  # the global generator must not matter
        return [batch.x for batch in itertools.islice(TASKS[name](24, 8, seed=seed), 2)]

    first, again, other = draw(5), draw(5), draw(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


def test_recall_keeps_pairs_away_from_questions():
    last = []
    for batch in itertools.islice(MultiQueryRecall(40, 64, num_pairs=3, num_keys=4, min_distance=9), 4):
        for tokens in tokens_of(batch):
            first_query = tokens.index(8)  # values 0 to 3, keys 4 to 7, Q
            shown = [place + 1 for place, token in enumerate(tokens[:first_query]) if token >= 4]
            assert first_query == 34 and len(shown) == 3
            last.append(max(shown))
    assert max(last) == 34 - 9 - 1  # reached, and never exceeded


def test_haystack_distance_and_place():
    task = Haystack(12, 4000, min_distance=5)
    tokens = task.sample().x.argmax(-1)
    assert (tokens[0] == Haystack.BOS).all() and (tokens[-1] == Haystack.Q).all()
    for token in (Haystack.BOS, Haystack.KEY, Haystack.SEP, Haystack.Q):
        assert (tokens == token).sum(0).eq(1).all()
    step, stream = (tokens == Haystack.KEY).nonzero(as_tuple=True)
    key = torch.empty(4000, dtype=torch.int64).scatter_(0, stream, step)
    assert torch.equal(tokens[key + 2, torch.arange(4000)], torch.full((4000,), Haystack.SEP))
    distance = 11 - key
    # Every allowed place is used about equally often: 4000 sequences over distances 5 to 10.
    counts = distance.bincount()
    assert counts[:5].sum() == 0 and len(counts) == 11
    assert counts[5:].min() > 500


@pytest.mark.parametrize("name", TASKS)
def test_chance_is_the_accuracy_of_the_most_frequent_answer(name):
    task = TASKS[name](24, 4000)
    target = task.sample().target
    counts = target[target != IGNORE].bincount(minlength=task.output_size)
    assert counts.max() / counts.sum() == pytest.approx(task.chance, abs=0.02)


def test_curriculum_sets_lengths():
    task = Haystack(5, 2)
    curriculum = Curriculum(task, 5, 20, updates=4)
    lengths = [batch.x.shape[0] for batch in itertools.islice(curriculum, 6)]
    assert lengths == [5, 10, 15, 20, 20, 20]
    assert (curriculum.input_size, curriculum.output_size, curriculum.batch_size, curriculum.chance) == (8, 4, 2, 0.25)
    geometric = Curriculum(task, 5, 40, updates=4, shape="geometric")
    assert [geometric.length_at(i) for i in range(5)] == [5, 10, 20, 40, 40]
    assert Curriculum(task, 20, 5, updates=2).length_at(0) == 20
    assert Curriculum(task, 5, 20, updates=1).length_at(0) == 20


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Haystack(4, 2), ["length", "at least 5", "got 4"]),
        (lambda: Haystack(10, 2, min_distance=9), ["length", "at least 11", "got 10"]),
        (lambda: Haystack(10, 0), ["batch_size", "got 0"]),
        (lambda: Haystack(10, 2, seed=2**40), ["seed", "2**32 - 1", f"got {2**40}"]),
        (lambda: Haystack(10, 2, seed=-1), ["seed", "between 0", "got -1"]),
        (lambda: Haystack(10, 2, num_values=1), ["num_values", "got 1"]),
        (lambda: Haystack(10, 2, min_distance=-1), ["min_distance", "got -1"]),
        (lambda: Copy(5, 2, pattern_length=3), ["length", "at least 6", "got 5"]),
        (lambda: Copy(5, 2, pattern_length=0), ["pattern_length", "got 0"]),
        (lambda: AnBn(1, 2), ["length", "at least 2", "got 1"]),
        (lambda: MultiQueryRecall(15, 2, num_pairs=4), ["length", "at least 16", "got 15"]),
        (lambda: MultiQueryRecall(24, 2, num_pairs=4, min_distance=9), ["length", "at least 25", "got 24"]),
        (lambda: MultiQueryRecall(50, 2, min_distance=-1), ["min_distance", "at least 0", "got -1"]),
        (lambda: MultiQueryRecall(50, 2, num_pairs=4, num_queries=5), ["num_queries", "between 1 and", "got 5"]),
        (lambda: MultiQueryRecall(50, 2, num_pairs=4, num_keys=3), ["num_keys", "at least num_pairs (4)", "got 3"]),
        (lambda: Curriculum(Haystack(5, 2), 4, 9, 3), ["start", "at least 5", "got 4"]),
        (lambda: Curriculum(Haystack(5, 2), 5, 9, 0), ["updates", "got 0"]),
        (lambda: Curriculum(Haystack(5, 2), 5, 9, 2, shape="cubic"), ["shape", "geometric", "cubic"]),
    ],
)
def test_errors_name_argument_expectation_and_value(build, words):
    with pytest.raises(ValueError) as error:
        build()
    for word in words:
        assert word in str(error.value)


def test_length_setter_checks():
    task = Haystack(5, 2)
    with pytest.raises(ValueError, match="got 3"):
        task.length = 3
    assert task.length == 5
