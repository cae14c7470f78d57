"""Loader for folders of photographs.

Pixels come from the node's decoded copy or from decoding processes. Augmentation and normalization happen on
the training device.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import tee
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cvdist.config import DataConfig
from cvdist.data.augment import Augmentation
from cvdist.data.contents import map_ahead
from cvdist.data.dataset import Batch, DatasetInfo, Loader, Split, to_device
from cvdist.data.forms import root_of
from cvdist.data.images.ahead import DecodeAhead, Reader
from cvdist.data.images.store import PictureStore
from cvdist.data.images.versions import digest_of_rows
from cvdist.data.labels import label_column, label_names, labels_of, targets_of
from cvdist.data.mixing import Mixing
from cvdist.data.normalize import Normalizer
from cvdist.data.quarantine import BadPicture
from cvdist.data.sampler import EpochOrder, LocalBatch, partition

Rows = Sequence[int] | np.ndarray

_AHEAD = 2  # batches that are read while the device computes


class PixelSource(Protocol):
    """A source of pixels by row."""

    def batches(self, rows: Iterable[Rows]) -> Iterator[Tensor]:
        """Yield the pixels of each list of rows, uint8 (n, size, size, 3) on the CPU, in order."""
        ...

    def pictures(self, rows: Rows) -> Tensor:
        """Return the pixels of some rows. Another thread than that of `batches` may call this."""
        ...


class PixelFile:
    """Reads decoded pictures from a file (`PixelSource`).

    The file is read rather than memory-mapped, so that a process's memory does not grow with the data.
    """

    def __init__(self, path: Path, size: int, places: np.ndarray, *, pinned: bool) -> None:
        """Open the file.

        Args:
            path: file of pictures, each uint8 (size, size, 3).
            size: height and width of a picture in pixels.
            places: int64, position in the file for each row, counted in pictures.
            pinned: whether batches are read into pinned memory, for copies to a GPU.
        """
        self._size, self._places, self._pinned = size, places, pinned
        self._file = path.open("rb", buffering=0)

    def batches(self, rows: Iterable[Rows]) -> Iterator[Tensor]:
        with ThreadPoolExecutor(_AHEAD, thread_name_prefix="pixels") as pool:
            yield from map_ahead(pool, self.pictures, rows, _AHEAD)

    def pictures(self, rows: Rows) -> Tensor:
        shape = (len(rows), self._size, self._size, 3)
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)
        stride = self._size * self._size * 3
        for picture, place in zip(pixels.numpy(), self._places[rows].tolist(), strict=True):
            if os.preadv(self._file.fileno(), [picture.data], place * stride) != stride:
                raise OSError(f"{self._file.name} has become shorter")
        return pixels


class DecodingSource:
    """Decodes pictures each time they are used, in processes that work ahead (`PixelSource`)."""

    def __init__(
        self, config: DataConfig, paths: pa.ChunkedArray, *, processes: int, timeout: float, pinned: bool
    ) -> None:
        """Set up the processes, which start with the first epoch.

        Args:
            config: configuration that names the pictures.
            paths: paths of all rows, below `--data`.
            processes: number of processes.
            timeout: seconds that a few pictures may take.
            pinned: whether batches are put into pinned memory, for copies to a GPU.
        """
        where = (root_of(config), config.image_size, config.resize)
        self._size, self._paths, self._pinned = config.image_size, paths, pinned
        self._reader = Reader(*where)
        self._ahead = DecodeAhead(*where, threads=processes, timeout=timeout, processes=True)

    def batches(self, rows: Iterable[Rows]) -> Iterator[Tensor]:
        tasks = (self._ahead.split(self._named(wanted)) for wanted in rows)
        for parts in self._ahead.map(Reader.pixels, tasks):
            shape = (sum(len(part) for part in parts), self._size, self._size, 3)
            pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)
            yield torch.cat(parts, out=pixels) if parts else pixels

    def pictures(self, rows: Rows) -> Tensor:
        return self._reader.pixels(self._named(rows))

    def _named(self, rows: Rows) -> list[str]:
        paths: list[str] = self._paths.take(pa.array(np.asarray(rows, dtype=np.int64))).to_pylist()
        return paths


class ImageLoader(Loader):
    """Yields batches of a folder of photographs (`cvdist.data.dataset.Loader`)."""

    def __init__(
        self,
        store: PictureStore,
        source: PixelSource,
        rows: dict[Split, np.ndarray],
        info: DatasetInfo,
        *,
        device: torch.device,
        augmentation: Augmentation | None,
        mixing: Mixing | None,
        channels_last: bool,
    ) -> None:
        """Set up the loader.

        Args:
            store: the node's decoded copy: labels, paths and digests.
            source: provides the pixels.
            rows: row numbers in the store's table, int64, for each split.
            info: description of the data set.
            device: device of the batches.
            augmentation: applied to training pictures, or None.
            mixing: mixes training pictures with each other, or None.
            channels_last: whether batches get the channels_last memory format.
        """
        self.info = info
        self.quarantine: Sequence[BadPicture] = store.bad
        self.device, self.augmentation, self.mixing = device, augmentation, mixing
        self._store, self._source, self._rows = store, source, rows
        self._labels = labels_of(store.table, len(info.classes))
        self._digest = ""
        self._normalize = Normalizer(info.mean, info.std, device, channels_last=channels_last)

    def labels(self, split: Split) -> Tensor:
        return self._labels[self._rows[split]]

    def train_batches(
        self, order: EpochOrder, rank: int, world_size: int, position: int = 0
    ) -> Iterator[Batch]:
        mine = order.local_batches(rank, world_size, position, partner=self.mixing is not None)
        return self._batches("train", mine, order.epoch)

    def valid_batches(self, rank: int, world_size: int, batch_size: int) -> Iterator[Batch]:
        mine = partition(self.info.valid_size, rank, world_size)
        starts = range(mine.start, mine.stop, batch_size)
        indices = (torch.arange(start, min(start + batch_size, mine.stop)) for start in starts)
        return self._batches(
            "valid", (LocalBatch(part, int(part[0]), 0, len(part)) for part in indices), epoch=None
        )

    def pictures(self, split: Split, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        rows = self._rows[split][np.asarray(indices, dtype=np.int64)]
        names = label_names(self._labels[rows], self.info.classes)
        return self._source.pictures(rows).permute(0, 3, 1, 2).contiguous(), names

    def names(self, split: Split, indices: Sequence[int]) -> list[str]:
        rows = self._rows[split][np.asarray(indices, dtype=np.int64)]
        return [str(path) for path in self._store.table.column("path").take(pa.array(rows)).to_pylist()]

    def digest(self) -> str:
        if not self._digest:
            table = self._store.table
            self._digest = digest_of_rows(table, self._rows.values(), ("digest", label_column(table)))
        return self._digest

    def _batches(self, split: Split, local_batches: Iterator[LocalBatch], epoch: int | None) -> Iterator[Batch]:
        """Yield a batch for each local batch, augmented and mixed as in `epoch`; None turns both off."""
        rows, (ahead, local_batches) = self._rows[split], tee(local_batches)
        wanted = (rows[local.indices.numpy()] for local in ahead)
        for pixels, local in zip(self._source.batches(wanted), local_batches, strict=True):
            labels = targets_of(self._labels[rows[local.indices.numpy()]])
            batch = Batch(
                self._prepare(pixels, local, epoch),
                to_device(labels, self.device),
                local.indices,
                local.global_size,
            )
            if self.mixing is not None and epoch is not None:
                batch = self.mixing.mix(batch, self.mixing.draw(epoch, local.start))
            yield batch

    def _prepare(self, pixels: Tensor, local: LocalBatch, epoch: int | None) -> Tensor:
        """Augment and normalize on the device: uint8 (n, H, W, C) on the CPU to float32 (n, C, H, W) there."""
        # Seen as (n, C, H, W), these pixels lie in memory as channels_last wants them.
        images = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        if self.augmentation is not None and epoch is not None:
            images = self.augmentation.apply(images, self.augmentation.draw(local, epoch), self.info.mean)
        return self._normalize(images)
