"""Resizing as torchvision evaluates its weights: the shorter side to a length, then the picture's middle."""

from __future__ import annotations

from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop
from torchvision.transforms.v2.functional import resize as resize_pixels


def crop_middle(pixels: Tensor, size: int, resize: str, whole: tuple[int, int]) -> Tensor:
    """Return the middle of a picture, as the transforms of torchvision's weights do.

    Args:
        pixels: uint8 (3, H, W), on any device.
        size: height and width of the result in pixels.
        resize: `crop:SHORTER:INTERPOLATION`: how long the shorter side is before the crop, and how it gets so.
        whole: height and width of the picture of which `pixels` may be a reduced copy.

    Returns:
        uint8 (3, size, size).
    """
    _, side, interpolation = resize.split(":")
    shorter, longer = int(side), int(int(side) * max(whole) / min(whole))
    target = [longer, shorter] if whole[0] > whole[1] else [shorter, longer]
    if list(pixels.shape[1:]) != target:
        pixels = resize_pixels(pixels, target, InterpolationMode(interpolation), antialias=True)
    return center_crop(pixels, [size, size])
