"""An inspection, from pictures to a training without those that it has found."""

from __future__ import annotations

import csv
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from PIL import Image

from tests.helpers.jobs import call, the_error
from tests.helpers.pictures import scene
from tests.integration.test_any_network import write_weights

NETWORK = "resnet18"


def photograph(seed, tint):
    """A picture in the color of a class: red (0) or blue (2)."""
    values = np.asarray(scene(seed, 160, 120), float) * 0.7
    values[..., tint] += 75
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures of two classes, with copies, a wrong label and odd ones; and the weights of a network."""
    root = tmp_path_factory.mktemp("inspect")
    photos = root / "pictures"
    for part, count in (("train", 40), ("valid", 12)):
        for tint, name in ((0, "red"), (2, "blue")):
            (photos / part / name).mkdir(parents=True)
            for i in range(count):
                seed = 1000 * tint + 100 * (part == "valid") + i
                photograph(seed, tint).save(photos / part / name / f"{i:02}.jpg")
    train, valid = photos / "train", photos / "valid"
    shutil.copy(valid / "red" / "01.jpg", train / "red" / "again.jpg")
    with Image.open(valid / "blue" / "02.jpg") as one:
        one.crop((4, 3, 157, 118)).save(train / "blue" / "cropped.png")
    with Image.open(train / "blue" / "05.jpg") as one:
        one.resize((80, 60)).save(train / "blue" / "smaller.jpg", quality=70)
    shutil.move(train / "red" / "07.jpg", train / "blue" / "wrong.jpg")
    Image.new("RGB", (160, 120), (9, 9, 9)).save(train / "red" / "blank.png")
    (root / "weights").mkdir()
    write_weights(root / "weights" / f"{NETWORK}.pth", NETWORK)
    return root


def words(root, *more):
    return (
        *("--data", root / "pictures", "--model", NETWORK, "--weights", root / "weights" / f"{NETWORK}.pth"),
        *("--image-size", "64", "--runtime", "inline", "--device", "cpu", "--precision", "float32", *more),
    )


def inspect(root, *more):
    variables = {"CVDIST_CACHE": str(root / "cache")}
    return call("inspect", *words(root, *more), storage=root / "runs", **variables)


def test_what_is_wrong_is_found_and_left_out_of_a_training(place):
    done = inspect(place, "--output", place / "found")
    assert done.returncode == 0, done.stderr
    text = (place / "found" / "issues.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == ["path", "kind", "score", "class", "suggested", "twin", "note", "leave_out"]
    found = {(row["path"], row["kind"]): row for row in rows}
    # Copies across the splits come first.
    assert [row["kind"] for row in rows[:3]] == ["leak", "leak", "copy"]
    assert found["train/red/again.jpg", "leak"]["twin"] == "valid/red/01.jpg"
    assert found["train/red/again.jpg", "leak"]["note"] == "same bytes"
    assert found["train/blue/cropped.png", "leak"]["twin"] == "valid/blue/02.jpg"
    assert found["train/blue/cropped.png", "leak"]["note"] == "nearly the same"
    assert found["train/blue/smaller.jpg", "copy"]["twin"] == "train/blue/05.jpg"
    wrong = found["train/blue/wrong.jpg", "label"]
    assert wrong["suggested"] == "red" and wrong["class"] == "blue"
    assert next(row["path"] for row in rows if row["kind"] == "label") == "train/blue/wrong.jpg"
    assert ("train/red/blank.png", "blank") in found
    assert "2 across the splits, 1 others" in done.stdout
    assert re.search(r"without the 2 that training has copies of, \d", done.stdout)
    assert done.stdout.rstrip().endswith(f"--exclude {place}/found/issues.csv")

    # The page shows them, and loads nothing.
    page = (place / "found" / "inspection.html").read_text()
    assert "train/blue/cropped.png" in page and "valid/blue/02.jpg" in page and "red rather than blue" in page
    assert all(source.startswith("data:image/jpeg") for source in re.findall(r'src="([^"]*)"', page))

    # Logged: one run with the counts and the files.
    client = MlflowClient(f"sqlite:///{place}/runs/mlflow.db")
    run = client.search_runs([client.get_experiment_by_name("cvdist").experiment_id])[0]
    assert run.info.status == "FINISHED" and run.data.tags["cvdist.kind"] == "inspection"
    assert run.data.metrics["issues/leak"] == 2 and 0 < run.data.metrics["wrong_labels/estimate"] < 20
    logged = download_artifacts(
        run_id=run.info.run_id, artifact_path="issues.csv", tracking_uri=client.tracking_uri
    )
    assert Path(logged).read_text() == text
    assert {"issues.parquet", "inspection.html"} <= {
        file.path for file in client.list_artifacts(run.info.run_id)
    }

    # Again, from the cache that is named: it is used as it is.
    (cache,) = (place / "runs" / "features").glob(f"*/{NETWORK}")
    again = call(
        *("inspect", "--data", place / "pictures", "--features", cache, "--tracking", "none"),
        *("--output", place / "again", "--runtime", "inline"),
        storage=place / "runs",
        CVDIST_CACHE=str(place / "cache"),
    )
    assert again.returncode == 0 and "to compute" not in again.stderr, again.stderr
    assert (place / "again" / "issues.csv").read_text() == text
    # What was left out is not found again.
    cleaned = inspect(
        place, "--tracking", "none", "--output", place / "clean", "--exclude", place / "found" / "issues.csv"
    )
    left = {row["path"] for row in csv.DictReader((place / "clean" / "issues.csv").open())}
    out = {row["path"] for row in rows if row["leave_out"] == "true"}
    assert cleaned.returncode == 0 and len(out) >= 4 and not left & out
    assert "train/blue/wrong.jpg" in left or "train/blue/wrong.jpg" in out


def test_training_leaves_pictures_out_from_pictures_and_from_a_cache(place, tmp_path):
    listed = tmp_path / "some.csv"
    listed.write_text(
        "path,kind\ntrain/red/00.jpg,copy\ntrain/blue/wrong.jpg,label\nvalid/red/00.jpg,x\nnone.jpg,x\n"
    )
    variables = {"storage": tmp_path / "runs", "CVDIST_CACHE": str(place / "cache")}
    cache = tmp_path / "features"
    made = call("preprocess", "transfer-features", *words(place, "--features", cache), **variables)
    assert made.returncode == 0, made.stderr
    shared = words(place, "--no-visualize")
    ways = {"transfer": ("--epochs", "1", "--num-workers", "1"), "transfer-features": ("--features", cache)}
    for recipe, more in ways.items():
        done = call("train", recipe, *shared, *more, "--tracking", "none", "--exclude", listed, **variables)
        assert done.returncode == 0, done.stderr
        assert "82 training and 23 validation pictures" in done.stderr
        assert (
            f"without the 3 pictures of --exclude {listed} (1 of its rows name no picture here)" in done.stderr
        )

    # A run is measured on what it was validated on, and says if it goes on with something else.
    name = ("--name", "once", "--num-workers", "1")
    done = call("train", "transfer", *shared, *name, "--epochs", "1", "--exclude", listed, **variables)
    assert done.returncode == 0, done.stderr
    measured = call("evaluate", "once", "--tracking", "none", "--device", "cpu", **variables)
    assert "23 pictures, 0 more can't be decoded" in measured.stdout, measured.stderr
    resumed = call("train", "transfer", *shared, *name, "--epochs", "2", **variables)
    assert "other than in the checkpoint: --exclude" in resumed.stderr, resumed.stderr
    assert "--exclude is for folders of pictures" in the_error(
        call("train", "digits-cnn", "--exclude", listed, "--tracking", "none", **variables)
    )


def test_what_can_not_be_inspected(place, tmp_path):
    def error(*more):
        return the_error(call("inspect", *more, "--tracking", "none", storage=tmp_path / "runs"))

    assert "--data is needed" in error("--runtime", "inline")
    among = ("--data", place / "pictures", "--output", place / "pictures" / "found")
    assert "is among the pictures" in error(*among)
    assert "--lr is a setting of" in error("--lr", "1")
