"""What this process may use of its machine."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores() -> int:
    """CPU cores that this process may use: its affinity, or a container's limit if that is lower."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        # Of the second version of control groups: microseconds that may be used, of so many.
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(affinity, int(quota) // int(period)))
    except (OSError, ValueError):  # no limit is written as "max"
        return affinity
