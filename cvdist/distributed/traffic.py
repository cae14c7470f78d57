"""The bytes that a worker sends, and the time that its steps wait for other workers.

Both are counted where the collectives are called. On a GPU, waiting is measured by pairs of events on the
stream, which are read when the step's metrics are, so that measuring never makes a step wait.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def ring_bytes(size: float, workers: int) -> float:
    """Return the bytes that each worker sends to all-reduce `size` bytes: 2 (n - 1) / n of them.

    No algorithm sends less, and a ring sends exactly that (Patarasuk and Yuan 2009, JPDC 69).
    """
    return 2 * (workers - 1) / workers * size


class Traffic:
    """Counts the bytes sent and the seconds waited by one worker."""

    def __init__(self, device: torch.device) -> None:
        """Start at zero. Time is taken from events if `device` is a GPU, and from the clock otherwise."""
        self._cuda = device.type == "cuda"
        self._bytes, self._seconds = 0.0, 0.0
        self._began: Any = None
        self._events: list[tuple[Any, Any]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Traffic:
        """Return this same object: copies of a model add to the counts of the original."""
        return self

    def sent(self, size: float) -> None:
        """Count `size` bytes that this worker has sent."""
        self._bytes += size

    def begin(self) -> None:
        """Note that the step waits for other workers from here on."""
        self._began = self._now()

    def end(self) -> None:
        """Note that the step no longer waits. Without a `begin` before it, this does nothing."""
        began, self._began = self._began, None
        if began is None:
            return
        if self._cuda:
            self._events.append((began, self._now()))
        else:
            self._seconds += self._now() - began

    @contextmanager
    def waiting(self, size: float) -> Iterator[None]:
        """Count a collective operation, which is the body of the `with`, and the `size` bytes that it sends."""
        self.sent(size)
        self.begin()
        yield
        self.end()

    def take(self) -> tuple[float, float]:
        """Return the bytes sent and the seconds waited since the last call, and start at zero again."""
        for began, ended in self._events:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1000
        taken = self._bytes, self._seconds
        self._bytes, self._seconds, self._events = 0.0, 0.0, []
        return taken

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
