"""JPEGs for a GPU's decoder: which ones, and what becomes of the others. A processor stands in for the GPU."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from cvdist.data.images import on_gpu
from cvdist.data.images.ahead import DecodeAhead
from cvdist.data.images.decode import is_gpu_decodable
from cvdist.data.images.on_gpu import GpuDecoder
from tests.helpers import pictures
from tests.helpers.quarters import ORIENTATION, encoded, quarters

CPU, SIZE = torch.device("cpu"), 32


def turned(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(quarters(), exif=exif)


FILES = {
    "plain.jpg": (encoded(quarters()), True),
    "other.jpg": (pictures.jpeg(7), True),
    "upright.jpg": (turned(1), True),
    "gray.jpg": (encoded(quarters(mode="L")), True),
    "progressive.jpg": (encoded(quarters(), progressive=True), True),
    "turned.jpg": (turned(6), False),
    "cmyk.jpg": (encoded(quarters(mode="CMYK")), False),
    "large.jpg": (encoded(quarters(400, 300)), False),
    "cut.jpg": (encoded(quarters())[:-200], False),
    "cut-with-end.jpg": (encoded(quarters())[:-200] + b"\xff\xd9", False),
    "picture.png": (encoded(quarters(), "PNG"), False),
    "nothing.jpg": (b"", False),
    "text.jpg": (b"no picture\xff\xd9", False),
}


@pytest.mark.parametrize("name", FILES)
def test_which_files_are_for_the_gpu(name):
    content, expected = FILES[name]
    assert is_gpu_decodable(content, SIZE) == expected


@pytest.mark.parametrize("refused", [(), ("other.jpg",), ("plain.jpg", "gray.jpg")], ids=str)
@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_all_is_decoded_in_order_whoever_does_it(tmp_path, monkeypatch, resize, refused):
    """The same as by the processor alone. torchvision's decoder for processors stands for nvJPEG."""
    for name, (content, _) in FILES.items():
        (tmp_path / name).write_bytes(content)
    sizes = {len(FILES[name][0]) for name in refused}
    real, calls = on_gpu.decode_jpeg, []

    def decode_jpeg(batch, *, mode, device):
        calls.append(len(batch))
        if any(len(one) in sizes for one in batch):
            raise RuntimeError("nvjpegDecode failed")
        return real(batch, mode=mode, device=device)

    monkeypatch.setattr(on_gpu, "decode_jpeg", decode_jpeg)

    def ahead(*, for_gpu):
        reader = DecodeAhead(str(tmp_path), SIZE, resize, threads=2, timeout=60, for_gpu=for_gpu)
        return [one for _, batch in reader.batches(list(FILES), 5) for one in batch]

    decoded, expected = GpuDecoder(CPU, SIZE, resize)(ahead(for_gpu=True)), ahead(for_gpu=False)
    for name, got, wanted in zip(FILES, decoded, expected, strict=True):
        assert (got.digest, got.reason, got.encoded) == (wanted.digest, wanted.reason, None), name
        assert (got.pixels is None) == (wanted.pixels is None), name
        assert got.pixels is None or torch.equal(got.pixels, wanted.pixels), name
    assert calls == ([5, 1, 1, 1, 1, 1] if refused else [5])  # one call, and singly only if one is refused
