"""`jobs/predict.py`: every picture once, whatever comes between; and what may go wrong."""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
from unittest.mock import Mock

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.dataset

from cvdist.jobs import cli
from cvdist.jobs import predict as run_prediction
from cvdist.jobs.predict import table as predictions_table
from cvdist.runtime import ray_cluster
from cvdist.storage import Folder
from tests.helpers import pictures
from tests.helpers.jobs import call, the_error, user_error


def predict(trained, source, *words):
    config = cli.parse(
        "predict", [str(source), "--storage", str(trained.storage), "--runtime", "inline", *map(str, words)]
    )
    return run_prediction(config)


def error(trained, source, *words):
    return user_error(predict, trained, source, *words)


def nested(root, count=40):
    """Pictures in folders of several depths, without classes."""
    return pictures.write(root, {"": count // 2, "deep": count // 4, "deep/er/and/er": count // 4})


def read(output):
    return pandas.read_parquet(output / "predictions").sort_values("path", ignore_index=True)


# ------------------------------------------------------------------------------------------------ the job


def test_results_are_what_the_logged_model_says_and_can_be_read_by_all(trained, tmp_path):
    photos, output = nested(tmp_path / "photos"), tmp_path / "output"
    (photos / "notes.txt").write_text("no picture")
    (photos / "deep" / "bad.jpg").write_bytes(b"no picture either")
    finished = predict(
        trained, "good", "--data", photos, "--output", output, "--slice-size", 8, "--max-bad-fraction", "0.1"
    )
    table = read(output)
    paths = sorted(str(path.relative_to(photos)) for path in photos.rglob("0*.jpg"))
    assert table["path"].tolist() == paths and len(paths) == 40
    assert list(table.columns) == ["path", "class", "confidence", "probabilities"]
    answers = trained.served(trained.good).predict([(photos / path).read_bytes() for path in paths])
    assert table["class"].tolist() == [answer["class"] for answer in answers]
    classes = [str(digit) for digit in range(10)]
    expected = [[answer["probabilities"][name] for name in classes] for answer in answers]
    found = np.stack(table["probabilities"].to_list())
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    assert table["class"].tolist() == [str(i) for i in found.argmax(1)]
    np.testing.assert_array_equal(table["confidence"], found.max(1))

    dataset = pyarrow.dataset.dataset(output / "predictions")
    assert dataset.count_rows() == 40
    assert json.loads(dataset.schema.metadata[b"cvdist.classes"]) == [str(digit) for digit in range(10)]
    assert dataset.schema.field("probabilities").type == pa.list_(pa.float32(), 10)
    manifest = json.loads((output / "manifest.json").read_text())
    assert (manifest["pictures"], manifest["predicted"], manifest["bad"]) == (41, 40, 1)
    assert (
        manifest["counts"] == table["class"].value_counts().reindex(manifest["classes"], fill_value=0).to_dict()
    )
    files = {str(path.relative_to(output)) for path in output.rglob("*.parquet")}
    assert {one["object"] for one in manifest["files"]} == files and len(files) > 2
    assert sum(one["rows"] for one in manifest["files"]) == 40
    bad = list(csv.DictReader(io.StringIO((output / "quarantine.csv").read_text())))
    assert [row["path"] for row in bad] == ["deep/bad.jpg"]
    text = predictions_table(finished)
    assert "40 of 41, 1 can't be decoded" in text and "pandas.read_parquet" in text


def test_the_same_again_computes_what_is_missing_or_has_changed(trained, tmp_path):
    photos, output = nested(tmp_path / "photos"), tmp_path / "output"
    words = ("--data", photos, "--output", output, "--slice-size", 4)

    def again(source="good", *more):
        return predict(trained, source, *words, *more).predictions

    assert again().computed == 40
    unchanged = again()
    assert (unchanged.computed, unchanged.removed, unchanged.rows) == (0, 0, 40)
    before = read(output)
    (photos / "deep" / "0003.jpg").write_bytes(pictures.jpeg(77))
    (photos / "deep" / "0003.more.jpg").write_bytes(pictures.jpeg(78))
    (photos / "0000.jpg").unlink()
    after = again()
    assert after.rows == 40 and 0 < after.computed <= 30 and after.removed > 0
    table = read(output)
    assert table["path"].is_unique and set(before["path"]) ^ set(table["path"]) == {
        "0000.jpg", "deep/0003.more.jpg",
    }  # fmt: skip
    # Another model, or other pictures, are not mixed in.
    message = error(trained, "averaged", *words)
    assert "holds predictions of another model" in message and "--replace" in message
    other = pictures.write(tmp_path / "other", {"": 3})
    assert "of other pictures" in error(trained, "good", "--data", other, "--output", output)
    assert again("averaged", "--replace").computed == 40


def test_a_few_pictures_are_predicted_here_and_printed(trained, tmp_path, monkeypatch):
    """Whatever the runtime: without Ray, and with nothing left behind unless --output says where."""
    photos, temporary = nested(tmp_path / "photos", 8), tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(ray_cluster, "connect", Mock(side_effect=AssertionError))
    words = [photos / "0000.jpg", photos / "deep" / "0001.jpg"]
    done = call("predict", "good", "--data", *words, storage=trained.storage)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if ".jpg" in line]
    assert [row[0] for row in rows] == ["0000.jpg", "deep/0001.jpg"]
    assert "results" not in done.stdout and not list(temporary.iterdir())
    whole = predict(trained, "good", "--data", photos, "--output", tmp_path / "output")
    table = read(tmp_path / "output").set_index("path")
    for path, name, share, *_ in rows:
        assert name == table["class"][path] and share == f"{100 * table['confidence'][path]:.1f}%"
    assert [one.path for one in whole.shown] == sorted(table.index)


def test_bad_input_is_one_line(trained, tmp_path, shared_data):
    photos = nested(tmp_path / "photos")
    here = ("--data", photos, "--output", tmp_path / "output")
    assert "--data is needed" in error(trained, "good", "--output", "x")
    assert "--output is needed" in error(trained, "good", "--data", photos)
    assert "there is no such file, folder" in error(trained, "good", "--data", tmp_path / "no", "--output", "x")
    (tmp_path / "empty").mkdir()
    assert "has no pictures" in error(trained, "good", "--data", tmp_path / "empty", *here[2:])
    assert "--slice-size is 0" in error(trained, "good", *here, "--slice-size", 0)
    weights = shared_data / "weights" / "vgg16_features.pth"
    text = error(trained, weights, *here, "--model", "vgg16", "--weights-preprocessing", "vgg-features")
    assert "has no classifier" in text
    for i in range(3):
        (photos / f"bad{i}.jpg").write_bytes(b"bad")
    text = error(trained, "good", *here)
    assert "more than --max-bad-fraction 0.001 allows, e.g. bad" in text
    assert not (tmp_path / "output" / "manifest.json").exists()
    (tmp_path / "output" / "manifest.json").write_text('{"format": "something"}')
    assert "manifest.json of something else" in error(trained, "good", *here)
    done = call("predict", "--data", photos, storage=tmp_path)
    assert the_error(done).startswith("the first argument is MODEL, not --data")


def test_ray_actors_compute_what_is_left_on_a_bucket(trained, ray_cluster, bucket, tmp_path):
    """They get the model through Ray, and no picture is predicted twice."""
    photos = pictures.write(tmp_path / "photos", {"a": 20, "b": 20})
    output = f"{bucket}/predicted"
    words = ("good", "--data", photos, "--output", output, "--slice-size", "5")
    first = predict(trained, *words).predictions
    folder = Folder.open(output, "")
    for receipt in first.files[2:]:
        folder.delete(receipt.object)
    done = call("predict", *words, storage=trained.storage, **ray_cluster)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"2 of \d+ slices are there already", done.stderr)
    assert re.search(r"predicting on [12] CPU actors?", done.stderr)
    assert "pictures  40 of 40, 0 can't be decoded" in done.stdout
    left = 40 - sum(receipt.pictures for receipt in first.files[:2])
    assert re.search(rf"computed  {left} pictures", done.stdout)
    table = pyarrow.dataset.dataset(
        f"{folder.root}/predictions", filesystem=folder.filesystem, format="parquet"
    ).to_table()
    expected = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.jpg"))
    assert sorted(table.column("path").to_pylist()) == expected
