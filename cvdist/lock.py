"""A file lock between the processes of a node."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)


@contextmanager
def locked(lock: Path, what: str, timeout: float) -> Iterator[None]:
    """Hold a lock that only one process of this node can hold. The kernel frees it when the process ends.

    Args:
        lock: The lock file, which is created if it does not exist.
        what: Completes the log message "waiting for another process to ...". Empty for short waits, which are
            not logged.
        timeout: Seconds to wait for the lock.

    Raises:
        TimeoutError: If another process holds the lock for longer than `timeout`.
    """
    file = FileLock(lock, poll_interval=0.02, fallback_to_soft=False)
    try:
        held = file.acquire(blocking=False)
    except Timeout:
        if what:
            logger.info("waiting for another process to %s", what)
        try:
            held = file.acquire(timeout)
        except Timeout:
            raise TimeoutError(f"another process has held {lock} for {timeout:g} s") from None
    with held:
        yield
