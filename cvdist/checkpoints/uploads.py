"""Stores checkpoints in a thread while training goes on, at most one at a time."""

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
    """The upload that is under way, if there is one."""

    def __init__(self, timeout: float) -> None:
        """Start without an upload.

        Args:
            timeout: Seconds that `wait` waits, `--checkpoint-timeout`.
        """
        self._timeout = timeout
        self._pending: Future[None] | None = None

    def start(self, upload: Callable[[], None]) -> None:
        """Call `upload` in a thread, which does not keep the process alive. Call `wait` first."""
        assert self._pending is None
        done = self._pending = Future[None]()

        def run() -> None:
            try:
                upload()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        threading.Thread(target=run, name="checkpoint", daemon=True).start()

    def wait(self) -> None:
        """Wait until no upload is under way.

        Raises:
            UserError: If that takes too long, or the checkpoint could not be stored.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        began = time.monotonic()
        try:
            pending.result(self._timeout)
        except TimeoutError as error:
            if pending.done():
                raise  # the upload's own
            raise UserError(
                f"the last checkpoint has not reached the storage within {self._timeout:g} s "
                "(--checkpoint-timeout): is the storage away or too slow?",
                transient=True,
            ) from error
        if (waited := time.monotonic() - began) > _SLOW:
            logger.warning(
                "training waited %s for the last checkpoint's upload: the storage is slow, or "
                "--checkpoint-every too short for it",
                log.duration(waited),
            )
