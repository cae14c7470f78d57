"""Pictures with several labels: the loss, the results, what a checkpoint keeps, and the convex head."""

from __future__ import annotations

import csv
import dataclasses

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import nn

from cvdist import multilabel
from cvdist.checkpoints import format as ckpt
from cvdist.config import LoopConfig, SavedModelConfig
from cvdist.data.dataset import Batch
from cvdist.distributed.precision import choose_precision
from cvdist.errors import UserError
from cvdist.saved import open_model
from cvdist.tracking import NoTracker
from cvdist.training import imbalance, reporting
from cvdist.training.logistic import FOLDS, assign_folds, fit
from cvdist.training.loss import correct, loss_sum
from cvdist.training.train import train
from cvdist.training.validation import evaluate_multilabel
from tests.helpers import multilabel_workers as helper
from tests.helpers.logistic_workers import CPU, INPUTS, parts
from tests.helpers.runs import assert_same_weights, train_and_kill


@pytest.fixture(autouse=True)
def digits_with_labels():
    with helper.digits_with_labels():
        yield


class Keeper(NoTracker):
    """Keeps what is logged."""

    def __init__(self):
        self.metrics, self.texts, self.model, self.figures = {}, {}, {}, {}

    def log_metrics(self, values, step):
        self.metrics.update({name: (*self.metrics.get(name, ()), value) for name, value in values.items()})

    def log_text(self, name, content):
        self.texts[name] = content

    def log_figure(self, name, draw):
        self.figures[name] = draw

    def log_model(self, model, identity, *_, thresholds=(), **__):
        self.model = {"identity": identity, "thresholds": thresholds}


# ---------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 3.0, 0.5])])
def test_the_loss_is_pytorchs_over_the_whole_batch(weights):
    torch.manual_seed(0)
    scores, labels = torch.randn(7, 3), torch.rand(7, 3).round()
    expected = nn.BCEWithLogitsLoss(pos_weight=weights)(scores, labels)
    parts = [
        loss_sum(a, b, multilabel=True, weights=weights)
        for a, b in zip(scores.split([2, 5, 0]), labels.split([2, 5, 0]), strict=True)
    ]
    torch.testing.assert_close(sum(parts) / 7, expected)
    smooth = nn.BCEWithLogitsLoss()(scores, labels * 0.8 + 0.1)
    torch.testing.assert_close(loss_sum(scores, labels, multilabel=True, smoothing=0.2) / 7, smooth)


def test_right_are_exact_matches_and_of_mixtures_those_of_the_larger_share():
    scores = torch.tensor([[1.0, -1.0], [1.0, 1.0], [0.0, -1.0], [-1.0, -1.0]])
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.7, 0.3], [0.0, 0.0]])
    assert correct(scores, labels, multilabel=True).tolist() == [True, False, True, True]


def test_balanced_weights_are_negatives_by_positives():
    labels = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]]).bool()

    def weights(chosen):
        found = imbalance.class_weights(LoopConfig(class_weights=chosen), ("a", "b", "c"), labels)
        return None if found is None else found.tolist()

    assert weights("balanced") == [3, 1, 1]  # nothing can be weighed against none
    assert weights("b=2.5") == [1, 2.5, 1] and weights("none") is None
    assert imbalance.describe(("a", "b", "c"), labels) == "b 4, a 1, c 0; 1.25 a picture, 0 pictures with none"


# ----------------------------------------------------------------------------------------------------- results


def test_an_evaluation_is_scikit_learns():
    torch.manual_seed(1)
    scores, truth = torch.randn(60, 4).round(decimals=1), torch.rand(60, 4) < 0.3
    truth[:, 3] = False
    rows = torch.arange(60)
    batches = [Batch(scores[some], truth[some].float(), some, len(some)) for some in rows.split(25)]
    found = evaluate_multilabel(nn.Identity(), batches, truth, CPU, choose_precision("float32", CPU))
    chances, labels = scores.sigmoid(), found.labels
    expected = [metrics.average_precision_score(truth[:, i], chances[:, i]) for i in range(3)]
    assert (
        labels.average_precision[:3].tolist() == pytest.approx(expected) and labels.average_precision[3].isnan()
    )
    assert labels.mean_average_precision == pytest.approx(np.mean(expected))
    taken = chances.double() >= labels.thresholds
    assert found.correct == metrics.accuracy_score(truth.numpy(), taken.numpy(), normalize=False)
    assert (found.total, found.confusion) == (60, None)
    assert found.loss == pytest.approx(nn.BCEWithLogitsLoss()(scores, truth.float()).item())
    wrong = (taken != truth).sum(1)
    assert [len({*m.true} ^ {*m.predicted}) for m in found.mistakes] == sorted(wrong.tolist(), reverse=True)[
        :16
    ]
    first = found.mistakes[0]
    assert first.true == tuple(truth[first.index].nonzero().flatten().tolist())


def test_a_run_learns_and_says_what_it_reached(tmp_path, caplog):
    keeper = Keeper()
    with caplog.at_level("INFO"):
        run = helper.make_run(tmp_path, keeper)
        summary = train(run)
    record = run.progress.best
    assert summary.best.valid_mean_average_precision > 0.9 and record.select_by == "mean_average_precision"
    assert "several a picture" in str(run.identity) and not hasattr(run.model, "log_softmax")
    text = caplog.text
    assert "a picture, 80 pictures with none" in text and "binary cross-entropy" in text
    assert f"mAP {record.valid_mean_average_precision:.4f}" in text and "/200 exact matches" in text
    assert "accuracy" not in text
    assert summary.outcome.startswith(
        f"mAP {record.valid_mean_average_precision:.4f}, {record.valid_correct}/200 exact"
    )
    assert (
        keeper.metrics["valid/mean_average_precision"][record.epoch - 1] == record.valid_mean_average_precision
    )
    assert "valid/balanced_accuracy" not in keeper.metrics
    assert set(keeper.figures) >= {"average_precision", "precision_recall", "wrong_labels", "loss"}
    assert "confusion_matrix" not in keeper.figures
    (head, *rows) = csv.reader(keeper.texts["classes.csv"].splitlines())
    assert head[:4] == ["class", "pictures", "average_precision", "threshold"] and len(rows) == 3
    assert [float(row[3]) for row in rows] == pytest.approx(keeper.model["thresholds"], rel=1e-5)
    assert keeper.model["identity"].multilabel
    assert "confusion" not in reporting.description(
        summary, "train"
    ) and "classes.csv" in reporting.description(summary, "train")


def test_thresholds_survive_a_checkpoint(tmp_path):
    run = helper.make_run(tmp_path)
    train(run)
    name = f"epoch-{run.progress.best_epoch:04}"
    saved = ckpt.load(tmp_path / "run" / name)
    assert saved.best.labels.thresholds.tolist() == run.best.labels.thresholds.tolist()
    assert torch.equal(saved.best.labels.curves, run.best.labels.curves)
    assert saved.best.labels.counts.exact == run.best.correct and saved.best.mistakes == run.best.mistakes
    model = open_model(SavedModelConfig(source=str(tmp_path / "run" / name)))
    assert model.thresholds == saved.progress.thresholds == tuple(run.best.labels.thresholds.tolist())
    assert model.identity.multilabel and len(model.thresholds) == 3
    # The probabilities of the opened model are those that were validated.
    batches = list(run.loader.valid_batches(0, 1, 200))
    found = evaluate_multilabel(
        model.model, batches, run.loader.labels("valid"), CPU, choose_precision("float32", CPU)
    )
    assert found.correct == run.best.correct
    assert found.labels.average_precision.tolist() == pytest.approx(run.best.labels.average_precision.tolist())


def test_resumed_in_mid_epoch_ends_bit_identical(tmp_path):
    changes = {
        "mixup_alpha": 0.4,
        "cutmix_alpha": 1.0,
        "class_weights": "balanced",
        "label_smoothing": 0.1,
        "checkpoint_every": 5,
        "dropout": 0.5,
        "log_every_steps": 3,
    }
    whole = helper.make_run(tmp_path / "whole", **changes)
    train(whole)
    train_and_kill(helper.make_run(tmp_path / "parts", **changes), 33)
    rest = helper.make_run(tmp_path / "parts", **changes)
    assert (rest.progress.epoch, rest.progress.position) == (1, 10 * 40)
    assert len(rest.progress.thresholds) == 3
    train(rest)
    assert_same_weights(whole, rest)
    for one, other in zip(whole.progress.history, rest.progress.history, strict=True):
        fields = (
            "train_correct",
            "valid_correct",
            "valid_loss",
            "valid_mean_average_precision",
            "valid_macro_f1",
        )
        assert all(getattr(one, name) == getattr(other, name) for name in fields)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"select_by": "balanced_accuracy"}, "--select-by balanced_accuracy: these pictures may have several"),
        ({"balanced_sampling": True}, "--balanced-sampling is for pictures with one class each"),
        ({"class_weights": "evn=2"}, "did you mean even"),
    ],
)
def test_what_makes_no_sense_is_one_line(tmp_path, changes, said):
    with pytest.raises(UserError, match=said) as error:
        helper.make_run(tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_a_training_ends_early_by_mean_average_precision(tmp_path):
    summary = train(helper.make_run(tmp_path, epochs=5, lr=1e-12, patience=2))
    assert summary.epochs == 3 and "no better mean average precision in 2 epochs" in summary.stopped


def test_a_model_below_its_baseline_is_said(tmp_path):
    from cvdist.results import RidgeResult

    summary = train(helper.make_run(tmp_path, epochs=1))
    assert summary.below_baseline == ""
    perfect = dataclasses.replace(summary, ridge=RidgeResult(1, 200, 1.0, 0.1, 1.0))
    assert perfect.below_baseline.startswith("the model's mAP 0.") and "1.0000: try" in perfect.below_baseline


# ------------------------------------------------------------------------------------------------- convex head


@pytest.mark.parametrize("weights", [None, (1.0, 3.0, 0.5)])
def test_each_class_has_the_logistic_regression_of_scikit_learn(weights):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, labels = helper.several_labels()
    mine, penalty = parts(x, labels), 0.01
    having = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    found = fit(
        *(lambda: mine, labels, 3, INPUTS),
        device=CPU,
        memory=1e9,
        penalties=[penalty],
        tolerance=1e-12,
        class_weights=having,
    )
    scaler = StandardScaler().fit(x.numpy())
    for number in range(3):
        each = np.where(labels[:, number], 1.0 if weights is None else weights[number], 1.0)
        model = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-9, max_iter=10_000)
        model.fit(scaler.transform(x.numpy()), labels[:, number], sample_weight=each)
        weight = model.coef_[0] / scaler.scale_
        np.testing.assert_allclose(found.weight[number], weight, rtol=1e-3, atol=1e-4 * abs(weight).max())
        assert found.bias[number].item() == pytest.approx(model.intercept_[0] - weight @ scaler.mean_, abs=5e-3)
    scores = x @ found.weight.T + found.bias
    assert found.correct == multilabel.count(scores.sigmoid(), labels).exact
    assert found.loss == pytest.approx(nn.BCEWithLogitsLoss(pos_weight=having)(scores, labels.double()).item())


def test_the_largest_derivative_at_the_end_is_within_the_tolerance():
    """Also where scores are nearly equal, so that in float32 their losses would round alike."""
    random = torch.Generator().manual_seed(0)
    numbers = torch.randint(32, (1500,), generator=random)
    labels = torch.stack([(numbers >> bit) & 1 for bit in range(5)], 1).bool()
    x = 0.05 * torch.randn(32, 256, generator=random)[numbers] + torch.randn(1500, 256, generator=random)
    mine = parts(x, labels)
    found = fit(lambda: mine, labels, 5, 256, device=CPU, memory=1e9)
    inputs = x.double()
    deviation = inputs.std(0, correction=0)
    residuals = ((inputs @ found.weight.T + found.bias).sigmoid() - labels.double()) / len(x)
    weight = (found.weight * deviation).T
    slopes = ((inputs - inputs.mean(0)) / deviation).T @ residuals + found.penalty * weight
    assert max(slopes.abs().max(), residuals.sum(0).abs().max()) < 1.01e-5


def test_each_picture_is_held_out_once_and_those_alike_are_spread():
    found = helper.fitted()
    assert found.folds == FOLDS and {held.total for held in found.path} == {203}
    assert found.penalty == min(found.path, key=lambda held: held.loss).penalty
    _, labels = helper.several_labels()
    folds = assign_folds(labels, 0)
    for row in labels.unique(dim=0):
        sizes = folds[(labels == row).all(1)].bincount(minlength=FOLDS)
        assert sizes.max() - sizes.min() <= 1
    assert assign_folds(labels[:1], 0).tolist() == [-1]
