"""`jobs/preprocess.py` as users run it: real Ray, a real S3 server, real photographs; and what may go wrong."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import mlflow
import numpy as np
import psutil
import pytest
import torch
from mlflow import MlflowClient

from benchmarks import made_up_features
from cvdist import config as configs
from cvdist.checkpoints import format
from cvdist.data.images.decode import decode
from cvdist.errors import UserError
from cvdist.features import inspect, manifest
from cvdist.features.copies import FeatureRows, MappedCopy
from cvdist.features.local import LocalShards
from cvdist.jobs import cli
from cvdist.storage import Folder
from tests import pictures
from tests.conftest import wait_until
from tests.feature_caches import write_weights
from tests.jobs import ROOT, mlflow_store, preprocess, the_error, torchrun, train


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "vgg11.pth")


def tiny(weights, data, features):
    """Arguments for pictures of 32 pixels."""
    return (
        *("dogs-cats-vgg16-features", "--data", data, "--features", features, "--model", "vgg11"),
        *("--weights", weights, "--weights-preprocessing", "imagenet", "--image-size", "32"),
    )


@pytest.fixture
def bucket(s3, monkeypatch):
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    return "s3://bucket"


def subset(source, target, train, valid):
    """The first photographs of each class."""
    for part, count in (("train", train), ("valid", valid)):
        for name in ("cat", "dog"):
            (target / part / name).mkdir(parents=True)
            for path in sorted((source / part / name).glob("*.jpg"))[:count]:
                shutil.copyfile(path, target / part / name / path.name)
    return target


def test_real_photographs_through_a_bucket(shared_data, bucket, s3, tmp_path):
    """Extract with two actors, look, train with two workers, and ask the logged model about pictures."""
    photos = subset(shared_data / "dogs-vs-cats", tmp_path / "photos", 50, 30)
    features = f"{bucket}/real"
    weights = shared_data / "weights" / "vgg16_features.pth"
    flags = ("--weights", weights, "--weights-preprocessing", "vgg-features")
    common = {"storage": tmp_path, "CVDIST_CACHE": str(tmp_path / "cache"), **s3}
    done = preprocess(
        *("dogs-cats-vgg16-features", "--data", photos, "--features", features, *flags, "--shard-size", "40"),
        **common,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"pictures  160 of 160, 0 can't be decoded", done.stdout)
    assert re.search(r"computed  160 pictures in .*, \d+\.\d images/s", done.stdout)
    cache = manifest.read(Folder.open(features, ""))
    jpegs = sum(path.stat().st_size for path in photos.rglob("*.jpg"))
    assert cache.stored_bytes < jpegs and cache.stored_bytes * 10 < 160 * 25088 * 4
    assert "is whole: 5/5 shards, 160 pictures" in preprocess("--check", features, **common).stdout
    assert re.search(r"zeros +8\d\.\d% of the values", inspect.describe(features))
    done = train(
        *("dogs-cats-vgg16-features", "--data", photos, "--features", features, *flags),
        *("--num-workers", "2", "--epochs", "2", "--name", "real", "--batch-size", "32", "--lr", "0.0004"),
        **common,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    correct = int(re.search(r"best accuracy  [\d.]+% \((\d+)/60\)", done.stdout)[1])
    assert correct >= 52, done.stdout
    # The baseline, from the sums of both workers: 100 photographs are enough for most of the 60.
    assert int(re.search(r"ridge probe +[\d.]+% \((\d+)/60\) in", done.stdout)[1]) >= 54, done.stdout
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs(["1"])
    (output,) = run.outputs.model_outputs
    with mlflow_store(tmp_path):
        model = mlflow.pytorch.load_model(f"models:/{output.model_id}")

    paths = sorted((photos / "valid").rglob("*.jpg"))
    pixels = torch.stack([decode(path.read_bytes(), 224, "squash") for path in paths]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        probabilities = torch.cat([model(part.contiguous()) for part in pixels.split(4)])
    dogs = torch.tensor([path.parent.name == "dog" for path in paths])
    # It computes in float32 what was learned from features in bfloat16.
    assert abs(int((probabilities.argmax(1) == dogs).sum()) - correct) <= 1


def test_on_a_cluster_and_then_without_one(weights, ray_cluster, tmp_path):
    photos = pictures.write(tmp_path / "photos", pictures.FOUR)
    features = tmp_path / "features"
    arguments = (*tiny(weights, photos, features), "--shard-size", "4", "--extractors", "2")
    common = {"storage": tmp_path, "CVDIST_CACHE": str(tmp_path / "cache")}
    done = preprocess(*arguments, **common, **ray_cluster)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "extracting on 2 CPU actors" in done.stderr
    following = re.search(r"next: python jobs/train.py (.*)", done.stdout)[1]
    assert following.startswith("dogs-cats-vgg16-features --features ")
    again = preprocess(*arguments, **common, **ray_cluster)
    assert "no picture has changed" in again.stderr and "computed  0 pictures" in again.stdout
    # Without Ray and without MLflow, from the copy that all processes of the node share.
    done = torchrun(
        *(2, *tiny(weights, photos, features), "--epochs", "1", "--tracking", "none", "--batch-size", "4"),
        **common,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"best accuracy  [\d.]+% \(\d/5\)", done.stdout) and "on this node" in done.stderr
    assert re.search(r"ridge probe +[\d.]+% \(\d/5\) in", done.stdout)
    # On the cluster again, with the head split over workers that write a checkpoint together.
    done = train(
        *(*tiny(weights, photos, features), "--epochs", "2", "--tracking", "none", "--batch-size", "4"),
        *("--parallel", "head", "--hidden-size", "16", "--name", "split"),
        **common,
        **ray_cluster,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"best accuracy  [\d.]+% \(\d/5\)", done.stdout)
    assert "parallel   head: " in done.stderr + done.stdout
    (written,) = (tmp_path / "split").glob("epoch-0002*")
    saved = format.load(written)
    assert saved.workers == 2 and saved.progress.epoch == 2
    assert saved.state["model"]["classifier.0.weight"].shape == (16, 25088)


def test_errors_are_one_line(weights, s3, tmp_path):
    photos = pictures.write(tmp_path / "photos", {"a": 2, "b": 2})
    common = {"storage": tmp_path, "CVDIST_CACHE": str(tmp_path / "cache"), **s3}

    def error(*arguments, **more):
        return the_error(preprocess(*arguments, **{**common, **more}))

    def misread(*words):
        with pytest.raises(UserError) as error:
            configs.check_preprocess(cli.parse("preprocess", words))
        return str(error.value)

    assert misread("dogs-cats-vgg16", "--data", "x").startswith("--features is needed")
    assert misread("--check").startswith("--check takes one folder or URI")
    assert "unknown flag --view: did you mean --views" in misread("dogs-cats-vgg16", "--view", "3")
    assert error("dogs-cats-vgg16", "--features", "x").startswith("--data is needed")
    assert "has no manifest.json" in error("--check", photos)
    text = error(
        *tiny(weights, photos, "s3://bucket/f"), AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_MAX_ATTEMPTS="2"
    )
    assert "s3://bucket/f can't be written" in text
    text = error(*tiny(weights, photos, "s3://bucket/f"), AWS_SECRET_ACCESS_KEY="wrong")
    assert "wrong" not in text and "s3://bucket/f" in text
    assert "needs 1 GPUs" in error(*tiny(weights, photos, tmp_path / "f"), "--device", "cuda")
    too_many = error(*tiny(weights, photos, tmp_path / "f"), "--extractors", "99")
    assert "99" in too_many and "CPUs" in too_many
    (photos / "a" / "0000.jpg").write_bytes(b"bad")
    assert "more than --max-bad-fraction 0.001 allows" in error(*tiny(weights, photos, tmp_path / "f"))


def test_a_killed_job_goes_on_where_it_was(weights, bucket, s3, tmp_path):
    photos = pictures.write(tmp_path / "photos", {"train/a": 150, "train/b": 150, "valid/a": 5, "valid/b": 5})
    features = f"{bucket}/killed"
    arguments = (*tiny(weights, photos, features), "--shard-size", "5", "--image-size", "128")
    command = [sys.executable, "jobs/preprocess.py", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | s3
    job = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    folder = Folder.open(features, "")

    def receipts():
        return sum(name.startswith("receipts/") for name in folder.sizes())

    try:
        wait_until(lambda: receipts() >= 5 or job.poll() is not None, 90, "five shards are finished")
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait(10)
    assert folder.find(manifest.NAME) is None
    wait_until(lambda: _quiet(receipts), 60, "Ray's processes have followed")
    finished = receipts()
    assert 5 <= finished < 62
    done = preprocess(*arguments, storage=tmp_path, **s3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{finished} of 62 shards are there already" in done.stderr
    assert "is whole: 62/62 shards, 310 pictures" in inspect.check(features)


def test_a_killed_actor_costs_its_shard_and_no_more(weights, tmp_path):
    """As a node that is lost would: Ray gives its shard to another actor."""
    photos = pictures.write(tmp_path / "photos", {"train/a": 100, "train/b": 100, "valid/a": 5, "valid/b": 5})
    features = tmp_path / "features"
    arguments = (*tiny(weights, photos, features), "--shard-size", "5", "--image-size", "128")
    killed = []

    def kill(job):
        wait_until(lambda: len(list(features.glob("receipts/*"))) >= 3, 90, "three shards are finished")
        # Ray names its processes after the actors in them.
        actors = [p for p in psutil.Process(job).children(recursive=True) if "MapWorker" in p.name()]
        actors[0].kill()
        killed.append(actors[0].pid)

    job = subprocess.Popen(
        [sys.executable, "jobs/preprocess.py", *map(str, arguments)], cwd=ROOT,
        stdout=subprocess.PIPE, text=True,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, stderr=subprocess.PIPE,
    )  # fmt: skip
    killing = threading.Thread(target=kill, args=(job.pid,))
    killing.start()
    try:
        output, errors = job.communicate(timeout=200)
    finally:
        job.kill()
    killing.join(10)
    assert killed and job.returncode == 0, errors[-3000:]
    assert "computed  210 pictures" in output
    assert "is whole: 42/42 shards, 210 pictures" in inspect.check(str(features))


def _quiet(count):
    before = count()
    time.sleep(2)
    return count() == before


def test_a_server_that_restarts_while_shards_are_written(weights, own_s3, tmp_path, monkeypatch):
    for name, value in own_s3.environment.items():
        monkeypatch.setenv(name, value)
    photos = pictures.write(tmp_path / "photos", {"train/a": 100, "train/b": 100, "valid/a": 5, "valid/b": 5})
    features = "s3://bucket/restarted"
    folder = Folder.open(features, "")
    failures = []

    def restart():
        try:
            wait_until(lambda: "receipts/" in "".join(folder.sizes()), 90, "a shard is finished")
            own_s3.stop(kill=True)
            time.sleep(1)
            own_s3.start()
        except BaseException as error:
            failures.append(error)

    restarting = threading.Thread(target=restart)
    restarting.start()
    done = preprocess(
        *(*tiny(weights, photos, features), "--shard-size", "5", "--image-size", "128"),
        storage=tmp_path,
        **own_s3.environment,
    )
    restarting.join(60)
    assert not failures, failures
    if done.returncode:  # a server killed in the middle of an answer may be an error, but a clear one
        the_error(done)
        done = preprocess(
            *(*tiny(weights, photos, features), "--shard-size", "5", "--image-size", "128"),
            storage=tmp_path,
            **own_s3.environment,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is whole: 42/42 shards, 210 pictures" in inspect.check(features)


def test_a_server_that_restarts_while_shards_are_read(own_s3, tmp_path, monkeypatch):
    for name, value in own_s3.environment.items():
        monkeypatch.setenv(name, value)
    made = made_up_features.write("s3://bucket/read", 64, 0, shape=(256,), shard_size=4)
    features = made_up_features.everything(made, "s3://bucket/read")
    folder = Folder.open("s3://bucket/read", "--features", patient=True)
    shards = LocalShards(folder, made, tmp_path / "cache", limit=1 << 30, timeout=60.0)
    copy = MappedCopy(shards, fetch_threads=2, timeout=60.0)

    def row(number):
        gathered = copy.gather(FeatureRows(np.array([number]), np.array([2]), np.array([0])))
        path = next(p for p in features if int(p[-12:-4]) == 4 * number + 2)
        assert torch.equal(gathered[0], features[path][0])

    row(0)
    own_s3.stop(kill=True)
    starting = threading.Timer(1.5, own_s3.start)
    starting.start()
    for number in range(1, len(made.shards)):
        row(number)  # waits until the server is back
    starting.join(30)
    own_s3.stop(kill=True)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    with pytest.raises(UserError, match="can't be read"):
        Folder.open("s3://bucket/read", "--features").read(made.shards[0].object)
    copy.close()
