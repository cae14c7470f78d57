"""What is measured of decoded pictures."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from cvdist.data.images.decode import decode_with_size
from cvdist.data.images.measures import measure


def test_brightness_contrast_and_border():
    random = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (4, 40, 40, 3), dtype=torch.uint8, generator=random)
    pictures[1] = 255
    pictures[2, :10] = 0
    pictures[2, :, 36:] = 0
    pictures[3, ..., 1:] = 0
    found = measure(pictures)
    gray = pictures[:, ::2, ::2].float().mean(3) / 255
    torch.testing.assert_close(found[:, 0], gray.mean((1, 2)))
    torch.testing.assert_close(found[:, 1], gray.flatten(1).std(1, correction=0))
    assert found[:, 2].tolist() == pytest.approx([0, 1, 1 - 0.75 * 0.9, 0])


def test_a_gradient_is_no_border():
    ramp = torch.arange(0, 240, 6, dtype=torch.uint8)[:, None, None].expand(40, 40, 3)
    assert measure(ramp[None])[0, 2] < 0.2


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_size_is_that_of_the_upright_picture(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(content, kind, exif=exif)
    pixels, size = decode_with_size(content.getvalue(), 16, "squash")
    assert pixels.shape == (16, 16, 3) and size == ((40, 60) if orientation == 6 else (60, 40))
