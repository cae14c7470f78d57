"""Checkpoints on their way to the storage, at most one at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from cvdist import log
from cvdist.errors import UserError

logger = logging.getLogger(__name__)

_SLOW = 30.0  # seconds after which a wait for the storage is worth a line


class Uploads:
    """Waits for the checkpoint on its way, with a bound."""

    def __init__(self, timeout: float) -> None:
        """`timeout`: seconds, `--checkpoint-timeout`."""
        self._timeout = timeout
        self._pending: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Run `work` in a thread, which does not keep the process alive. `wait` comes first."""
        done = self.expect()
        threading.Thread(target=lambda: self.run(work, done), name="checkpoint", daemon=True).start()

    def expect(self) -> Future[None]:
        """For a caller with a thread of its own, who lets it call `run`."""
        assert self._pending is None
        self._pending = Future()
        return self._pending

    @staticmethod
    def run(work: Callable[[], None], done: Future[None]) -> None:
        """`work`, whose end or error goes to `done`."""
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    def wait(self) -> None:
        """Until nothing is on its way.

        Raises:
            UserError: if that takes too long, or what was on its way could not be stored.
        """
        if self._pending is None:
            return
        began = time.monotonic()
        try:
            self._pending.result(self._timeout)
        except TimeoutError as error:
            if not self._pending.done():
                raise UserError(
                    f"the last checkpoint has not reached the storage within {self._timeout:g} s "
                    "(--checkpoint-timeout): is the storage away or too slow?"
                ) from error
            raise
        finally:
            self._pending = None
        if (waited := time.monotonic() - began) > _SLOW:
            logger.warning(
                "training waited %s for the last checkpoint's upload: the storage is slow, or "
                "--checkpoint-every too short for it",
                log.duration(waited),
            )
