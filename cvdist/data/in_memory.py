"""Small data sets: one uint8 tensor on the device, gathered, normalized and augmented by batch.

Nothing is done a picture at a time. Several steps' local batches are gathered and normalized in one go: for
digits, a tensor operation's fixed cost is a good part of a step, and so it is paid once for many steps.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cvdist.data.augment import Augmentation
from cvdist.data.dataset import Batch, DatasetInfo, Loader, Split, to_device
from cvdist.data.labels import label_names, targets_of
from cvdist.data.mixing import Mixing
from cvdist.data.normalize import Normalizer
from cvdist.data.quarantine import BadPicture
from cvdist.data.sampler import EpochOrder, LocalBatch, partition

# Float pixels gathered at once: large enough to spread an operation's fixed cost over many small steps,
# small enough to stay in a processor's cache until the steps have used them.
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class LabeledImages:
    """A split of a data set on one device: images uint8 (N, C, H, W) and labels as in `Loader.labels`."""

    images: Tensor
    labels: Tensor


class InMemoryLoader(Loader):
    """Yields batches of a data set that fits in the device's memory (`cvdist.data.dataset.Loader`)."""

    def __init__(
        self,
        info: DatasetInfo,
        train: LabeledImages,
        valid: LabeledImages,
        *,
        device: torch.device,
        augmentation: Augmentation | None = None,
        mixing: Mixing | None = None,
        channels_last: bool = False,
    ) -> None:
        """Move the whole data set to `device`.

        Args:
            info: description of the data set.
            train: training samples.
            valid: validation samples.
            device: where batches are made.
            augmentation: applied to training pictures, or None.
            mixing: mixes training pictures with each other, or None.
            channels_last: whether batches get the channels_last memory format.
        """
        self.info = info
        self.quarantine: Sequence[BadPicture] = ()
        self.device = device
        self.augmentation, self.mixing = augmentation, mixing
        self.splits: dict[Split, LabeledImages] = {
            "train": LabeledImages(train.images.to(device), train.labels.to(device)),
            "valid": LabeledImages(valid.images.to(device), valid.labels.to(device)),
        }
        self._normalize = Normalizer(info.mean, info.std, device, channels_last=channels_last)

    def labels(self, split: Split) -> Tensor:
        return self.splits[split].labels.cpu()

    def train_batches(
        self, order: EpochOrder, rank: int, world_size: int, position: int = 0
    ) -> Iterator[Batch]:
        picture_bytes = 4 * self.info.channels * self.info.height * self.info.width
        steps = max(1, _CHUNK_BYTES * world_size // (order.batch_size * picture_bytes))
        local_batches = order.local_batches(rank, world_size, position, partner=self.mixing is not None)
        while chunk := list(itertools.islice(local_batches, steps)):
            draws = None
            if self.augmentation is not None:
                draws = torch.cat([self.augmentation.draw(local, order.epoch) for local in chunk])
            batches = self._gather("train", chunk, draws)
            if self.mixing is None:
                yield from batches
                continue
            for local, batch in zip(chunk, batches, strict=True):
                yield self.mixing.mix(batch, self.mixing.draw(order.epoch, local.start))

    def valid_batches(self, rank: int, world_size: int, batch_size: int) -> Iterator[Batch]:
        mine = partition(self.info.valid_size, rank, world_size)
        for start in range(mine.start, mine.stop, batch_size):
            indices = torch.arange(start, min(start + batch_size, mine.stop))
            yield from self._gather("valid", [LocalBatch(indices, start, 0, len(indices))], None)

    def pictures(self, split: Split, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        rows = torch.as_tensor(indices, dtype=torch.int64, device=self.device)
        data = self.splits[split]
        return data.images[rows].cpu(), label_names(data.labels[rows], self.info.classes)

    def digest(self) -> str:
        sha = hashlib.sha256()
        for data in self.splits.values():
            for tensor in (data.images, data.labels):
                sha.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
                sha.update(tensor.cpu().numpy().data)
        return sha.hexdigest()

    def _gather(self, split: Split, chunk: list[LocalBatch], draws: Tensor | None) -> Iterator[Batch]:
        data = self.splits[split]
        indices = torch.cat([local.indices for local in chunk])
        rows = to_device(indices, self.device)
        images = data.images.index_select(0, rows).float()
        if self.augmentation is not None and draws is not None:
            images = self.augmentation.apply(images, draws, self.info.mean)
        images = self._normalize(images)
        labels = targets_of(data.labels.index_select(0, rows))
        sizes = [len(local.indices) for local in chunk]
        parts = zip(images.split(sizes), labels.split(sizes), indices.split(sizes), chunk, strict=True)
        for part_images, part_labels, part_indices, local in parts:
            yield Batch(part_images, part_labels, part_indices, local.global_size)
