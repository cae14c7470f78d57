"""What a worker process offers to the training loop, whichever runtime has started it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch


class Worker(Protocol):
    """One process of a run."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: str
    device: torch.device

    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """Folder of the run's latest checkpoint, local while the context lasts; None for a fresh run."""
        ...

    def best_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The same for the checkpoint with the highest score."""
        ...

    def report(self, name: str, score: float, folder: Path | None) -> None:
        """Hand over a checkpoint; every worker calls it, rank 0 with a folder, the others with None.

        The best `--keep-checkpoints` by score are kept, and the latest. The folder may be deleted afterwards.
        """
        ...
