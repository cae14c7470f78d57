"""A model's results on labeled pictures, and the metrics computed from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import compress, starmap
from typing import Any

import torch
from torch import Tensor

from cvdist import multilabel
from cvdist.data.labels import NO_CLASS
from cvdist.results import CalibrationBin, correct_of

TOP = 5
_AT_ONCE = 2**22  # answers that are counted at a time, which bounds the memory


@dataclass(frozen=True)
class SampleResults:
    """A model's answers, a few numbers for each of N pictures, in the order of their rows.

    Where pictures may have several labels, `true`, `predicted` and `confidence` have a value for each class.

    Attributes:
        classes: Names of the classes.
        rows: int64 (N,), rows of the pictures in the data set.
        true: int64 (N,), true classes. With several labels bool (N, classes).
        predicted: Predicted classes, in the form of `true`.
        log_true: float32 (N,), log-probability of the true class. With several labels the mean over the classes
            of the log-probability that the picture has the class, or that it does not, whichever is true.
        confidence: float32 (N,), probability of the predicted class. With several labels the probability of
            each class, (N, classes).
        brier: float32 (N,), sum over the classes of the squared distance to the truth. With several labels the
            mean.
        in_top: bool (N,), whether the true class is among the five most probable, or all labels are right.
        thresholds: With several labels, the probability of each class from which on the class is predicted.
    """

    classes: tuple[str, ...]
    rows: Tensor
    true: Tensor
    predicted: Tensor
    log_true: Tensor
    confidence: Tensor
    brier: Tensor
    in_top: Tensor
    thresholds: tuple[float, ...] = ()

    @property
    def multilabel(self) -> bool:
        """Whether a picture may have several labels."""
        return self.true.dim() == 2

    @property
    def right(self) -> Tensor:
        """Whether each prediction is right, with several labels all labels of the picture: bool (N,)."""
        return (self.true == self.predicted).view(len(self), -1).all(1)

    def in_order_of(self, classes: Sequence[str]) -> SampleResults:
        """Return the same answers with the classes in another order."""
        if self.multilabel:
            columns = [self.classes.index(name) for name in classes]
            moved = {name: getattr(self, name)[:, columns] for name in ("true", "predicted", "confidence")}
            thresholds = tuple(self.thresholds[column] for column in columns)
            return dataclasses.replace(self, classes=tuple(classes), thresholds=thresholds, **moved)
        order = torch.tensor([classes.index(name) for name in self.classes])
        moved = {name: order[getattr(self, name)] for name in ("true", "predicted")}
        return dataclasses.replace(self, classes=tuple(classes), **moved)

    def names(self, which: Tensor, row: int) -> list[str]:
        """Return the names of the classes of picture `row` in `which`, such as `true` or `predicted`."""
        if self.multilabel:
            return list(compress(self.classes, which[row].tolist()))
        return [self.classes[int(which[row])]]

    def words(self, which: Tensor, row: int) -> str:
        """Join the names of the classes of picture `row` in `which`, as `names` returns them, in one line."""
        return ", ".join(self.names(which, row)) or NO_CLASS

    @property
    def totals(self) -> list[int]:
        """Number of pictures of each class."""
        return self._count(self.true)

    @property
    def taken(self) -> list[int]:
        """Number of pictures that were taken for each class."""
        return self._count(self.predicted)

    @property
    def hits(self) -> list[int]:
        """Number of pictures that were correctly taken for each class."""
        return self._count(self.true & self.predicted if self.multilabel else self.true[self.right])

    def _count(self, which: Tensor) -> list[int]:
        counts = which.sum(0) if self.multilabel else torch.bincount(which, minlength=len(self.classes))
        found: list[int] = counts.tolist()
        return found

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.rows)


def sample_results(
    classes: Sequence[str],
    rows: Tensor,
    true: Tensor,
    log_probabilities: Tensor,
    thresholds: Sequence[float] = (),
) -> SampleResults:
    """Build the results of a batch: rows int64 (n,), true as in the results, log_probabilities (n, classes)."""
    probabilities = log_probabilities.exp()
    if true.dim() == 2:
        predicted = multilabel.at_or_above(probabilities, thresholds)
        log_true = log_probabilities.where(true, _log_complement(log_probabilities)).mean(1)
        brier, right = (probabilities - true.float()).square().mean(1), (predicted == true).all(1)
        found = (rows, true, predicted, log_true, probabilities, brier, right)
        return SampleResults(tuple(classes), *found, tuple(thresholds))
    confidence, predicted = probabilities.max(1)
    log_true = log_probabilities.gather(1, true[:, None])[:, 0]
    p_true = log_true.exp()
    # sum (p - y)^2 = sum p^2 - 2 p_true + 1
    brier = probabilities.square().sum(1) - 2 * p_true + 1
    best = log_probabilities.topk(min(TOP, len(classes)), dim=1).indices
    in_top = (best == true[:, None]).any(1)
    return SampleResults(tuple(classes), rows, true, predicted, log_true, confidence, brier, in_top)


def _log_complement(logarithms: Tensor) -> Tensor:
    """Compute log(1 - p) from log(p), exact where p is close to 0 or 1, and finite where it is 1."""
    large = logarithms > -math.log(2)
    near_one = (-torch.expm1(logarithms)).log().clamp(min=-104)  # the logarithm of the smallest float32
    return near_one.where(large, torch.log1p(-logarithms.exp()))


def concatenate(parts: Sequence[SampleResults]) -> SampleResults:
    """Join the results of one batch or more, sorted by row."""
    names = ("rows", "true", "predicted", "log_true", "confidence", "brier", "in_top")
    whole: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    order = whole["rows"].argsort()
    return dataclasses.replace(parts[0], **{name: tensor[order] for name, tensor in whole.items()})


@dataclass(frozen=True)
class ClassMetrics:
    """Counts of one class: pictures of it, pictures that were taken for it, and pictures in both groups.

    average_precision: where pictures may have several labels; None if there is no picture of the class.
    threshold: where pictures may have several labels, the least probability with which one is taken for the
        class.
    """

    name: str
    total: int
    predicted: int
    correct: int
    average_precision: float | None = None
    threshold: float | None = None

    @property
    def precision(self) -> float | None:
        """Share of the pictures taken for the class that are of the class; None if none was taken for it."""
        return self.correct / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        """Share of the class's pictures that were taken for it; None if there are no pictures of the class."""
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
        correct: number of pictures that are classified correctly; with several labels those that get exactly
            theirs.
        top_correct: number of pictures whose class is among the five most probable ones; None if there are ten
            classes or fewer.
        loss: mean cross-entropy; with several labels the mean binary cross-entropy over pictures and classes.
        brier: mean Brier score, summed over the classes, from 0 to 2 (Brier 1950, "Verification of forecasts
            expressed in terms of probability"); with several labels the mean over the classes, from 0 to 1.
        calibration_error: expected calibration error, from `expected_calibration_error`.
        bins: calibration, from `calibration`; with several labels for the probabilities of all classes.
        by_class: metrics of each class.
        confusion: confusion matrix, int64 (true classes, predicted classes); None with several labels.
        precision_at_recall: with several labels from `multilabel.precision_at_recall`, float32 (classes,
            levels).
    """

    total: int
    correct: int
    top_correct: int | None
    loss: float
    brier: float
    calibration_error: float
    bins: tuple[CalibrationBin, ...]
    by_class: tuple[ClassMetrics, ...]
    confusion: Tensor | None
    precision_at_recall: Tensor | None = None

    def __str__(self) -> str:
        """Format the main figures, in a few words."""
        right = correct_of(self.correct, self.total, several=self.confusion is None)
        return right if self.confusion is not None else f"mAP {self.mean_average_precision:.4f}, {right}"

    @property
    def mean_average_precision(self) -> float:
        """Mean average precision of the classes that have pictures, where these may have several labels."""
        return _mean([one.average_precision for one in self.by_class])

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have pictures."""
        return _mean([one.recall for one in self.by_class])

    @property
    def macro_f1(self) -> float:
        """Mean F1 score of the classes that have pictures."""
        return _mean([one.f1 for one in self.by_class if one.total])

    def summary(self) -> dict[str, float | None]:
        """Return the numbers over all classes, by their names in JSON."""
        several = self.confusion is None
        counts = {"total": self.total, "correct": self.correct, "accuracy": self.correct / self.total}
        return {
            **({"mean_average_precision": self.mean_average_precision} if several else {}),
            **counts,
            **({} if several else {"top5_correct": self.top_correct}),
            "loss": self.loss,
            "brier_score": self.brier,
            "expected_calibration_error": self.calibration_error,
            **({} if several else {"balanced_accuracy": self.balanced_accuracy}),
            "macro_f1": self.macro_f1,
        }

    def class_rows(self) -> list[dict[str, Any]]:
        """Return the numbers of each class, by their names in JSON."""
        counts = ("name", "total", "predicted", "correct")
        ranking = ("average_precision", "threshold") if self.confusion is None else ()
        names = (*counts, *ranking, "precision", "recall", "f1")
        return [{name: getattr(one, name) for name in names} for one in self.by_class]

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary for JSON."""
        values = {
            **self.summary(),
            "classes": self.class_rows(),
            "calibration": [asdict(one) for one in self.bins],
        }
        return values if self.confusion is None else values | {"confusion": self.confusion.tolist()}


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / max(len(known), 1)


def compute_metrics(found: SampleResults, bins: int) -> Metrics:
    """Compute all metrics of the results `found`, with calibration over `bins` bins."""
    classes, confusion, curves = len(found.classes), None, None
    more: tuple[Sequence[float | None], ...] = ()
    if found.multilabel:
        precisions = multilabel.average_precision(found.confidence, found.true).tolist()
        known = [None if math.isnan(value) else value for value in precisions]
        more, right = (known, found.thresholds), found.true
        curves = multilabel.precision_at_recall(found.confidence, found.true)
    else:
        flat = torch.bincount(found.true * classes + found.predicted, minlength=classes * classes)
        confusion = flat.view(classes, classes)
        right = found.right
    columns = zip(found.classes, found.totals, found.taken, found.hits, *more, strict=True)
    binned = calibration(found.confidence.flatten(), right.flatten(), bins)
    return Metrics(
        total=len(found),
        correct=int(found.right.sum()),
        top_correct=int(found.in_top.sum()) if classes > 2 * TOP and not found.multilabel else None,
        loss=-found.log_true.double().mean().item(),
        brier=found.brier.double().mean().item(),
        calibration_error=expected_calibration_error(binned),
        bins=binned,
        by_class=tuple(starmap(ClassMetrics, columns)),
        confusion=confusion,
        precision_at_recall=curves,
    )


def calibration(confidence: Tensor, right: Tensor, bins: int) -> tuple[CalibrationBin, ...]:
    """Group pictures by confidence, in bins of equal width over (0, 1] (Guo et al. 2017, arXiv:1706.04599).

    Args:
        confidence: float (N,), probability of the predicted class.
        right: bool (N,), whether the picture is classified correctly.
        bins: number of bins. Each excludes its lower edge and includes its upper one.
    """
    # Edges as exact as the numbers are: a confidence of 0.2 belongs to the bin that ends there.
    edges = torch.arange(1, bins + 1, dtype=torch.float64) / bins
    edges = edges.to(confidence.dtype).double()
    counts, weights = torch.zeros(2, bins, dtype=torch.int64), torch.zeros(bins, dtype=torch.float64)
    for some, hits in zip(confidence.split(_AT_ONCE), right.split(_AT_ONCE), strict=True):
        sure = some.double()
        place = torch.bucketize(sure, edges).clamp(max=bins - 1)
        counts += torch.stack([torch.bincount(one, minlength=bins) for one in (place, place[hits])])
        weights += torch.bincount(place, weights=sure, minlength=bins)
    (totals, correct), sums = counts.tolist(), weights.tolist()
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
