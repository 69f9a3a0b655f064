"""How much a run uses its experts and slots, and how long experts sleep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_rtrl.cells.slot_cell import Routing

_TENSORS = ("experts", "reads", "writes", "since_use", "used")


class RoutingUsage:
    """Counts what the steps of a run touch.

    Args:
        batch_size: streams ``B``.
        num_slots: slots ``S``.
        num_experts: experts ``E``.
    """

    def __init__(self, batch_size: int, num_slots: int, num_experts: int) -> None:
        self.rows = 0
        """Steps times streams since the last call of :meth:`metrics`."""
        self.experts = torch.zeros(num_experts, dtype=torch.int64)
        self.reads = torch.zeros(num_slots, dtype=torch.int64)
        self.writes = torch.zeros(num_slots, dtype=torch.int64)
        self.since_use = torch.zeros(batch_size, num_experts, dtype=torch.int64)
        """Steps since each expert was last used by each stream; since the beginning where it never was."""
        self.used = torch.zeros(batch_size, num_experts, dtype=torch.bool)

    def count(self, routings: Sequence[Routing]) -> None:
        """Count consecutive steps."""
        batch = len(self.since_use)
        self.rows += len(routings) * batch
        for counts, touched in (
            (self.experts, [r.experts for r in routings]),
            (self.reads, [r.read for r in routings]),
            (self.writes, [r.write for r in routings]),
        ):
            counts += torch.cat([t.flatten() for t in touched]).cpu().bincount(minlength=len(counts))
        last = torch.full_like(self.since_use, -1)  # (B, E), last step that used each expert
        for step, routing in enumerate(routings):
            last.scatter_(1, routing.experts.cpu(), step)
        now = last >= 0
        self.since_use = torch.where(now, len(routings) - 1 - last, self.since_use + len(routings))
        self.used |= now

    def metrics(self) -> dict[str, Any]:
        """Shares since the last call and sleep lengths now, by names of ``METRICS``."""
        rows = max(self.rows, 1)
        row: dict[str, Any] = {
            "slot_reads": (self.reads / rows).tolist(),
            "slot_writes": (self.writes / rows).tolist(),
        }
        if len(self.experts):
            row["expert_load"] = (self.experts / rows).tolist()
        if bool(self.used.any()):
            asleep = self.since_use[self.used].double()
            row |= {"sleep_mean": float(asleep.mean()), "sleep_max": float(asleep.max())}
        self.rows = 0
        for counts in (self.experts, self.reads, self.writes):
            counts.zero_()
        return row

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        tensors: dict[str, Tensor] = {name: getattr(self, name).clone() for name in _TENSORS}
        return {"rows": self.rows, **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.rows = state["rows"]
        for name in _TENSORS:
            setattr(self, name, state[name].clone())
