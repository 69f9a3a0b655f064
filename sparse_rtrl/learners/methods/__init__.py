"""Ways to keep the past of a recurrent module: the exact influence, and approximations of it under their names."""

from __future__ import annotations

from typing import Literal, TypeAlias

from sparse_rtrl.learners.methods.diagonal import Diagonal
from sparse_rtrl.learners.methods.exact import Exact
from sparse_rtrl.learners.methods.past import Past
from sparse_rtrl.learners.methods.rflo import RFLO
from sparse_rtrl.learners.methods.snap1 import SnAp1
from sparse_rtrl.learners.methods.truncated import Truncated
from sparse_rtrl.learners.methods.uoro import UORO

Method: TypeAlias = Literal["exact", "snap1", "rflo", "uoro", "truncated"]

METHODS: dict[str, type[Past]] = {past.name: past for past in (Exact, SnAp1, RFLO, UORO, Truncated)}

__all__ = ["METHODS", "RFLO", "UORO", "Diagonal", "Exact", "Method", "Past", "SnAp1", "Truncated"]
