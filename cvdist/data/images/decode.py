"""Decodes picture files of any format, all by one rule, to upright, square RGB pictures of one size.

JPEGs are decoded by libjpeg-turbo (simplejpeg), which notices damage, and decodes very large pictures at a
fraction of their size. Pillow decodes all other formats, with packages for HEIC and JPEG XL where they are
installed. `containers` gives them the files without metadata, and says how the camera was held.
`benchmarks/image_decoding.py` measures this.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
import zlib

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cvdist.config import PicturesConfig
from cvdist.data import formats
from cvdist.data.augment import luma
from cvdist.data.images.containers import Jpeg, orientation, png_data, split, split_jpeg
from cvdist.data.images.resizing import crop_middle, resize_pixels

FORMAT = 3  # changes whenever the same file would give other pixels
CUT = "truncated: ends within the picture"
DAMAGED = "damaged within the picture"
_MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
_TOO_LARGE = f"larger than {_MOST_PIXELS:,} pixels"
_DAMAGE = ("Corrupt JPEG data", "Premature end")  # how libjpeg's words for it begin
_ENDED = re.compile("[Pp]remature end|found marker 0xd9 instead")
_CROP = 8 / 7  # torchvision evaluates its weights on the inner 224 of 256 pixels


class UndecodableError(Exception):
    """Raised with one line on why a file can't be decoded; `detail`: what the decoder said, for `--debug`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        """Create the error."""
        super().__init__(reason)
        self.detail = detail


def decode(content: bytes, size: int, resize: str) -> Tensor:
    """Decode a file to upright uint8 RGB (size, size, 3): the first part of `decode_with_size`."""
    return decode_with_size(content, size, resize)[0]


def decode_with_size(content: bytes, size: int, resize: str) -> tuple[Tensor, tuple[int, int]]:
    """Decode a file to upright uint8 RGB (size, size, 3), and return its own width and height in pixels.

    Gray, palette, 16-bit and CMYK pictures become RGB, and transparent ones get a white background. Only the
    first frame of animated ones is taken. The orientation that a camera noted in EXIF is applied. Resizing is
    bilinear and antialiased.

    Args:
        content: content of the file.
        size: height and width in pixels.
        resize: as `PicturesConfig.resize`.

    Raises:
        UndecodableError: if the file is damaged or no picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are refused below anyway
            return _decode(content, formats.identify(content), size, resize)
    except UndecodableError:
        raise
    except Exception as error:  # damaged bytes lead decoders to raise all sorts of things
        cut = isinstance(error, EOFError) or "truncated" in str(error)
        raise UndecodableError(CUT if cut else DAMAGED, _one_line(error)) from error


def is_gpu_decodable(content: bytes, size: int) -> bool:
    """Return whether nvJPEG decodes this file to the same picture as `decode`, apart from rounding.

    That is so for undamaged JPEGs of ordinary size that need no rotation and are stored as YCbCr or grayscale.
    nvJPEG does not notice damage, so the file is decoded here at an eighth of its size, which costs less than
    half as much as decoding it.
    """
    try:
        if formats.identify(content) != "JPEG":
            return False
        jpeg = split_jpeg(content)
        if jpeg.is_cut or _reduction(jpeg, size) > 1 or orientation(jpeg.exif) != 1:
            return False
        if simplejpeg.decode_jpeg_header(jpeg.content)[2] not in ("YCbCr", "Gray"):
            return False
        simplejpeg.decode_jpeg(jpeg.content, "GRAY", min_height=1, min_width=1)
        return True
    except Exception:  # whatever is wrong with it, `decode` says so
        return False


def _decode(content: bytes, format: str, size: int, resize: str) -> tuple[Tensor, tuple[int, int]]:
    """Decode a file of a known format, or of none, as `decode_with_size` does."""
    if format == "JPEG":
        jpeg = split_jpeg(content)
        whole = (jpeg.height, jpeg.width)
        square = resize_to_square(_decode_jpeg(jpeg, size), size, resize, whole)
        return _upright(square, whole, orientation(jpeg.exif))
    if reason := formats.not_read(content, format):
        raise UndecodableError(reason)
    parts = split(content, format)
    try:
        if format == "JPEG XL":
            from pillow_jxl import Decoder

            is_jpeg, header, data, *_ = Decoder(num_threads=0)(parts.content)
            if is_jpeg:
                return _decode(data, "JPEG", size, resize)
            image = Image.frombytes(header.mode.split(";16")[0], (header.width, header.height), data)
        elif format == "HEIC":
            from pillow_heif import open_heif

            image = open_heif(parts.content).to_pillow()
        else:
            image = Image.open(io.BytesIO(parts.content), formats=[format or "TGA"])
        with image:
            pixels = _decode_any(image)
            if format == "PNG" and _is_short(parts.content, pixels):
                raise UndecodableError(CUT, "rows are missing")
            # For AVIF, Pillow puts the file's own orientation into EXIF.
            exif = image.info.get("exif", b"") if format == "AVIF" else parts.exif
            height, width = pixels.shape[1:]
            return _upright(resize_to_square(pixels, size, resize), (height, width), orientation(exif))
    except UndecodableError:
        raise
    except Image.DecompressionBombError:
        raise UndecodableError(_TOO_LARGE) from None
    except Exception as error:
        if not format and isinstance(error, UnidentifiedImageError):
            raise UndecodableError("not a picture of any known kind") from None
        if parts.is_cut:
            raise UndecodableError(CUT, _one_line(error)) from error
        raise


def _reduction(jpeg: Jpeg, size: int) -> int:
    """Return by how much a JPEG is reduced while it is decoded: 2 for half its size, and so on.

    At least twice the pixels that are needed remain, so that resizing has enough to average.
    """
    return next((factor for factor in (8, 4, 2) if min(jpeg.height, jpeg.width) >= 2 * size * factor), 1)


def _decode_jpeg(jpeg: Jpeg, size: int) -> Tensor:
    """Decode a JPEG, at a fraction of its size if it is very large, to uint8 RGB (3, H, W)."""
    if jpeg.height * jpeg.width > _MOST_PIXELS:
        raise UndecodableError(_TOO_LARGE)
    factor = _reduction(jpeg, size)
    least = {"min_height": -(-jpeg.height // factor), "min_width": -(-jpeg.width // factor)}
    try:
        pixels = simplejpeg.decode_jpeg(jpeg.content, **least)
    except ValueError as error:
        if str(error).startswith(_DAMAGE):
            raise UndecodableError(CUT if _ENDED.search(str(error)) else DAMAGED, str(error)) from error
        return _decode_rare_jpeg(jpeg)
    if jpeg.is_cut:
        raise UndecodableError(CUT, "scans are missing")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_rare_jpeg(jpeg: Jpeg) -> Tensor:
    """Decode a JPEG of a kind that libjpeg-turbo's simple interface does not know, if Pillow knows it."""
    try:
        # Without the end marker: running out of data is the only damage that Pillow notices.
        with Image.open(io.BytesIO(jpeg.content.removesuffix(b"\xff\xd9")), formats=["JPEG"]) as image:
            return _decode_any(image)
    except Exception as error:
        if jpeg.kind:
            raise UndecodableError(formats.not_supported(jpeg.kind), _one_line(error)) from error
        raise


def _decode_any(image: Image.Image) -> Tensor:
    """Decode a picture of any format with Pillow to uint8 RGB (3, H, W)."""
    image.load()
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _is_short(png: bytes, pixels: Tensor) -> bool:
    """Return whether a PNG has fewer rows than its header claims, which Pillow leaves black.

    Unpacks the file again, but only if its end is black.
    """
    if pixels[:, -2:].any():
        return False
    width, height, depth, color = struct.unpack_from(">LLBB", png, 16)
    missing = width * height * depth * {2: 3, 4: 2, 6: 4}.get(color, 1) // 8
    unpacked = zlib.decompressobj()
    for data in png_data(png):
        while data and missing > 0:
            missing -= len(unpacked.decompress(data, 1 << 20))
            data = unpacked.unconsumed_tail
    return missing > 0


def _upright(pixels: Tensor, whole: tuple[int, int], orientation: int) -> tuple[Tensor, tuple[int, int]]:
    """Turn square pictures (size, size, 3) upright, from one of EXIF's orientations.

    Args:
        pixels: the picture.
        whole: the picture's own height and width, as stored.
        orientation: from 1, which is upright, to 8.

    Returns:
        The picture, and its own width and height.
    """
    height, width = whole
    if orientation in (5, 6, 7, 8):
        pixels, height, width = pixels.transpose(0, 1), width, height
    flipped = [dim for dim, those in ((0, (3, 4, 7, 8)), (1, (2, 3, 6, 7))) if orientation in those]
    return (pixels.flip(flipped) if flipped else pixels).contiguous(), (width, height)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale a picture of 16-bit, 32-bit or floating point values to 8 bits; Pillow would clip it at 255."""
    values = np.nan_to_num(np.array(image, dtype=np.float64))
    highest = values.max(initial=0)
    full = next(limit for limit in (1, 255, 65535, max(highest, 1)) if highest <= limit)
    if image.mode.startswith("I;16"):
        full = 65535
    return Image.fromarray((values.clip(0) * (255 / full)).round().astype(np.uint8))


def resize_to_square(pixels: Tensor, size: int, resize: str, whole: tuple[int, int] | None = None) -> Tensor:
    """Resize a picture, on any device, or on the CPU if it was decoded at a reduced size.

    Args:
        pixels: uint8 (3, H, W).
        size: height and width of the result in pixels.
        resize: as `PicturesConfig.resize`.
        whole: height and width of the picture of which `pixels` is a reduced copy.

    Returns:
        uint8 (size, size, 3).
    """
    height, width = whole or pixels.shape[1:]
    if resize.startswith("crop:"):
        return crop_middle(pixels, size, resize, (height, width)).permute(1, 2, 0).contiguous()
    if resize == "crop":
        side = max(1, round(min(height, width) / _CROP))
        top, left = (height - side) // 2, (width - side) // 2
        factor = round(height / pixels.shape[1])
        if factor > 1:
            return _resize_box(pixels, size, [edge / factor for edge in (left, top, left + side, top + side)])
        pixels = pixels[:, top : top + side, left : left + side]
    if pixels.shape[1:] != (size, size):
        pixels = resize_pixels(pixels, size, size)
    return pixels.permute(1, 2, 0).contiguous()


def _resize_box(pixels: Tensor, size: int, box: list[float]) -> Tensor:
    """Resize a part of a picture whose edges lie between pixels, which Pillow can and torchvision can't.

    Args:
        pixels: uint8 (3, H, W).
        size: height and width of the result in pixels.
        box: left, top, right and bottom of the part.
    """
    left, top = math.floor(box[0]), math.floor(box[1])
    inner = pixels[:, top : math.ceil(box[3]), left : math.ceil(box[2])].permute(1, 2, 0).contiguous().numpy()
    within = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    small = Image.fromarray(inner).resize((size, size), Image.Resampling.BILINEAR, box=within)
    return torch.from_numpy(np.array(small))


def to_gray(pixels: Tensor) -> Tensor:
    """Convert RGB pictures (n, 3, H, W) to gray ones (n, 1, H, W), float32, rounded as Pillow does."""
    return luma(pixels.float()).round()


def decode_settings(config: PicturesConfig) -> dict[str, object]:
    """Return all settings and versions that the pixels of a file depend on, besides the file."""
    return {"decode": FORMAT, "size": config.image_size, "resize": config.resize}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {text}"
