"""Workers started by torchrun, without Ray: two workers learn what one learns."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient

from cvdist.checkpoints.store import CheckpointStore
from tests.conftest import wait_until
from tests.jobs import ROOT, run, torchrun, train

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
    done = train(
        *COMMON, "--runtime", "inline", "--name", "one", "--no-log-model", "--no-visualize", storage=storage
    )
    assert done.returncode == 0, done.stderr
    return storage


@pytest.mark.parametrize(("workers", "more"), [(2, []), (3, ["--accumulate-steps", "2", "--no-visualize"])])
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


def test_sigterm_leads_to_a_checkpoint_and_the_same_weights(tmp_path):
    """Two workers, stopped in mid-epoch and started again, against two that were left alone."""
    words = ["digits-cnn", "--batch-size", "50", "--lr-scheduler", "constant", "--tracking", "none"]
    assert torchrun(2, *words, "--epochs", "4", "--name", "whole", storage=tmp_path).returncode == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            [*launcher, "jobs/train.py", *words, "--epochs", "400", "--name", "stopped"],
            cwd=ROOT,
            stderr=log,
            stdout=log,
            env={**os.environ, "CVDIST_STORAGE": str(tmp_path)},
        )
    text = lambda: (tmp_path / "log").read_text()  # noqa: E731
    try:
        wait_until(lambda: "epoch 1/400  train" in text(), 120, "an epoch is done")
    finally:
        asked_at = time.monotonic()
        job.terminate()
        job.wait(60)
    assert time.monotonic() - asked_at < 40
    assert "stopped by SIGTERM after a checkpoint: --name stopped goes on from it" in text(), text()
    again = torchrun(2, *words, "--epochs", "4", "--name", "stopped", storage=tmp_path)
    assert again.returncode == 0 and "resuming   at epoch" in again.stderr, again.stderr
    ends = [next((tmp_path / name).glob("epoch-0004*/state.pt")) for name in ("whole", "stopped")]
    one, other = (torch.load(end, weights_only=True)["model"] for end in ends)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_with_its_checkpoints_in_a_bucket_is_killed_and_goes_on(workers, s3, tmp_path, monkeypatch):
    """One worker in this process, and two under torchrun: against a run that was left alone."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    words = ["digits-cnn", "--batch-size", "200", "--lr-scheduler", "constant", "--tracking", "none"]
    words += ["--checkpoint-every", "7", *(["--runtime", "inline"] if workers == 1 else [])]

    def start(*more):
        command = [*words, *more]
        return train(*command, storage=tmp_path) if workers == 1 else torchrun(2, *command, storage=tmp_path)

    assert start("--epochs", "4", "--name", "whole").returncode == 0

    root = f"s3://bucket/{tmp_path.name}"
    store = CheckpointStore.at(f"{root}/killed")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if workers == 2 else []
    command = [sys.executable, *launcher, "jobs/train.py", *words, "--epochs", "400", "--name", "killed"]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            [*command, "--storage", root], cwd=ROOT, stderr=log, stdout=log, start_new_session=True
        )
    try:
        ended = lambda: job.poll() is not None  # noqa: E731
        wait_until(lambda: ended() or any(one.at > 4000 for one in store.list()), 150, "an epoch is done")
        assert not ended(), (tmp_path / "log").read_text()
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait(60)
    again = start("--epochs", "4", "--name", "killed", "--storage", root)
    assert again.returncode == 0 and "resuming   at epoch" in again.stderr, again.stderr
    (last,) = [one for one in store.list() if one.at == 4 * 4000]
    with store.open(last.name) as folder:
        reached = torch.load(folder / "state.pt", weights_only=True)["model"]
    expected = torch.load(tmp_path / "whole" / "epoch-0004" / "state.pt", weights_only=True)["model"]
    assert all(torch.equal(reached[name], tensor) for name, tensor in expected.items())


def test_a_hanging_worker_is_named_with_the_step(tmp_path):
    """One of two stops without dying: the other one gives up within --step-timeout and says where it was."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [
        "digits-cnn",
        "--epochs",
        "400",
        "--tracking",
        "none",
        "--data-timeout",
        "3",
        "--step-timeout",
        "3",
    ]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            [*launcher, "jobs/train.py", *words],
            cwd=ROOT,
            stderr=log,
            stdout=log,
            env={**os.environ, "CVDIST_STORAGE": str(tmp_path)},
        )
    stopped = None
    text = lambda: (tmp_path / "log").read_text()  # noqa: E731
    try:
        wait_until(lambda: "epoch 1/400  train" in text(), 120, "an epoch is done")
        second = [p for p in psutil.Process(job.pid).children() if p.environ().get("RANK") == "1"]
        stopped = second[0]
        stopped.suspend()
        wait_until(
            lambda: "timed out waiting for another worker in step" in text(), 60, "the other one gives up"
        )
        assert re.search(r"worker 0 timed out waiting for another worker in step \d+ of epoch \d+", text())
    finally:
        if stopped is not None:
            stopped.kill()
        job.terminate()
        job.wait(60)


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
