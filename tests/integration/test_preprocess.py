"""`jobs/preprocess.py` as users run it: real Ray, a real S3 server, real photographs; and what may go wrong."""

from __future__ import annotations

import re
import shutil
import threading

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from benchmarks import made_up_features
from cvdist import config as configs
from cvdist.errors import UserError
from cvdist.features import maintenance, manifest
from cvdist.features.copies import FeatureRows, MappedCopy
from cvdist.features.local import LocalShards
from cvdist.jobs import cli
from cvdist.storage import Folder
from tests.helpers import pictures
from tests.helpers.feature_caches import flags
from tests.helpers.jobs import call, mlflow_store, the_error, user_error
from tests.helpers.stores import empty_store


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
    photos = subset(shared_data / "dogs-vs-cats", tmp_path / "photos", 18, 6)
    features = f"{bucket}/real"
    weights = shared_data / "weights" / "vgg16_features.pth"
    recipe = ("dogs-cats-vgg16-features", "--data", photos, "--features", features, "--weights", weights)
    recipe = (*recipe, "--weights-preprocessing", "vgg-features", "--runtime", "inline")
    common = {"storage": empty_store(tmp_path), "CVDIST_CACHE": str(tmp_path / "cache"), **s3}
    done = call("preprocess", *recipe, "--shard-size", "12", **common)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"pictures  48 of 48, 0 can't be decoded", done.stdout)
    assert re.search(r"computed  48 pictures in .*, \d+\.\d images/s", done.stdout)
    following = re.search(r"next: python jobs/train.py (.*)", done.stdout)[1]
    assert following.startswith("dogs-cats-vgg16-features --features ")
    cache = manifest.read(Folder.open(features, ""))
    jpegs = sum(path.stat().st_size for path in photos.rglob("*.jpg"))
    assert cache.stored_bytes < jpegs and cache.stored_bytes * 10 < 48 * 25088 * 4
    assert "is whole: 4/4 shards, 48 pictures" in call("preprocess", "--check", features, **common).stdout
    assert re.search(r"zeros +8\d\.\d% of the values", maintenance.describe(features))
    again = call("preprocess", *recipe, "--shard-size", "12", **common)
    assert "no picture has changed" in again.stderr and "computed  0 pictures" in again.stdout

    done = call(
        "train",
        *(*recipe, "--epochs", "4", "--name", "real", "--batch-size", "8"),
        *("--no-visualize", "--hidden-size", "64", "--lr", "0.002", "--lr-warmup-epochs", "0"),
        **common,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    correct = int(re.search(r"best accuracy  [\d.]+% \((\d+)/12\)", done.stdout)[1])
    assert correct >= 10, done.stdout
    # The baseline: 36 photographs are enough for most of the 12.
    assert int(re.search(r"ridge probe +[\d.]+% \((\d+)/12\) in", done.stdout)[1]) >= 10, done.stdout
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
        return user_error(lambda: configs.check_preprocess(cli.parse("preprocess", words)))

    assert misread("dogs-cats-vgg16", "--data", "x").startswith("--features is needed")
    assert misread("--check").startswith("--check takes one folder or URI")
    assert "unknown flag --view: did you mean --views" in misread("dogs-cats-vgg16", "--view", "3")
    assert error("dogs-cats-vgg16", "--features", "x").startswith("--data is needed")
    assert "has no manifest.json" in error("--check", photos)
    text = error(
        *flags(photos, "s3://bucket/f", weights), AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_MAX_ATTEMPTS="2"
    )
    assert "s3://bucket/f can't be written" in text
    text = error(*flags(photos, "s3://bucket/f", weights), AWS_SECRET_ACCESS_KEY="wrong")
    assert "wrong" not in text and "s3://bucket/f" in text
    assert "needs 1 GPUs" in error(*flags(photos, tmp_path / "f", weights), "--device", "cuda")
    too_many = error(*flags(photos, tmp_path / "f", weights), "--extractors", "99")
    assert "99" in too_many and "CPUs" in too_many
    (photos / "a" / "0000.jpg").write_bytes(b"bad")
    assert "more than --max-bad-fraction 0.001 allows" in error(*flags(photos, tmp_path / "f", weights))


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
