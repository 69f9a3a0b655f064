"""Accuracy of a model on fresh sequences, with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sparse_rtrl.training.gradient_method import RecurrentModel, Tally, answer_loss, unroll
from sparse_rtrl.training.streams import TokenShift
from sparse_rtrl.training.tasks import Task

_TOGETHER = 2**14
"""Steps times streams that are run in one piece, so that a model's memory does not grow with the length."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on fresh sequences.

    Attributes:
        correct: asked answers that were right.
        asked: asked answers.
        sequences: sequences they came from.
    """

    correct: int
    asked: int
    sequences: int

    @property
    def value(self) -> float:
        """Share of right answers."""
        return self.correct / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of Wilson with sequences, not answers, as trials: answers of one sequence are dependent."""
        return wilson_interval(self.value, self.sequences)


def wilson_interval(share: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a binomial share, ``(p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)``.

    Args:
        share: observed share of successes ``p``.
        trials: number of trials ``n``.
        z: quantile of the normal distribution; the default gives 95 %.

    Returns:
        Lower and upper end.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    centre = share + z * z / (2 * trials)
    radius = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - radius) / scale), min(1.0, (centre + radius) / scale)


@torch.no_grad()
def evaluate(model: RecurrentModel, task: Task | TokenShift, num_sequences: int) -> Accuracy:
    """Accuracy of a model on the next ``num_sequences`` sequences of a task, run with the plain forward pass.

    Args:
        model: what answers.
        task: where the sequences come from, whole ones in each batch; give it another seed than the training task.
        num_sequences: how many sequences to answer.

    Returns:
        Counts and their interval.
    """
    if num_sequences < 1:
        raise ValueError(f"num_sequences must be at least 1, got {num_sequences}")
    total, done = Tally(), 0
    while done < num_sequences:
        batch = task.sample()
        take = min(task.batch_size, num_sequences - done)
        state, steps = model.initial_state(take), max(1, _TOGETHER // take)
        for x, target in zip(batch.x[:, :take].split(steps), batch.target[:, :take].split(steps), strict=True):
            outputs, state = unroll(model, x, state)
            total += answer_loss(outputs, target)[1]
        done += take
    return Accuracy(total.correct, total.asked, done)
