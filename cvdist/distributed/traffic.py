"""What a worker sends, and how long its step waits for that: counted where the collectives are called.

On a GPU the clock is a pair of events on the stream, read when the step's metrics are: nothing waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def ring_bytes(size: float, workers: int) -> float:
    """Bytes that each worker sends to all-reduce `size` bytes: 2 (n - 1) / n of them.

    The least that is possible, and what a ring takes (Patarasuk and Yuan 2009, JPDC 69).
    """
    return 2 * (workers - 1) / workers * size


class Traffic:
    """Bytes sent and seconds waited by one worker since the last `take`."""

    def __init__(self, device: torch.device) -> None:
        """Events on `device` if it is a GPU, else the clock."""
        self._cuda = device.type == "cuda"
        self._bytes, self._seconds = 0.0, 0.0
        self._began: Any = None
        self._events: list[tuple[Any, Any]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Traffic:
        """Copies of a model count to the same account."""
        return self

    def sent(self, size: float) -> None:
        """Count bytes that this worker has sent."""
        self._bytes += size

    def begin(self) -> None:
        """From here on the step waits."""
        self._began = self._now()

    def end(self) -> None:
        """Up to here, if `begin` was called before."""
        began, self._began = self._began, None
        if began is None:
            return
        if self._cuda:
            self._events.append((began, self._now()))
        else:
            self._seconds += self._now() - began

    @contextmanager
    def waiting(self, size: float) -> Iterator[None]:
        """A collective in the block sends `size` bytes."""
        self.sent(size)
        self.begin()
        yield
        self.end()

    def take(self) -> tuple[float, float]:
        """Bytes and seconds since the last call."""
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
