"""A linear head that is solved from a cache: an ordinary run, and what is better than its baseline is kept."""

from __future__ import annotations

import re
import signal

import pytest
from mlflow import MlflowClient

from cvdist import config as configs
from cvdist.checkpoints import format as ckpt
from cvdist.checkpoints.store import CheckpointStore
from cvdist.checkpoints.worker import Worker
from cvdist.distributed.consensus import StopRequest
from cvdist.errors import UserError
from cvdist.jobs.train import table, train
from tests.helpers import feature_caches


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A cache of two classes that differ in their colors, and a configuration that solves a linear head."""
    return configs.replace(feature_caches.two_colors(tmp_path_factory.mktemp("logistic")), fit="logistic")


def checkpoint_of(config, name):
    (newest, *_) = CheckpointStore.at(f"{config.run.storage}/{name}").list()
    return f"{config.run.storage}/{name}/{newest.name}"


def test_a_solved_run_is_a_run_like_any_other(chosen):
    config = configs.replace(chosen, name="solved", tracking="required")
    done = train(config)
    summary = done.summary
    assert summary.best_correct == summary.valid_total == 7 and summary.epochs == 1
    text = table(done)
    assert "best accuracy  100.00% (7/7) by logistic regression" in text
    assert re.search(
        r"logistic +penalty \S+, 100.00% \(17/17\) of held-out training pictures \(5 folds\)", text
    )
    client = MlflowClient(done.run.tracking_uri)
    path = client.get_metric_history(done.run.run_id, "logistic/held_out_correct")
    assert [metric.step for metric in path] == list(range(1, len(summary.logistic.path) + 1))
    metrics = client.get_run(done.run.run_id).data.metrics
    assert metrics["train/correct"] == 17 and metrics["valid/correct"] == 7
    assert "figures/penalties.png" in [file.path for file in client.list_artifacts(done.run.run_id, "figures")]
    # The same command again has nothing to do, and its result is the checkpoint's.
    assert train(config).summary.logistic == summary.logistic


def test_work_goes_on_from_a_solved_head(chosen):
    train(configs.replace(chosen, name="first"))
    resume = checkpoint_of(chosen, "first")
    solved = ckpt.load(resume)
    assert solved.progress.logistic.epoch == 1
    more = train(configs.replace(chosen, name="more", fit="epochs", epochs=3, lr=1e-9, resume=resume))
    assert more.summary.epochs == 3 and more.summary.best_correct == 7 and more.summary.logistic is None


def test_two_views_are_two_samples(chosen, tmp_path):
    views = configs.replace(chosen, views=2, features=str(tmp_path / "views"), name="views")
    feature_caches.extract(views)
    assert train(views).summary.best_correct == 7


def test_epochs_that_end_below_the_baseline_are_followed_by_the_solution(chosen):
    """The learning rate is too low for anything to be learned."""
    done = train(configs.replace(chosen, name="low", fit="epochs", epochs=2, lr=0.0, seed=1))
    history = ckpt.load(checkpoint_of(chosen, "low")).progress.history
    assert max(record.valid_correct for record in history[:2]) < done.summary.ridge.correct
    assert len(history) == 3 and done.summary.best_correct == 7
    assert "by logistic regression" in table(done)


def test_another_head_below_the_baseline_says_what_is_better(chosen):
    done = train(configs.replace(chosen, name="mlp", head="mlp", fit="epochs", epochs=1, lr=0.0, seed=1))
    assert done.summary.best_correct < done.summary.ridge.correct
    more = done.summary.ridge.correct - done.summary.best_correct
    assert f"the model has {more} more mistake" in table(done) and "--head linear --fit logistic" in table(done)


def test_what_cannot_be_solved_is_refused_in_one_line(chosen):
    with pytest.raises(UserError, match="--fit logistic solves for one linear layer on cached features"):
        train(configs.replace(chosen, name="refused", head="mlp"))
    with pytest.raises(UserError, match="name them with --features"):
        train(configs.replace(chosen, features=""))


def test_a_fit_that_is_stopped_begins_again(chosen, monkeypatch, caplog):
    config = configs.replace(chosen, name="stopped")
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "poll_stop_request", lambda self: StopRequest.EXIT)
        with pytest.raises(SystemExit) as ended:
            train(config)
    assert ended.value.code == 128 + signal.SIGTERM
    assert train(config).summary.best_correct == 7
