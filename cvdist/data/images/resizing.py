"""Resizing as torchvision does it, bit for bit, without its import, which takes a process two seconds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_pixels(pixels: Tensor, height: int, width: int, interpolation: str = "bilinear") -> Tensor:
    """Resize a picture with antialiasing.

    Args:
        pixels: uint8 (3, H, W), on any device.
        height: height of the result in pixels.
        width: width of the result in pixels.
        interpolation: `bilinear` or `bicubic`.

    Returns:
        uint8 (3, height, width).
    """
    native = pixels.device.type == "cpu"  # the other devices resize float pixels only
    batch = pixels[None] if native else pixels[None].float()
    batch = F.interpolate(batch, (height, width), mode=interpolation, align_corners=False, antialias=True)
    return batch[0] if native else batch[0].clamp(0, 255).round().to(torch.uint8)


def crop_middle(pixels: Tensor, size: int, resize: str, whole: tuple[int, int]) -> Tensor:
    """Return the middle of a picture after its shorter side was resized, as torchvision's weights expect it.

    Args:
        pixels: uint8 (3, H, W), on any device.
        size: height and width of the result in pixels.
        resize: `crop:SHORTER:INTERPOLATION`: how long the shorter side is before the crop, and how it gets so.
        whole: height and width of the picture of which `pixels` may be a reduced copy.

    Returns:
        uint8 (3, size, size); black where the resized picture is smaller.
    """
    _, side, interpolation = resize.split(":")
    shorter, longer = int(side), int(int(side) * max(whole) / min(whole))
    height, width = (longer, shorter) if whole[0] > whole[1] else (shorter, longer)
    if pixels.shape[1:] != (height, width):
        pixels = resize_pixels(pixels, height, width, interpolation)
    if min(height, width) < size:
        left, top = max(size - width, 0) // 2, max(size - height, 0) // 2
        pixels = F.pad(pixels, (left, max(size - width, 0) - left, top, max(size - height, 0) - top))
    top, left = round((pixels.shape[1] - size) / 2), round((pixels.shape[2] - size) / 2)
    return pixels[:, top : top + size, left : left + size]
