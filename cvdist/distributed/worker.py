"""What a worker process offers to the training loop, whichever runtime has started it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from enum import IntEnum
from pathlib import Path
from typing import Protocol

import torch


class StopRequest(IntEnum):
    """What a run is asked to do; the more urgent, the higher.

    CHECKPOINT: save one now, since some of its nodes may soon be gone. EXIT: end after a checkpoint; the run
    will be started again. ABORT: a newer job of its name has begun (the loop gets this as an error).
    """

    NONE = 0
    CHECKPOINT = 1
    EXIT = 2
    ABORT = 3


class Worker(Protocol):
    """One process of a run."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: str
    device: torch.device

    def checkpoints(self) -> Sequence[str]:
        """Names of the run's checkpoints, the one to go on from first, then the next best for that."""
        ...

    def open_checkpoint(self, name: str) -> AbstractContextManager[Path]:
        """A checkpoint's folder, local while the context lasts; empty if the checkpoint is gone."""
        ...

    def open_best_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The folder of the checkpoint with the highest score, in the same way; None if there is none."""
        ...

    def save_checkpoint(
        self,
        name: str,
        score: float,
        at: int,
        fill: Callable[[Path], None] | None,
        awaited: Sequence[str] = (),
    ) -> None:
        """Hand over a checkpoint; every worker calls it, rank 0 with `fill`, the others with None.

        fill: writes the checkpoint into an empty folder, perhaps later and in another thread. At most one
        checkpoint is on its way; the next one waits for it. at: samples trained on so far. The best
        `--keep-checkpoints` by score are kept, and the latest. awaited: the files that the others write, each
        its own with a `fill` of its own, without which rank 0's is not complete.

        Raises:
            UserError: if the one before could not be stored.
        """
        ...

    def wait_for_uploads(self) -> None:
        """Wait until what was reported is stored; every worker calls it.

        Raises:
            UserError: if it could not be stored.
        """
        ...

    def poll_stop_request(self) -> StopRequest:
        """What the run is asked to do; every worker calls it after each step, and all get the same answer.

        Raises:
            Superseded: on every worker, if a newer job of the same name has begun.
        """
        ...
