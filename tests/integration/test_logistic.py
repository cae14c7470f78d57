"""A linear head that is solved from a cache: an ordinary run, and what is better than its baseline is kept."""

from __future__ import annotations

import logging
import re
import signal
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from cvdist import config as configs
from cvdist.checkpoints import format as ckpt
from cvdist.checkpoints.store import CheckpointStore
from cvdist.checkpoints.worker import Worker
from cvdist.distributed.stop_request import StopRequest
from cvdist.errors import UserError
from cvdist.jobs.train import table, train
from cvdist.results import RidgeResult
from cvdist.training import ridge
from tests.helpers import feature_caches


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A cache of two classes that differ in their colors, and a configuration that solves a linear head."""
    return configs.replace(feature_caches.two_colors(tmp_path_factory.mktemp("logistic")), fit="logistic")


def checkpoint_of(config, name):
    (newest, *_) = CheckpointStore.at(f"{config.run.storage}/{name}").list()
    return f"{config.run.storage}/{name}/{newest.name}"


@pytest.fixture
def perfect_baseline(monkeypatch):
    """The ridge probe makes no mistake, whatever it is given."""
    monkeypatch.setattr(ridge, "probe", lambda *_: RidgeResult(7, 7, 1.0, 0.1))


def test_a_solved_run_is_a_run_like_any_other(chosen):
    config = configs.replace(chosen, name="solved", tracking="required")
    done = train(config)
    summary = done.summary
    assert summary.epochs == summary.best.epoch == 1 and summary.best.valid_total == 7
    text, right = table(done), summary.best.valid_correct
    assert f"({right}/7) by logistic regression" in text
    assert re.search(
        r"logistic +penalty \S+, [\d.]+% \(\d+/17\) of held-out training pictures \(5 folds\)", text
    )
    client = MlflowClient(done.run.tracking_uri)
    path = client.get_metric_history(done.run.run_id, "logistic/held_out_correct")
    assert [metric.value for metric in path] == [held.correct for held in summary.logistic.path]
    assert [metric.step for metric in path] == list(range(1, len(path) + 1))
    metrics = client.get_run(done.run.run_id).data.metrics
    assert metrics["train/total"] == 17 and metrics["valid/correct"] == right
    assert "figures/penalties.png" in [file.path for file in client.list_artifacts(done.run.run_id, "figures")]
    # The same command again has nothing to do, and its result is the checkpoint's.
    assert train(config).summary.logistic == summary.logistic


def test_the_head_has_the_weights_of_the_solution(chosen):
    """They fit the features as they are, with the layers' own names."""
    train(configs.replace(chosen, name="weights"))
    saved = ckpt.load(Path(checkpoint_of(chosen, "weights")))
    loader, state = feature_caches.loader(chosen), saved.state["model"]
    correct = 0
    for batch in loader.batches_in_order("train", 0, 1, 8):
        features = torch.nn.functional.adaptive_avg_pool2d(batch.images, 7).flatten(1)
        scores = features @ state["classifier.0.weight"].T + state["classifier.0.bias"]
        correct += int((scores.argmax(1) == batch.labels).sum())
    assert correct == saved.progress.history[0].train_correct > 17 / 2


def test_work_goes_on_from_a_solved_head(chosen):
    first = train(configs.replace(chosen, name="first"))
    resume = checkpoint_of(chosen, "first")
    assert ckpt.load(Path(resume)).progress.logistic.epoch == 1
    changes = {"fit": "epochs", "epochs": 3, "lr": 1e-12, "resume": resume, "ridge_probe": False}
    more = train(configs.replace(chosen, name="more", **changes))
    history = ckpt.load(Path(checkpoint_of(chosen, "more"))).progress.history
    assert [record.valid_correct for record in history] == [first.summary.best.valid_correct] * 3
    assert more.summary.logistic is None and "at epoch 1" in table(more)


def test_all_views_are_samples(chosen, tmp_path):
    views = configs.replace(chosen, views=3, features=str(tmp_path / "views"), name="views")
    feature_caches.extract(views)
    loader, seen = feature_caches.loader(views), []
    for view in range(loader.views):
        seen += [batch.images for batch in loader.batches_in_order("train", 0, 1, 17, view)]
    assert loader.views == len(seen) == 3 and not torch.equal(seen[1], seen[2])
    found = train(views).summary.logistic
    assert found.path[0].total == 17  # each picture is held out with its views, and counted once


@pytest.mark.usefixtures("perfect_baseline")
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_epochs_that_end_below_the_baseline_are_followed_by_the_solution(chosen, head):
    """The learning rate is too low for anything to be learned."""
    done = train(configs.replace(chosen, name=head, head=head, fit="epochs", epochs=2, lr=0.0))
    assert done.summary.logistic.epoch == done.summary.epochs == 3
    history = ckpt.load(Path(checkpoint_of(chosen, head))).progress.history
    assert history[2].train_correct > history[1].train_correct
    assert done.summary.best.valid_correct == max(record.valid_correct for record in history)


@pytest.mark.usefixtures("perfect_baseline")
def test_a_head_that_cannot_be_solved_says_what_may_be_better(chosen):
    """Three hidden units, where two classes need four."""
    narrow = configs.replace(chosen, name="narrow", head="mlp", hidden_size=3, fit="epochs", epochs=1, lr=0.0)
    done = train(narrow)
    more = 7 - done.summary.best.valid_correct
    assert done.summary.logistic is None and more > 0
    assert f"the model has {more} more mistake" in table(done)
    assert "try --head linear --fit logistic" in table(done)


def test_what_cannot_be_solved_is_refused_in_one_line(chosen):
    with pytest.raises(UserError, match="--fit logistic solves for one linear layer on cached features"):
        train(configs.replace(chosen, name="refused", head="mlp"))
    with pytest.raises(UserError, match="--features is needed"):
        train(configs.replace(chosen, features=""))


def test_a_fit_that_is_stopped_begins_again(chosen, monkeypatch, caplog):
    config = configs.replace(chosen, name="stopped")
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "cvdist"):
        patch.setattr(Worker, "poll_stop_request", lambda self: StopRequest.EXIT)
        with pytest.raises(SystemExit) as ended:
            train(config)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "stopped begins the fit again" in caplog.text
    assert train(config).summary.logistic.epoch == 1
