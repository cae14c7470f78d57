"""Pictures with several classes each: colored squares on gray, one square a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"blue": (40, 60, 230), "green": (40, 200, 60), "red": (230, 40, 40)}


def multilabel_table(folder: Path, count: int = 48, *, size: int = 32, seed: int = 0, first: int = 0) -> Path:
    """Write `count` PNG files and `labels.csv`, with the columns path and labels (`red;green`).

    All eight sets of classes come by turns, beginning with the picture of no class (an empty cell).

    Args:
        folder: is made.
        count: number of pictures.
        size: width and height of the pictures, pixels.
        seed: of the places of the squares and of the noise.
        first: number of the first picture: other numbers are other names and other pictures.

    Returns:
        `labels.csv`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["path,labels"]
    for number in range(first, first + count):
        names = [name for bit, name in enumerate(COLORS) if number >> bit & 1]
        Image.fromarray(_picture(names, size, seed * 1_000_003 + number)).save(folder / f"{number:05}.png")
        lines.append(f"{number:05}.png,{';'.join(names)}")
    table = folder / "labels.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


def _picture(names: list[str], size: int, seed: int) -> np.ndarray:
    """Return uint8 (size, size, 3) with a square of each color, each in a quarter of its own."""
    random = np.random.default_rng(seed)
    picture = random.integers(110, 140, (size, size, 3), dtype=np.uint8)
    side = size // 2
    quarters = random.permutation(4)
    for quarter, name in zip(quarters, names, strict=False):
        top, left = quarter // 2 * side, quarter % 2 * side
        picture[top + 1 : top + side - 1, left + 1 : left + side - 1] = COLORS[name]
    return picture
