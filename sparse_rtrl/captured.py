"""What a captured piece of a stream can do: the protocol between those who capture and those who carry influence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sparse_rtrl.cells.slot_cell import Routing


@dataclass(frozen=True)
class Moved:
    """The map of a committed window, for the experts that have not moved with it.

    Attributes:
        Jh: ``dh_end[write] / dh_entry[support]``, ``(B, w, r)``.
        write: slots that any step wrote, ``(B, kw)`` int64.
        support: slots that the written content depends on, ``(B, ks)`` int64, containing ``write``.
        experts: rows of the stacked influence that have moved, ``(M,)`` int64, distinct.
    """

    Jh: Tensor
    write: Tensor
    support: Tensor
    experts: Tensor


class Captured(Protocol):
    """Consecutive steps of all streams that were captured together, with the parameters they were run with.

    A window is a list of them, all of one class, oldest first. What is done with a whole window is a class method, so
    that a class may do it in one go.
    """

    @property
    def count(self) -> int:
        """Steps that it counts as."""

    @property
    def routing(self) -> Routing:
        """What its last step touched."""

    @property
    def experts(self) -> Tensor:
        """Experts that any of its steps used, with repeats, ``(B, m)`` int64."""

    @classmethod
    def pull_back(cls, window: Sequence[Any], v: Tensor, core: Tensor, experts: Tensor) -> Tensor:
        """Take one row vector per stream back through a window.

        Args:
            window: captured steps of this class, oldest first.
            v: ``dL/dh`` behind the last step, ``(B, H)``; stays as it is.
            core: gradient of the core parameters at fixed entry state, ``(N_core,)``, added to.
            experts: that of the experts, ``(E, N_expert)``, added to.

        Returns:
            ``dL/dh`` before the first step, ``(B, H)``.
        """

    @classmethod
    def commit_(cls, window: Sequence[Any], core: Tensor, experts: Tensor, num_slots: int, ops: Any) -> Moved | None:
        """Move influence through a window, in place: ``P <- J P + F`` for the core and for the experts it used.

        Args:
            window: captured steps of this class, oldest first.
            core: ``(B, H + 1, N_core)``, the loss row last.
            experts: ``(B * E, H + 1, N_expert)``.
            num_slots: ``S``.
            ops: operations, from :func:`sparse_rtrl.ops.dispatch.select`.

        Returns:
            How the other experts have to move; None if the class knows no experts.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything in it, as tensors, numbers and containers of them; the tensors are not copied."""
