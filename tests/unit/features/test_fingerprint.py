"""A cache says which decoder made it."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest

from cvdist import config as configs
from cvdist.errors import UserError
from cvdist.features import fingerprint, manifest
from cvdist.features.fingerprint import Fingerprint
from tests.helpers import feature_caches


@pytest.mark.usefixtures("cached")
def test_a_cache_says_which_decoder_made_it(chosen, tmp_path):
    here = feature_caches.manifest_of(chosen)
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
