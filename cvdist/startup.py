"""Measures the phases of a job's start, from its command or a restart of its workers to the first step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import psutil

# When this process began: importing torch is a part of what its user waits for. Seconds since 1970, and by the
# clock that nobody sets.
BEGAN_AT = float(psutil.Process().create_time())
BEGAN = time.monotonic() - (time.time() - BEGAN_AT)


class Waterfall:
    """The seconds of each phase of a start. It may be sent to another process, which goes on with it.

    Attributes:
        phases: seconds by phase, in order.
        attempt: which start of the job's workers this is, from 1.
    """

    def __init__(self, attempt: int = 1) -> None:
        """Start the first phase at the time when this process began."""
        self.phases: dict[str, float] = {}
        self.attempt = attempt
        self._last = BEGAN_AT

    def end(self, phase: str) -> None:
        """Note that a phase, which began with the end of the last one, is over."""
        now = time.time()
        self.phases[phase] = max(now - self._last, 0.0)  # another node's clock may be behind
        self._last = now


def describe(workers: Sequence[Mapping[str, float]]) -> str:
    """Describe a start in one line: `8.3 s: imports 2.0, ray 3.1, data 0.9-1.2, ...`.

    Phases that took no time are left out.

    Args:
        workers: the phases of each worker. Where these differ, the fastest's and the slowest's are given.
    """
    parts = []
    for phase in workers[0]:
        seconds = sorted(worker.get(phase, 0.0) for worker in workers)
        low, high = f"{seconds[0]:.1f}", f"{seconds[-1]:.1f}"
        if high != "0.0":
            parts.append(f"{phase} {high if low == high else f'{low}-{high}'}")
    return f"{max(sum(worker.values()) for worker in workers):.1f} s: {', '.join(parts)}"
