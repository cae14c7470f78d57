"""Small checkpoints, written as a run writes its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cvdist.checkpoints import format as ckpt
from cvdist.checkpoints.format import UNSCORED, Checkpoint, Normalization, OrderIdentity, Progress
from cvdist.checkpoints.store import CheckpointStore
from cvdist.results import EpochRecord, ModelIdentity

SAMPLES = 100  # of an epoch


def checkpoint(epoch: int, position: int = 0, correct: int = 50, mark: float = 0.0) -> Checkpoint:
    """One after `epoch` epochs and `position` samples; `correct` of 100 validation samples in each epoch."""
    history = [
        EpochRecord(number, 1.0, 1, SAMPLES, 1.0, correct, 100, 0.1, 1.0, 1.0) for number in range(1, epoch + 1)
    ]
    return Checkpoint(
        model=ModelIdentity("scratch-cnn", ("a", "b"), 1, 8, 8),
        order=OrderIdentity(SAMPLES, 10, 0),
        progress=Progress(epoch=epoch, position=position, history=history),
        best=None,
        state={"mark": mark},
        normalization=Normalization((0.5,), (0.5,)),
    )


def name_of(saved: Checkpoint) -> str:
    epoch, position = saved.progress.epoch, saved.progress.position
    return f"epoch-{epoch + 1:04}-step-{position:06}" if position else f"epoch-{epoch:04}"


def add(store: CheckpointStore, saved: Checkpoint, fill: Callable[[Path], None] | None = None) -> str:
    """Store it; returns its name there."""
    progress = saved.progress
    score = UNSCORED if progress.position else progress.history[-1].score
    at = progress.epoch * SAMPLES + progress.position
    store.add(name_of(saved), score, at, fill or (lambda folder: ckpt.save(folder, saved)))
    return name_of(saved) + store.suffix
