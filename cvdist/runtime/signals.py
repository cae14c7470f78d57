"""What SIGTERM does to a job: an end after a last checkpoint, or an exception."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)


class Stop:
    """While this lasts, SIGTERM asks for an end in order; a second one, or the grace period, ends at once."""

    def __init__(self, grace_period: float) -> None:
        """`grace_period`: seconds."""
        self._grace_period = grace_period
        self._asked = False

    def asked(self) -> bool:
        """Whether the signal has come."""
        return self._asked

    def __enter__(self) -> Stop:
        """Take over SIGTERM; in the main thread."""
        self._before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._note),
            signal.SIGALRM: signal.signal(signal.SIGALRM, self._leave),
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give it back."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            self._leave(number, frame)
        self._asked = True
        signal.setitimer(signal.ITIMER_REAL, self._grace_period)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        logger.warning("no checkpoint within --grace-period %g s: ending without", self._grace_period)
        sys.exit(128 + signal.SIGTERM)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """While this lasts, SIGTERM raises SystemExit, so that `finally` clauses run.

    Kubernetes, `ray job stop` and torchrun stop a job by this signal.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
