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


class DisagreementError(ContractError):
    """What was captured of a segment disagrees with an ordinary backward pass: the gradient would be wrong.

    ``.grad`` holds nothing of that segment, and the influence has not moved through it.

    Attributes:
        step: number of the segment or step, counted from the beginning.
        stream: the stream that was looked at.
        names: what disagrees: parameters, ``the state``, or ``the states of other streams``.
    """

    def __init__(self, step: int, stream: int, names: list[str], reason: str) -> None:
        super().__init__(
            [
                f"step {step}, stream {stream}: the derivative by {', '.join(names)} that was captured disagrees with"
                f" an ordinary backward pass. {reason}"
            ]
        )
        self.step, self.stream, self.names = step, stream, names


class NonFiniteError(FloatingPointError):
    """A state or Jacobian holds NaN or infinity; nothing was committed.

    Derivatives of a diagonal cell are taken some steps late. The error is then raised again, and no step can be learned
    from, until the streams that it names are reset.

    Attributes:
        step: number of the step, counted from the construction of the learner.
        streams: streams concerned.
        group: what is not finite: ``state``, ``state Jacobian``, ``core`` or ``expert E``.
    """

    def __init__(self, step: int, streams: list[int], group: str, late: bool = False) -> None:
        rest = (
            "Nothing was committed since; reset these streams"
            if late
            else "The learner is as it was before this step; lower the learning rate, clip gradients, or reset these"
            " streams"
        )
        super().__init__(f"step {step}: NaN or infinity in {group}, streams {streams}. {rest}")
        self.step, self.streams, self.group = step, streams, group


class NonFiniteLossError(FloatingPointError):
    """The loss of a segment is NaN or infinity; it was not backpropagated.

    Attributes:
        step: first such step, counted from the beginning of the segment.
    """

    def __init__(self, loss: float, step: int) -> None:
        super().__init__(f"the loss is {loss}")
        self.step = step


class DivergenceError(FloatingPointError):
    """A training met a loss, gradient, state or influence that is not finite, and stopped.

    Attributes:
        update: the update it happened in, counted from 1.
        step: the step it happened at, counted from 0 at the beginning of the training.
    """

    def __init__(self, update: int, step: int, cause: str) -> None:
        super().__init__(f"diverged at step {step}, in update {update}: {cause}")
        self.update, self.step = update, step


class BackendError(RuntimeError):
    """A backend was asked for that is not there; the message names the remedy."""
