"""Decides whether a training ends before its last epoch, because it no longer improves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cvdist.checkpoints.format import Progress
from cvdist.config import LoopConfig
from cvdist.distributed.collectives import gather
from cvdist.results import EpochRecord, spoken
from cvdist.training.run import Run


def epochs_without_gain(history: Sequence[EpochRecord], min_delta: float) -> int:
    """Return how many epochs have passed since the selected value was last better by more than `min_delta`."""
    best, since = -math.inf, 0
    for record in history:
        since += 1
        if record.selected > best + min_delta or best == -math.inf:
            best, since = record.selected, 0
    return since


def reason(progress: Progress, settings: LoopConfig) -> str:
    """Return why a training ends before its last epoch; empty if it does not."""
    fitted = progress.logistic.epoch if progress.logistic is not None else 0  # which is no epoch of training
    history = [record for record in progress.history if record.epoch != fitted]
    since = epochs_without_gain(history, settings.min_delta)
    if not settings.patience or since < settings.patience or len(history) >= settings.epochs:
        return ""
    more = f" by more than {settings.min_delta:g}" if settings.min_delta else ""
    what, plural = spoken(settings.select_by), "s" * (since > 1)
    return f"stopped early after epoch {history[-1].epoch}: no better {what}{more} in {since} epoch{plural}"


def due(run: Run) -> bool:
    """Return whether the training ends here, as rank 0 decides for all. All workers must call this.

    It depends on the records of the epochs alone, which checkpoints keep, so a continued run goes on counting.
    """
    settings = run.config.loop
    return bool(settings.patience) and bool(gather(reason(run.progress, settings))[0])
