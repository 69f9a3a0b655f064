"""The numbers that a run logs: what each means, and how a report draws it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A key of a line of ``metrics.jsonl``.

    Attributes:
        name: the key.
        meaning: what it says, for the documentation.
        title: title of its picture in a report; None for no picture.
        unit: what the picture's axis shows.
        entry: what an entry of a list is; None for a number.
        logarithmic: whether its axis is.
        from_zero: whether its axis begins at zero.
    """

    name: str
    meaning: str
    title: str | None = None
    unit: str = ""
    entry: str | None = None
    logarithmic: bool = False
    from_zero: bool = False


_ALL = (
    Metric("update", "updates done"),
    Metric("tokens", "tokens seen: steps times streams"),
    Metric("seconds", "wall-clock time of training, that before an interruption included"),
    Metric(
        "bits_per_byte",
        "loss in bits; only where the targets are the 256 bytes",
        "Bits per byte",
        "bits per byte",
    ),
    Metric(
        "loss",
        "cross entropy per asked answer in nats; null where nothing was asked",
        "Loss",
        "cross entropy per answer, nats",
    ),
    Metric(
        "accuracy",
        "share of asked answers that were right; null where nothing was asked",
        "Accuracy",
        "share of right answers",
    ),
    Metric("length", "steps of the last batch", "Length of the sequences", "steps"),
    Metric("memory_bytes", "resident memory of the process", "Memory of the process", "MiB", from_zero=True),
    Metric(
        "gpu_memory_bytes",
        "most GPU memory held by tensors so far; only on a GPU",
        "GPU memory",
        "MiB",
        from_zero=True,
    ),
    Metric("tokens_per_second", "rate since the line before", "Speed", "tokens per second", from_zero=True),
    Metric(
        "gradient_norm",
        "norm of the whole gradient at the last optimizer step, before clipping",
        "Gradient norm before clipping",
        "norm",
        logarithmic=True,
    ),
    Metric(
        "influence_norm_core",
        "Frobenius norm of the influence of the core group, root mean square over the streams",
        "Influence of the core group",
        "Frobenius norm",
        logarithmic=True,
    ),
    Metric(
        "influence_norm_experts",
        "the same for each expert, asleep ones as of their last update; a list (E,)",
        "Influence of the experts",
        "Frobenius norm",
        entry="expert",
    ),
    Metric(
        "lyapunov",
        "finite-time Lyapunov exponent per step, where it is estimated",
        "Lyapunov exponent",
        "nats per step",
    ),
    Metric(
        "sleep_mean",
        "steps since an expert was last used, mean over experts and streams that have used it",
        "Mean sleep of the experts",
        "steps",
    ),
    Metric("sleep_max", "the longest of these"),
    Metric(
        "expert_load",
        "share of steps and streams that used each expert; a list (E,), its sum the experts of a step",
        "Expert load",
        "share of steps",
        entry="expert",
    ),
    Metric(
        "slot_reads",
        "share of the steps and streams that read each slot; a list (S,)",
        "Slots read",
        "share of steps",
        entry="slot",
    ),
    Metric(
        "slot_writes",
        "share of the steps and streams that wrote each slot; a list (S,)",
        "Slots written",
        "share of steps",
        entry="slot",
    ),
    Metric("learning_rate", "of the last update", "Learning rate", "learning rate", logarithmic=True),
)

METRICS = {metric.name: metric for metric in _ALL}
"""Keys of a line of ``metrics.jsonl``, in the order of a report. Means and shares are over everything since the line
before. A key is absent where the method has no such number; ``null`` stands for a number that is not finite."""
