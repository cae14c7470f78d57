"""Handlers of SIGTERM: a job ends after a last checkpoint, or by an exception."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from cvdist.distributed.stop_request import StopRequest

logger = logging.getLogger(__name__)


class SigtermRequest:
    """In a `with` block, SIGTERM asks for an end after a checkpoint; a second one ends the process at once."""

    def __init__(self, grace_period: float) -> None:
        """Prepare the handler, which `with` installs.

        Args:
            grace_period: Seconds after the signal in which the block has to end; then the process is ended.
        """
        self._grace_period = grace_period
        self._received = False

    def poll(self) -> StopRequest:
        """Return EXIT if the signal has come, else NONE."""
        return StopRequest.EXIT if self._received else StopRequest.NONE

    def __enter__(self) -> SigtermRequest:
        """Handle SIGTERM from now on; in the main thread."""
        self._before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._note),
            signal.SIGALRM: signal.signal(signal.SIGALRM, self._exit),
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the handlers that there were before."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            self._exit(number, frame)
        self._received = True
        signal.setitimer(signal.ITIMER_REAL, self._grace_period)

    def _exit(self, number: int, frame: FrameType | None) -> None:
        logger.warning("no checkpoint within --grace-period %g s: ending without", self._grace_period)
        sys.exit(128 + signal.SIGTERM)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Make SIGTERM raise SystemExit for the duration of the context, so that `finally` clauses run.

    Kubernetes, `ray job stop` and torchrun stop a job by this signal.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
