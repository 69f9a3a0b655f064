"""How the influence of sleeping experts is kept up to date: the decision, and the cost table it was read from."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from sparse_rtrl.ops import dispatch

try:
    from sparse_rtrl import _planner as planner  # type: ignore[attr-defined]
except ImportError:  # not built for this Python: the same plans, later
    from sparse_rtrl.influence import planner

CatchUp = Literal["auto", "eager", "replay", "product"]
DEFAULT_BUFFER = 64
"""Segments that are kept unless another number is chosen."""


@dataclass(frozen=True)
class Plan:
    """A decision of the planner.

    Attributes:
        eager: move every expert at every commit, and keep no Jacobians.
        buffer: segments kept for sleeping experts.
        levels: highest level of products in the tree; None for all that fit.
        product_from: smallest gap, in segments, that a merged product bridges cheaper than replay; 0 for none, None to
            compare operation counts at each wake-up.
        table: predicted seconds per stream and segment of each option, for reading; empty for a forced path.
    """

    eager: bool
    buffer: int = DEFAULT_BUFFER
    levels: int | None = None
    product_from: int | None = None
    table: tuple[dict[str, Any], ...] = ()

    @property
    def decision(self) -> str:
        """The decision in words."""
        if self.eager:
            return "eager: move every expert at every commit"
        products = f"products up to level {self.levels}, merged from a gap of {self.product_from} segments"
        return f"lazy: keep {self.buffer} segments, {products if self.product_from else 'always replay'}"


def plan(
    *,
    num_slots: int,
    slot_size: int,
    read_slots: int,
    write_slots: int,
    num_experts: int,
    top_k: int,
    expert_columns: int,
    batch_size: int = 1,
    commit_every: int = 1,
    flush_every: float = 1.0,
    buffer: int | Literal["auto"] = "auto",
    itemsize: int = 4,
    catch_up: CatchUp = "auto",
    **rates: float,
) -> Plan:
    """Decide between eager updating, replay and merged products, and how many segments and levels to keep.

    Args:
        num_slots: ``S``.
        slot_size: ``D``.
        read_slots: ``kr``.
        write_slots: ``kw``.
        num_experts: ``E``.
        top_k: experts of a step, ``k``.
        expert_columns: recurrent parameters of one expert.
        batch_size: streams ``B``.
        commit_every: steps of a segment.
        flush_every: steps between two flushes, that is between optimizer steps.
        buffer: segments kept; ``"auto"`` lets the planner choose.
        itemsize: bytes of a number.
        catch_up: ``"auto"``, or a path to force.
        **rates: ``flops`` and ``bytes`` per second, ``lazy_seconds`` of bookkeeping per segment, ``query_seconds`` per
            wake-up, and ``margin``: the part of the eager cost that lazy must stay below.

    Raises:
        ValueError: on sizes out of range or an unknown path.
    """
    if catch_up not in get_args(CatchUp):
        raise ValueError(f"catch_up must be one of {get_args(CatchUp)}, got {catch_up!r}")
    if buffer != "auto" and buffer < 1:
        raise ValueError(f"buffer must be 'auto' or at least 1, got {buffer}")
    if flush_every < 1:
        raise ValueError(f"flush_every must be at least 1 step, got {flush_every}")
    if catch_up == "eager":
        return Plan(eager=True)
    found = planner.plan(
        num_slots=num_slots,
        slot_size=slot_size,
        read_slots=read_slots,
        write_slots=write_slots,
        num_experts=num_experts,
        top_k=top_k,
        expert_columns=expert_columns,
        batch_size=batch_size,
        commit_every=commit_every,
        flush_every=flush_every,
        buffer=0 if buffer == "auto" else buffer,
        itemsize=itemsize,
        **rates,
    )
    if catch_up != "auto":
        best = next((row for row in found["table"] if row["path"] == catch_up), None)
        return forced(catch_up, best["buffer"] if best and best["buffer"] else DEFAULT_BUFFER)
    return Plan(found["eager"], found["buffer"], found["levels"], found["product_from"], tuple(found["table"]))


def measured_rates(seconds: float = 0.2) -> dict[str, float]:
    """Floating-point operations and bytes per second of this machine, for :func:`plan`; takes about a second.

    Operations are those of an influence update out of the cache, bytes those of a copy beyond it, each the median of
    repeats during ``seconds``.
    """
    w, r, columns, batch = 64, 128, 1056, 16
    P = torch.zeros(batch, 129, columns)
    Jh = torch.randn(1, w, r) / r
    write, support = torch.tensor([[0, 1]]), torch.tensor([[0, 1, 2, 3]])
    stream, group = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    big = torch.ones(2**24)
    target = torch.empty_like(big).copy_(big)
    update = _median_seconds(
        lambda: dispatch.influence_update_(P, Jh, write, support, None, stream, group, [], [], []), seconds
    )
    copy = _median_seconds(lambda: target.copy_(big), seconds)
    return {"flops": 2.0 * w * r * columns / update, "bytes": 2.0 * big.nbytes / copy}


def _median_seconds(call: Callable[[], object], seconds: float) -> float:
    times: list[float] = []
    call()
    while sum(times) < seconds or len(times) < 5:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def forced(catch_up: CatchUp, buffer: int) -> Plan:
    """The plan of a path that was asked for, whatever it costs."""
    if catch_up == "replay":
        return Plan(eager=False, buffer=buffer, levels=0, product_from=0)
    if catch_up == "product":
        return Plan(eager=False, buffer=buffer, product_from=1)
    return Plan(eager=catch_up == "eager", buffer=buffer)
