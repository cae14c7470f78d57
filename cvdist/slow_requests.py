"""Counts slow and failed requests to the storage, and the time that they cost.

The storage libraries retry throttled, reset and timed out requests themselves, with growing pauses, and do not
report how often. From outside, only the duration of a request is visible: a request that takes a second longer
than the transfer of its bytes over a slow link was slow or was retried (the first pause of the AWS SDK is up to
a second). Only requests of this process are counted: those for checkpoints, for the files that order attempts,
and for feature caches, but not those of the processes that decode pictures.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from cvdist import log

logger = logging.getLogger(__name__)

_SLOW_SECONDS = 1.0  # a request that takes this much longer than expected is slow
_EXPECTED_RATE = 10e6  # bytes per second
LOG_SECONDS = 30.0
"""Between two warnings."""
_lost: deque[float] = deque()  # seconds that each slow or failed request cost beyond its expected duration
_logged_at = -math.inf


@contextmanager
def measured(what: str, size: int = 0) -> Iterator[list[int]]:
    """Measure the request that is made during the context. Can be used from several threads.

    A `FileNotFoundError` does not count as a failure, since the storage has answered.

    Args:
        what: What is requested, for logs.
        size: Size of the request in bytes, as far as it is known.

    Yields:
        A list of sizes. If the size is known only after the request, the caller appends it.
    """
    global _logged_at
    sizes, failed = [size], False
    start = time.monotonic()
    try:
        yield sizes
    except FileNotFoundError:
        raise
    except OSError:
        failed = True
        raise
    finally:
        now = time.monotonic()
        lost = now - start - sum(sizes) / _EXPECTED_RATE
        if failed or lost > _SLOW_SECONDS:
            _lost.append(max(lost, 0.0))
            if now - _logged_at > LOG_SECONDS:
                _logged_at = now
                logger.warning("the storage took %s for %s", log.duration(now - start), what)


def take() -> list[float]:
    """Return the seconds that each slow or failed request since the last call has cost."""
    return [_lost.popleft() for _ in range(len(_lost))]
