"""A model's results on labeled pictures, and the metrics computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cvdist.results import CalibrationBin, balanced_accuracy, macro_f1

TOP = 5


@dataclass(frozen=True)
class SampleResults:
    """A model's answers, a few numbers for each of N pictures, in the order of their rows.

    rows: int64, of the data set; true, predicted: int64 classes; log_true: float32 log-probability of the true
    class; confidence: float32 probability of the predicted one; brier: float32, sum over the classes of the
    squared distance to the truth; in_top: bool, whether the true class is among the five most probable.
    """

    classes: tuple[str, ...]
    rows: Tensor
    true: Tensor
    predicted: Tensor
    log_true: Tensor
    confidence: Tensor
    brier: Tensor
    in_top: Tensor

    @property
    def right(self) -> Tensor:
        """Whether each prediction is right: bool, (N,)."""
        return self.true == self.predicted

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.rows)


def sample_results(
    classes: Sequence[str], rows: Tensor, true: Tensor, log_probabilities: Tensor
) -> SampleResults:
    """Of a batch: rows, true int64 (n,); log_probabilities float32 (n, classes)."""
    probabilities = log_probabilities.exp()
    confidence, predicted = probabilities.max(1)
    log_true = log_probabilities.gather(1, true[:, None])[:, 0]
    p_true = log_true.exp()
    # sum (p - y)^2 = sum p^2 - 2 p_true + 1
    brier = probabilities.square().sum(1) - 2 * p_true + 1
    best = log_probabilities.topk(min(TOP, len(classes)), dim=1).indices
    in_top = (best == true[:, None]).any(1)
    return SampleResults(tuple(classes), rows, true, predicted, log_true, confidence, brier, in_top)


def concatenate(parts: Sequence[SampleResults]) -> SampleResults:
    """All batches together, sorted by row."""
    names = ("rows", "true", "predicted", "log_true", "confidence", "brier", "in_top")
    whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    order = whole["rows"].argsort()
    return SampleResults(parts[0].classes, **{name: tensor[order] for name, tensor in whole.items()})


@dataclass(frozen=True)
class ClassMetrics:
    """Counts of one class: pictures of it, pictures taken for it, and both at once."""

    name: str
    total: int
    predicted: int
    correct: int

    @property
    def precision(self) -> float | None:
        """Share of what was taken for the class that is of it; None if nothing was."""
        return self.correct / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        """Share of the class that was recognized; None if there is none of it."""
        return self.correct / self.total if self.total else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; None if there is nothing to measure."""
        both = self.predicted + self.total
        return 2 * self.correct / both if both else None


@dataclass(frozen=True)
class Metrics:
    """All metrics of one model on one data set.

    Attributes:
        total: number of pictures.
        correct: number of pictures that are classified correctly.
        top_correct: number of pictures whose class is among the five most probable ones; None if there are ten
            classes or fewer.
        loss: mean cross-entropy.
        brier: mean Brier score, summed over the classes, from 0 to 2 (Brier 1950, "Verification of forecasts
            expressed in terms of probability").
        calibration_error: expected calibration error, from `expected_calibration_error`.
        bins: calibration, from `calibration`.
        by_class: metrics of each class.
        confusion: confusion matrix, int64 (true classes, predicted classes).
    """

    total: int
    correct: int
    top_correct: int | None
    loss: float
    brier: float
    calibration_error: float
    bins: tuple[CalibrationBin, ...]
    by_class: tuple[ClassMetrics, ...]
    confusion: Tensor

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have pictures."""
        return balanced_accuracy(self.confusion)

    @property
    def macro_f1(self) -> float:
        """Mean F1 score of the classes that have pictures."""
        return macro_f1(self.confusion)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary for JSON."""
        return {
            "total": self.total,
            "correct": self.correct,
            "accuracy": self.correct / self.total,
            "top5_correct": self.top_correct,
            "loss": self.loss,
            "brier_score": self.brier,
            "expected_calibration_error": self.calibration_error,
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "classes": [
                {**asdict(one), "precision": one.precision, "recall": one.recall, "f1": one.f1}
                for one in self.by_class
            ],
            "calibration": [asdict(one) for one in self.bins],
            "confusion": self.confusion.tolist(),
        }


def compute_metrics(found: SampleResults, bins: int) -> Metrics:
    """The figures of `found`, with calibration over `bins` bins."""
    classes, total = len(found.classes), len(found)
    flat = torch.bincount(found.true * classes + found.predicted, minlength=classes * classes)
    confusion = flat.view(classes, classes)
    columns = zip(found.classes, confusion.sum(1).tolist(), confusion.sum(0).tolist(),
                  confusion.diagonal().tolist(), strict=True)  # fmt: skip
    binned = calibration(found.confidence, found.right, bins)
    return Metrics(
        total=total,
        correct=int(found.right.sum()),
        top_correct=int(found.in_top.sum()) if classes > 2 * TOP else None,
        loss=-found.log_true.double().mean().item(),
        brier=found.brier.double().mean().item(),
        calibration_error=expected_calibration_error(binned),
        bins=binned,
        by_class=tuple(ClassMetrics(*row) for row in columns),
        confusion=confusion,
    )


def calibration(confidence: Tensor, right: Tensor, bins: int) -> tuple[CalibrationBin, ...]:
    """Group pictures by confidence, in bins of equal width over (0, 1] (Guo et al. 2017, arXiv:1706.04599).

    Args:
        confidence: float (N,), probability of the predicted class.
        right: bool (N,), whether the picture is classified correctly.
        bins: number of bins. Each excludes its lower edge and includes its upper one.
    """
    sure = confidence.double()
    # Edges as exact as the numbers are: a confidence of 0.2 belongs to the bin that ends there.
    edges = torch.arange(1, bins + 1, dtype=torch.float64) / bins
    place = torch.bucketize(sure, edges.to(confidence.dtype).double()).clamp(max=bins - 1)
    totals = torch.bincount(place, minlength=bins).tolist()
    correct = torch.bincount(place[right], minlength=bins).tolist()
    sums = torch.bincount(place, weights=sure, minlength=bins).tolist()
    return tuple(
        CalibrationBin(
            i / bins, (i + 1) / bins, totals[i], correct[i], sums[i] / totals[i] if totals[i] else 0.0
        )
        for i in range(bins)
    )


def expected_calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Compute the expected calibration error: the mean of |accuracy - confidence| over the pictures' bins.

    This is equation 3 of Guo, Pleiss, Sun and Weinberger 2017, "On Calibration of Modern Neural Networks",
    arXiv:1706.04599.
    """
    total = sum(one.total for one in bins)
    return sum(one.total * abs(one.accuracy - one.confidence) for one in bins) / max(total, 1)
