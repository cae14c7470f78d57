"""A cache says which decoder made it."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest

from cvdist import config as configs
from cvdist.errors import UserError
from cvdist.features import fingerprint, manifest
from cvdist.features.fingerprint import Fingerprint
from cvdist.storage import Folder
from tests.helpers import feature_caches, pictures


def test_a_cache_says_which_decoder_made_it(tmp_path):
    photos = pictures.write(
        tmp_path / "pictures", {f"{part}/{n}": 1 for part in ("train", "valid") for n in "ab"}
    )
    weights = feature_caches.write_weights(tmp_path / "weights.pth")
    chosen = feature_caches.config(photos, tmp_path / "features", weights, tmp_path / "cache")
    feature_caches.extract(chosen)
    here = manifest.read(Folder.open(str(tmp_path / "features"), "--features"))
    # As older versions wrote it and read it; one that they could not have made is another one.
    values = here.fingerprint.to_dict()
    assert "decoder" not in values and Fingerprint.from_dict(values) == here.fingerprint
    asked = fingerprint.for_extraction(feature_caches.extraction(configs.replace(chosen, decoder="nvjpeg")))
    assert here.fingerprint.differences(asked) == ["--decoder: the cache has cpu, asked for is nvjpeg"]
    assert Fingerprint.from_dict(asked.to_dict()) == asked
    other = dataclasses.replace(here, fingerprint=asked)
    assert manifest.parse(manifest.dump(other), "here") == other
    assert hashlib.sha256(manifest.dump(here)).digest() != hashlib.sha256(manifest.dump(other)).digest()
    # Without a GPU it is refused in one line, before anything is computed.
    with pytest.raises(UserError, match=r"^--decoder nvjpeg is for GPUs, and this extractor has none"):
        feature_caches.extract(configs.replace(chosen, decoder="nvjpeg", features=str(tmp_path / "others")))
