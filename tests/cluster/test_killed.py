"""What it costs a job if its processes are killed, stopped or hang, or a server restarts, on this machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import psutil
import pytest

from cvdist.checkpoints import format as ckpt
from cvdist.checkpoints.store import CheckpointStore
from cvdist.config import CheckpointConfig
from cvdist.features import maintenance, manifest
from cvdist.storage import Folder
from k8s.services import free_port
from tests.helpers import feature_caches, pictures
from tests.helpers.feature_caches import flags
from tests.helpers.jobs import ROOT, call, on_ray, the_error
from tests.helpers.stores import empty_store, the_run
from tests.helpers.waiting import wait_for_exit, wait_until, work_of

pytestmark = pytest.mark.timeout(3600)  # waits end by themselves when nothing moves


# ---------------------------------------------------------------------------------- training under Ray


def train_workers():
    """Ray Train's processes on the Ray that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if any("ray::RayTrainWorker" in word for word in process.cmdline()):
                found.append(process)
    return found


def test_a_killed_worker_costs_neither_the_job_nor_its_run(bucket, weights, tmp_path):
    """On a Ray that the job starts itself, with a divided head, each of whose checkpoints two workers write."""
    photos = pictures.write(tmp_path / "photos", pictures.FOUR)
    features, cache = tmp_path / "features", tmp_path / "cache"
    feature_caches.extract(feature_caches.config(photos, features, weights, cache))
    words = [
        *("dogs-cats-vgg16-features", "--features", features, "--model", "vgg11", "--weights", weights),
        *("--weights-preprocessing", "imagenet", "--image-size", "32", "--batch-size", "4", "--cache", cache),
        *("--parallel", "head", "--hidden-size", "16", "--epochs", "12", "--workers", "2", "--device", "cpu"),
        *("--name", "survivor", "--no-log-model", "--no-visualize", "--storage", bucket),
        *("--tracking-uri", f"sqlite:///{empty_store(tmp_path)}/mlflow.db"),
    ]
    folder = Folder.open(f"{bucket}/survivor", "--storage")
    checkpoints = lambda: [name for name in folder.sizes() if name.endswith("/checkpoint.json")]  # noqa: E731
    killed = []

    def kill():
        wait_until(
            lambda: len(checkpoints()) >= 2, "two epochs are done", work_of(os.getpid()), poll_seconds=0.2
        )
        victim = train_workers()[0]
        victim.kill()
        killed.append(victim.pid)

    killing = threading.Thread(target=kill)
    killing.start()
    done = call("train", *words, storage=tmp_path)
    killing.join()
    assert killed and done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    # Ray may not have heard of them yet when the worker died.
    assert "resuming   at epoch" in said and "parallel   head: " in said
    assert re.search(r"ridge probe +[\d.]+% \(\d/5\) in", done.stdout)  # from the sums of both
    assert len(checkpoints()) <= CheckpointConfig.keep + 1  # those included: none stays for ever
    client, found = the_run(tmp_path)
    assert found.info.status == "FINISHED"
    epochs = [metric.step for metric in client.get_metric_history(found.info.run_id, "valid/correct")]
    assert sorted(epochs) == list(range(1, 13))  # none lost with the process, none twice
    name = next(name for name in checkpoints() if name.startswith("epoch-0012"))
    with CheckpointStore.at(f"{bucket}/survivor").open(name.partition("/")[0]) as last:
        saved = ckpt.load(last)
    assert saved.workers == 2 and saved.state["model"]["classifier.0.weight"].shape == (16, 25088)


# ----------------------------------------------------------------------------- training under torchrun


@contextmanager
def started(*words, storage, epoch=1):
    """A job on two nodes, as torchrun sees them, its two launchers and its log; it has ended an epoch."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launcher += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    log = storage / "log"
    with log.open("w") as output:
        nodes = [
            subprocess.Popen(
                [*launcher, f"--node-rank={rank}", "jobs/train.py", *words, "--epochs", "400"],
                cwd=ROOT,
                stderr=output,
                stdout=output,
                env={**os.environ, "CVDIST_STORAGE": str(storage)},
            )
            for rank in range(2)
        ]
    ended = lambda: any(node.poll() is not None for node in nodes)  # noqa: E731
    try:
        wait_until(
            lambda: f"epoch {epoch}/400  train" in log.read_text() or ended(),
            "an epoch is done",
            work_of(nodes[0].pid, log),
        )
        assert not ended(), log.read_text()
        yield nodes, log
    except BaseException:
        print(log.read_text()[-5000:])  # which pytest shows
        raise
    finally:
        for node in nodes:
            node.terminate()
        for node in nodes:
            wait_for_exit(node, "torchrun's launcher", work_of(node.pid, log))


def stored(run, epoch):
    """Checkpoints at the end of an epoch."""
    folders = (meta.parent for meta in run.glob(f"epoch-{epoch:04}*/checkpoint.json"))
    return [folder for folder in folders if "step" not in folder.name]


def test_a_stopped_job_goes_on_and_a_hanging_worker_is_named_with_the_step(tmp_path):
    """Two nodes, one of which is told to end in mid-epoch, learn what one worker learns that was left alone.

    When they are started again, one of them stops without dying: the other one gives up within --step-timeout
    and says where it was.
    """
    words = ["digits-cnn", "--batch-size", "16", "--lr-scheduler", "constant", "--lr", "0.002"]
    words += ["--dropout", "0", "--keep-checkpoints", "99", "--data-timeout", "8", "--step-timeout", "8"]
    words += ["--no-visualize", "--no-log-model", "--name", "stopped"]
    with started(*words, storage=tmp_path) as (nodes, log):
        nodes[1].terminate()  # rank 0 is on the other node, and hears of it from this one's worker
        codes = [wait_for_exit(node, "torchrun's launcher", work_of(node.pid, log)) for node in nodes]
    assert 0 not in codes, log.read_text()
    assert "stopped by SIGTERM after a checkpoint: --name stopped goes on from it" in log.read_text()
    resumed = max(path.name for path in (tmp_path / "stopped").glob("epoch-*-step-*"))
    epoch = int(resumed.split("-")[1])
    with started(*words, storage=tmp_path, epoch=epoch) as (nodes, log):
        assert "resuming   at epoch" in log.read_text()
        # Workers wait longer for the checkpoint; when it is stored, there are 250 steps before the next one.
        wait_until(
            lambda: stored(tmp_path / "stopped", epoch), "the epoch's checkpoint is stored", poll_seconds=0.02
        )
        (second,) = psutil.Process(nodes[1].pid).children()
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

    client, found = the_run(tmp_path)
    assert found.data.tags["cvdist.attempt"] == "2"
    steps = [metric.step for metric in client.get_metric_history(found.info.run_id, "step/loss")]
    assert steps == sorted(set(steps))  # none twice

    alone = (*words[:-1], "alone", "--epochs", str(epoch), "--tracking", "none", "--runtime", "inline")
    assert call("train", *alone, storage=tmp_path).returncode == 0
    stopped, whole = (ckpt.load(stored(tmp_path / name, epoch)[0]) for name in ("stopped", "alone"))
    for one, other in zip(stopped.progress.history, whole.progress.history, strict=True):
        assert one.train_total == other.train_total == 4000
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-2)
    for name, tensor in whole.state["model"].items():
        assert (stopped.state["model"][name] - tensor).norm() < 0.05 * tensor.norm(), name


# --------------------------------------------------------------------------------------- preprocessing


def actors(cluster):
    """The extractors on this cluster: Ray names its processes after the actors in them."""
    port = cluster["RAY_ADDRESS"].rpartition(":")[2]
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "MapWorker" in " ".join(process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(word.endswith(f":{port}") for word in process.parent().cmdline()):
                    found.append(process)
    return found


def test_a_killed_job_and_a_killed_actor_cost_their_shards_and_no_more(
    s3, bucket, weights, ray_cluster, tmp_path
):
    """The job goes on where it was; a shard of an actor that is lost, as with its node, is another one's."""
    photos = pictures.write(tmp_path / "photos", {"train/a": 75, "train/b": 75, "valid/a": 5, "valid/b": 5})
    arguments = (*flags(photos, bucket, weights), "--shard-size", "5", "--image-size", "96")
    environment = {**os.environ, "CVDIST_STORAGE": str(tmp_path), **s3, **ray_cluster}
    folder = Folder.open(bucket, "")

    def receipts():
        return sum(name.startswith("receipts/") for name in folder.sizes())

    job = subprocess.Popen(
        [sys.executable, "jobs/preprocess.py", *map(str, arguments)], cwd=ROOT, env=environment,
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(
            lambda: receipts() >= 5 or job.poll() is not None,
            "five shards are finished",
            work_of(job.pid),
            poll_seconds=0.2,
        )
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait(10)
    assert folder.find(manifest.NAME) is None
    wait_until(lambda: not actors(ray_cluster), "the job's actors have followed it")
    finished = receipts()
    assert 5 <= finished < 32
    killed = []

    def kill():
        wait_until(
            lambda: receipts() >= finished + 3, "three more shards are finished", receipts, poll_seconds=0.2
        )
        victim = actors(ray_cluster)[0]
        victim.kill()
        killed.append(victim.pid)

    killing = threading.Thread(target=kill)
    killing.start()
    done = call("preprocess", *arguments, storage=tmp_path, **s3, **ray_cluster)
    killing.join()
    assert killed and done.returncode == 0, done.stderr[-3000:]
    assert f"{finished} of 32 shards are there already" in done.stderr
    assert f"computed  {5 * (32 - finished)} pictures" in done.stdout
    assert "is whole: 32/32 shards, 160 pictures" in maintenance.check(bucket)


def test_a_server_that_restarts_while_shards_are_written(own_s3, weights, ray_cluster, tmp_path, monkeypatch):
    for name, value in own_s3.environment.items():
        monkeypatch.setenv(name, value)
    photos = pictures.write(tmp_path / "photos", {"train/a": 30, "train/b": 30, "valid/a": 5, "valid/b": 5})
    features = "s3://bucket/restarted"
    words = (*flags(photos, features, weights), "--shard-size", "5", "--image-size", "96")
    environment = {**own_s3.environment, **on_ray(own_s3.environment), **ray_cluster}
    folder = Folder.open(features, "")
    failures = []

    def restart():
        try:
            wait_until(lambda: "receipts/" in "".join(folder.sizes()), "a shard is finished", poll_seconds=0.2)
            own_s3.stop(kill=True)
            time.sleep(1)
            own_s3.start()
        except BaseException as error:
            failures.append(error)

    restarting = threading.Thread(target=restart)
    restarting.start()
    done = call("preprocess", *words, storage=tmp_path, **environment)
    restarting.join()
    assert not failures, failures
    if done.returncode:  # a server killed in the middle of an answer may be an error, but a clear one
        the_error(done)
        done = call("preprocess", *words, storage=tmp_path, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is whole: 14/14 shards, 70 pictures" in maintenance.check(features)
