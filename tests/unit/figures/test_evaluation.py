"""Figures of an evaluation."""

from __future__ import annotations

import pytest
import torch

from cvdist.evaluation import metrics
from cvdist.figures.pictures import PredictionCaption, difference_grid
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
