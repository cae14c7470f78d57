"""A table of pictures with several labels: trained from pictures and from a cache, by one worker and by two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from cvdist import config as configs
from cvdist import recipes
from cvdist.checkpoints import format as ckpt
from cvdist.checkpoints.store import CheckpointStore
from cvdist.jobs.train import table, train
from tests.helpers import feature_caches
from tests.helpers.multilabel import COLORS, multilabel_table


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """The table, with 96 pictures."""
    return multilabel_table(tmp_path_factory.mktemp("table"), 96)


@pytest.fixture(scope="module")
def cached(labels, tmp_path_factory):
    """A cache of the pictures' features, and a configuration that solves a linear head on it."""
    root = tmp_path_factory.mktemp("cached")
    weights = feature_caches.write_weights(root / "weights.pt")
    config = feature_caches.config(
        *(labels, root / "features", weights, root / "cache"),
        storage=str(root),
        head="linear",
        hidden_size=0,
        fit="logistic",
        label_separator=";",
        precision="float32",
        tracking="none",
        runtime="inline",
    )
    feature_caches.extract(config)
    return config


def scratch(labels, folder, **changes):
    defaults = {
        "data": str(labels),
        "label_separator": ";",
        "image_size": 32,
        "cache": str(folder / "cache"),
        "storage": str(folder),
        "epochs": 2,
        "batch_size": 16,
        "lr": 0.01,
        "dropout": 0.0,
        "rotation": 0.0,
        "translation": 0.0,
        "precision": "float32",
        "runtime": "inline",
        "tracking": "none",
    }
    return configs.replace(recipes.find("dogs-cats-cnn"), **{**defaults, **changes})


def newest(config, name):
    (first, *_) = CheckpointStore.at(f"{config.run.storage}/{name}").list()
    return ckpt.load(Path(config.run.storage) / name / first.name)


def same_history(one, other):
    for mine, theirs in zip(one.progress.history, other.progress.history, strict=True):
        for name in ("train_loss", "valid_loss", "valid_mean_average_precision", "valid_macro_f1"):
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-4), name
        assert (mine.train_correct, mine.valid_correct) == (theirs.train_correct, theirs.valid_correct)


def test_from_scratch_by_one_worker_and_by_two_under_ray(labels, tmp_path):
    one = scratch(labels, tmp_path, name="one")
    done = train(one)
    text = table(done)
    assert "mAP 0." in text and "exact matches" in text and "accuracy" not in text
    assert done.summary.valid_total + newest(one, "one").order.train_size == 96
    train(configs.replace(one, runtime="ray", num_workers=2, name="two"))
    first, second = newest(one, "one"), newest(one, "two")
    same_history(first, second)
    assert first.progress.thresholds == pytest.approx(second.progress.thresholds, rel=1e-4)
    assert first.model.multilabel and first.model.classes == tuple(COLORS)


def test_a_convex_head_from_a_cache_by_one_worker_and_by_two_under_ray(cached):
    one = configs.replace(cached, name="one")
    done = train(one)
    assert done.summary.ridge.mean_average_precision is not None and "ridge probe" in table(done)
    assert "exact matches of held-out training pictures (5 folds)" in table(done)
    train(configs.replace(cached, runtime="ray", num_workers=2, name="two"))
    first, second = newest(one, "one"), newest(one, "two")
    assert first.progress.ridge.value == pytest.approx(second.progress.ridge.value)
    mine, theirs = first.progress.history[0], second.progress.history[0]
    assert (mine.train_correct, mine.valid_correct) == (theirs.train_correct, theirs.valid_correct)
    assert mine.valid_mean_average_precision == pytest.approx(theirs.valid_mean_average_precision)
    # These samples are separable, so losses are nearly 0 at many penalties, and rounding may decide between
    # them (test_processes.py compares penalties). Each solution is the optimum at its own penalty.
    for saved in (first, second):
        require_optimum(cached, saved)


def require_optimum(config, saved):
    """At the stored weights, the derivatives of each class's objective are within the solver's 1e-5."""
    batches = list(feature_caches.loader(config).batches_in_order("train", 0, 1, 200))
    maps = torch.cat([one.images for one in batches]).double()
    inputs = torch.nn.functional.adaptive_avg_pool2d(maps, 7).flatten(1).numpy()
    truth = torch.cat([one.labels for one in batches]).numpy()
    scaler, penalty, state = StandardScaler().fit(inputs), saved.progress.logistic.penalty, saved.state["model"]
    scaled = scaler.transform(inputs)

    def derivative(weight, scores, number):
        residuals = 1 / (1 + np.exp(-scores)) - truth[:, number]
        return np.abs(scaled.T @ residuals / len(scores) + penalty * weight).max()

    for number in range(3):
        weight = state["classifier.0.weight"][number].double().numpy()
        scores = inputs @ weight + state["classifier.0.bias"][number].item()
        assert derivative(weight * scaler.scale_, scores, number) < 1e-5
        # scikit-learn's optimum for twice the penalty is none for this one.
        c = 1 / (2 * penalty * len(inputs))
        other = LogisticRegression(C=c, tol=1e-9, max_iter=10_000).fit(scaled, truth[:, number])
        assert derivative(other.coef_[0], other.decision_function(scaled), number) > 1.5e-5


def test_epochs_that_end_below_the_baseline_are_followed_by_the_solution(cached):
    """The learning rate is too low for anything to be learned."""
    done = train(configs.replace(cached, fit="epochs", epochs=1, lr=0.0, name="below"))
    assert done.summary.logistic is not None and done.summary.logistic.epoch == 2
    history = newest(cached, "below").progress.history
    assert done.summary.best_mean_average_precision == max(one.valid_mean_average_precision for one in history)


def test_a_split_head_has_the_results_of_one_worker(cached):
    changes = {"fit": "epochs", "epochs": 2, "head": "mlp", "hidden_size": 16, "dropout": 0.0, "lr": 0.01}
    alone = configs.replace(cached, **changes, ridge_probe=False, name="alone")
    train(alone)
    train(configs.replace(alone, runtime="ray", num_workers=2, parallel="head", name="split"))
    same_history(newest(alone, "alone"), newest(alone, "split"))
