"""Measures of a model's answers, checked by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    log_loss,
    precision_recall_fscore_support,
)
from torch.nn.functional import binary_cross_entropy_with_logits

from cvdist.evaluation import metrics
from cvdist.evaluation.compare import compare_models, mcnemar, wilson_interval
from cvdist.models.servable import log_probabilities

# --------------------------------------------------------------------------------------------- arithmetic


def outcome_of(probabilities, true, classes="ab"):
    logarithms = torch.tensor(probabilities).log()
    return metrics.sample_results(tuple(classes), torch.arange(len(true)), torch.tensor(true), logarithms)


def test_calibration_of_five_answers_by_hand():
    confidence = torch.tensor([0.55, 0.60, 0.80, 0.95, 1.00])
    right = torch.tensor([True, False, True, True, True])
    bins = metrics.calibration(confidence, right, 5)
    assert [one.total for one in bins] == [0, 0, 2, 1, 2]  # 0.6 ends its bin, and so does 0.8
    assert [one.correct for one in bins] == [0, 0, 1, 1, 2]
    # (2 |1/2 - 0.575| + 1 |1 - 0.8| + 2 |1 - 0.975|) / 5
    assert metrics.expected_calibration_error(bins) == pytest.approx((0.15 + 0.2 + 0.05) / 5)


def test_every_edge_belongs_to_the_bin_that_it_ends():
    edges = torch.arange(1, 16) / 15
    assert [one.total for one in metrics.calibration(edges, edges > 0, 15)] == [1] * 15


def test_loss_and_brier_score_by_hand():
    found = outcome_of([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4]], [0, 1, 1])
    measured = metrics.compute_metrics(found, 10)
    assert (measured.correct, measured.total, measured.top_correct) == (2, 3, None)
    assert measured.loss == pytest.approx(-(math.log(0.9) + math.log(0.7) + math.log(0.4)) / 3)
    assert measured.brier == pytest.approx((2 * 0.01 + 2 * 0.09 + 2 * 0.36) / 3)
    first, second = measured.by_class
    assert (first.precision, first.recall) == (1 / 2, 1.0) and first.f1 == pytest.approx(2 / 3)
    assert (second.precision, second.recall) == (1.0, 1 / 2)


def test_a_class_without_pictures_has_no_recall_and_top_five_counts_from_eleven_classes():
    probabilities = torch.full((2, 11), 0.01)
    probabilities[0, :6] = torch.tensor([0.3, 0.25, 0.2, 0.1, 0.05, 0.02])
    probabilities[1, 10] = 0.9
    found = outcome_of(probabilities.tolist(), [4, 10], classes=tuple("abcdefghijk"))
    measured = metrics.compute_metrics(found, 10)
    assert (measured.correct, measured.top_correct) == (1, 2)
    assert measured.by_class[1].recall is None and measured.by_class[1].precision is None
    assert measured.balanced_accuracy == 0.5
    assert measured.macro_f1 == 0.5  # of the two classes that there are pictures of


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(b, c):
    n, k = b + c, min(b, c)
    exact = min(Fraction(1), 2 * sum(Fraction(math.comb(n, i), 2**n) for i in range(k + 1)))
    assert mcnemar(b, c) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)
    ends = wilson_interval(total - correct, total)
    assert ends == pytest.approx((1 - high, 1 - low), abs=5e-5) and 0 <= ends[0] <= ends[1] <= 1


def test_mcnemar_of_known_counts():
    assert mcnemar(1, 9) == pytest.approx(0.021484375)  # 2 (1 + 10) / 1024
    assert mcnemar(0, 5) == pytest.approx(0.0625) and mcnemar(0, 0) == 1.0
    # Thousands of pictures: no overflow, and next to the normal approximation with its correction.
    z = (abs(10_400 - 10_000) - 1) / math.sqrt(20_400)
    assert mcnemar(10_000, 10_400) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_two_models_whose_classes_are_in_another_order():
    first = outcome_of([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]], [0, 1, 1, 1])
    second = outcome_of([[0.2, 0.8], [0.4, 0.6], [0.9, 0.1], [0.1, 0.9]], [1, 0, 0, 0], classes="ba")
    found = compare_models(first, second, 5)
    assert (found.both, found.only_first, found.only_second, found.neither) == (1, 1, 1, 1)
    assert found.by_class == (("a", 1, 1, 1), ("b", 3, 1, 1))
    assert found.most_different.tolist() == [2, 1]  # 0.4 and 0.9; 0.8 and 0.4


# ------------------------------------------------------------------------------------------ several labels


def several(seed=0, count=200, classes=4):
    """Scores float32 (count, classes), truth bool (count, classes); the last class has no picture."""
    torch.manual_seed(seed)
    truth = torch.rand(count, classes) < 0.3
    truth[:, -1] = False
    scores = torch.randn(count, classes) * 3 + 2 * truth
    return scores, truth


def outcome_of_several(scores, truth, thresholds, classes="abcd"):
    found = log_probabilities(scores, multilabel=True)
    return metrics.sample_results(tuple(classes), torch.arange(len(truth)), truth, found, thresholds)


def test_metrics_of_several_labels_are_those_of_scikit_learn():
    scores, truth = several()
    thresholds = (0.3, 0.5, 0.7, 0.5)
    probabilities, true = scores.sigmoid().numpy(), truth.numpy()
    predicted = probabilities >= np.array(thresholds)
    measured = metrics.compute_metrics(outcome_of_several(scores, truth, thresholds), 10)
    assert measured.correct == round(accuracy_score(true, predicted) * 200) < 200 == measured.total
    with_pictures = slice(0, 3)
    expected = average_precision_score(true[:, with_pictures], probabilities[:, with_pictures], average=None)
    assert [one.average_precision for one in measured.by_class[:3]] == pytest.approx(expected.tolist())
    assert measured.by_class[3].average_precision is None  # of no picture
    assert measured.mean_average_precision == pytest.approx(expected.mean())
    columns = precision_recall_fscore_support(true, predicted, average=None, zero_division=0)
    for i, one in enumerate(measured.by_class[:3]):
        assert (one.precision, one.recall, one.f1) == pytest.approx(tuple(float(c[i]) for c in columns[:3]))
        assert (one.total, one.threshold) == (int(columns[3][i]), thresholds[i])
    assert measured.macro_f1 == pytest.approx(columns[2][:3].mean())
    pairs = (true.flatten(), probabilities.flatten().astype(float))
    assert measured.loss == pytest.approx(log_loss(*pairs), rel=1e-5)
    assert measured.brier == pytest.approx(brier_score_loss(*pairs), rel=1e-5)
    assert sum(one.total for one in measured.bins) == 800
    assert sum(one.correct for one in measured.bins) == truth.sum()
    plain = measured.to_dict()
    assert "confusion" not in plain and "balanced_accuracy" not in plain
    assert plain["classes"][0]["threshold"] == 0.3 and "threshold" not in single().to_dict()["classes"][0]


def single():
    return metrics.compute_metrics(outcome_of([[0.9, 0.1], [0.3, 0.7]], [0, 1]), 10)


def test_the_loss_of_several_labels_is_exact_for_probabilities_close_to_0_and_1():
    scores = torch.tensor([[-60.0, 30.0], [60.0, 20.0], [200.0, -200.0]])
    truth = torch.tensor([[False, False], [True, False], [True, False]])
    found = outcome_of_several(scores, truth, (0.5, 0.5), "ab")
    expected = binary_cross_entropy_with_logits(scores, truth.float(), reduction="none").mean(1)
    torch.testing.assert_close(-found.log_true, expected)
    wrong = outcome_of_several(scores[2:], ~truth[2:], (0.5, 0.5), "ab")
    assert 100 < -float(wrong.log_true) < 200  # float32 says no more of it, but it is finite


def test_batches_in_any_order_come_to_the_same_metrics():
    scores, truth = several()
    thresholds = (0.3, 0.5, 0.7, 0.5)
    whole = outcome_of_several(scores, truth, thresholds)
    parts = []
    for rows in torch.randperm(200).split(33):
        found = log_probabilities(scores[rows], multilabel=True)
        parts.append(metrics.sample_results(whole.classes, rows, truth[rows], found, thresholds))
    again = metrics.concatenate(parts)
    assert again.thresholds == thresholds
    assert metrics.compute_metrics(again, 10).to_dict() == metrics.compute_metrics(whole, 10).to_dict()


def test_models_of_several_labels_are_compared_by_pictures_whose_labels_are_all_right():
    truth = torch.tensor([[True, False], [True, True], [False, False], [False, True]])
    sure = torch.where(truth, 3.0, -3.0)
    one, other = sure.clone(), sure.clone()
    one[1, 1] = -2.0  # misses a label
    other[2, 0] = other[3, 0] = 5.0  # a label that is not there
    first = outcome_of_several(one, truth, (0.5, 0.6), "ab")
    second = outcome_of_several(other[:, [1, 0]], truth[:, [1, 0]], (0.6, 0.5), "ba")
    found = compare_models(first, second, 5)
    assert (found.both, found.only_first, found.only_second, found.neither) == (1, 2, 1, 0)
    assert found.by_class == (("a", 2, 2, 2), ("b", 2, 1, 2))
    assert found.p == mcnemar(2, 1) and sorted(found.most_different.tolist()) == [1, 2, 3]
    back = second.in_order_of("ab")
    assert torch.equal(back.true, truth) and back.thresholds == (0.5, 0.6)
    assert back.words(back.predicted, 2) == "a" and back.words(back.true, 2) == "no class"
