"""Count slow and failed requests to the storage, and the time that they cost.

The storage libraries retry throttled, reset and timed out requests themselves, with growing pauses, and do not
report how often. From outside, only the duration of a request is visible: a request that takes a second longer
than the transfer of its bytes over a slow link was slow or was retried (the first pause of the AWS SDK is up to
a second). Only requests of this process are counted: those for checkpoints, for the files that order attempts,
and for feature caches, but not those of the processes that decode pictures.
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

_SLOW_SECONDS = 1.0  # a request that takes this much longer than expected is slow
_EXPECTED_RATE = 10e6  # bytes per second
_LOG_SECONDS = 30.0  # between two warnings


@dataclass(frozen=True)
class SlowRequests:
    """Slow and failed requests of a period.

    Attributes:
        slow: How many requests succeeded, but took too long.
        failed: How many requests failed.
        seconds: Time that both cost beyond the expected duration of the requests.
    """

    slow: int = 0
    failed: int = 0
    seconds: float = 0.0

    def __add__(self, other: SlowRequests) -> SlowRequests:
        """Return the sum of two periods or processes."""
        return SlowRequests(self.slow + other.slow, self.failed + other.failed, self.seconds + other.seconds)

    def __bool__(self) -> bool:
        """Return whether any request was slow or failed."""
        return bool(self.slow or self.failed)

    def __str__(self) -> str:
        """Format the counts for logs."""
        return (
            f"{self.slow} requests slow or tried again, {self.failed} failed, {log.duration(self.seconds)} lost"
        )


NO_SLOW_REQUESTS = SlowRequests()


class SlowRequestMeter:
    """Measures requests and counts the slow and failed ones. Can be used from several threads."""

    def __init__(self) -> None:
        """Start with no requests."""
        self._lock = threading.Lock()
        self._not_taken = self._total = NO_SLOW_REQUESTS
        self._logged_at = -_LOG_SECONDS

    @contextmanager
    def request(self, what: str, size: int = 0) -> Iterator[list[int]]:
        """Measure the request that is made during the context.

        A `FileNotFoundError` does not count as a failure, since the storage has answered.

        Args:
            what: What is requested, for logs.
            size: Size of the request in bytes, as far as it is known.

        Yields:
            A list of sizes. If the size is known only after the request, the caller appends it.
        """
        sizes, failed = [size], 0
        start = time.monotonic()
        try:
            yield sizes
        except FileNotFoundError:
            raise
        except OSError:
            failed = 1
            raise
        finally:
            seconds = time.monotonic() - start
            lost = seconds - sum(sizes) / _EXPECTED_RATE
            if failed or lost > _SLOW_SECONDS:
                self._add(what, seconds, SlowRequests(1 - failed, failed, max(lost, 0.0)))

    def take(self) -> SlowRequests:
        """Return the requests since the last call."""
        with self._lock:
            taken, self._not_taken = self._not_taken, NO_SLOW_REQUESTS
            return taken

    def _add(self, what: str, seconds: float, requests: SlowRequests) -> None:
        with self._lock:
            self._not_taken += requests
            self._total += requests
            total, now = self._total, time.monotonic()
            due = now - self._logged_at >= _LOG_SECONDS
            if due:
                self._logged_at = now
        if due:
            logger.warning(
                "the storage took %s for %s; in this process so far: %s", log.duration(seconds), what, total
            )


meter = SlowRequestMeter()
"""Measures all requests through `cvdist.storage`."""
