"""Synthetic photographs for benchmarks, which take as long to decode as real ones; not a benchmark itself."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(seed: int, width: int = 500, height: int = 375) -> bytes:
    """Return a JPEG of soft shapes with fine grain: about 30 kB at 500x375, like Kaggle's dogs and cats."""
    random = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for cells, strength in ((6, 90), (40, 35), (160, 12)):
        rough = Image.fromarray(random.integers(0, 255, (cells, cells, 3), np.uint8))
        smooth = np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC), np.float64)
        picture += (smooth / 127.5 - 1) * strength
    file = io.BytesIO()
    Image.fromarray((picture + 128).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def write_folder(root: Path, count: int, *, width: int = 500, height: int = 375) -> Path:
    """Write `count` training and 4 validation pictures of two classes. Up to 100 differ, and are repeated."""
    contents = [jpeg(seed, width, height) for seed in range(min(count, 100))]
    for part, number in (("train", count), ("valid", 4)):
        for i in range(number):
            folder = root / part / ("cat", "dog")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:06}.jpg").write_bytes(contents[i % len(contents)])
    return root
