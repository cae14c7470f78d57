"""Decodes picture files of any format to square RGB pictures of one size.

JPEGs of ordinary size are decoded by torchvision, which is 1.6 times as fast as Pillow. Much larger JPEGs are
decoded by Pillow, which lets libjpeg decode at a half, a quarter or an eighth of the size and so is 3 times as
fast at 12 megapixels. All other formats are decoded by Pillow. `benchmarks/image_decoding.py` measures this.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import resize as resize_pixels

from cvdist.config import PicturesConfig

FORMAT = 1  # changes whenever the same file would give other pixels
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
_ORIENTATION = 0x0112  # the EXIF tag
_DRAFT_FROM = 4  # sides of at least so many times the size are decoded at a fraction
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
                if _is_ordinary_jpeg(image, size):
                    return resize_to_square(_decode_jpeg(content), size, resize)
                return resize_to_square(_decode_any(image, size), size, resize)
    except UnidentifiedImageError:
        raise UndecodableError("not a picture of any known kind") from None
    except Image.DecompressionBombError:
        raise UndecodableError(f"larger than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from None
    except Exception as error:  # damaged bytes lead decoders to raise all sorts of things
        raise UndecodableError(_one_line(error)) from error


def _is_ordinary_jpeg(image: Image.Image, size: int) -> bool:
    return image.format == "JPEG" and image.mode in ("RGB", "L") and min(image.size) < _DRAFT_FROM * size


def is_gpu_decodable(content: bytes, size: int) -> bool:
    """Return whether nvJPEG decodes this file to the same picture as `decode`, apart from rounding.

    That is so for complete JPEGs of ordinary size that need no rotation and are stored as YCbCr or grayscale.
    """
    if not content.rstrip(b"\0").endswith(b"\xff\xd9"):  # it would fill up with gray what is missing
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                in_rgb = image.info.get("adobe_transform") == 0 and image.mode == "RGB"
                upright = image.getexif().get(_ORIENTATION, 1) == 1
                return _is_ordinary_jpeg(image, size) and upright and not in_rgb
    except Exception:  # whatever is wrong with it, `decode` says so
        return False


def _decode_jpeg(content: bytes) -> Tensor:
    """Decode a JPEG with torchvision to uint8 (3, H, W)."""
    # A copy that may be written to: PyTorch wants one, and so nothing else ever sees it changed.
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    pixels: Tensor = decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    return pixels


def _decode_any(image: Image.Image, size: int) -> Tensor:
    """Decode a picture of any format with Pillow to uint8 RGB (3, H, W)."""
    # A hint for JPEGs: at least twice the size that is needed, so that the resizing still has what to average.
    image.draft("RGB", (2 * size, 2 * size))
    turned = _upright(image)
    if turned.mode.startswith(("I", "F")):
        turned = _eight_bits(turned)
    if turned.has_transparency_data:
        white = Image.new("RGBA", turned.size, "white")
        turned = Image.alpha_composite(white, turned.convert("RGBA"))
    return torch.from_numpy(np.array(turned.convert("RGB"))).permute(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # metadata may be damaged where the picture is not
        return image
    return ImageOps.exif_transpose(image) if turned else image


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
    if resize == "crop":
        side = max(1, round(min(height, width) / _CROP))
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[:, top : top + side, left : left + side]
    if pixels.shape[1:] != (size, size):
        pixels = resize_pixels(pixels, [size, size], antialias=True)
    return pixels.permute(1, 2, 0).contiguous()


def decode_settings(config: PicturesConfig) -> dict[str, object]:
    """All that the pixels of a file depend on, besides the file."""
    return {"decode": FORMAT, "size": config.image_size, "resize": config.resize}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:160]
    return text or type(error).__name__
