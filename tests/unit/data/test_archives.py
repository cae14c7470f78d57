"""Pictures in tars and in Parquet files: which are found, with which class and split, and what is read."""

from __future__ import annotations

import json
import tarfile
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvdist.config import PicturesConfig
from cvdist.data import contents, forms
from cvdist.data.contents import Contents, digest_of
from cvdist.data.forms import archives
from cvdist.data.images.listing import list_pictures
from cvdist.data.images.versions import with_versions
from cvdist.errors import UserError
from cvdist.prediction.pictures import find_pictures
from tests.helpers import forms as made
from tests.helpers import pictures


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CVDIST_CACHE", str(folder))
    return folder


def listed(uri, **settings):
    """Class, part and digest of each picture, sorted; what is read by its path has that digest."""
    config = PicturesConfig(uri=str(uri), **settings)
    listing = list_pictures(config, fewest_classes=1)
    table = with_versions(listing.table, forms.root_of(config), forms.cache_folder("")).to_pylist()
    read = list(Contents(forms.root_of(config)).read_all([row["path"] for row in table], 1))
    assert [digest_of(one).hex() for one in read] == [row["version"] for row in table]
    assert [len(one) for one in read] == [row["size"] for row in table]
    return sorted((listing.classes[row["label"]], row["part"], row["version"]) for row in table)


def summary(uri, **settings):
    found = listed(uri, **settings)
    return {key: sum(row[:2] == key for row in found) for key in {row[:2] for row in found}}


def refused(uri, **settings):
    with pytest.raises(UserError) as error:
        listed(uri, **settings)
    return str(error.value)


def jpegs(*names, suffix=".jpg"):
    return [(f"{name}{suffix}", pictures.jpeg(i)) for i, name in enumerate(names)]


def test_the_same_pictures_in_each_form_are_the_same(tmp_path):
    root = pictures.write(tmp_path / "folder", {"train/cat": 6, "train/dog": 5, "val/cat": 2, "val/dog": 3})
    found = {form: listed(uri) for form, uri in made.write_all(root, tmp_path).items()}
    assert len(found["folder"]) == 16
    assert all(one == found["folder"] for one in found.values()), found


# ---------------------------------------------------------------------------------------------------- tars


def test_an_archive_is_read_once(tmp_path, monkeypatch):
    tar = made.tar(tmp_path / "some" / "a.tar", [*jpegs("a/1", "a/2", "b/1", "b/2")])
    before = listed(tar)
    archives.kept.UNSETTLED, unsettled = -(10**9), archives.kept.UNSETTLED
    try:
        assert listed(tar) == before
        with monkeypatch.context() as patched:
            patched.setattr(forms.tars, "_members", None)  # it is not read
            assert listed(tar) == before
        made.tar(tar, jpegs("a/1", "b/1", "b/3"))
        assert len(listed(tar)) == 3
    finally:
        archives.kept.UNSETTLED = unsettled
