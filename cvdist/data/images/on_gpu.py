"""Decoding of JPEGs on a GPU with nvJPEG, for nodes whose CPU can't decode as fast as the GPU computes.

nvJPEG's pixels differ slightly from the CPU decoder's, in rounding and in the interpolation of colors, so a
feature cache records which decoder was used. The GPU decodes ordinary JPEGs only, a batch in one call. The CPU
decodes everything else: other formats, CMYK, pictures that need rotation, very large ones, damaged files, and
files that nvJPEG rejects.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from cvdist.data.dataset import to_device
from cvdist.data.images.ahead import Decoded, decoded
from cvdist.data.images.decode import resize_to_square
from cvdist.errors import UserError


class GpuDecoder:
    """Decodes the pictures that `DecodeAhead` has left encoded. It is not thread-safe."""

    def __init__(self, device: torch.device, size: int, resize: str) -> None:
        """Note the settings.

        Args:
            device: GPU that decodes.
            size: height and width of the decoded pictures in pixels.
            resize: how pictures become square, as `DataConfig.resize`.
        """
        self._device, self._size, self._resize = device, size, resize

    def require(self) -> None:
        """Check that nvJPEG works here, by decoding a small picture.

        Raises:
            UserError: if it does not.
        """
        if self._device.type != "cuda":
            raise UserError(
                "--decoder nvjpeg is for GPUs, and this extractor has none: leave it out, or extract with "
                "--device cuda"
            )
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "JPEG")
        try:
            self._decode([_tensor(file.getvalue())])
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:160]
            raise UserError(f"--decoder nvjpeg can't be used here ({reason}): leave it out") from error

    def __call__(self, batch: Sequence[Decoded]) -> list[Decoded]:
        """Decode what is left encoded in a batch.

        Returns:
            The batch with pixels uint8 (size, size, 3) on the device, where a picture can be decoded.
        """
        left = [one.encoded for one in batch if one.encoded is not None]
        pixels = iter(self._pixels([_tensor(content) for content in left]) if left else [])
        return [self._finished(one, next(pixels) if one.encoded is not None else None) for one in batch]

    def _finished(self, one: Decoded, pixels: Tensor | None) -> Decoded:
        if pixels is not None:
            height, width = pixels.shape[1:]
            square = resize_to_square(pixels, self._size, self._resize)
            return Decoded(one.digest, square, width=width, height=height)
        if one.encoded is not None:  # nvJPEG refused it, so the CPU decides
            one = decoded(one.encoded, one.digest, self._size, self._resize)
        return dataclasses.replace(
            one, pixels=None if one.pixels is None else to_device(one.pixels, self._device)
        )

    def _pixels(self, encoded: list[Tensor]) -> list[Tensor | None]:
        """Decode files to uint8 (3, H, W) each, or None for files that nvJPEG rejects."""
        try:
            return list(self._decode(encoded))
        except RuntimeError:  # one of the files failed, but not which
            pass
        found: list[Tensor | None] = []
        for one in encoded:
            try:
                found += self._decode([one])
            except RuntimeError:
                found.append(None)
        return found

    def _decode(self, encoded: list[Tensor]) -> list[Tensor]:
        pixels: list[Tensor] = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=self._device)
        return pixels


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
