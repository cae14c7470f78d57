"""The pictures of a feature cache as arrays, and their pixels where they have to be looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from cvdist.data.images.ahead import DecodeAhead
from cvdist.data.images.measures import MEASURES
from cvdist.errors import UserError
from cvdist.features.loader import FeatureLoader
from cvdist.log import redact
from cvdist.training.ridge import pooled

_BATCH = 256


@dataclass(frozen=True)
class InspectedPictures:
    """The n pictures of a cache, those for training first.

    Attributes:
        classes: Names of the classes.
        paths: Paths below `--data`.
        labels: int64 (n,).
        valid: Whether a picture is for validation, bool (n,).
        features: Pooled features, float16 or float32 (n, d).
        digests: First bytes of the files' SHA-256.
        measures: Measures of each picture, float (n,), by the names in `MEASURES`.
    """

    classes: tuple[str, ...]
    paths: list[str]
    labels: Tensor
    valid: np.ndarray
    features: Tensor
    digests: list[bytes]
    measures: dict[str, np.ndarray]

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.paths)

    def class_of(self, row: int) -> str:
        """Return the name of a picture's class."""
        return self.classes[int(self.labels[row])]

    @property
    def pixels(self) -> np.ndarray:
        """Number of pixels of each picture, float (n,)."""
        return self.measures["width"] * self.measures["height"]


def read(loader: FeatureLoader, index: pa.Table, after_batch: Callable[[int], None]) -> InspectedPictures:
    """Read all pictures of both splits.

    Args:
        loader: The cache's features, on the CPU.
        index: The cache's index.
        after_batch: Called with the number of pictures that were read.
    """
    info = loader.info
    count, offset = info.train_size + info.valid_size, {"train": 0, "valid": info.train_size}
    width = pooled(torch.empty(1, *loader.feature_shape)).shape[1]
    exact = len(loader.feature_shape) == 1 and loader.copy.dtype == torch.float16
    features = torch.empty(count, width, dtype=torch.float16 if exact else torch.float32)
    done = 0
    for split in ("train", "valid"):
        for batch in loader.batches_in_order(split, 0, 1, _BATCH):
            features[batch.indices + offset[split]] = pooled(batch.images).to(features.dtype)
            done += len(batch.labels)
            after_batch(done)
    paths = loader.names("train", range(info.train_size)) + loader.names("valid", range(info.valid_size))
    rows = index.take(pc.index_in(pa.array(paths), value_set=index.column("path").combine_chunks()))
    return InspectedPictures(
        classes=info.classes,
        paths=paths,
        labels=torch.cat([loader.labels("train"), loader.labels("valid")]),
        valid=np.arange(count) >= info.train_size,
        features=features,
        digests=rows.column("digest").to_pylist(),
        measures={name: np.asarray(rows.column(name)).astype(np.float64) for name in MEASURES},
    )


class Originals:
    """Decodes pictures of an inspection in parallel, to squares of one size."""

    def __init__(
        self, uri: str, pictures: InspectedPictures, side: int, *, workers: int, timeout: float
    ) -> None:
        """Set up the decoding, which starts with the first picture.

        Args:
            uri: Folder or URI of the pictures.
            pictures: The pictures.
            side: Height and width of the squares, in pixels.
            workers: Threads that decode. 0: one for each core.
            timeout: Seconds that a picture may take.
        """
        self._uri, self._paths, self.side = uri, pictures.paths, side
        self._ahead = DecodeAhead(uri, side, "squash", threads=workers, timeout=timeout)

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """Decode some rows to uint8 (n, side, side, 3).

        Raises:
            UserError: If a picture is gone, or can't be decoded any more.
        """
        pixels = torch.empty(len(rows), self.side, self.side, 3, dtype=torch.uint8)
        paths = [self._paths[row] for row in rows]
        for first, decoded in self._ahead.batches(paths, _BATCH):
            for place, one in enumerate(decoded, start=first):
                if one.pixels is None:
                    raise UserError(
                        f"--data {redact(self._uri)}: {paths[place]} has changed since its features were "
                        f"computed, and can't be decoded any more ({one.reason}): run jobs/preprocess.py again"
                    )
                pixels[place] = one.pixels
        return pixels

    def close(self) -> None:
        """End the threads."""
        self._ahead.close()


def name_of(uri: str) -> str:
    """Return the name of a set of pictures, which is that of its folder."""
    return PurePosixPath(redact(uri).rstrip("/")).name
