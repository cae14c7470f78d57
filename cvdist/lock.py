"""One process of a node at a time."""

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
    """Hold `lock` against the other processes of this node. The kernel frees it when its holder dies.

    what: completes "waiting for another process to ...", empty for short waits; timeout: in seconds.

    Raises:
        TimeoutError: if another process holds it for longer.
    """
    deadline = time.monotonic() + timeout
    told = False
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has held {lock} for {timeout:g} s") from None
            if what and not told:
                logger.info("waiting for another process to %s", what)
                told = True
            time.sleep(0.2 if what else 0.02)
        yield
