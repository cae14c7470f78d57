"""A picture of four colored quarters, by which a test sees how it was decoded."""

from __future__ import annotations

import io

import torch
from PIL import Image

RED, GREEN, BLUE, WHITE = (220, 30, 20), (20, 190, 40), (30, 20, 200), (255, 255, 255)
ORIENTATION = 0x0112
ORIENTED = {
    1: (RED, GREEN, BLUE, WHITE),
    2: (GREEN, RED, WHITE, BLUE),
    3: (WHITE, BLUE, GREEN, RED),
    4: (BLUE, WHITE, RED, GREEN),
    5: (RED, BLUE, GREEN, WHITE),
    6: (BLUE, RED, WHITE, GREEN),
    7: (WHITE, GREEN, BLUE, RED),
    8: (GREEN, WHITE, RED, BLUE),
}
"""The four quarters once a picture with this orientation in EXIF is upright."""


def quarters(width=96, height=64, mode="RGB"):
    """Red, green / blue, white."""
    picture = Image.new("RGB", (width, height), WHITE)
    picture.paste(RED, (0, 0, width // 2, height // 2))
    picture.paste(GREEN, (width // 2, 0, width, height // 2))
    picture.paste(BLUE, (0, height // 2, width // 2, height))
    return picture.convert(mode)


def encoded(picture, kind="JPEG", **options):
    file = io.BytesIO()
    if kind == "JPEG":
        options = {"quality": 95, "subsampling": 0, **options}
    picture.save(file, kind, **options)
    return file.getvalue()


def corners(pixels):
    """The middles of the four quarters: top left, top right, bottom left, bottom right."""
    a, b = pixels.shape[0] // 4, 3 * pixels.shape[0] // 4
    return [tuple(pixels[y, x].tolist()) for y in (a, b) for x in (a, b)]


def close(got, expected, tolerance=12):
    return all(abs(g - e) <= tolerance for g, e in zip(got, expected, strict=True))


def assert_quarters(pixels, expected=(RED, GREEN, BLUE, WHITE), tolerance=12):
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    got = corners(pixels)
    assert all(close(g, e, tolerance) for g, e in zip(got, expected, strict=True)), got
