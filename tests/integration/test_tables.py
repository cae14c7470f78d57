"""A table of paths and labels in a bucket, as all jobs take it."""

from __future__ import annotations

import pytest
from pyarrow import fs as arrow

from cvdist import config as configs
from cvdist import recipes, storage
from cvdist.jobs import cli, evaluate, predict, visualize
from cvdist.jobs.preflight import look_at_data
from cvdist.jobs.train import train
from tests.helpers import pictures


@pytest.fixture
def table(bucket, tmp_path):
    """A competition's table, with a row more than there are files; the pictures lie in a folder `train`."""
    photos = pictures.write(tmp_path / "photos", {"train": 40, "test": 3})
    rows = [f"{i:04},{'ant' if i % 2 else 'bee'},x" for i in range(41)]
    (photos / "labels.csv").write_text("\n".join(["number,insect,note", *rows]))
    filesystem, path = storage.locate(bucket)
    arrow.copy_files(str(photos), path, destination_filesystem=filesystem)
    return photos


def test_all_jobs_take_a_table_in_a_bucket(trained, table, bucket, tmp_path, caplog):
    caplog.set_level("INFO", "cvdist")
    named = {"data": f"{bucket}/labels.csv", "path_column": "number", "label_column": "insect"}
    config = configs.replace(
        recipes.find("dogs-cats-cnn"), **named, image_size=32, cache=str(tmp_path / "cache"), runtime="inline",
        storage=str(trained.storage), name="tabled", epochs=1, batch_size=20, system_metrics=False,
        visualize=False,
    )  # fmt: skip
    finished = train(config)
    assert finished is not None and finished.summary.best.valid_total == 8
    assert f"1 of 41 rows named no file below {bucket}, e.g. 0040" in caplog.text
    assert look_at_data(config)[0].startswith("40 pictures in 2 classes")

    def job(kind, *words):
        flags = ["tabled", "--storage", str(trained.storage), *map(str, words)]
        return {"evaluate": evaluate, "predict": predict, "visualize": visualize}[kind](cli.parse(kind, flags))

    # What was trained on, then the same pictures on a disk, then in folders, to which the columns mean nothing.
    own = job("evaluate", "--cache", tmp_path / "cache", "--tracking", "none").evaluation.first.metrics
    assert (own.correct, own.total) == (finished.summary.best.valid_correct, 8)
    flags = ("--path-column", "number", "--data-root", table / "train")
    data = (table / "labels.csv", *flags, "--label-column", "insect")
    same = job("evaluate", "--data", *data, "--tracking", "none").evaluation.first.metrics
    folders = pictures.write(tmp_path / "folders", {"ant": 2, "bee": 1})
    other = job("evaluate", "--data", folders, "--tracking", "none").evaluation.first.metrics
    assert (same.total, other.total) == (40, 3)

    predicted = job(
        "predict", "--data", table / "labels.csv", *flags, "--output", tmp_path / "out", "--runtime", "inline"
    )
    assert predicted.predictions.rows == 40
    shown = job("visualize", "--data", *data, "--output", tmp_path / "figures")
    assert shown.interpretation.num_correct == same.correct
