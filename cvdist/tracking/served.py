"""A logged model as MLflow serves it: pictures or pixels in, class names and probabilities out.

MLflow stores this file with the model and runs it where the model is served. So it imports nothing of this
package, and decodes with Pillow what `cvdist.data.images.decode` decodes in jobs, to the same pixels.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow.pytorch
import numpy as np
import torch
import torch.nn.functional as F
from mlflow.exceptions import MlflowException
from mlflow.models import Model, set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image, UnidentifiedImageError
from torch import Tensor

# MLflow warns that it does not check inputs of two kinds: `ServedClassifier` does.
logging.getLogger("mlflow.types.type_hints").setLevel(logging.ERROR)

Answer = dict[str, str | float | list[str] | dict[str, float]]

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # what people send, and no format whose decoder runs programs
_BATCH = 16  # pictures of a forward pass
_CROP = 8 / 7  # shorter side of a picture, divided by the side of the square that `crop` keeps
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class BadInputError(MlflowException):
    """An input that can't be classified. MLflow's server answers with status 400 and the message."""

    def __init__(self, position: int, reason: str) -> None:
        """Name the input by its position, from 0."""
        self._line = f"inputs[{position}]: {reason}"
        super().__init__(self._line, error_code=INVALID_PARAMETER_VALUE)

    def serialize_as_json(self) -> str:
        """Return the body of the answer. The server has put the whole request in front of `message` by then."""
        return json.dumps({"error_code": self.error_code, "message": self._line})


class ServedClassifier(PythonModel):
    """Classifies pictures: files of JPEG, PNG, WebP, GIF or BMP of any size, or pixels."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the network, which is an exported graph without pickle, and what is known about its pictures."""
        folder = context.artifacts["network"]
        self._network = mlflow.pytorch.load_model(folder)
        about = (Model.load(folder).metadata or {})["cvdist"]
        self._classes, self._resize = about["classes"], about["resize"]
        self._thresholds = about.get("thresholds")  # where a picture may have several labels
        self._shape = (about["channels"], about["height"], about["width"])
        self._bfloat16 = about["precision"] == "bfloat16" and _native_bfloat16()
        self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")

    def predict(  # type: ignore[override]  # MLflow asks which arguments it takes
        self, model_input: list[str | list[Any]]
    ) -> list[Answer]:
        """Classify pictures.

        Args:
            model_input: For each picture the file, as base64 or bytes, or uint8 pixels (C, H, W), as an array
                or nested lists.

        Returns:
            For each picture `class`, `confidence` (the probability of this class) and `probabilities` by class,
            the most probable first. Of a model with several labels a picture, `labels`, the classes at or above
            their thresholds, instead of `class` and `confidence`.

        Raises:
            BadInputError: If an input is neither.
        """
        # While a batch is computed, the pool decodes the next ones.
        decoded = self._pool.map(self._pixels, itertools.count(), model_input)
        probabilities: list[list[float]] = []
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            while batch := list(itertools.islice(decoded, _BATCH)):
                probabilities += self._network(torch.stack(batch)).tolist()
        return [self._answer(row) for row in probabilities]

    def _answer(self, probabilities: list[float]) -> Answer:
        ranked = sorted(zip(self._classes, probabilities, strict=True), key=lambda one: -one[1])
        if self._thresholds is not None:
            least = dict(zip(self._classes, self._thresholds, strict=True))
            return {"labels": [name for name, p in ranked if p >= least[name]], "probabilities": dict(ranked)}
        return {"class": ranked[0][0], "confidence": ranked[0][1], "probabilities": dict(ranked)}

    def _pixels(self, position: int, given: Any) -> Tensor:
        """Make uint8 pixels (C, H, W) of one input."""
        try:
            if isinstance(given, str):
                text = "".join(given.rpartition(",")[2].split())  # without `data:...,` and line ends
                given = base64.b64decode(text, validate=True)
        except ValueError:
            raise BadInputError(position, "a picture is sent as base64 of its file") from None
        if isinstance(given, bytes):
            try:
                pixels = decode(given, self._shape[1], self._resize)
            except UnidentifiedImageError:
                raise BadInputError(position, f"no picture of a known kind ({', '.join(_FORMATS)})") from None
            except Exception as error:  # damaged bytes lead decoders to raise all sorts of things
                reason = " ".join(str(error).split())[:160]
                raise BadInputError(position, f"the picture can't be decoded: {reason}") from None
            return pixels if self._shape[0] == 3 else to_gray(pixels)
        return self._given_pixels(position, given)

    def _given_pixels(self, position: int, given: Any) -> Tensor:
        shape = "x".join(map(str, self._shape))
        try:
            pixels = np.asarray(given)
        except ValueError:  # rows of different lengths
            pixels = np.empty(0)
        if pixels.shape != self._shape or pixels.dtype.kind not in "iu":
            raise BadInputError(position, f"neither base64 of a picture's file nor integer pixels of {shape}")
        if pixels.min() < 0 or pixels.max() > 255:
            raise BadInputError(position, "pixels are from 0 to 255")
        return torch.from_numpy(pixels.astype(np.uint8))


def decode(content: bytes, size: int, resize: str) -> Tensor:
    """Decode a picture file to upright RGB pixels, uint8 (3, size, size).

    Args:
        content: Content of the file.
        size: Height and width in pixels.
        resize: How it is brought to this size: `squash`, `crop`, or `crop:SHORTER:INTERPOLATION`.

    Raises:
        Exception: An error of any type, if the file can't be decoded.
    """
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        width, height = image.size
        # Very large JPEGs are decoded at a fraction of their size.
        factor = next((factor for factor in (8, 4, 2) if min(width, height) >= 2 * size * factor), 1)
        image.draft(None, (width // factor, height // factor))
        small = _resized(_rgb(image), size, resize, height, width)
        orientation = _orientation(image)
    if orientation in (5, 6, 7, 8):
        small = small.transpose(1, 2)
    return small.flip([dim for dim, those in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if orientation in those])


def _native_bfloat16() -> bool:
    """Return whether this CPU computes bfloat16 natively, which PyTorch has no public function for."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def to_gray(pixels: Tensor) -> Tensor:
    """Convert RGB pixels (3, H, W) to brightness, uint8 (1, H, W)."""
    return (pixels * torch.tensor(_LUMA).view(3, 1, 1)).sum(0, keepdim=True).round().to(torch.uint8)


def _orientation(image: Image.Image) -> int:
    """Return how the camera was held, 1 to 8 as in EXIF; 1, which is upright, where EXIF doesn't say it."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        return int(exif.get(0x0112, 1))
    except Exception:  # damaged metadata is no reason to refuse a picture
        return 1


def _rgb(image: Image.Image) -> Tensor:
    """Return a picture's pixels, uint8 (3, H, W). Transparent ones lie on white, 16 bits become 8."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.array(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _resized(pixels: Tensor, size: int, resize: str, height: int, width: int) -> Tensor:
    """Bring pixels, of a picture of `height` and `width`, to uint8 (3, size, size)."""
    if resize.startswith("crop:"):
        _, shorter, interpolation = resize.split(":")
        side, longer = int(shorter), int(int(shorter) * max(height, width) / min(height, width))
        pixels = _scaled(pixels, [longer, side] if height > width else [side, longer], interpolation)
        missing = [max(0, size - edge) for edge in pixels.shape[:0:-1] for _ in range(2)]
        pixels = F.pad(pixels, [(edge + end) // 2 for end, edge in zip((0, 1, 0, 1), missing, strict=True)])
        top, left = (round((edge - size) / 2) for edge in pixels.shape[1:])
        return pixels[:, top : top + size, left : left + size]
    if resize == "crop":
        side = max(1, round(min(height, width) / _CROP))
        top, left = (height - side) // 2, (width - side) // 2
        factor = round(height / pixels.shape[1])
        if factor > 1:  # the edges lie between pixels
            box = (left / factor, top / factor, (left + side) / factor, (top + side) / factor)
            x, y, right, bottom = (int(box[0]), int(box[1]), math.ceil(box[2]), math.ceil(box[3]))
            inner = Image.fromarray(pixels[:, y:bottom, x:right].permute(1, 2, 0).contiguous().numpy())
            within = (box[0] - x, box[1] - y, box[2] - x, box[3] - y)
            small = inner.resize((size, size), Image.Resampling.BILINEAR, box=within)
            return torch.from_numpy(np.array(small)).permute(2, 0, 1)
        pixels = pixels[:, top : top + side, left : left + side]
    return _scaled(pixels, [size, size], "bilinear")


def _scaled(pixels: Tensor, target: Sequence[int], interpolation: str) -> Tensor:
    if list(pixels.shape[1:]) == list(target):
        return pixels
    return F.interpolate(pixels[None], list(target), mode=interpolation, antialias=True)[0]


set_model(ServedClassifier())
