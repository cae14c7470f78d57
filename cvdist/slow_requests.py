"""What the storage costs beyond the usual: requests that it answered late or not at all, and the time lost.

The storage libraries try a throttled, reset or timed out request again by themselves, with growing pauses, and
keep to themselves how often they did. What can be seen from outside is a request's time: one that needs a
second more than its bytes do at a slow link's rate was slow, or had to be tried again (the AWS SDK's first
pause is up to a second). Counted are the requests of this process: checkpoints, the files that order attempts,
the cache of features; not those of processes that decode pictures.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cvdist import log

logger = logging.getLogger(__name__)

_USUAL_SECONDS = 1.0
_USUAL_RATE = 10e6  # bytes a second
_TELL_SECONDS = 30.0  # between two lines


@dataclass(frozen=True)
class SlowRequests:
    """Requests of some span of time. slow: answered, but late; failed: given up; seconds: lost to both."""

    slow: int = 0
    failed: int = 0
    seconds: float = 0.0

    def __add__(self, other: SlowRequests) -> SlowRequests:
        """Of both spans."""
        return SlowRequests(self.slow + other.slow, self.failed + other.failed, self.seconds + other.seconds)

    def __bool__(self) -> bool:
        """Whether there was anything out of the usual."""
        return bool(self.slow or self.failed)

    def __str__(self) -> str:
        """As logs show it."""
        return (
            f"{self.slow} requests slow or tried again, {self.failed} failed, {log.duration(self.seconds)} lost"
        )


NO_SLOW_REQUESTS = SlowRequests()


class SlowRequestMeter:
    """Adds up what requests cost. Safe to use from several threads."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._lock = threading.Lock()
        self._untaken = self._total = NO_SLOW_REQUESTS
        self._told = -_TELL_SECONDS

    @contextmanager
    def request(self, what: str, size: int = 0) -> Iterator[list[int]]:
        """A request for `what`, of `size` bytes; one whose size is known later appends it to what it is given.

        That there is no such file is an answer like any other.
        """
        sizes, failed = [size], 0
        began = time.monotonic()
        try:
            yield sizes
        except FileNotFoundError:
            raise
        except OSError:
            failed = 1
            raise
        finally:
            seconds = time.monotonic() - began
            lost = seconds - sum(sizes) / _USUAL_RATE
            if failed or lost > _USUAL_SECONDS:
                self._add(what, seconds, SlowRequests(1 - failed, failed, max(lost, 0.0)))

    def take(self) -> SlowRequests:
        """What has come since the last call."""
        with self._lock:
            taken, self._untaken = self._untaken, NO_SLOW_REQUESTS
            return taken

    def _add(self, what: str, seconds: float, strain: SlowRequests) -> None:
        with self._lock:
            self._untaken += strain
            self._total += strain
            total, now = self._total, time.monotonic()
            tell = now - self._told >= _TELL_SECONDS
            if tell:
                self._told = now
        if tell:
            logger.warning(
                "the storage took %s for %s; in this process so far: %s", log.duration(seconds), what, total
            )


storage = SlowRequestMeter()
"""Of all requests through `cvdist.storage`."""
