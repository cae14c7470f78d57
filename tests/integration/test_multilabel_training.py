"""Training for pictures with several labels, from pictures and from a cache."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import ray

from cvdist import config as configs
from cvdist import recipes
from cvdist.checkpoints import format as ckpt
from cvdist.checkpoints.store import CheckpointStore
from cvdist.config import SavedModelConfig
from cvdist.jobs.train import table, train
from cvdist.saved import open_model
from tests.helpers import feature_caches
from tests.helpers.multilabel import COLORS, multilabel_table


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """The table, with 96 pictures."""
    return multilabel_table(tmp_path_factory.mktemp("table"), 96)


@pytest.fixture(scope="module")
def cached(tmp_path_factory, weights):
    """A cache of 96 pictures' features, and a configuration that solves a linear head on it."""
    root = tmp_path_factory.mktemp("cached")
    labels = multilabel_table(root / "pictures", 96)
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


@pytest.fixture
def on_the_cluster(ray_cluster, monkeypatch):
    for name, value in ray_cluster.items():
        monkeypatch.setenv(name, value)
    yield
    ray.shutdown()


def test_from_scratch_by_one_worker_and_by_two_under_ray(labels, tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO, "cvdist")
    note = "rows without a class in column labels, kept as pictures of no class: 12"
    one = scratch(labels, tmp_path, name="one")
    done = train(one)
    text = table(done)
    assert "mAP 0." in text and "exact matches" in text and "accuracy" not in text
    assert done.summary.best.valid_total + newest(one, "one").order.train_size == 96
    assert caplog.text.count(note) == 1
    train(configs.replace(one, runtime="ray", num_workers=2, name="two"))
    assert caplog.text.count(note) == 2 and note not in capfd.readouterr().err, "the workers repeat nothing"
    first, second = newest(one, "one"), newest(one, "two")
    same_history(first, second)
    assert first.progress.thresholds == pytest.approx(second.progress.thresholds, rel=1e-4)
    assert first.model.multilabel and first.model.classes == tuple(COLORS)


def test_epochs_that_end_below_the_baseline_are_followed_by_the_solution(cached):
    """The learning rate is too low for anything to be learned."""
    done = train(configs.replace(cached, fit="epochs", epochs=1, lr=0.0, name="below"))
    assert done.summary.logistic is not None and done.summary.logistic.epoch == 2
    history = newest(cached, "below").progress.history
    assert done.summary.best.valid_mean_average_precision == max(
        one.valid_mean_average_precision for one in history
    )


def test_a_split_head_under_ray_has_the_results_of_one_worker(cached, on_the_cluster):
    changes = {"fit": "epochs", "epochs": 2, "head": "mlp", "hidden_size": 16, "dropout": 0.0, "lr": 0.01}
    alone = configs.replace(cached, **changes, ridge_probe=False, name="alone")
    train(alone)
    train(configs.replace(alone, runtime="ray", num_workers=2, parallel="head", name="split"))
    same_history(newest(alone, "alone"), newest(alone, "split"))
    saved = open_model(SavedModelConfig(source=f"{alone.run.storage}/split"))
    assert (saved.identity.head, saved.identity.hidden_size) == ("mlp", 16)
