"""Plain values that several rooms speak of: what a run measured, and what its model is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cvdist import log
from cvdist.config import HeadSize, ModelConfig
from cvdist.slow_requests import NO_SLOW_REQUESTS, SlowRequests

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EpochRecord:
    """Exact results of one epoch.

    `epoch` counts from 1, losses are means, `seconds` hold both phases, `peak_memory` is in bytes, of rank 0;
    `storage_*` are of the requests since the epoch before, over all workers (`cvdist.slow_requests`).
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
    def slow_requests(self) -> SlowRequests:
        """What the storage cost beyond the usual."""
        return SlowRequests(self.storage_slow, self.storage_failed, self.storage_seconds)


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


@dataclass(frozen=True)
class Mistake:
    """A picture that was classified wrongly: its row, its class, the class it was taken for, how surely."""

    index: int
    true: int
    predicted: int
    confidence: float


@dataclass(frozen=True)
class Evaluation:
    """Results over all validation samples.

    loss: mean cross-entropy; confusion: int64 (classes, classes) on the CPU, rows are true classes;
    mistakes: the most confident ones, most confident first.
    """

    loss: float
    correct: int
    total: int
    confusion: Tensor
    mistakes: list[Mistake]


@dataclass(frozen=True)
class ModelIdentity:
    """What has to agree for weights to fit.

    head, hidden_size: see `cvdist.models.heads`; empty and 0 for models that have no choice of heads.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    height: int
    width: int
    head: str = ""
    hidden_size: int = 0

    def __str__(self) -> str:
        """As error messages name it."""
        size = HeadSize(self.head, self.hidden_size)
        head = "" if size in (("", 0), ModelConfig().head_size) else f", {size}"
        return f"{self.name}{head} ({len(self.classes)} classes, {self.channels}x{self.height}x{self.width})"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelIdentity:
        """Inverse of `dataclasses.asdict`, also after JSON."""
        return cls(**{**values, "classes": tuple(values["classes"])})


@dataclass(frozen=True)
class Summary:
    """What a finished run reports to the person who started it."""

    data: str
    model: str
    workers: int
    hardware: str
    epochs: int
    best_epoch: int
    best_correct: int
    valid_total: int
    samples_per_second: float
    train_seconds: float
    first_step_at: float
    """Seconds since 1970 when the first step was done; 0 if the run had nothing left to do."""
    visualized: bool = False
    """Whether the run shows what the network has learned."""
    slow_requests: SlowRequests = NO_SLOW_REQUESTS
    """What the storage cost beyond the usual."""
    ridge: RidgeResult | None = None
    """The baseline, where one was computed."""
