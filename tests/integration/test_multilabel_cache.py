"""Feature caches of pictures with several classes: labels are in the index, and change without features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cvdist import config as configs
from cvdist import loaders
from cvdist.features import maintenance
from cvdist.features.copies import DeviceCopy
from tests.helpers.feature_caches import (
    CPU,
    config,
    epoch,
    extract,
    manifest_of,
    opened,
    refusal,
)
from tests.helpers.jobs import user_error
from tests.helpers.multilabel import multilabel_table

CLASSES = ("blue", "green", "red")


@pytest.fixture
def chosen(weights, tmp_path):
    table = multilabel_table(tmp_path / "pictures", 16)
    return config(table, tmp_path / "features", weights, tmp_path / "cache", label_separator=";")


def sets_of(chosen):
    """The classes of each picture by its name, as batches have them."""
    loader, found = opened(chosen), {}
    batches = epoch(loader), list(loader.valid_batches(0, 1, 4))
    for split, mine in zip(("train", "valid"), batches, strict=True):
        for batch in mine:
            assert batch.labels.dtype == torch.float32
            assert torch.equal(batch.labels.bool(), loader.labels(split)[batch.indices])
            for name, row in zip(loader.names(split, batch.indices.tolist()), batch.labels, strict=True):
                found[name] = {loader.info.classes[i] for i in row.nonzero().flatten()}
    return found


def said_by(table):
    rows = (line.split(",") for line in table.read_text().splitlines()[1:])
    return {name: set(filter(None, cell.split(";"))) for name, cell in rows}


def test_a_cache_has_the_classes_of_each_picture(chosen):
    built, computed = extract(chosen)
    assert len(computed) == 16 and built.manifest.multilabel and built.manifest.classes == CLASSES
    assert manifest_of(chosen) == built.manifest
    assert sets_of(chosen) == said_by(Path(chosen.data.uri))
    loader = opened(chosen)
    assert loader.info.multilabel and "no class" in loader.pictures("train", range(loader.info.train_size))[1]
    about = maintenance.describe(chosen.features.uri)
    assert "3, any number a picture, 2 pictures of none: blue 8, green 8, red 8" in about
    assert "16 pictures" in maintenance.check(chosen.features.uri)
    assert extract(chosen)[1] == [] and manifest_of(chosen) == built.manifest
    pictures = opened(configs.replace(chosen, features=""))
    loader.copy = DeviceCopy(loader.copy, CPU)  # as on a GPU with room
    for batch in epoch(loader):
        assert batch.labels.dtype == torch.float32
        assert torch.equal(batch.labels.bool(), loader.labels("train")[batch.indices])
    names = [one.names("valid", range(one.info.valid_size)) for one in (loader, pictures)]
    assert names[0] == names[1]
    assert user_error(loaders.check, configs.replace(chosen, balanced_sampling=True)).startswith("--balanced-")


def test_new_pictures_with_new_combinations_keep_the_others(chosen, weights, tmp_path):
    table = Path(chosen.data.uri)
    few = [line for line in table.read_text().splitlines() if ";" not in line]
    table.write_text("\n".join(few))
    built, _ = extract(chosen)
    before = sets_of(chosen)
    more = multilabel_table(tmp_path / "more", 8, first=40)
    for picture in more.parent.glob("*.png"):
        picture.rename(table.parent / picture.name)
    rows = [
        line.replace("blue", "amber") for line in more.read_text().splitlines()[1:]
    ]  # a class before others
    table.write_text("\n".join([*few, *rows]))
    assert "is of the classes blue, green, red, --data" in refusal(chosen)
    updated, computed = extract(chosen)
    assert len(computed) == 8 and set(built.manifest.shards) < set(updated.manifest.shards)
    assert updated.manifest.classes == ("amber", *CLASSES)
    after = sets_of(chosen)
    assert after == said_by(table) and before.items() < after.items()


def test_other_labels_cost_no_features(chosen):
    table = Path(chosen.data.uri)
    built, _ = extract(chosen)
    digest = opened(chosen).digest()
    text = table.read_text()
    table.write_text(text.replace("00005.png,blue;red", "00005.png,green"))
    assert "(1 with another label, e.g. 00005.png)" in refusal(chosen)
    updated, computed = extract(chosen)
    assert computed == [] and updated.manifest.shards == built.manifest.shards
    assert sets_of(chosen)["00005.png"] == {"green"} and opened(chosen).digest() != digest
    table.write_text(text)
    extract(chosen)
    assert opened(chosen).digest() == digest


def test_one_class_a_picture_and_several_are_told_apart(chosen):
    table = Path(chosen.data.uri)
    rows = [f"{number:05}.png,{'blue' if number % 2 else 'red'}" for number in range(16)]
    table.write_text("\n".join(["path,labels", *rows]))
    single = configs.replace(chosen, label_separator="")
    built, _ = extract(single)
    assert not built.manifest.multilabel
    assert "has one class a picture, --data" in refusal(chosen)
    updated, computed = extract(chosen)
    assert computed == [] and updated.manifest.multilabel
    assert updated.manifest.shards == built.manifest.shards
    assert "has any number of classes a picture, --data" in refusal(single)
    assert sets_of(chosen) == said_by(table)


def test_the_format_needs_nothing_of_ours(chosen):
    """What docs/feature-format.md says of pictures with several classes."""
    import pyarrow.parquet as pq

    extract(chosen)
    root = Path(chosen.features.uri)
    about = json.loads((root / "manifest.json").read_text())
    assert about["multilabel"] is True
    table = pq.read_table(root / about["index"]["object"])
    sets = [{about["classes"][i] for i in one} for one in table["classes"].to_pylist()]
    assert dict(zip(table["path"].to_pylist(), sets, strict=True)) == said_by(Path(chosen.data.uri))
