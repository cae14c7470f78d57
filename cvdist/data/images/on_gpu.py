"""JPEGs decoded by the GPU, through nvJPEG: for jobs whose processors can't decode as fast as it computes.

Its pixels differ a little from those of the processor's decoder (other rounding, other interpolation of
colours), so what is computed from them says which it was. It gets ordinary JPEGs only, a batch in one call. All
else is the processor's: other kinds of files, CMYK, pictures that a camera has noted to be turned, very large
ones, and files that end too early or that nvJPEG refuses.
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
from cvdist.data.images.ahead import Decoded
from cvdist.data.images.decode import UndecodableError, decode, resized
from cvdist.errors import UserError


class GpuDecoder:
    """Turns what `DecodeAhead` has left encoded into pixels. Not for several threads at once."""

    def __init__(self, device: torch.device, size: int, resize: str) -> None:
        """`size`, `resize`: as of `cvdist.data.images.decode.decode`."""
        self._device, self._size, self._resize = device, size, resize

    def require(self) -> None:
        """Decode a first picture.

        Raises:
            UserError: if that can't be done here.
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
        """The batch with pixels uint8 (size, size, 3) on the device, and nothing left encoded."""
        left = [one.encoded for one in batch if one.encoded is not None]
        pixels = iter(self._pixels([_tensor(content) for content in left]) if left else [])
        return [self._finished(one, next(pixels) if one.encoded is not None else None) for one in batch]

    def _finished(self, one: Decoded, pixels: Tensor | None) -> Decoded:
        if pixels is not None:
            return Decoded(one.digest, resized(pixels, self._size, self._resize))
        if one.encoded is not None:  # refused, so the processor's to judge
            try:
                one = Decoded(one.digest, decode(one.encoded, self._size, self._resize))
            except UndecodableError as error:
                return Decoded(one.digest, None, str(error))
        return dataclasses.replace(
            one, pixels=None if one.pixels is None else to_device(one.pixels, self._device)
        )

    def _pixels(self, encoded: list[Tensor]) -> list[Tensor | None]:
        """uint8 (3, H, W) each, None for files that are refused."""
        try:
            return list(self._decode(encoded))
        except RuntimeError:  # of one of them, which is not named
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
