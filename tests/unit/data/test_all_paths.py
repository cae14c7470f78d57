"""Odd pictures through all that decodes: the same pixels, bit for bit, and the same errors, word for word."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cvdist
from cvdist import config as configs
from cvdist import loaders
from cvdist.config import TrainConfig, cache_folder
from cvdist.data.images import store
from cvdist.data.images.ahead import DecodeAhead, Reader
from cvdist.data.images.loader import DecodingSource
from cvdist.data.images.on_gpu import GpuDecoder
from tests.helpers import pictures
from tests.unit.data.test_decoding import ORIENTATION, encoded, quarters

SIZE = 24


def turned(orientation, kind="JPEG", **options):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(quarters(**options), kind, exif=exif)


def damaged(content):
    """Bytes of the scan flipped, behind which the file ends as it should."""
    start = len(content) * 3 // 4
    return content[:start] + bytes(byte ^ 0xA5 for byte in content[start : start + 40]) + content[start + 40 :]


def mpo():
    file = io.BytesIO()
    quarters().save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (96, 64))])
    return file.getvalue()


def odd():
    """Contents by path, and which of them can't be decoded."""
    photograph, gray = pictures.jpeg(3, 90, 70), quarters(mode="L")
    palette = quarters().quantize(4)
    deep = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    good = {
        **{f"jpeg-{number}.jpg": turned(number) for number in range(1, 9)},
        **{f"large-{number}.jpg": turned(number, width=400, height=300) for number in (1, 6)},
        **{f"png-{number}.png": turned(number, "PNG") for number in (3, 6)},
        "tiff-6.tif": turned(6, "TIFF"),
        "gray.jpg": encoded(gray),
        "gray-alpha.png": encoded(gray.convert("LA"), "PNG"),
        "palette.png": encoded(palette, "PNG", transparency=palette.getpixel((1, 1))),
        "rgba.png": encoded(quarters(mode="RGBA"), "PNG"),
        "cmyk.jpg": encoded(quarters(mode="CMYK")),
        "rgb-inside.jpg": encoded(quarters(), keep_rgb=True),
        "subsampled.jpg": encoded(quarters(97, 63), subsampling=2),
        "deep.png": encoded(Image.fromarray(deep), "PNG"),
        "one-bit.png": encoded(quarters(mode="1"), "PNG"),
        "progressive.jpg": encoded(quarters(), progressive=True),
        "two-in-one.jpg": mpo(),
        "tiny.jpg": encoded(Image.new("RGB", (1, 1))),
        "narrow.jpg": encoded(Image.new("RGB", (1, 300))),
        "really-png.jpg": encoded(quarters(), "PNG"),
        "junk-behind.jpg": photograph + b"junk" * 9,
        "bad-metadata.jpg": encoded(quarters(), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff\x01\x00"),
    }
    bad = {
        "cut.jpg": photograph[: len(photograph) // 2],
        "cut-with-end.jpg": photograph[: len(photograph) // 2] + b"\xff\xd9",
        "flipped.jpg": damaged(photograph),
        "cut.png": encoded(quarters(), "PNG")[:-60],
        "text.jpg": b"no picture\xff\xd9",
        "empty.jpg": b"",
        "start.jpg": b"\xff\xd8\xff",
    }
    return good, bad


GOOD, BAD = odd()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    for number, (path, content) in enumerate({**GOOD, **BAD}.items()):
        (root / "ab"[number % 2]).mkdir(exist_ok=True)
        (root / "ab"[number % 2] / path).write_bytes(content)
    return root


@pytest.fixture(scope="module", params=["squash", "crop"])
def resize(request):
    return request.param


@pytest.fixture(scope="module")
def by_reader(folder, resize):
    """By path: pixels, or why there are none. The other paths are compared with it."""
    paths = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*"))
    return results(paths, Reader(str(folder), SIZE, resize).decode(paths))


def results(paths, decoded):
    pairs = zip(paths, decoded, strict=True)
    return {path: one.reason if one.pixels is None else one.pixels for path, one in pairs}


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for path, one in wanted.items():
        if isinstance(one, str):
            assert got[path] == one, path
        else:
            assert torch.equal(got[path], one), path


def test_nothing_else_decodes():
    """Pictures are opened in the file with the rule alone; on GPUs, and to shrink a report's, where it says."""
    package = Path(cvdist.__file__).parent
    calls = re.compile(r"Image\.open\(|simplejpeg\.|decode_jpeg\(|decode_image\(|read_image\(")
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if calls.search(path.read_text())}
    assert found == {"data/images/decode.py", "data/images/on_gpu.py", "report_html/embed.py"}


def test_which_pictures_are_bad_and_why(by_reader):
    reasons = {path.split("/")[1]: one for path, one in by_reader.items() if isinstance(one, str)}
    assert reasons.pop("flipped.jpg").startswith("Corrupt JPEG data")
    assert reasons.pop("cut.png") and reasons.pop("start.jpg")  # in Pillow's words
    assert reasons == {
        "cut.jpg": "Premature end of JPEG file",
        "cut-with-end.jpg": "Corrupt JPEG data: premature end of data segment",
        "text.jpg": "not a picture of any known kind",
        "empty.jpg": "the file is empty",
    }


@pytest.mark.parametrize("kind", ["threads", "processes", "a GPU"])
def test_ahead(folder, resize, by_reader, kind):
    """In place of nvJPEG stands torchvision's decoder for processors, which notices as little damage."""
    ahead = DecodeAhead(
        str(folder), SIZE, resize, threads=2, timeout=60, processes=kind == "processes", for_gpu=kind == "a GPU"
    )
    decoded = [one for _, batch in ahead.batches(list(by_reader), 20) for one in batch]
    ahead.close()
    if kind == "a GPU":
        assert sum(one.encoded is not None for one in decoded) >= 7
        decoded = GpuDecoder(torch.device("cpu"), SIZE, resize)(decoded)
    assert_same(results(by_reader, decoded), by_reader)


@pytest.mark.parametrize("room", [0.9, 0.0], ids=["kept on the disk", "decoded in each epoch"])
def test_training(folder, resize, by_reader, tmp_path, room):
    config = configs.replace(
        TrainConfig(), dataset="images", data=str(folder), cache=str(tmp_path), image_size=SIZE, resize=resize,
        cache_fraction=room, decode_workers=2, max_bad_fraction=0.5,
    )  # fmt: skip
    loaders.prepare(config)
    loader = loaders.open_loader(config, torch.device("cpu"))
    got = {picture.path: picture.reason for picture in loader.quarantine}
    for split, count in (("train", loader.info.train_size), ("valid", loader.info.valid_size)):
        pixels = loader.pictures(split, range(count))[0].permute(0, 2, 3, 1)
        got |= dict(zip(loader.names(split, range(count)), pixels, strict=True))
    assert_same(got, by_reader)
    if room:
        return
    table = store.open_picture_store(config.data, cache_folder(config.data.cache)).table
    source = DecodingSource(config.data, table.column("path"), processes=2, timeout=60, pinned=False)
    (streamed, nothing) = source.batches([range(len(table)), []])
    assert len(nothing) == 0
    assert_same(
        dict(zip(table.column("path").to_pylist(), streamed, strict=True)),
        {path: one for path, one in by_reader.items() if not isinstance(one, str)},
    )
