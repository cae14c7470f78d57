"""Likely wrong labels: found, ranked, and counted."""

from __future__ import annotations

import pytest
import torch

from cvdist.inspection.labels import LabelModel, check_labels, fit_label_model
from cvdist.training.ridge import Equations, Sums


def blobs(count, classes, seed=0, spread=1.0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centers = 3 * torch.randn(classes, 20, generator=random)
    return (centers[labels] + spread * torch.randn(count, 20, generator=random)), labels


@pytest.mark.parametrize("classes", [2, 5])
def test_flipped_labels_come_first_with_their_class_and_are_counted(classes):
    features, true = blobs(600, classes)
    flipped = torch.randperm(600, generator=torch.Generator().manual_seed(1))[:18]
    given = true.clone()
    given[flipped] = (true[flipped] + 1) % classes
    checked = check_labels(features, given, classes)
    first = checked.log_odds.argsort(descending=True)[:18]
    assert sorted(first.tolist()) == sorted(flipped.tolist())
    assert torch.equal(checked.suggested[flipped], true[flipped]) and checked.otherwise[flipped].all()
    if classes == 2:  # with more, a label at random and a classifier that errs are hard to tell apart
        assert checked.wrong[first].sum() == pytest.approx(18, abs=1)
        assert checked.rate == pytest.approx(18 / 600, abs=0.01)
    assert checked.correct == 600 - 18


def test_where_classes_overlap_and_labels_are_right_few_are_called_wrong():
    features, labels = blobs(1000, 2, spread=9.0)
    checked = check_labels(features, labels, 2)
    errors = 1000 - checked.correct
    assert errors > 60
    assert checked.wrong[checked.otherwise].sum() < errors / 4


def test_scores_are_those_of_a_classifier_without_the_picture():
    features, labels = blobs(30, 3)
    features = features.double()[:, :6]
    penalty = torch.tensor([0.7, 20.0], dtype=torch.float64)

    def equations(rows):
        sums = Sums.zero(6, 3, torch.device("cpu"))
        sums.add(features[rows], labels[rows])
        return Equations.of(sums)

    found = list(equations(torch.arange(30)).left_out_scores(features, labels, penalty))
    for row in (0, 7, 29):
        others = equations(torch.arange(30)[torch.arange(30) != row])
        for scores, one in zip(found, penalty, strict=True):
            torch.testing.assert_close(scores[row], others.fit(one).scores(features[row : row + 1])[0])


def test_the_model_of_labels_is_the_one_that_they_were_drawn_from():
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(20_000, 4, generator=random, dtype=torch.float64)
    true = torch.multinomial((6 * scores).softmax(1), 1, generator=random)[:, 0]
    wrong = torch.rand(20_000, generator=random) < 0.05
    given = torch.where(wrong, (true + torch.randint(1, 4, (20_000,), generator=random)) % 4, true)
    model = fit_label_model(scores, given)
    assert model.scale == pytest.approx(6, rel=0.05) and model.rate == pytest.approx(0.05, abs=0.01)
    # Probabilities are calibrated: of those that are called wrong, so many are.
    odds = model.log_odds(scores, given)
    for low, high in ((-4, -1), (-1, 1), (1, 9)):
        mine = (odds > low) & (odds <= high)
        assert odds[mine].sigmoid().mean() == pytest.approx(float(wrong[mine].double().mean()), abs=0.06)


def test_extreme_scores_keep_their_order():
    odds = LabelModel(1000.0, 0.01).log_odds(
        torch.tensor([[5.0, 0.0], [9.0, 0.0], [0.0, 9.0]], dtype=torch.float64), torch.tensor([1, 1, 1])
    )
    assert odds.isfinite().all() and odds[1] > odds[0] > 0 > odds[2]
