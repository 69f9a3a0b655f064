"""Exceptions that say what went wrong in a learning step."""

from __future__ import annotations


class ContractError(ValueError):
    """A cell breaks the support contract, or cannot be carried exactly.

    Attributes:
        violations: one sentence per violation.
    """

    def __init__(self, violations: list[str]) -> None:
        super().__init__("; ".join(violations))
        self.violations = violations


class NonFiniteError(FloatingPointError):
    """A state or Jacobian holds NaN or infinity; nothing was committed.

    Attributes:
        step: number of the step, counted from the construction of the learner.
        streams: streams concerned.
        group: what is not finite: ``state``, ``state Jacobian``, ``core`` or ``expert E``.
    """

    def __init__(self, step: int, streams: list[int], group: str) -> None:
        super().__init__(
            f"step {step}: NaN or infinity in {group}, streams {streams}. The learner is as it was before this step;"
            " lower the learning rate, clip gradients, or reset these streams"
        )
        self.step, self.streams, self.group = step, streams, group


class BackendError(RuntimeError):
    """A backend was asked for that is not there; the message names the remedy."""
