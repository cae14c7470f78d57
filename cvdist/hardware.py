"""The resources of the machine that this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores() -> int:
    """Return the number of usable CPU cores: those of the affinity, or the container's limit if it is lower."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        # The limit of control groups v2: microseconds of CPU time per period of so many microseconds.
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(affinity, int(quota) // int(period)))
    except (OSError, ValueError):  # there is no such file, or no limit, which is written as "max"
        return affinity
