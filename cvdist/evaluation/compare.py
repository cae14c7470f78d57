"""Comparison of two models on the same pictures with McNemar's test, and the interval of an accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cvdist.evaluation.metrics import SampleResults


@dataclass(frozen=True)
class ModelComparison:
    """How many pictures both models classify correctly, only one does, or neither.

    With several labels per picture, all of them have to be right. p: p-value of McNemar's exact test; by_class:
    for each class its name, the number of its pictures, and how many of these the first and the second model
    recognized; most_different: int64 positions in the outcomes that only one model got right, those where the
    two models' probabilities of the truth are furthest apart first.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    p: float
    by_class: tuple[tuple[str, int, int, int], ...]
    most_different: Tensor

    @property
    def total(self) -> int:
        """The number of pictures."""
        return self.both + self.only_first + self.only_second + self.neither

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain values, for JSON."""
        return {
            "both_right": self.both,
            "only_first_right": self.only_first,
            "only_second_right": self.only_second,
            "both_wrong": self.neither,
            "mcnemar_p": self.p,
            "classes": [
                {"name": name, "total": total, "first_correct": first, "second_correct": second}
                for name, total, first, second in self.by_class
            ],
        }


def compare_models(first: SampleResults, second: SampleResults, most: int) -> ModelComparison:
    """Compare the answers of two models to the same pictures; `most`: how many pictures to show at most.

    Raises:
        ValueError: if the two have answers to different pictures.
    """
    second = second.in_order_of(first.classes)
    if not torch.equal(first.rows, second.rows) or not torch.equal(first.true, second.true):
        raise ValueError("two outcomes of different pictures can't be compared")
    one, other = first.right, second.right
    only_first, only_second = int((one & ~other).sum()), int((~one & other).sum())
    disagree = (one != other).nonzero().flatten()
    apart = (first.log_true.exp() - second.log_true.exp()).abs()[disagree]
    return ModelComparison(
        both=int((one & other).sum()),
        only_first=only_first,
        only_second=only_second,
        neither=int((~one & ~other).sum()),
        p=mcnemar(only_first, only_second),
        by_class=tuple(zip(first.classes, first.totals, first.hits, second.hits, strict=True)),
        most_different=disagree[apart.argsort(descending=True, stable=True)[:most]],
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Compute the two-sided p-value of McNemar's exact test.

    It is the probability of a difference at least this large between two equally good models. If they are, then
    each picture that exactly one of them classifies correctly is the first one's with probability 1/2, so
    `only_first` has a binomial distribution. McNemar 1947, "Note on the sampling error of the difference
    between correlated proportions or percentages"; this is the exact form of the test.

    Args:
        only_first: number of pictures that only the first model classifies correctly.
        only_second: number of pictures that only the second model classifies correctly.
    """
    from scipy.stats import binomtest  # takes a second to import

    disagreed = only_first + only_second
    return float(binomtest(only_first, disagreed).pvalue) if disagreed else 1.0


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Compute the 95% interval of an accuracy that was measured on `total` pictures, at least one.

    Its ends are the accuracies from which the measured one is 1.96 standard deviations away. Wilson 1927,
    "Probable inference, the law of succession, and statistical inference".
    """
    z = 1.959963984540054  # of the normal distribution's two tails of 2.5%
    accuracy, scale = correct / total, 1 + z**2 / total
    middle = (accuracy + z**2 / (2 * total)) / scale
    half = z / scale * math.sqrt(accuracy * (1 - accuracy) / total + (z / (2 * total)) ** 2)
    return max(middle - half, 0.0), min(middle + half, 1.0)
