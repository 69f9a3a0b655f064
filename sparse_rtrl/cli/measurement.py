"""Honest memory and time of a piece of training on the CPU."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Resident set of this process now."""
    return int(psutil.Process().memory_info().rss)


def _high_water_mark() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no VmHWM line")


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the resident set of this process rises at most while ``work`` runs.

    The kernel's high-water mark of the resident set, reset before ``work``, minus the resident set at that moment:
    what is allocated outside PyTorch counts, and nothing is sampled, so no peak is missed. Freed memory that the
    allocator keeps would hide growth, so it is handed back first. Run it in a process of its own, after a small dress
    rehearsal of the same work, so that code pages and library start-up do not count.

    Args:
        work: what to measure; whatever it builds counts.

    Raises:
        OSError: where the kernel keeps no such mark (not Linux).
    """
    if not (_STATUS.exists() and _CLEAR_REFS.exists()):
        raise OSError("peak memory is read from /proc/self/status, which this system lacks; run on Linux")
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
    _CLEAR_REFS.write_text("5")  # resets the high-water mark
    before = resident_bytes()
    work()
    return max(0, _high_water_mark() - before)


def median_seconds(work: Callable[[], object], repeats: int = 5, warm_ups: int = 1) -> float:
    """Median wall-clock time of ``work`` over ``repeats`` runs, after ``warm_ups`` runs that do not count."""
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for _ in range(warm_ups):
        work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
