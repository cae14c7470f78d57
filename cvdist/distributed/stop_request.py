"""The requests that a run may get between two steps."""

from __future__ import annotations

from enum import IntEnum


class StopRequest(IntEnum):
    """A request to a run. A higher value is more urgent.

    Attributes:
        NONE: Go on.
        CHECKPOINT: Save a checkpoint now, because some of the nodes may soon be gone.
        EXIT: Save a checkpoint and end; the run will be started again.
        ABORT: End, because a newer job has taken over the run. Workers see it as the error `Superseded`.
    """

    NONE = 0
    CHECKPOINT = 1
    EXIT = 2
    ABORT = 3
