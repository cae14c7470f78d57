"""Odd pictures through all that decodes: what is right, the same pixels bit for bit, and the same words."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cvdist
from cvdist import config as configs
from cvdist import loaders
from cvdist.config import TrainConfig, cache_folder
from cvdist.data.images import store
from cvdist.data.images.ahead import DecodeAhead, Reader
from cvdist.data.images.loader import DecodingSource
from cvdist.data.images.on_gpu import GpuDecoder
from tests.helpers import pictures
from tests.helpers.jobs import ROOT
from tests.helpers.odd_pictures import share, table
from tests.helpers.quarters import assert_quarters

ODD = table()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All files in two classes, and links: to a picture, to nothing, to itself, and in circles."""
    root = tmp_path_factory.mktemp("odd")
    for number, (path, odd) in enumerate(ODD.items()):
        (root / "ab"[number % 2]).mkdir(exist_ok=True)
        (root / "ab"[number % 2] / path).write_bytes(odd.content)
    first = root / "a" / next(iter(ODD))
    links = {
        "link": first,
        "gone": root / "gone",
        "self": root / "a/self.jpg",
        "circle": root / "a",
        "up": root,
    }
    for link, target in links.items():
        (root / "a" / f"{link}.jpg").symlink_to(target)
    return root


# Size and `--resize`: the large pictures of the table are decoded at a fourth, at half and in full.
SHAPES = [(32, "squash"), (32, "crop"), (128, "crop"), (224, "squash")]


@pytest.fixture(scope="module", params=SHAPES[1::2], ids=str)
def shape(request):
    """What the paths are compared at."""
    return request.param


@pytest.fixture(scope="module")
def by_reader(folder, shape):
    """By path: pixels, or why there are none. The other paths are compared with it."""
    return read(folder, shape)


def read(folder, shape):
    paths = [f"{'ab'[number % 2]}/{path}" for number, path in enumerate(ODD)]
    return results(paths, Reader(str(folder), *shape).decode(paths))


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
    """Pictures are opened in the file with the rule alone; elsewhere only where it says."""
    package = Path(cvdist.__file__).parent
    calls = re.compile(r"Image\.open\(|simplejpeg\.|decode_jpeg\(|decode_image\(|read_image\(")
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if calls.search(path.read_text())}
    assert found == {
        *("data/images/decode.py", "data/images/on_gpu.py", "report_html/embed.py"),
        *("tracking/served.py", "jobs/export.py"),  # code that runs without this package
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_right(folder, shape):
    wrong = {}
    for path, one in read(folder, shape).items():
        odd = ODD[path.split("/")[1]]
        try:
            if isinstance(one, str) or isinstance(odd.right, str):
                assert one == odd.right
            else:
                assert_quarters(one, odd.right, odd.tolerance)
        except AssertionError as error:
            wrong[path] = str(error)
    assert not wrong


@pytest.mark.parametrize("kind", ["threads", "processes", "a GPU"])
def test_ahead(folder, shape, by_reader, kind):
    """In place of nvJPEG stands torchvision's decoder for processors, which notices as little damage."""
    processes, for_gpu = kind == "processes", kind == "a GPU"
    ahead = DecodeAhead(str(folder), *shape, threads=2, timeout=60, processes=processes, for_gpu=for_gpu)
    decoded = [one for _, batch in ahead.batches(list(by_reader), 20) for one in batch]
    ahead.close()
    if for_gpu:
        assert sum(one.encoded is not None for one in decoded) >= 5
        decoded = GpuDecoder(torch.device("cpu"), *shape)(decoded)
    assert_same(results(by_reader, decoded), by_reader)


@pytest.mark.parametrize("room", [0.9, 0.0], ids=["kept on the disk", "decoded in each epoch"])
def test_training(folder, shape, by_reader, tmp_path, room):
    size, resize = shape
    config = configs.replace(
        TrainConfig(), dataset="images", data=str(folder), cache=str(tmp_path), image_size=size, resize=resize,
        cache_fraction=room, decode_workers=2, max_bad_fraction=0.5,
    )  # fmt: skip
    loaders.prepare(config)
    loader = loaders.open_loader(config, torch.device("cpu"))
    got = {picture.path: picture.reason for picture in loader.quarantine}
    for split, count in (("train", loader.info.train_size), ("valid", loader.info.valid_size)):
        pixels = loader.pictures(split, range(count))[0].permute(0, 2, 3, 1)
        got |= dict(zip(loader.names(split, range(count)), pixels, strict=True))
    assert_same(got, by_reader | {"a/link.jpg": by_reader[next(iter(by_reader))]})
    if room:
        return
    table = store.open_picture_store(config.data, cache_folder(config.data.cache)).table
    source = DecodingSource(config.data, table.column("path"), processes=2, timeout=60, pinned=False)
    (streamed, nothing) = source.batches([range(len(table)), []])
    assert len(nothing) == 0
    assert_same(
        dict(zip(table.column("path").to_pylist(), streamed, strict=True)),
        {path: one for path, one in got.items() if not isinstance(one, str)},
    )


def test_what_the_decoder_said_is_for_debugging(tmp_path):
    """Also in the processes that decode."""
    (tmp_path / "cut.jpg").write_bytes(share(pictures.jpeg(0), 0.6))
    program = """
import sys
from cvdist import log
from cvdist.data.images.ahead import DecodeAhead
for debug in (False, True):
    log.setup(debug=debug)
    ahead = DecodeAhead(sys.argv[1], 32, "squash", threads=1, timeout=60, processes=True)
    next(ahead.batches(["cut.jpg"], 1))
    print(f"debug {debug}", file=sys.stderr, flush=True)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    quiet, debugging = said.split("debug False")
    detail = "Corrupt JPEG data: premature end of data segment"
    assert detail not in quiet and detail in debugging
