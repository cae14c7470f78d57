"""Small image folders that tests write."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(seed: int, width: int = 60, height: int = 40) -> bytes:
    """A JPEG of random blots, another one for each seed."""
    blots = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(blots).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def scene(seed: int, width: int = 300, height: int = 220) -> Image.Image:
    """A picture with large and small parts, and noise, as photographs have them; another one for each seed."""
    random = np.random.default_rng(seed)
    values = random.normal(0, 4, (height, width, 3))
    for parts, share in ((3, 0.5), (8, 0.3), (24, 0.2)):
        blots = Image.fromarray(random.integers(0, 255, (parts, parts + 2, 3), np.uint8))
        values += share * np.asarray(blots.resize((width, height), Image.Resampling.BICUBIC), float)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def write(root: Path, counts: dict[str, int], *, width: int = 60, height: int = 40) -> Path:
    """`counts`: how many pictures in each folder, such as `{"train/cat": 5}`. Returns `root`."""
    for number, (folder, count) in enumerate(counts.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / folder / f"{i:04}.jpg").write_bytes(jpeg(1000 * number + i, width, height))
    return root


FOUR = {"train/cat": 6, "train/dog": 5, "valid/cat": 2, "valid/dog": 3}
