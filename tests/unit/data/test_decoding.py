"""Sizes, crops and real photographs. Kinds of files and of damage are in `integration/test_odd_pictures.py`."""

from __future__ import annotations

import io

import pytest
import simplejpeg
import torch
from PIL import Image

from cvdist.data.images.decode import UndecodableError, decode, resize_to_square
from tests.helpers import pictures
from tests.helpers.quarters import BLUE, RED, assert_quarters, close, encoded, quarters


def test_huge_pictures_decode_small_and_too_huge_ones_are_refused():
    content = encoded(quarters(5000, 4000))
    assert_quarters(decode(content, 224, "squash"))
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(UndecodableError, match="larger than 178,956,970 pixels"):
        decode(bomb, 224, "squash")


def test_crop_keeps_proportions_and_squash_keeps_everything():
    picture = Image.new("RGB", (300, 100), BLUE)
    picture.paste(RED, (100, 0, 200, 100))
    content = encoded(picture, "PNG")
    assert close(decode(content, 64, "crop").float().mean((0, 1)).tolist(), RED, 2)
    squashed = decode(content, 63, "squash")
    assert [close(squashed[30, x].tolist(), color, 2) for x, color in ((10, BLUE), (31, RED), (52, BLUE))]


@pytest.mark.parametrize("size", [32, 64])
def test_reduced_pictures_are_cropped_where_full_ones_are(size):
    """To a part of a pixel; in whole ones the mean difference was 2.1 of 255 at 32 pixels, and 0.8 at 64."""
    for seed in range(4):
        content = pictures.jpeg(seed, 500, 375)
        full = torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1)
        expected = resize_to_square(full, size, "crop")
        assert (decode(content, size, "crop").float() - expected.float()).abs().mean() < 0.5


def test_the_two_decoders_agree(shared_data):
    """Of the same JPEG at the same size: libjpeg-turbo's and Pillow's pixels, on real photographs."""
    for path in sorted((shared_data / "dogs-vs-cats" / "valid" / "cat").iterdir())[:6]:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            png = encoded(image.convert("RGB"), "PNG")
        difference = decode(content, 224, "squash").float() - decode(png, 224, "squash").float()
        assert difference.abs().mean() < 1 and difference.abs().max() < 64
