"""Workers started by torchrun, without Ray: two workers learn what one learns."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.jobs import run, torchrun, train

# 20 steps; nothing random but the order, which all share.
COMMON = ["digits-cnn", "--epochs", "1", "--batch-size", "200", "--dropout", "0", "--log-every-steps", "1"]


def results(storage, name):
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("cvdist")
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`cvdist.name` = '{name}'")
    losses = [metric.value for metric in client.get_metric_history(found.info.run_id, "step/loss")]
    return found, losses


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One worker in this machine's plainest way."""
    storage = tmp_path_factory.mktemp("storage")
    done = train(*COMMON, "--runtime", "inline", "--name", "one", "--no-log-model", storage=storage)
    assert done.returncode == 0, done.stderr
    return storage


@pytest.mark.parametrize(("workers", "more"), [(2, []), (3, ["--accumulate-steps", "2"])])
def test_more_workers_learn_the_same_model(alone, workers, more):
    name = f"workers-{workers}"
    done = torchrun(workers, *COMMON, *more, "--name", name, "--no-log-model", storage=alone)
    assert done.returncode == 0, done.stderr
    expected, expected_losses = results(alone, "one")
    got, losses = results(alone, name)
    assert len(losses) == len(expected_losses) == 20
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    assert got.data.params["run.world_size"] == str(workers)
    for metric in ("valid/correct", "valid/total", "train/total"):
        assert got.data.metrics[metric] == expected.data.metrics[metric], metric
    assert got.info.status == "FINISHED"
    report = MlflowClient(f"sqlite:///{alone}/mlflow.db").download_artifacts(got.info.run_id, "report.html")
    assert f"<dd>{workers} on " in Path(report).read_text(encoding="utf-8")
    assert done.stdout.count("best accuracy") == 1


def test_neither_ray_nor_mlflow_is_imported(tmp_path):
    """The loop must run where neither is installed."""
    script = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('ray', 'mlflow'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "sys.argv[0] = 'jobs/train.py'\n"
        "import runpy; runpy.run_path('jobs/train.py', run_name='__main__')\n"
    )
    words = ["digits-cnn", "--epochs", "1", "--runtime", "inline", "--tracking", "none"]
    done = run(sys.executable, "-c", script, *words, storage=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "best accuracy" in done.stdout


def test_one_workers_mistake_ends_all_at_once(tmp_path):
    """MNIST is missing and can't be fetched: every worker stops, one line says why."""
    done = torchrun(
        2,
        "mnist-cnn",
        "--data",
        tmp_path,
        "--tracking",
        "none",
        storage=tmp_path,
        https_proxy="http://127.0.0.1:9",
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert f"--data {tmp_path} holds no MNIST" in lines[0] and "could not be downloaded" in lines[0]
