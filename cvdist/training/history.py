"""The record of a run, epoch by epoch."""

from __future__ import annotations

from dataclasses import dataclass

from cvdist import log
from cvdist.strain import Strain


@dataclass(frozen=True)
class EpochRecord:
    """Exact results of one epoch.

    `epoch` counts from 1, losses are means, `seconds` hold both phases, `peak_memory` is in bytes, of rank 0;
    `storage_*` are of the requests since the epoch before, over all workers (`cvdist.strain`).
    """

    epoch: int
    train_loss: float
    train_correct: int
    train_total: int
    valid_loss: float
    valid_correct: int
    valid_total: int
    learning_rate: float
    seconds: float
    samples_per_second: float
    peak_memory: int = 0
    storage_slow: int = 0
    storage_failed: int = 0
    storage_seconds: float = 0.0

    @property
    def train_accuracy(self) -> float:
        """Fraction in [0, 1]."""
        return self.train_correct / self.train_total

    @property
    def valid_accuracy(self) -> float:
        """Fraction in [0, 1]."""
        return self.valid_correct / self.valid_total

    @property
    def score(self) -> float:
        """Which checkpoint is the best: validation accuracy; of equals the earlier one."""
        return self.valid_accuracy - 1e-9 * self.epoch

    @property
    def waited(self) -> Strain:
        """What the storage cost beyond the usual."""
        return Strain(self.storage_slow, self.storage_failed, self.storage_seconds)


@dataclass(frozen=True)
class RidgeResult:
    """What a ridge probe made of the validation pictures (`cvdist.training.ridge`).

    penalty: on its squared weights, as chosen; seconds: that all of it took.
    """

    correct: int
    total: int
    penalty: float
    seconds: float

    def __str__(self) -> str:
        """`98.50% (394/400) in 1.2 s`."""
        return f"{log.percent(self.correct, self.total)} in {self.seconds:.1f} s"

    @property
    def accuracy(self) -> float:
        """Fraction in [0, 1]."""
        return self.correct / self.total
