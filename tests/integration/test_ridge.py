"""The ridge probe of real runs, and where its result is told."""

from __future__ import annotations

import pytest
import torch
from mlflow import MlflowClient

from cvdist import config as configs
from cvdist.jobs.report import build
from cvdist.jobs.train import table, train
from cvdist.training import ridge
from tests.helpers import feature_caches

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A cache of two classes that differ in their colors, and a configuration to train from it."""
    return feature_caches.two_colors(tmp_path_factory.mktemp("ridge"))


class Silent:
    def due(self):
        return False

    def clear(self):
        pass


def test_a_run_tells_its_baseline_and_a_resumed_run_keeps_it(chosen, monkeypatch):
    config = configs.replace(chosen, name="told", tracking="required", epochs=1)
    first = train(config)
    result = first.summary.ridge
    assert result.total == 7 and 0 <= result.correct <= 7
    expected = ridge.probe(feature_caches.loader(chosen), 0, 1, CPU, Silent())
    assert (result.correct, result.penalty) == (expected.correct, pytest.approx(expected.penalty))
    metrics = MlflowClient(first.run.tracking_uri).get_run(first.run.run_id).data.metrics
    assert metrics["ridge/valid_correct"] == result.correct and metrics["ridge/valid_total"] == 7
    assert metrics["ridge/valid_accuracy"] == pytest.approx(result.correct / 7)
    assert metrics["ridge/penalty"] == pytest.approx(result.penalty)
    assert f"ridge probe    {result}" in table(first)
    page = build(first.run.tracking_uri, first.run.run_id)
    assert f"ridge probe on the features: {result}" in page and f"{result.correct}/7</b>" in page
    # From the checkpoint, to the last digit of its seconds.
    monkeypatch.setattr(ridge, "probe", None)
    assert train(configs.replace(config, epochs=2)).summary.ridge == result


def test_it_can_be_left_out(chosen):
    done = train(configs.replace(chosen, name="without", ridge_probe=False))
    assert done.summary.ridge is None and "ridge probe" not in table(done)
