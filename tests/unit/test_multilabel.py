"""The metrics for several labels a picture equal scikit-learn's, with equal scores and empty classes too."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from torch import Tensor

from cvdist import multilabel


@st.composite
def scored(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Probabilities (n, classes), many of which are equal, and the truth."""
    count, classes = draw(st.integers(1, 30)), draw(st.integers(2, 4))
    seed, steps = draw(st.integers(0, 2**31)), draw(st.sampled_from([2, 5, 2**20]))
    random = np.random.default_rng(seed)
    scores = random.integers(0, steps, (count, classes)) / (steps - 1)
    truth = random.random((count, classes)) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    return torch.tensor(scores, dtype=torch.float32), torch.tensor(truth)


@settings(max_examples=50)
@given(scored())
def test_average_precision_is_that_of_scikit_learn(case: tuple[Tensor, Tensor]) -> None:
    scores, truth = case
    found = multilabel.average_precision(scores, truth)
    for number in range(truth.shape[1]):
        if truth[:, number].any():
            expected = metrics.average_precision_score(truth[:, number].numpy(), scores[:, number].numpy())
            assert found[number].item() == pytest.approx(expected, abs=1e-12)
        else:
            assert found[number].isnan()


@settings(max_examples=50)
@given(scored())
def test_no_threshold_has_a_higher_f1_than_the_chosen_one(case: tuple[Tensor, Tensor]) -> None:
    scores, truth = case
    thresholds = multilabel.best_thresholds(scores, truth)
    reached = multilabel.count(scores, truth, thresholds).f1
    for number in range(truth.shape[1]):
        if not truth[:, number].any():
            assert thresholds[number] == 0.5
            continue
        tried = scores[:, number].double().unique()
        f1 = [
            metrics.f1_score(truth[:, number], scores[:, number].double() >= threshold, zero_division=0)
            for threshold in tried
        ]
        assert reached[number].item() == pytest.approx(max(f1), abs=1e-12)
        highest = max(float(threshold) for threshold, value in zip(tried, f1, strict=True) if value == max(f1))
        assert thresholds[number] <= highest
        assert ((tried < highest) <= (tried < thresholds[number])).all()  # no score between


@settings(max_examples=50)
@given(scored(), st.randoms(use_true_random=False))
def test_the_order_of_the_pictures_changes_nothing(case: tuple[Tensor, Tensor], random: object) -> None:
    scores, truth = case
    order = list(range(len(scores)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for function in (multilabel.average_precision, multilabel.best_thresholds, multilabel.precision_at_recall):
        assert torch.equal(
            function(scores, truth).nan_to_num(-1), function(scores[order], truth[order]).nan_to_num(-1)
        )


@settings(max_examples=50)
@given(scored(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_counts_are_those_of_scikit_learn(case: tuple[Tensor, Tensor], threshold: float) -> None:
    scores, truth = case
    counts = multilabel.count(scores, truth, threshold)
    taken = (scores >= threshold).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        precision, recall, f1, support = metrics.precision_recall_fscore_support(
            truth.numpy().astype(int), taken.astype(int), average=None, zero_division=np.nan
        )
    assert counts.true.tolist() == support.tolist()
    for mine, theirs in ((counts.precision, precision), (counts.recall, recall), (counts.f1, f1)):
        np.testing.assert_allclose(mine.numpy(), theirs, atol=1e-12)
    assert counts.exact == int((taken == truth.numpy()).all(1).sum())
    there = [value for value, count in zip(f1, support, strict=True) if count]
    assert counts.macro_f1 == pytest.approx(float(np.mean(there)) if there else 0.0)


@settings(max_examples=50)
@given(scored())
def test_the_curve_has_the_precision_of_the_first_threshold_with_that_recall(
    case: tuple[Tensor, Tensor],
) -> None:
    scores, truth = case
    curves = multilabel.precision_at_recall(scores, truth)
    for number in range(truth.shape[1]):
        if not truth[:, number].any():
            assert curves[number].isnan().all()
            continue
        precision, recall, _ = metrics.precision_recall_curve(truth[:, number], scores[:, number])
        precision, recall = precision[:-1][::-1], recall[:-1][::-1]  # from the highest threshold down
        positives = int(truth[:, number].sum())
        found = np.rint(recall * positives).astype(int)
        for level in (0, 1, 33, 50, 99, 100):
            first = int(np.argmax(100 * found >= level * positives))
            assert curves[number, level].item() == pytest.approx(precision[first], abs=1e-6)


def test_without_pictures_nothing_is_known() -> None:
    scores, truth = torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.bool)
    assert multilabel.average_precision(scores, truth).isnan().all()
    assert multilabel.mean(multilabel.average_precision(scores, truth)) == 0
    assert multilabel.best_thresholds(scores, truth).tolist() == [0.5, 0.5]
