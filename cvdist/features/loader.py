"""Loader of cached features, for training a model without running its frozen layers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from cvdist.data.augment import Augmentation
from cvdist.data.dataset import Batch, DatasetInfo, Loader, Shuffle, Split, to_device
from cvdist.data.labels import label_names, targets_of
from cvdist.data.quarantine import BadPicture
from cvdist.data.sampler import EpochOrder, LocalBatch, draw_balanced, partition
from cvdist.features.copies import Copy, DeviceCopy, FeatureRows
from cvdist.features.order import windowed
from cvdist.seeding import generator

logger = logging.getLogger(__name__)

Pictures = Callable[[Sequence[str]], Tensor]
"""Original pixels, uint8 (n, C, H, W), of pictures by path."""


class FeatureLoader(Loader):
    """Yields batches of features from the node's copy of a cache (`cvdist.data.dataset.Loader`).

    In each epoch, one of the stored views of each training sample is chosen at random.

    Attributes:
        views: number of views of each training sample to choose from.
    """

    features = True

    def __init__(
        self,
        info: DatasetInfo,
        copy: Copy,
        splits: dict[Split, FeatureRows],
        labels: dict[Split, Tensor],
        paths: Callable[[Split, Sequence[int]], list[str]],
        *,
        device: torch.device,
        views: int,
        seed: int,
        window: int,
        digest: str,
        quarantine: Sequence[BadPicture],
        augmentation: Augmentation | None,
        pictures: Pictures,
        note: str,
    ) -> None:
        """Set up the loader.

        Args:
            info: description of the data set.
            copy: the node's copy of the features.
            splits: where each sample's features are, for each split; views are not used.
            labels: as in `Loader.labels`, for each split.
            paths: returns the paths of some rows of a split.
            device: device of the batches.
            views: number of views of each training sample to choose from.
            seed: seed of the choice of views.
            window: number of shards that are shuffled together; 0 means that all samples are shuffled.
            digest: SHA-256 of the contents and labels of all pictures, and of the shuffle's shards.
            quarantine: pictures that can't be decoded.
            augmentation: augmentation of the views, or None.
            pictures: reads original pictures, for figures.
            note: one line for the log.
        """
        self.info, self.quarantine, self.augmentation, self.note = info, quarantine, augmentation, note
        self.copy, self._splits, self.device = copy, splits, device
        self._labels = labels
        self._paths, self._pictures, self._digest = paths, pictures, digest
        self.views, self._seed, self._window = views, seed, window
        # Sorted by shard, so that validation reads each shard once, even if the listing has changed since.
        self._by_shard = {split: np.lexsort((rows.row, rows.shard)) for split, rows in splits.items()}

    def shuffle(self, world_size: int, *, balanced: bool = False) -> Shuffle:
        return Shuffle(world_size if self._window else 0, self._window, balanced)

    def epoch_order(self, batch_size: int, seed: int, epoch: int, shuffle: Shuffle) -> EpochOrder:
        if not shuffle.streams:
            return super().epoch_order(batch_size, seed, epoch, shuffle)
        drawn = draw_balanced(self._labels["train"], seed=seed, epoch=epoch) if shuffle.balanced else None
        shard = self._splits["train"].shard
        order = windowed(
            shard if drawn is None else shard[drawn.numpy()],
            batch_size,
            seed=seed,
            epoch=epoch,
            streams=shuffle.streams,
            window=shuffle.window,
        )
        if drawn is not None:
            order.order = drawn[order.order]
        return order

    def train_batches(
        self, order: EpochOrder, rank: int, world_size: int, position: int = 0
    ) -> Iterator[Batch]:
        mine = list(order.local_batches(rank, world_size, position))
        shards = self._splits["train"].shard
        soon = shards[torch.cat([local.indices for local in mine]).numpy()] if mine else shards[:0]
        if not self._window:  # what validation needs may arrive in the meantime
            soon = np.concatenate([soon, self._splits["valid"].shard[self._by_shard["valid"]]])
        self.copy.expect(soon)
        return self._batches("train", mine, self._draw_views(order.epoch))

    def valid_batches(self, rank: int, world_size: int, batch_size: int) -> Iterator[Batch]:
        return self.batches_in_order("valid", rank, world_size, batch_size)

    def batches_in_order(
        self, split: Split, rank: int, world_size: int, batch_size: int, view: int = 0
    ) -> Iterator[Batch]:
        """Yield worker `rank`'s part of a split, shard by shard: each sample once, in its view number `view`.

        View 0 is the picture without augmentation. Only training pictures have other views.
        """
        part = partition(len(self._by_shard[split]), rank, world_size)
        mine = self._by_shard[split][part.start : part.stop]
        self.copy.expect(self._splits[split].shard[mine])
        cut = (torch.from_numpy(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size))
        views = np.full(len(self._by_shard[split]), view) if view else None
        return self._batches(split, [LocalBatch(rows, 0, 0, len(rows)) for rows in cut], views)

    def labels(self, split: Split) -> Tensor:
        return self._labels[split]

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of one sample's features, channels first."""
        return tuple(self.copy.shape)

    @property
    def feature_size(self) -> int:
        """Number of features of one sample."""
        return math.prod(self.copy.shape)

    def pictures(self, split: Split, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Return original pixels and class names of some rows (`Loader.pictures`).

        Pictures that can't be read any more are gray.
        """
        rows = [int(index) for index in indices]
        names = label_names(self._labels[split][rows], self.info.classes)
        return self._pictures(self._paths(split, rows)), names

    def names(self, split: Split, indices: Sequence[int]) -> list[str]:
        return self._paths(split, [int(index) for index in indices])

    def digest(self) -> str:
        return self._digest

    def _draw_views(self, epoch: int) -> np.ndarray | None:
        """Choose the view of each training sample for an epoch, int64 (train_size,); None for a single view."""
        if self.views == 1:
            return None
        random = generator("view of an epoch", self._seed, epoch)
        return torch.randint(self.views, (self.info.train_size,), generator=random).numpy()

    def _batches(
        self, split: Split, local_batches: Sequence[LocalBatch], views: np.ndarray | None
    ) -> Iterator[Batch]:
        if isinstance(self.copy, DeviceCopy):
            yield from self._on_device(self.copy, split, local_batches, views)
            return
        labels = self._labels[split]
        wanted = (self._rows(split, local.indices, views) for local in local_batches)
        for features, local in zip(self.copy.batches(wanted), local_batches, strict=True):
            yield Batch(
                # Converted on the GPU, because in the stored dtype half as many bytes are copied to it.
                features.to(self.device, non_blocking=True).float(),
                targets_of(to_device(labels[local.indices], self.device)),
                local.indices,
                local.global_size,
            )

    def _on_device(
        self, copy: DeviceCopy, split: Split, local_batches: Sequence[LocalBatch], views: np.ndarray | None
    ) -> Iterator[Batch]:
        """Yield batches from features in device memory: positions and labels go there once per epoch."""
        if not local_batches:
            return
        indices = torch.cat([local.indices for local in local_batches])
        sizes = [len(local.indices) for local in local_batches]
        places = copy.places(self._rows(split, indices, views)).split(sizes)
        labels = to_device(self._labels[split][indices], self.device).split(sizes)
        for local, mine, known in zip(local_batches, places, labels, strict=True):
            yield Batch(copy.at(mine).float(), targets_of(known), local.indices, local.global_size)

    def _rows(self, split: Split, indices: Tensor, views: np.ndarray | None) -> FeatureRows:
        where, rows = self._splits[split], indices.numpy()
        drawn = views[rows] if views is not None else np.zeros(len(rows), dtype=np.int64)
        return FeatureRows(where.shard[rows], where.row[rows], drawn)
