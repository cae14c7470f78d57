"""A few pictures, and a cache of their features."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers import pictures, session

COUNTS = {"train/cat": 7, "train/dog": 6, "valid/cat": 3, "valid/dog": 2}


@pytest.fixture(scope="session")
def weights() -> Path:
    """Random convolutions of a VGG11."""
    from tests.helpers.feature_caches import write_weights

    return session.once("vgg11", lambda folder: write_weights(folder / "vgg11.pth"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return pictures.write(tmp_path / "photos", COUNTS)


@pytest.fixture
def chosen(photos, weights, tmp_path):
    from tests.helpers.feature_caches import config

    return config(photos, tmp_path / "features", weights, tmp_path / "cache")


@pytest.fixture
def cached(chosen, weights):
    """The cache that `chosen` names is there, of its pictures. It is computed once for all tests."""
    from tests.helpers.feature_caches import config, extract

    def make(folder: Path) -> Path:
        photos = pictures.write(folder / "photos", COUNTS)
        extract(config(photos, folder / "features", weights, folder / "cache"))
        return folder

    made = session.once("features", make)
    shutil.copytree(made / "photos", chosen.data.uri, dirs_exist_ok=True)  # with their times
    shutil.copytree(made / "features", chosen.features.uri)
