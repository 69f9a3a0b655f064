"""Random choices of one case, all from its seed."""

import random
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Choice = TypeVar("Choice")


class Draw:
    """Choices and tensors from one seed, apart from torch's own generator."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def one_of(self, *options: Choice) -> Choice:
        return self._random.choice(options)

    def some_of(self, options: Sequence[Choice], least: int, most: int) -> list[Choice]:
        """Between ``least`` and ``most`` different options, in random order."""
        return self._random.sample(list(options), self._random.randint(least, min(most, len(options))))

    def integer(self, least: int, most: int) -> int:
        return self._random.randint(least, most)

    def uniform(self, least: float, most: float) -> float:
        return self._random.uniform(least, most)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def mask(self, size: int, probability: float = 0.5) -> Tensor:
        """A mask ``(size,)`` with at least one True."""
        mask = torch.rand(size, generator=self._generator) < probability
        mask[self.integer(0, size - 1)] = True
        return mask

    def order(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self._generator)

    def lengths(self, total: int, longest: int) -> list[int]:
        """Random lengths that add up to ``total``."""
        out: list[int] = []
        while sum(out) < total:
            out.append(min(self.integer(1, longest), total - sum(out)))
        return out
