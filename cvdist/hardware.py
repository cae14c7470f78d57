"""The resources of the machine that this process may use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch


def usable_cores() -> int:
    """Return the number of usable CPU cores: those of the affinity, or the container's limit if it is lower."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        # The limit of control groups v2: microseconds of CPU time per period of so many microseconds.
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(affinity, int(quota) // int(period)))
    except (OSError, ValueError):  # there is no such file, or no limit, which is written as "max"
        return affinity


def available_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU's memory or, for a CPU, of main memory within the container's limit."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    try:
        # Control groups v2. Beside what processes have allocated ("anon"), they count files in the page cache.
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["anon"]
        return min(available, max(limit - int(used), 0))
    except (OSError, ValueError, KeyError):  # there are no such files, or no limit, which is written as "max"
        return available
