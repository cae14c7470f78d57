"""Heads for pictures with several labels, trained from a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from cvdist import config as configs
from cvdist.checkpoints import format as ckpt
from cvdist.checkpoints.store import CheckpointStore
from cvdist.config import SavedModelConfig
from cvdist.jobs.train import train
from cvdist.saved import open_model
from tests.helpers import feature_caches
from tests.helpers.multilabel import multilabel_table


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


def newest(config, name):
    (first, *_) = CheckpointStore.at(f"{config.run.storage}/{name}").list()
    return ckpt.load(Path(config.run.storage) / name / first.name)


def test_epochs_that_end_below_the_baseline_are_followed_by_the_solution(cached):
    """The learning rate is too low for anything to be learned."""
    done = train(configs.replace(cached, fit="epochs", epochs=1, lr=0.0, name="below"))
    assert done.summary.logistic is not None and done.summary.logistic.epoch == 2
    history = newest(cached, "below").progress.history
    assert done.summary.best_mean_average_precision == max(one.valid_mean_average_precision for one in history)


def test_a_split_head_under_ray_has_the_results_of_one_worker(cached, ray_cluster, monkeypatch):
    changes = {"fit": "epochs", "epochs": 2, "head": "mlp", "hidden_size": 16, "dropout": 0.0, "lr": 0.01}
    alone = configs.replace(cached, **changes, ridge_probe=False, name="alone")
    train(alone)
    for name, value in ray_cluster.items():
        monkeypatch.setenv(name, value)
    try:
        train(configs.replace(alone, runtime="ray", num_workers=2, parallel="head", name="split"))
    finally:
        ray.shutdown()
    first, second = newest(alone, "alone"), newest(alone, "split")
    for mine, theirs in zip(first.progress.history, second.progress.history, strict=True):
        for name in ("train_loss", "valid_loss", "valid_mean_average_precision", "valid_macro_f1"):
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-4), name
        assert (mine.train_correct, mine.valid_correct) == (theirs.train_correct, theirs.valid_correct)
    saved = open_model(SavedModelConfig(source=f"{alone.run.storage}/split"))
    assert (saved.identity.head, saved.identity.hidden_size) == ("mlp", 16)
