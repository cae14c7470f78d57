"""Layouts of folders: what is a split, a class or litter, what is refused, and when pictures are the same."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvdist import config as configs
from cvdist import storage
from cvdist.config import PicturesConfig
from cvdist.data import kept
from cvdist.data.forms import NO_PART, TRAIN_PART, VALID_PART, look_unlabeled
from cvdist.data.images import versions
from cvdist.data.images.listing import list_pictures
from cvdist.data.split import held_back_counts
from cvdist.errors import UserError
from tests.helpers.jobs import user_error

CATS_DOGS = ("cat", "dog")


def write(root, files):
    """Files by path, with the number of files that are to be there: names alone decide what is listed."""
    root.mkdir(exist_ok=True)
    for path, count in files.items():
        folder = root / path
        if "." in folder.name and not folder.name.startswith("."):
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.write_text(path)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (folder / f"{i}.jpg").write_text(f"{path} {i}")
    return root


def listed(root, fewest=2):
    listing = list_pictures(PicturesConfig(uri=str(root)), fewest)
    parts = np.asarray(listing.table.column("part")).tolist()
    return listing.classes, [parts.count(part) for part in (TRAIN_PART, VALID_PART, NO_PART)]


def both(train, valid, extra=""):
    """A layout with two classes in each of two folders."""
    return {f"{train}/cat": 3, f"{train}/dog{extra}": 3, f"{valid}/cat": 2, f"{valid}/dog": 2}


LAYOUTS = {
    "usual": (both("train", "valid"), [6, 4, 0], ""),
    "upper case": (both("Train", "Valid"), [6, 4, 0], ""),
    "shouted": (both("TRAIN", "VALIDATION"), [6, 4, 0], ""),
    "Kaggle": (both("training_set", "test_set"), [6, 4, 0], "validated on test_set"),
    "Kaggle, unpacked twice": (
        both("training_set/training_set", "test_set/test_set"),
        [6, 4, 0],
        "validated on test_set",
    ),
    "Training and Testing": (both("Training", "Testing"), [6, 4, 0], "validated on Testing"),
    "images": (both("train_images", "val_images"), [6, 4, 0], ""),
    "no separator": (both("TrainData", "testset"), [6, 4, 0], "validated on testset"),
    "all three": (
        {**both("train", "val"), "test/cat": 5, "test/dog": 5},
        [6, 4, 0],
        "pictures in no class folder, left out: 10, e.g. test/cat/0.jpg",
    ),
    "unlabeled test pictures": (
        {"train/cat": 5, "train/dog": 5, "test": 3},
        [0, 0, 10],
        "no folder valid beside train: --valid-fraction of it is held back",
    ),
    "train alone": ({"train/cat": 5, "train/dog": 5}, [0, 0, 10], "no folder valid beside train"),
    "no splits": ({"cat": 5, "dog": 5}, [0, 0, 10], ""),
    "deeper": ({"cat/2021/a": 5, "dog/b": 5, "dog": 1}, [0, 0, 11], ""),
    "each class with one folder": ({"cat/images": 5, "dog/images": 5}, [0, 0, 10], ""),
    "deeper in splits": (both("train", "valid", extra="/2021/a"), [6, 4, 0], ""),
    "litter": (
        {**both("train", "valid"), "train/__MACOSX": 1, "valid/cat/@eaDir": 1, "train/.ipynb_checkpoints": 1,
         "train/cat/Thumbs.db": 1, "train/.DS_Store": 0},
        [6, 4, 0],
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "counts", "line"), LAYOUTS.values(), ids=LAYOUTS)
def test_usual_layouts_are_recognized(tmp_path, caplog, files, counts, line):
    caplog.set_level("INFO", "cvdist")
    assert listed(write(tmp_path / "some", files)) == (CATS_DOGS, counts)
    messages = [record.getMessage() for record in caplog.records]
    assert (line and any(line in message for message in messages)) or not (line or messages), messages


def test_every_other_folder_is_a_class_in_natural_order(tmp_path):
    names = ["1", "2", "10", "11", "__background__", "__none__", "a b", "class 2", "class 10", "train", "ü#%"]
    root = write(tmp_path / "some", dict.fromkeys(names, 2))
    assert listed(root)[0] == tuple(names)


REFUSED = {
    "no folders": ({}, "--data DIR has no class folders: expected DIR/CLASS/*.jpg, a folder for each class"),
    "splits without classes": (
        {"train": 3, "valid": 3},
        "--data DIR/train has no class folders: expected DIR/train/CLASS/*.jpg, a folder for each class",
    ),
    "tests without classes": (
        {"train": 3, "test": 3},
        "--data DIR/train has no class folders: expected DIR/train/CLASS/*.jpg, a folder for each class",
    ),
    "an empty class": (
        {**both("train", "valid"), "train/dog": 0},
        "--data DIR/train: no pictures in dog: fill or remove what is empty",
    ),
    "a class that is only validated": (
        {**both("train", "valid"), "valid/fox": 1},
        "--data DIR: valid has classes that train has no pictures of: fox (1)",
    ),
    "one class": (
        {"train/cat": 2, "valid/cat": 2},
        "--data DIR has one class, cat (2 pictures): a classifier needs two or more",
    ),
    "a folder around the classes": (
        {"PetImages/Cat": 2, "PetImages/Dog": 3},
        "--data DIR has one class, PetImages (5 pictures): a classifier needs two or more; if Cat, Dog are the "
        "classes, name DIR/PetImages",
    ),
    "two folders for one split": (
        {**both("train", "valid"), "Train/cat": 1},
        "--data DIR has Train and train and valid: keep one folder for each split",
    ),
    "train and what is none": (
        {**both("train", "holdout")},
        "--data DIR has a folder train but none named valid or test beside it: add it, or name DIR/train "
        "itself, which is then split by --valid-fraction",
    ),
    "no train": (
        both("valid", "test"),
        "--data DIR has test, valid but no folder train: add it, or name DIR/test itself",
    ),
    "folds": (
        both("fold1", "fold2"),
        "--data DIR has the folders fold1, fold2, each with cat, dog in it: if they are splits, name them "
        "train and valid, or give one of them, such as --data DIR/fold1; if they are classes, move them into "
        "DIR/train",
    ),
    "splits by another name": (
        {"seg_train/seg_train/sea": 2, "seg_test/seg_test/sea": 2, "seg_pred/seg_pred": 2},
        "--data DIR has the folders seg_pred, seg_test, seg_train, which look like splits: if they are splits, "
        "name them train and valid, or give one of them, such as --data DIR/seg_pred; if they are classes, "
        "move them into DIR/train",
    ),
    "splits in the classes' names": (
        {"cat_train": 2, "cat_test": 2, "dog_train": 2, "dog_test": 2},
        "--data DIR has the folders cat_test, cat_train, dog_test, dog_train, which look like splits: if they "
        "are splits, name them train and valid, or give one of them, such as --data DIR/cat_test; if they are "
        "classes, move them into DIR/train",
    ),
    "one picture of each class": (
        {"cat": 1, "dog": 1},
        "--data DIR has one picture of each class: none is left to validate on",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "text"), REFUSED.values(), ids=REFUSED)
def test_layouts_that_may_be_meant_otherwise_are_refused(tmp_path, files, text):
    message = user_error(listed, write(tmp_path / "some", files))
    assert message.replace(str(tmp_path / "some"), "DIR") == text


def test_classes_that_one_folder_lacks_and_classes_of_one_are_named(tmp_path, caplog):
    assert listed(write(tmp_path / "a", {**both("train", "valid"), "train/fox": 4}))[1] == [10, 4, 0]
    assert "classes that valid has no pictures of: fox (4)" in caplog.text
    assert listed(write(tmp_path / "b", {"ant": 1, "bee": 1, "cat": 9}))[0] == ("ant", "bee", "cat")
    assert "classes with a single picture, which is in training only: ant, bee" in caplog.text


@pytest.mark.parametrize("place", ["valid", "results", "."])
def test_results_of_jobs_among_the_pictures_are_passed_over(tmp_path, caplog, place):
    root = write(tmp_path / "some", both("train", "valid"))
    output = root / place
    for name in ("receipts", "predictions"):
        (output / name).mkdir(parents=True)
    (output / "predictions" / "0.parquet").touch()
    (output / "manifest.json").write_text(json.dumps({"format": "cvdist-predictions"}))
    caplog.set_level("INFO", "cvdist")
    assert listed(root) == (CATS_DOGS, [6, 4, 0])
    assert "predictions" in caplog.text and "passed over" in caplog.text
    assert len(look_unlabeled(str(root))) == 10
    (output / "manifest.json").write_text("{}")
    if place == "valid":
        with pytest.raises(UserError, match="no pictures in predictions, receipts"):
            listed(root)


@pytest.mark.parametrize(
    ("data", "place"),
    [("D", "D"), ("D/", "D/runs"), ("D", "D/../D/a"), ("file:///x/D", "/x/D/a"), ("s3://k@b/p", "s3://b/p/q")],
)
def test_results_are_not_written_among_the_pictures(data, place):
    with pytest.raises(UserError, match=f"--output .* is among the pictures of --data .*{data[-1:]}"):
        configs.require_outside(data, output=place)
    configs.require_outside(data, output=f"{data.rstrip('/')}-results", cache="")
    configs.require_outside(f"{place}/pictures", output=place)


# ----------------------------------------------------------------------------------------------- the split


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.sampled_from([0.01, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.9]) | st.floats(0.001, 0.999),
)
def test_every_class_is_learned_and_those_of_two_or_more_are_validated(sizes, fraction):
    counts = held_back_counts(sizes, fraction)
    allowed = []
    for size, count in zip(sizes, counts, strict=True):
        share = round(fraction * size, 9)
        bounds = [min(max(int(np.floor(share)), 1), size - 1), min(max(int(np.ceil(share)), 1), size - 1)]
        assert bounds[0] <= count <= bounds[1]  # so none of one picture, and one to all but one of more
        allowed.append(bounds)
    least, most = np.sum(allowed, axis=0)
    wanted = min(max(fraction * sum(sizes), least), most)
    assert abs(sum(counts) - wanted) <= 0.5 + 1e-6


def test_balanced_classes_are_split_in_proportion():
    assert held_back_counts([800, 800], 0.2) == [160, 160]
    assert held_back_counts([500] * 10, 0.2) == [100] * 10
    assert held_back_counts([30, 30], 0.1) == [3, 3]
    assert held_back_counts([2] * 5 + [17], 0.2) == [1] * 5 + [3]


# ------------------------------------------------------------------------------------------------ the versions


def version_of(root, cache):
    return versions.digest(versions.with_versions(look_unlabeled(str(root)), str(root), cache))


def test_a_fresh_copy_is_the_same_and_another_picture_of_the_same_size_is_not(tmp_path):
    root, cache = write(tmp_path / "some", {"cat": 3, "dog": 3}), tmp_path / "cache"
    before = version_of(root, cache)
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    assert version_of(tmp_path / "copy", cache) == before
    one = tmp_path / "copy" / "cat" / "1.jpg"
    state = one.stat()
    one.write_text("tac 1")
    os.utime(one, ns=(state.st_atime_ns, state.st_mtime_ns))  # as an archive's time would
    assert one.stat().st_size == state.st_size and version_of(tmp_path / "copy", cache) != before
    one.write_text("cat 1")
    assert version_of(tmp_path / "copy", cache) == before
    one.rename(one.with_name("3.jpg"))
    assert version_of(tmp_path / "copy", cache) != before


def test_a_file_is_read_once(tmp_path, monkeypatch):
    root, cache = write(tmp_path / "some", {"cat": 3, "dog": 3}), tmp_path / "cache"
    monkeypatch.setattr(kept, "UNSETTLED", -(10**15))  # as if time had passed since the files were written
    before, read = version_of(root, cache), []
    real = storage.read
    monkeypatch.setattr(storage, "read", lambda _, path: read.append(path) or real(_, path))
    assert version_of(root, cache) == before and not read
    (root / "cat" / "1.jpg").write_text("new")
    assert version_of(root, cache) != before and [path[-9:] for path in read] == ["cat/1.jpg"]
    (next((cache / "versions").glob("*.arrow"))).write_bytes(b"damaged")
    version_of(root, cache)
    assert len(read) == 1 + 6


def test_a_file_that_was_just_written_is_read_again(tmp_path):
    root, cache = write(tmp_path / "some", {"cat": 1}), tmp_path / "cache"
    version_of(root, cache)
    assert len(kept.load(cache, str(root))) == 0


def test_a_picture_in_two_classes_is_named(tmp_path, caplog):
    root = write(tmp_path / "some", {"cat": 3, "dog": 3})
    shutil.copy(root / "cat" / "1.jpg", root / "dog" / "9.jpg")
    listing = list_pictures(PicturesConfig(uri=str(root)))
    versions.with_versions(listing.table, str(root), tmp_path / "cache")
    assert "pictures in more than one class: 1, e.g. cat/1.jpg and dog/9.jpg" in caplog.text
