"""Decoding and resizing JPEGs to 224x224 in one thread: ours, Pillow alone, and torchvision alone.

Ours decodes 12 megapixels at a fraction of their size. The other sides are what people write by hand. Unlike
ours, they ignore the orientation that the camera recorded, and torchvision's reads JPEGs only.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from benchmarks.harness import Comparison, compare
from benchmarks.photographs import jpeg
from cvdist.data.images.decode import decode

SIZE = 224


def measure() -> Iterator[Comparison]:
    """Measure pictures per second."""
    torch.set_num_threads(1)
    photographs = [jpeg(seed) for seed in range(100)]
    large = [jpeg(seed, 4000, 3000) for seed in range(4)] * 2
    sides = {"Pillow": _pillow, "torchvision v2": _torchvision}
    for files, what, targets in ((photographs, "500x375", (1.2, 0.85)), (large, "12 megapixels", (3, 2))):
        for (name, side), target in zip(sides.items(), targets, strict=True):
            yield compare(
                f"decoding {what}: ours / {name}", _rate(_ours, files), _rate(side, files), unit="pictures/s",
                target=target,
            )  # fmt: skip


def _rate(function: Callable[[bytes], object], files: list[bytes]) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        for content in files:
            function(content)
        return len(files) / (time.perf_counter() - started)

    return run


def _ours(content: bytes) -> object:
    return decode(content, SIZE, "squash")


def _pillow(content: bytes) -> object:
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    return torch.from_numpy(np.array(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)))


def _torchvision(content: bytes) -> object:
    pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return v2.functional.resize(pixels, [SIZE, SIZE], antialias=True)
