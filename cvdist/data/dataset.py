"""What the training loop knows of data: a description, and batches that are ready to compute with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from cvdist.data.augment import Augmentation
from cvdist.data.sampler import EpochOrder

Split = Literal["train", "valid"]


@dataclass(frozen=True)
class DatasetInfo:
    """Description of a data set.

    mean, std: of the training pictures by channel, for pixels in [0, 1].
    """

    name: str
    source: str
    classes: tuple[str, ...]
    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_size: int
    valid_size: int

    def __str__(self) -> str:
        """One line for logs and reports."""
        return (
            f"{self.name}: {self.train_size:,} training and {self.valid_size:,} validation pictures, "
            f"{len(self.classes)} classes, {self.channels}x{self.height}x{self.width} ({self.source})"
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """One worker's share of a step, on the device.

    images: float32 (n, C, H, W), normalised and, in training, augmented; n may be 0.
    labels: int64 (n,).
    indices: int64 (n,) on the CPU, rows of the split.
    global_size: samples in this step over all workers.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    global_size: int


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; what computes there is not waited for.

    A GPU copies by itself from pinned memory only: from any other the processor waits until its turn has come.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Shuffle:
    """How an epoch is shuffled, as a checkpoint within it has to remember.

    streams: 0 for a shuffle of everything; else the workers among which shards were divided, each shuffling
    `window` of them at a time, because not all fit on a node.
    """

    streams: int = 0
    window: int = 0


@dataclass(frozen=True)
class BadPicture:
    """A file that can't be decoded, and why."""

    path: str
    reason: str


class FullShuffle:
    """What loaders have in common whose every sample is at hand at any time."""

    features = False
    note = ""

    info: DatasetInfo

    def shuffle(self, world_size: int) -> Shuffle:
        """See `Loader.shuffle`."""
        return Shuffle()

    def names(self, split: Split, indices: Sequence[int]) -> list[str]:
        """See `Loader.names`."""
        return [f"row {index}" for index in indices]

    def epoch_order(self, batch_size: int, seed: int, epoch: int, shuffle: Shuffle) -> EpochOrder:
        """See `Loader.epoch_order`."""
        return EpochOrder(self.info.train_size, batch_size, seed=seed, epoch=epoch)


class Loader(Protocol):
    """A data set that hands out batches on one device.

    quarantine: what was left out; augmentation: what training pictures go through, or None; features: whether
    batches hold what the model's frozen layers made of the pictures, instead of pictures; note: one line for
    the log, or empty.
    """

    info: DatasetInfo
    quarantine: Sequence[BadPicture]
    augmentation: Augmentation | None
    features: bool
    note: str

    def shuffle(self, world_size: int) -> Shuffle:
        """How an epoch that begins now is shuffled."""
        ...

    def epoch_order(self, batch_size: int, seed: int, epoch: int, shuffle: Shuffle) -> EpochOrder:
        """The order of an epoch that began with `shuffle`."""
        ...

    def train_batches(
        self, order: EpochOrder, rank: int, world_size: int, position: int = 0
    ) -> Iterator[Batch]:
        """This worker's share of each step of an epoch, from `position` (in samples) on."""
        ...

    def valid_batches(self, rank: int, world_size: int, batch_size: int) -> Iterator[Batch]:
        """This worker's part of the validation data, each sample once, never padded."""
        ...

    def pictures(self, split: Split, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Original pixels, uint8 (n, C, H, W) on the CPU, and class names, of some rows of a split."""
        ...

    def names(self, split: Split, indices: Sequence[int]) -> list[str]:
        """What a person finds some rows of a split by: the pictures' paths where there are any."""
        ...

    def digest(self) -> str:
        """Hexadecimal SHA-256 of all that the data set holds."""
        ...
