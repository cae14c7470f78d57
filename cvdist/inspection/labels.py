"""Finds labels that are likely wrong, because all other pictures tell another class.

Each picture is classified by a ridge classifier of all others, exactly and without fitting again
(`cvdist.training.ridge`). Scores become probabilities by a model of how labels come about: the true class is
drawn from softmax(scale x scores), and with probability `rate` the label is one of the other classes instead.
Both numbers have the values that make the given labels likeliest (label-noise robust logistic regression,
Bootkrajang and Kaban 2012). So a label is not called wrong because the classifier errs, where it often does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cvdist.training.ridge import Equations, Sums, pooled

_BLOCK = 4096
_FITTED = 10_000  # pictures, at most, that the two numbers are fitted to
_GRID, _ROUNDS = 29, 3  # points for each number, and how often the grid is made finer


@dataclass(frozen=True)
class LabelModel:
    """A model of how labels come about; `scale`: factor of the scores; `rate`: share of wrong labels."""

    scale: float
    rate: float

    def log_odds(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the logarithm of the odds that each label is wrong, float64 (n,)."""
        others, own = _against(self.scale * scores, labels)
        classes = scores.shape[1]
        odds = torch.tensor(self.rate / (1 - self.rate) / (classes - 1), dtype=torch.float64)
        return odds.log() + others - own


@dataclass(frozen=True)
class CheckedLabels:
    """The results of checking all labels.

    Attributes:
        log_odds: Logarithm of the odds that a label is wrong, float64 (n,).
        suggested: The likeliest other class, int64 (n,).
        otherwise: Whether the other pictures suggest that class rather than the picture's own, bool (n,).
        rate: Estimated share of all labels that are wrong.
        correct: Number of pictures that a classifier of all others classifies as they are labeled.
    """

    log_odds: Tensor
    suggested: Tensor
    otherwise: Tensor
    rate: float
    correct: int

    @property
    def wrong(self) -> Tensor:
        """Probability that each label is wrong, float64 (n,)."""
        return self.log_odds.sigmoid()


def check_labels(
    features: Tensor, labels: Tensor, classes: int, after_block: Callable[[str], None] = lambda doing: None
) -> CheckedLabels:
    """Compare each label with what all other pictures say.

    Args:
        features: (n, d).
        labels: int64 (n,).
        classes: Number of classes.
        after_block: Called now and then with what is being done.
    """

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.arange(len(labels)).split(_BLOCK):
            yield features[part[0] : part[-1] + 1].double(), labels[part]
            after_block("labels: by all other pictures")

    equations = Equations.of(sums_of(features, labels, classes, torch.ones(len(labels), dtype=torch.bool)))
    left_out = equations.leave_one_out(blocks())
    penalty = torch.tensor([left_out.penalty], dtype=torch.float64)
    every = -(-len(labels) // _FITTED)
    # A few for the model, then all: the scores of many pictures in many classes need not be kept.
    some = next(equations.left_out_scores(features[::every].double(), labels[::every], penalty))
    model = fit_label_model(some, labels[::every])
    log_odds, suggested, otherwise = [], [], []
    for inputs, mine in blocks():
        scores = next(equations.left_out_scores(inputs, mine, penalty))
        log_odds.append(model.log_odds(scores, mine))
        others = scores.scatter(1, mine[:, None], -torch.inf)
        suggested.append(others.argmax(1))
        otherwise.append(others.amax(1) > scores.gather(1, mine[:, None])[:, 0])
    return CheckedLabels(
        torch.cat(log_odds), torch.cat(suggested), torch.cat(otherwise), model.rate, left_out.correct
    )


def sums_of(features: Tensor, labels: Tensor, classes: int, which: Tensor) -> Sums:
    """Add up the pictures of `which`, bool (n,), for a ridge classifier."""
    sums = Sums.zero(features.shape[1], classes, features.device)
    for part in which.nonzero().flatten().split(_BLOCK):
        sums.add(pooled(features[part]), labels[part])
    return sums


def fit_label_model(scores: Tensor, labels: Tensor) -> LabelModel:
    """Return the model under which the labels are likeliest.

    Args:
        scores: Scores of each picture by a classifier of all others, float64 (n, classes).
        labels: int64 (n,).
    """
    classes = scores.shape[1]
    scales = torch.logspace(-1, 3, _GRID, dtype=torch.float64)
    rates = torch.logspace(-5, -0.4, _GRID, dtype=torch.float64)
    best = LabelModel(1.0, float(rates[0]))
    for _ in range(_ROUNDS):
        likelihoods = torch.empty(_GRID, _GRID, dtype=torch.float64)
        for row, scale in enumerate(scales):
            others, own = _against(scale * scores, labels)
            whole = torch.logaddexp(others, own)
            right, wrong = own - whole, others - whole - torch.tensor(classes - 1).log()
            both = torch.logaddexp((1 - rates).log()[:, None] + right, rates.log()[:, None] + wrong)
            likelihoods[row] = both.sum(1)
        row, column = divmod(int(likelihoods.argmax()), _GRID)
        best = LabelModel(float(scales[row]), float(rates[column]))
        # Between the neighbors of the best point.
        scales, rates = _around(scales, row), _around(rates, column)
    return best


def _around(grid: Tensor, place: int) -> Tensor:
    low, high = grid[max(place - 1, 0)], grid[min(place + 1, _GRID - 1)]
    return torch.logspace(float(low.log10()), float(high.log10()), _GRID, dtype=torch.float64)


def _against(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the sum over all other classes, and that of the label's, float64 (n,) each."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1), own
