"""Exact nearest neighbors of 16,384 made-up pictures, against the bare matrix products that they need.

`python -m benchmarks.inspection 25000` inspects so many made-up pictures, and prints seconds and peak memory.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Comparison, compare
from cvdist.data.images.measures import MEASURES
from cvdist.inspection.alignment import SIDE
from cvdist.inspection.findings import find
from cvdist.inspection.neighbors import BLOCK, nearest
from cvdist.inspection.pictures import InspectedPictures

PICTURES, FEATURES, NEIGHBORS, CLASSES = 16_384, 1_280, 8, 10


def made_up(count: int) -> tuple[Tensor, Tensor]:
    """Make features float16 (count, FEATURES) around a center for each class, and labels int64 (count,)."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    centers = torch.randn(CLASSES, FEATURES, generator=random)
    features = torch.empty(count, FEATURES, dtype=torch.float16)
    for rows in torch.arange(count).split(BLOCK):
        noise = torch.randn(len(rows), FEATURES, generator=random)
        features[rows] = (centers[labels[rows]] + noise).relu().half()
    return features, labels


def search(features: Tensor, labels: Tensor) -> float:
    """Find all neighbors, and return the seconds that it took."""
    began = time.monotonic()
    nearest(features, labels, NEIGHBORS)
    return time.monotonic() - began


def products(features: Tensor) -> float:
    """Multiply each pair of blocks, do nothing with the result, and return the seconds that it took."""
    blocks = [block.float() for block in features.split(BLOCK)]
    began = time.monotonic()
    for number, block in enumerate(blocks):
        for other in blocks[number:]:
            block @ other.T
    return time.monotonic() - began


def measure() -> Iterator[Comparison]:
    """Measure seconds."""
    features, labels = made_up(PICTURES)
    yield compare(
        f"neighbors of {PICTURES:,} pictures / bare products",
        lambda: search(features, labels),
        lambda: products(features),
        unit="s",
        target=2.0,
        pairs=3,
        at_most=True,
    )


class _MadeUpPictures:
    """Stands in for decoding: pictures of random pixels."""

    def __call__(self, rows: Sequence[int]) -> Tensor:
        random = torch.Generator().manual_seed(0)
        return torch.randint(256, (len(rows), SIDE, SIDE, 3), dtype=torch.uint8, generator=random)


def whole(count: int) -> None:
    """Inspect made-up pictures, and print seconds and peak memory of each part."""
    features, labels = made_up(count)
    pictures = InspectedPictures(
        classes=tuple(map(str, range(CLASSES))),
        paths=[f"{row}.jpg" for row in range(count)],
        labels=labels,
        valid=np.arange(count) >= count * 4 // 5,
        features=features,
        digests=[row.to_bytes(16) for row in range(count)],
        measures={name: np.random.default_rng(0).random(count) for name in MEASURES},
    )
    began, last = time.monotonic(), {}

    def progress(doing: str) -> None:
        last[doing.split(":")[0]] = time.monotonic() - began

    find(pictures, _MadeUpPictures(), 100, torch.device("cpu"), progress)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{count:,} x {FEATURES:,}, without decoding: {time.monotonic() - began:.1f} s, peak {peak:.2f} GB")
    rate = count**2 * FEATURES / last["neighbors"] / 1e9
    print("finished after: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in last.items()))
    print(f"neighbors: {rate:,.0f} GFLOP/s")


if __name__ == "__main__":
    whole(int(sys.argv[1]))
