"""Figures of an evaluation."""

from __future__ import annotations

import pytest
import torch

from cvdist.evaluation import metrics
from cvdist.figures.pictures import PredictionCaption, difference_grid, wrong_labels_grid
from cvdist.figures.reliability import reliability_diagram
from tests.helpers.figures import assert_readable, assert_tidy, images, says

# ------------------------------------------------------------------------------------------------- figures


def test_a_reliability_diagram_says_its_error_and_can_be_read():
    confidence = torch.linspace(0.1, 1, 200)
    bins = metrics.calibration(confidence, torch.arange(200) % 3 > 0, 15)
    figure = reliability_diagram(bins, metrics.expected_calibration_error(bins))
    assert any(f"{metrics.expected_calibration_error(bins):.2%}" in text for text in says(figure))
    heights = [bar.get_height() for bar in figure.axes[0].patches][: sum(one.total > 0 for one in bins)]
    assert heights == pytest.approx([one.accuracy for one in bins if one.total])
    assert_readable(figure)


@pytest.mark.parametrize("count", [0, 1, 16])
def test_pictures_that_two_models_answer_differently(count):
    answers = [PredictionCaption("great white shark", 0.971, True)] * count
    figure = difference_grid(
        images(count or 1)[:count], ["shark"] * count, answers,
        [PredictionCaption("tench", 0.5, False)] * count,
        title="Where the models differ", subtitle="A: one; B: the other",
    )  # fmt: skip
    text = says(figure)
    assert text.count("97.1%") == count and ("right on the same pictures" in " ".join(text)) == (count == 0)
    assert_tidy(figure)


@pytest.mark.parametrize("count", [0, 1, 14])
def test_pictures_whose_labels_are_not_all_right(count):
    missed, wrong = [["sofa", "dining table"], []] * 7, [["cat"], [f"class {i}" for i in range(9)]] * 7
    figure = wrong_labels_grid(images(count or 1)[:count], missed[:count], wrong[:count], title="t", total=20)
    text = says(figure)
    assert text.count("sofa") == text.count("dining table") == text.count("cat") == (count + 1) // 2
    assert text.count("and 5 more") == text.count("class 3") == count // 2 and "class 4" not in text
    assert ("no mistakes: all 20/20 right" in text) == (count == 0)
    assert_tidy(figure)


def test_a_reliability_diagram_of_several_labels_counts_answers():
    probabilities = torch.linspace(0.01, 1, 300)
    bins = metrics.calibration(probabilities, torch.arange(300) % 3 > 0, 10)
    figure = reliability_diagram(bins, metrics.expected_calibration_error(bins), multilabel=True)
    text = " ".join(says(figure))
    assert "300 answers in 10 bins" in text and "accuracy" not in text and "pictures" not in text
    assert_readable(figure)
