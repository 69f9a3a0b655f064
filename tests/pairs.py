"""Combinations of parameters: in the ordinary run every pair of values meets, in ``make test-all`` all of them do."""

import itertools
import os

import pytest

ALL = bool(os.environ.get("SPARSE_RTRL_TEST_ALL"))


def pairs(*values):
    """Combinations of one value of each list, such that every two values of two lists come together at least once.

    Faults that need two parameters at once are then seen by far fewer tests than a product has. The choice is greedy,
    and the same in every run.
    """
    every = list(itertools.product(*(range(len(each)) for each in values)))
    if ALL or len(values) < 3:
        chosen = every
    else:
        chosen, missing = [], {pair for combination in every for pair in _pairs_of(combination)}
        while missing:
            best = max(every, key=lambda combination: len(missing.intersection(_pairs_of(combination))))
            chosen.append(best)
            missing.difference_update(_pairs_of(best))
    combined = [[each[i] for each, i in zip(values, combination, strict=True)] for combination in chosen]
    return [pytest.param(*some, id="-".join(_named(value) for value in some)) for some in combined]


def _named(value):
    """A value as ids of tests name it."""
    if isinstance(value, tuple):
        return "-".join(map(_named, value))
    return getattr(value, "__name__", str(value))


def _pairs_of(combination):
    return set(itertools.combinations(enumerate(combination), 2))
