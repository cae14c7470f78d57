"""Formats that need a package or are not read: what listing, decoding and the quarantine say of them."""

from __future__ import annotations

import logging

import pytest
import torch

from cvdist import config as configs
from cvdist import loaders
from cvdist.config import TrainConfig
from cvdist.data import formats
from cvdist.data.forms import look_unlabeled
from cvdist.data.images import listing
from cvdist.data.images.decode import UndecodableError, decode
from tests.helpers import pictures
from tests.helpers.jobs import user_error
from tests.helpers.odd_pictures import HAS_HEIC, with_extras

HEIC = b"\0\0\0\x18ftypheic" + bytes(99)


@pytest.fixture
def without_extras(monkeypatch):
    monkeypatch.setattr(formats, "_is_installed", lambda module: False)


@pytest.fixture
def with_all_extras(monkeypatch):
    monkeypatch.setattr(formats, "_is_installed", lambda module: True)


def config(root, **changes):
    return configs.replace(TrainConfig(), dataset="images", data=str(root), image_size=16, **changes)


def folder(root, *names):
    for i, name in enumerate(names):
        path = root / "ab"[i % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(HEIC)
    return root


CASES = [
    (["1.heic", "2.HEIC", "3.heif"], "3 files are HEIC, read with the extra heif (pip install pillow-heif)"),
    (["1.jxl"], "1 file is JPEG XL, read with the extra jxl (pip install pillow-jxl-plugin)"),
    (["1.NEF", "2.cr2"], "2 files are camera raw, which is not supported: convert to JPEG or TIFF"),
    (
        ["1.heic", "2.dng", "3.dng"],
        "1 file is HEIC, read with the extra heif (pip install pillow-heif); 2 files are camera raw, which is "
        "not supported: convert to JPEG or TIFF",
    ),
]


@pytest.mark.parametrize(("names", "text"), CASES)
def test_a_folder_without_pictures_that_can_be_read(tmp_path, without_extras, names, text):
    root = folder(tmp_path / "x", *names)
    for look in (lambda: listing.list_pictures(config(root).data), lambda: look_unlabeled(str(root))):
        assert user_error(look) == f"--data {root} has no pictures that can be read: {text}"


@pytest.mark.parametrize(("names", "text"), CASES)
def test_some_pictures_that_cant_be_read(tmp_path, without_extras, caplog, names, text):
    caplog.set_level(logging.INFO, "cvdist")
    root = folder(pictures.write(tmp_path / "x", {"a": 2, "b": 2}), *names)
    assert len(listing.list_pictures(config(root).data).table) == len(look_unlabeled(str(root))) == 4
    lines = [one.getMessage() for one in caplog.records if "left out" in one.getMessage()]
    assert lines == [f"data       left out: {text}"] * 2


def test_with_the_extra_they_are_listed(tmp_path, with_all_extras):
    root = folder(tmp_path / "x", "1.heic", "2.HIF", "3.jxl", "4.jpg")
    assert len(listing.list_pictures(config(root).data).table) == 4


def test_an_extra_that_is_installed_later(tmp_path, monkeypatch):
    """A photograph of that format under another name is in the quarantine until then."""
    if not HAS_HEIC:
        pytest.skip("pillow-heif is not installed (the extra heif)")
    root = pictures.write(tmp_path / "x", {"a": 3, "b": 3})
    (root / "a" / "0000.jpg").write_bytes(
        next(content for name, content, *_ in with_extras() if name == "heic")
    )
    chosen = config(root, cache=str(tmp_path / "cache"), decode_workers=1, max_bad_fraction=0.5)

    def opened():
        loaders.prepare(chosen)
        return loaders.open_loader(chosen, torch.device("cpu"))

    with monkeypatch.context() as patch:
        patch.setattr(formats, "_is_installed", lambda module: False)
        (bad,) = opened().quarantine
        assert bad.reason == "a format that is not supported: HEIC without the extra heif"
    assert not opened().quarantine


def test_formats_that_are_not_listed_are_not_opened():
    """Pillow would start Ghostscript."""
    with pytest.raises(UndecodableError, match="not a picture: text"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 32, "squash")
