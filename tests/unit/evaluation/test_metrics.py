"""Measures of a model's answers, checked by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvdist.evaluation import metrics
from cvdist.evaluation.compare import compare_models, mcnemar, wilson_interval

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
