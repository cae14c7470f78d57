"""A file lock between the processes of a node."""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    deadline = time.monotonic() + timeout
    logged = False
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has held {lock} for {timeout:g} s") from None
            if what and not logged:
                logger.info("waiting for another process to %s", what)
                logged = True
            time.sleep(0.2 if what else 0.02)
        yield
