"""Metrics for pictures that may have several classes: average precision, thresholds, and counts by class.

Scores are probabilities, or anything else that is higher the surer a model is. A picture is said to have a
class if its score is at least the class's threshold. Results are the same in whatever order the pictures come.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HALF = 0.5  # the threshold of a class for which none can be chosen
_AT_ONCE = 2**22  # scores that are sorted at a time: 200 MB with all that belongs to them
Measure = Callable[[Tensor, Tensor], Tensor]
LEVELS = 101  # of recall, at which `precision_at_recall` tells the precision


@dataclass(frozen=True)
class Counts:
    """How well the classes of pictures were predicted.

    Attributes:
        total: Number of pictures.
        exact: Number of pictures that were given exactly their classes, as scikit-learn's accuracy counts.
        true: How many pictures have each class, int64 (classes,).
        predicted: How many pictures were said to have each class, int64 (classes,).
        correct: How many of these do have the class, int64 (classes,).
    """

    total: int
    exact: int
    true: Tensor
    predicted: Tensor
    correct: Tensor

    @property
    def precision(self) -> Tensor:
        """Share of each class's predictions that are right, float64 (classes,); NaN if there are none."""
        return self.correct.double() / self.predicted

    @property
    def recall(self) -> Tensor:
        """Share of each class's pictures that were found, float64 (classes,); NaN if there are none."""
        return self.correct.double() / self.true

    @property
    def f1(self) -> Tensor:
        """F1 score of each class, float64 (classes,); NaN if a class is neither there nor predicted."""
        return 2 * self.correct.double() / (self.predicted + self.true)

    @property
    def macro_f1(self) -> float:
        """Mean F1 score of the classes that have pictures; 0 if none has."""
        return mean(torch.where(self.true > 0, self.f1, torch.nan))


def at_or_above(scores: Tensor, thresholds: Tensor | Sequence[float] | float) -> Tensor:
    """Return which classes a picture is said to have: those whose scores reach their thresholds.

    Args:
        scores: float (n, classes).
        thresholds: One a class, in float64, or one for all classes.

    Returns:
        bool (n, classes).
    """
    return scores.double() >= torch.as_tensor(thresholds, dtype=torch.float64, device=scores.device)


def count(scores: Tensor, truth: Tensor, thresholds: Tensor | float = HALF) -> Counts:
    """Count correct predictions if a picture is said to have the classes whose scores reach the thresholds.

    Args:
        scores: float (n, classes).
        truth: bool (n, classes), the classes that each picture has.
        thresholds: float64 (classes,), or one for all classes.
    """
    taken = at_or_above(scores, thresholds)
    exact = int((taken == truth).all(1).sum())
    return Counts(len(truth), exact, truth.sum(0), taken.sum(0), (taken & truth).sum(0))


def mean(by_class: Tensor) -> float:
    """Return the mean over the classes that have a value, which is not NaN; 0 if none has."""
    return float(by_class.double().nanmean().nan_to_num(0.0))


def _some_classes_at_a_time(function: Measure) -> Measure:
    """Make a function run on a few classes at a time, which bounds its memory, and join the results."""

    @functools.wraps(function)
    def measure(scores: Tensor, truth: Tensor) -> Tensor:
        width = max(1, _AT_ONCE // max(len(scores), 1))
        columns = zip(scores.split(width, 1), truth.split(width, 1), strict=True)
        return torch.cat([function(*some) for some in columns])

    return measure


@_some_classes_at_a_time
def average_precision(scores: Tensor, truth: Tensor) -> Tensor:
    """Compute the average precision of each class, as scikit-learn's `average_precision_score`.

    It is the mean over a class's pictures of the precision at the threshold that just finds the picture,
    without interpolation. Pictures with equal scores are found together.

    Args:
        scores: float (n, classes).
        truth: bool (n, classes), the classes that each picture has.

    Returns:
        float64 (classes,), from 0 to 1; NaN for a class that no picture has.
    """
    cuts = _Cuts(scores, truth)
    found = cuts.right.where(cuts.possible, 0).cummax(0).values
    new = found.diff(dim=0, prepend=found.new_zeros(1, found.shape[1]))
    return (new * cuts.precision).sum(0) / truth.sum(0)


@_some_classes_at_a_time
def best_thresholds(scores: Tensor, truth: Tensor) -> Tensor:
    """Choose the threshold of each class with which its F1 score is highest on these pictures.

    It lies in the middle between two successive scores, so that rounding decides nothing, or between 0 and the
    lowest score. Among equally good ones it is the highest. A class that no picture has gets 0.5.

    Args:
        scores: Probabilities, float (n, classes).
        truth: bool (n, classes), the classes that each picture has.

    Returns:
        float64 (classes,).
    """
    cuts, positives = _Cuts(scores, truth), truth.sum(0)
    f1 = (2 * cuts.right.double() / (cuts.taken + positives)).where(cuts.possible, -1.0)
    if not len(f1):
        return f1.new_full((f1.shape[1],), HALF)
    below = torch.cat([cuts.scores[1:], torch.zeros_like(cuts.scores[:1])])
    middle = (cuts.scores + below) / 2
    return middle.gather(0, f1.argmax(0, keepdim=True))[0].where(positives > 0, HALF)


@_some_classes_at_a_time
def precision_at_recall(scores: Tensor, truth: Tensor) -> Tensor:
    """Return each class's precision at the highest threshold that reaches a recall of 0, 0.01, ... 1.

    Args:
        scores: float (n, classes).
        truth: bool (n, classes), the classes that each picture has.

    Returns:
        float32 (classes, 101); NaN for a class that no picture has.
    """
    cuts, positives = _Cuts(scores, truth), truth.sum(0)
    curves = torch.full((truth.shape[1], LEVELS), torch.nan)
    # In whole numbers: the right ones that each level of recall asks for.
    asked = torch.arange(LEVELS)[:, None] * positives
    for number in positives.nonzero().flatten().tolist():
        possible = cuts.possible[:, number]
        right, precision = cuts.right[possible, number], cuts.precision[possible, number]
        at = torch.searchsorted((LEVELS - 1) * right, asked[:, number].contiguous())
        curves[number] = precision[at].float()
    return curves


class _Cuts:
    """The pictures by falling scores of each class, and how many are right if those down to a place are taken.

    All attributes are (n, classes), or can be broadcast to it.

    Attributes:
        scores: the scores, float64.
        right: number of pictures down to this place that have the class.
        taken: number of pictures down to this place.
        precision: ratio of `right` to `taken`.
        possible: whether a threshold can be here, which is not the case between equal scores.
    """

    def __init__(self, scores: Tensor, truth: Tensor) -> None:
        self.scores, order = scores.double().sort(0, descending=True)
        self.right = truth.gather(0, order).cumsum(0)
        self.taken = torch.arange(1, len(scores) + 1, device=scores.device)[:, None]
        self.precision = self.right.double() / self.taken
        last = torch.ones_like(truth[:1])
        self.possible = torch.cat([self.scores[1:] != self.scores[:-1], last])[: len(scores)]
