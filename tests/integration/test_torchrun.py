"""Workers started by torchrun, without Ray: two workers learn what one learns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cvdist.checkpoints.store import CheckpointStore
from tests.helpers.jobs import ROOT, call, run, torchrun
from tests.helpers.stores import empty_store, the_run
from tests.helpers.waiting import wait_until

# 20 steps an epoch; nothing random but the order, which all share.
COMMON = ["digits-cnn", "--batch-size", "200", "--dropout", "0", "--lr-scheduler", "constant"]
COMMON += ["--log-every-steps", "1", "--checkpoint-every", "7", "--no-log-model", "--no-visualize"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Four epochs of two workers: the output, and the storage with the run `two`."""
    storage = tmp_path_factory.mktemp("storage")
    done = torchrun(2, *COMMON, "--epochs", "4", "--name", "two", storage=storage)
    assert done.returncode == 0, done.stderr
    return done.stdout, storage


def test_two_workers_learn_the_same_model(two, tmp_path):
    output, storage = two
    words = [*COMMON, "--epochs", "1", "--runtime", "inline", "--name", "one"]
    done = call("train", *words, storage=empty_store(tmp_path))
    assert done.returncode == 0, done.stderr
    (client, got), (other, expected) = the_run(storage), the_run(tmp_path)

    def values(client, found, metric):
        return [one.value for one in client.get_metric_history(found.info.run_id, metric)]

    losses = values(client, got, "step/loss")
    assert len(losses) == 80
    assert losses[:20] == pytest.approx(values(other, expected, "step/loss"), rel=1e-3)
    for metric in ("valid/correct", "valid/total", "train/total"):
        assert values(client, got, metric)[0] == expected.data.metrics[metric], metric
    assert got.data.params["run.world_size"] == "2"
    assert got.info.status == "FINISHED"
    report = client.download_artifacts(got.info.run_id, "report.html")
    assert "<dd>2 on " in Path(report).read_text(encoding="utf-8")
    assert output.count("best accuracy") == 1


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
def test_a_job_with_its_checkpoints_in_a_bucket_is_killed_and_goes_on(workers, two, bucket, tmp_path):
    """One worker in this process, and two under torchrun: against a run that was left alone."""
    if workers == 1:  # with dropout, whose random numbers go on too
        words = ["digits-cnn", "--batch-size", "200", "--lr-scheduler", "constant", "--checkpoint-every", "7"]
        words += ["--runtime", "inline", "--tracking", "none"]
        assert call("train", *words, "--epochs", "4", "--name", "whole", storage=tmp_path).returncode == 0
        whole = tmp_path / "whole"
    else:
        words, whole = [*COMMON, "--tracking", "none"], two[1] / "two"

    words += ["--name", "killed", "--storage", bucket]
    store = CheckpointStore.at(f"{bucket}/killed")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if workers == 2 else []
    command = [sys.executable, *launcher, "jobs/train.py", *words, "--epochs", "400"]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log, start_new_session=True)
    try:
        ended = lambda: job.poll() is not None  # noqa: E731
        wait_until(lambda: ended() or any(one.at > 4000 for one in store.list()), "an epoch is done")
        assert not ended(), (tmp_path / "log").read_text()
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait(60)
    words += ["--epochs", "4"]
    again = call("train", *words, storage=tmp_path) if workers == 1 else torchrun(2, *words, storage=tmp_path)
    assert again.returncode == 0 and "resuming   at epoch" in again.stderr, again.stderr
    (last,) = [one for one in store.list() if one.at == 4 * 4000]
    with store.open(last.name) as folder:
        reached = torch.load(folder / "state.pt", weights_only=True)["model"]
    expected = torch.load(whole / "epoch-0004" / "state.pt", weights_only=True)["model"]
    differences = {name: (reached[name] - tensor).abs().max().item() for name, tensor in expected.items()}
    assert not any(differences.values()), (differences, again.stderr)
