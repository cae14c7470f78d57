"""Workers started by torchrun, without Ray: two workers learn what one learns."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient

from cvdist.checkpoints import format as ckpt
from cvdist.checkpoints.store import CheckpointStore
from tests.helpers.jobs import ROOT, call, run, torchrun, train
from tests.helpers.waiting import wait_until, work_of

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
    words = [*COMMON, "--runtime", "inline", "--name", "one", "--no-log-model", "--no-visualize"]
    done = call("train", *words, storage=storage)
    assert done.returncode == 0, done.stderr
    return storage


def test_two_workers_learn_the_same_model(alone):
    done = torchrun(2, *COMMON, "--name", "two", "--no-log-model", "--no-visualize", storage=alone)
    assert done.returncode == 0, done.stderr
    expected, expected_losses = results(alone, "one")
    got, losses = results(alone, "two")
    assert len(losses) == len(expected_losses) == 20
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    assert got.data.params["run.world_size"] == "2"
    for metric in ("valid/correct", "valid/total", "train/total"):
        assert got.data.metrics[metric] == expected.data.metrics[metric], metric
    assert got.info.status == "FINISHED"
    report = MlflowClient(f"sqlite:///{alone}/mlflow.db").download_artifacts(got.info.run_id, "report.html")
    assert "<dd>2 on " in Path(report).read_text(encoding="utf-8")
    assert done.stdout.count("best accuracy") == 1


@contextmanager
def started(workers, *words, storage, epoch=1):
    """A job of `workers` under torchrun that trains without MLflow, and its log; it has ended an epoch."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    log = storage / "log"
    with log.open("w") as output:
        job = subprocess.Popen(
            [*launcher, "jobs/train.py", *words, "--epochs", "400", "--tracking", "none"],
            cwd=ROOT,
            stderr=output,
            stdout=output,
            env={**os.environ, "CVDIST_STORAGE": str(storage)},
        )
    try:
        wait_until(
            lambda: f"epoch {epoch}/400  train" in log.read_text() or job.poll() is not None,
            "an epoch is done",
            work_of(job.pid, log),
        )
        assert job.poll() is None, log.read_text()
        yield job, log
    except BaseException:
        print(log.read_text()[-5000:])  # which pytest shows
        raise
    finally:
        job.terminate()
        wait_until(lambda: job.poll() is not None, "the job has ended", work_of(job.pid, log))


def stored(run, epoch):
    """Checkpoints at the end of an epoch."""
    folders = (meta.parent for meta in run.glob(f"epoch-{epoch:04}*/checkpoint.json"))
    return [folder for folder in folders if "step" not in folder.name]


def test_a_stopped_job_goes_on_and_a_hanging_worker_is_named_with_the_step(tmp_path):
    """Two workers, stopped in mid-epoch and started again, learn what one learns that was left alone.

    Then one of them stops without dying: the other one gives up within --step-timeout and says where it was.
    """
    words = [
        "digits-cnn",
        "--batch-size",
        "16",
        "--lr-scheduler",
        "constant",
        "--dropout",
        "0",
        "--lr",
        "0.002",
    ]
    words += ["--keep-checkpoints", "99", "--data-timeout", "8", "--step-timeout", "8"]
    with started(2, *words, "--name", "stopped", storage=tmp_path) as (_, log):
        pass
    assert "stopped by SIGTERM after a checkpoint: --name stopped goes on from it" in log.read_text()
    resumed = max(path.name for path in (tmp_path / "stopped").glob("epoch-*-step-*"))
    epoch = int(resumed.split("-")[1])
    with started(2, *words, "--name", "stopped", storage=tmp_path, epoch=epoch) as (job, log):
        assert "resuming   at epoch" in log.read_text()
        # Workers wait longer for the checkpoint; when it is stored, there are 250 steps before the next one.
        wait_until(
            lambda: stored(tmp_path / "stopped", epoch), "the epoch's checkpoint is stored", poll_seconds=0.02
        )
        (second,) = [p for p in psutil.Process(job.pid).children() if p.environ().get("RANK") == "1"]
        second.suspend()
        try:
            wait_until(
                lambda: "timed out waiting for another worker in step" in log.read_text(),
                "the other one gives up",
                lambda: log.stat().st_size,
            )
        finally:
            second.kill()
    assert re.search(r"worker 0 timed out waiting for another worker in step \d+ of epoch \d+", log.read_text())

    alone = (*words, "--epochs", str(epoch), "--name", "alone", "--tracking", "none", "--runtime", "inline")
    assert call("train", *alone, storage=tmp_path).returncode == 0
    stopped, whole = (ckpt.load(stored(tmp_path / name, epoch)[0]) for name in ("stopped", "alone"))
    for one, other in zip(stopped.progress.history, whole.progress.history, strict=True):
        assert one.train_total == other.train_total == 4000
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-2)
    for name, tensor in whole.state["model"].items():
        assert (stopped.state["model"][name] - tensor).norm() < 0.05 * tensor.norm(), name


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

    root = f"s3://bucket/{uuid.uuid4().hex}"
    store = CheckpointStore.at(f"{root}/killed")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if workers == 2 else []
    command = [sys.executable, *launcher, "jobs/train.py", *words, "--epochs", "400", "--name", "killed"]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            [*command, "--storage", root], cwd=ROOT, stderr=log, stdout=log, start_new_session=True
        )
    try:
        ended = lambda: job.poll() is not None  # noqa: E731
        wait_until(lambda: ended() or any(one.at > 4000 for one in store.list()), "an epoch is done")
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
    differences = {name: (reached[name] - tensor).abs().max().item() for name, tensor in expected.items()}
    assert not any(differences.values()), (differences, again.stderr)
