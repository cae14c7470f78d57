"""The one rule of decoding: picture files of any format become upright, square RGB pictures of one size.

JPEGs are decoded by libjpeg-turbo (simplejpeg), which notices damage, and decodes very large pictures at a
fraction of their size. All other formats, CMYK, and what libjpeg-turbo does not know are decoded by Pillow. It
also says what kind of file it is and how the camera was held. `benchmarks/image_decoding.py` measures this.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import resize as resize_pixels

from cvdist.config import PicturesConfig
from cvdist.data.augment import luma
from cvdist.data.images.resizing import crop_middle

FORMAT = 2  # changes whenever the same file would give other pixels
SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".gif",
        ".bmp",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".avif",
        ".jp2",
        ".tga",
        ".ico",
    ]
)
_JPEG = ("JPEG", "MPO")  # MPO: several JPEGs in a file, the first of which is shown
_DAMAGE = ("Corrupt JPEG data", "Premature end")  # how libjpeg's words for it begin
_ORIENTATION = 0x0112  # the EXIF tag
_CROP = 8 / 7  # torchvision evaluates its weights on the inner 224 of 256 pixels


class UndecodableError(Exception):
    """One line that says why a file can't be decoded."""


def decode(content: bytes, size: int, resize: str) -> Tensor:
    """The picture in `content`, upright, as uint8 RGB (size, size, 3).

    Gray, palette, 16-bit and CMYK pictures become RGB, transparent ones lie on white, animated ones show their
    first frame, and the orientation that a camera noted is applied. Resizing is bilinear and antialiased.

    Args:
        content: of the file.
        size: height and width in pixels.
        resize: as `PicturesConfig.resize`.

    Raises:
        UndecodableError: if it is damaged or no picture.
    """
    if not content:
        raise UndecodableError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and of sizes that are refused below anyway
            with Image.open(io.BytesIO(content)) as image:
                pixels = _decode_jpeg(content, image, size) if _is_jpeg(image) else None
                if pixels is None:
                    pixels = _decode_any(image)
                # Asked for after decoding: Pillow turns some formats by itself.
                return resize_to_square(_turn(pixels, _orientation(image)), size, resize)
    except UnidentifiedImageError:
        raise UndecodableError("not a picture of any known kind") from None
    except Image.DecompressionBombError:
        raise UndecodableError(f"larger than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from None
    except Exception as error:  # damaged bytes lead decoders to raise all sorts of things
        raise UndecodableError(_one_line(error)) from error


def is_gpu_decodable(content: bytes, size: int) -> bool:
    """Return whether nvJPEG decodes this file to the same picture as `decode`, apart from rounding.

    That is so for undamaged JPEGs of ordinary size that need no rotation and are stored as YCbCr or grayscale.
    nvJPEG does not notice damage, so the file is decoded here at an eighth of its size, which costs less than
    half as much as decoding it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                if not _is_jpeg(image) or _reduction(image, size) > 1 or _orientation(image) != 1:
                    return False
        if simplejpeg.decode_jpeg_header(content)[2] not in ("YCbCr", "Gray"):
            return False
        simplejpeg.decode_jpeg(content, "GRAY", min_height=1, min_width=1)
        return True
    except Exception:  # whatever is wrong with it, `decode` says so
        return False


def _is_jpeg(image: Image.Image) -> bool:
    return image.format in _JPEG and image.mode in ("RGB", "L")


def _reduction(image: Image.Image, size: int) -> int:
    """The fraction of its size at which a JPEG is decoded, as its denominator.

    At least twice the pixels that are needed remain, so that resizing has what to average.
    """
    return next((factor for factor in (8, 4, 2) if min(image.size) >= 2 * size * factor), 1)


def _decode_jpeg(content: bytes, image: Image.Image, size: int) -> Tensor | None:
    """Decode a JPEG to uint8 RGB (3, H, W), or return None for a kind that libjpeg-turbo does not know.

    Raises:
        ValueError: if it is damaged.
    """
    factor = _reduction(image, size)
    least = {"min_height": -(-image.height // factor), "min_width": -(-image.width // factor)}
    try:
        pixels = simplejpeg.decode_jpeg(content, **least)
    except ValueError as error:
        if str(error).startswith(_DAMAGE):
            raise
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_any(image: Image.Image) -> Tensor:
    """Decode a picture of any format with Pillow to uint8 RGB (3, H, W)."""
    image.load()
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8 as in EXIF; 1, which is upright, if the metadata is damaged."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _turn(pixels: Tensor, orientation: int) -> Tensor:
    """Turn (3, H, W) upright."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    flipped = [dim for dim, those in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if orientation in those]
    return pixels.flip(flipped) if flipped else pixels


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale a picture of 16-bit, 32-bit or floating point values to 8 bits; Pillow would clip it at 255."""
    values = np.nan_to_num(np.array(image, dtype=np.float64))
    highest = values.max(initial=0)
    full = next(limit for limit in (1, 255, 65535, max(highest, 1)) if highest <= limit)
    if image.mode.startswith("I;16"):
        full = 65535
    return Image.fromarray((values.clip(0) * (255 / full)).round().astype(np.uint8))


def resize_to_square(pixels: Tensor, size: int, resize: str) -> Tensor:
    """uint8 (3, H, W) to (size, size, 3), on any device."""
    height, width = pixels.shape[1:]
    if resize.startswith("crop:"):
        return crop_middle(pixels, size, resize, (height, width)).permute(1, 2, 0).contiguous()
    if resize == "crop":
        side = max(1, round(min(height, width) / _CROP))
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[:, top : top + side, left : left + side]
    if pixels.shape[1:] != (size, size):
        pixels = resize_pixels(pixels, [size, size], antialias=True)
    return pixels.permute(1, 2, 0).contiguous()


def to_gray(pixels: Tensor) -> Tensor:
    """Convert RGB pictures (n, 3, H, W) to gray ones (n, 1, H, W), float32, rounded as Pillow does."""
    return luma(pixels.float()).round()


def decode_settings(config: PicturesConfig) -> dict[str, object]:
    """All that the pixels of a file depend on, besides the file."""
    return {"decode": FORMAT, "size": config.image_size, "resize": config.resize}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:160]
    return text or type(error).__name__
