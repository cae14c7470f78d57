"""`jobs/preprocess.py` as users run it: real Ray, a real S3 server, real photographs; and what may go wrong."""

from __future__ import annotations

import contextlib
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
from cvdist.errors import UserError
from cvdist.features import inspect, manifest
from cvdist.features.copies import FeatureRows, MappedCopy
from cvdist.features.local import LocalShards
from cvdist.jobs import cli
from cvdist.storage import Folder
from tests.helpers import pictures
from tests.helpers.feature_caches import write_weights
from tests.helpers.jobs import ROOT, call, mlflow_store, on_ray, the_error
from tests.helpers.stores import empty_store
from tests.helpers.waiting import wait_until, work_of


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
    """Extract, look, train, and ask the logged model."""
    photos = subset(shared_data / "dogs-vs-cats", tmp_path / "photos", 24, 12)
    features = f"{bucket}/real"
    weights = shared_data / "weights" / "vgg16_features.pth"
    recipe = ("dogs-cats-vgg16-features", "--data", photos, "--features", features, "--weights", weights)
    recipe = (*recipe, "--weights-preprocessing", "vgg-features", "--runtime", "inline")
    common = {"storage": empty_store(tmp_path), "CVDIST_CACHE": str(tmp_path / "cache"), **s3}
    done = call("preprocess", *recipe, "--shard-size", "20", **common)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"pictures  72 of 72, 0 can't be decoded", done.stdout)
    assert re.search(r"computed  72 pictures in .*, \d+\.\d images/s", done.stdout)
    following = re.search(r"next: python jobs/train.py (.*)", done.stdout)[1]
    assert following.startswith("dogs-cats-vgg16-features --features ")
    cache = manifest.read(Folder.open(features, ""))
    jpegs = sum(path.stat().st_size for path in photos.rglob("*.jpg"))
    assert cache.stored_bytes < jpegs and cache.stored_bytes * 10 < 72 * 25088 * 4
    assert "is whole: 5/5 shards, 72 pictures" in call("preprocess", "--check", features, **common).stdout
    assert re.search(r"zeros +8\d\.\d% of the values", inspect.describe(features))
    again = call("preprocess", *recipe, "--shard-size", "20", **common)
    assert "no picture has changed" in again.stderr and "computed  0 pictures" in again.stdout

    done = call(
        "train",
        *(*recipe, "--epochs", "4", "--name", "real", "--batch-size", "8"),
        *("--no-visualize", "--hidden-size", "64", "--lr", "0.002", "--lr-warmup-epochs", "0"),
        **common,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    correct = int(re.search(r"best accuracy  [\d.]+% \((\d+)/24\)", done.stdout)[1])
    assert correct >= 20, done.stdout
    # The baseline: 48 photographs are enough for most of the 24.
    assert int(re.search(r"ridge probe +[\d.]+% \((\d+)/24\) in", done.stdout)[1]) >= 21, done.stdout
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs(["1"])
    (output,) = run.outputs.model_outputs
    with mlflow_store(tmp_path):
        model = mlflow.pyfunc.load_model(f"models:/{output.model_id}")

    paths = sorted((photos / "valid").rglob("*.jpg"))
    answers = model.predict([path.read_bytes() for path in paths])
    right = sum(answer["class"] == path.parent.name for answer, path in zip(answers, paths, strict=True))
    # It computes in float32 what was learned from features in bfloat16.
    assert abs(right - correct) <= 1


def test_errors_are_one_line(weights, s3, ray_cluster, tmp_path):
    photos = pictures.write(tmp_path / "photos", {"a": 2, "b": 2})
    common = {"storage": tmp_path, "CVDIST_CACHE": str(tmp_path / "cache"), **s3, **ray_cluster}

    def error(*arguments, **more):
        return the_error(call("preprocess", *arguments, **{**common, **more}))

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
    weights, bucket, s3, ray_cluster, tmp_path
):
    """The job goes on where it was; a shard of an actor that is lost, as with its node, is another one's."""
    photos = pictures.write(tmp_path / "photos", {"train/a": 75, "train/b": 75, "valid/a": 5, "valid/b": 5})
    features = f"{bucket}/killed"
    arguments = (*tiny(weights, photos, features), "--shard-size", "5", "--image-size", "96")
    environment = {**os.environ, "CVDIST_STORAGE": str(tmp_path), **s3, **ray_cluster}
    folder = Folder.open(features, "")

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
            poll_seconds=0.05,
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
            lambda: receipts() >= finished + 3, "three more shards are finished", receipts, poll_seconds=0.05
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
    assert "is whole: 32/32 shards, 160 pictures" in inspect.check(features)


def test_a_server_that_restarts_while_shards_are_written(weights, own_s3, ray_cluster, tmp_path, monkeypatch):
    for name, value in own_s3.environment.items():
        monkeypatch.setenv(name, value)
    photos = pictures.write(tmp_path / "photos", {"train/a": 30, "train/b": 30, "valid/a": 5, "valid/b": 5})
    features = "s3://bucket/restarted"
    words = (*tiny(weights, photos, features), "--shard-size", "5", "--image-size", "96")
    environment = {**own_s3.environment, **on_ray(own_s3.environment), **ray_cluster}
    folder = Folder.open(features, "")
    failures = []

    def restart():
        try:
            wait_until(lambda: "receipts/" in "".join(folder.sizes()), "a shard is finished", poll_seconds=0.05)
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
    assert "is whole: 14/14 shards, 70 pictures" in inspect.check(features)


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
