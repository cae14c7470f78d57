"""The interface between data and the training loop: data set descriptions, batches and loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from cvdist.data.quarantine import BadPicture
from cvdist.data.sampler import EpochOrder, draw_balanced

if TYPE_CHECKING:  # both import this module
    from cvdist.data.augment import Augmentation
    from cvdist.data.mixing import Mixing

Split = Literal["train", "valid"]


@dataclass(frozen=True)
class DatasetInfo:
    """Description of a data set.

    Attributes:
        name: short name for people.
        source: where the data came from, for people.
        classes: class names, in the order of their labels.
        channels: number of channels of a picture.
        height: height of a picture in pixels.
        width: width of a picture in pixels.
        mean: mean of the training pictures for each channel, for pixels in [0, 1].
        std: standard deviation of the training pictures for each channel, for pixels in [0, 1].
        train_size: number of training samples.
        valid_size: number of validation samples.
        multilabel: whether a picture may have several classes, or none.
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
    multilabel: bool = False

    def __str__(self) -> str:
        """Describe the data set in one line, for logs and reports."""
        return (
            f"{self.name}: {self.train_size:,} training and {self.valid_size:,} validation pictures, "
            f"{len(self.classes)} classes, {self.channels}x{self.height}x{self.width} ({self.source})"
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """One worker's part of the global batch of a step, on the device.

    Attributes:
        images: float32 (n, C, H, W), normalized and, in training, augmented; n may be 0. A loader of cached
            features puts features here instead.
        labels: int64 (n,). For mixed samples, the shares of the classes, float32 (n, classes). Where pictures
            may have several classes (`DatasetInfo.multilabel`), float32 (n, classes), 1 for a picture's own.
        indices: int64 (n,) on the CPU, the samples' row numbers in the split.
        global_size: number of samples in this step over all workers.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    global_size: int


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy `tensor` to `device` without waiting for work that is already queued there.

    Copies to a GPU are asynchronous only from pinned memory, so a tensor in other memory is pinned first.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Shuffle:
    """The way an epoch is shuffled. A checkpoint in mid-epoch stores it, so that the epoch can be continued.

    Attributes:
        streams: 0 if all samples are shuffled together. Otherwise the number of workers that the shards were
            divided among when the epoch began, because not all shards fit on a node.
        window: number of shards that each of these streams shuffles together; 0 if `streams` is 0.
        balanced: whether samples are drawn with replacement, each class about equally often.
    """

    streams: int = 0
    window: int = 0
    balanced: bool = False


class Loader(ABC):
    """A data set that yields batches on one device. All samples are shuffled together by default.

    Attributes:
        info: description of the data set.
        quarantine: pictures that were left out because they can't be decoded.
        augmentation: how training pictures are augmented, or None.
        mixing: how training pictures are mixed with each other, or None.
        features: whether batches hold cached outputs of the model's frozen layers instead of pictures.
        note: one line for the log, or empty.
    """

    info: DatasetInfo
    quarantine: Sequence[BadPicture]
    augmentation: Augmentation | None = None
    mixing: Mixing | None = None
    features: bool = False
    note: str = ""

    @abstractmethod
    def labels(self, split: Split) -> Tensor:
        """Return the labels of a split by row, on the CPU: int64 (n,), or bool (n, classes) if multilabel."""

    def shuffle(self, world_size: int, *, balanced: bool = False) -> Shuffle:
        """Return how an epoch that begins now is shuffled, with `world_size` workers (`Shuffle.balanced`)."""
        return Shuffle(balanced=balanced)

    def epoch_order(self, batch_size: int, seed: int, epoch: int, shuffle: Shuffle) -> EpochOrder:
        """Return the order of samples in an epoch that began with `shuffle`."""
        order = draw_balanced(self.labels("train"), seed=seed, epoch=epoch) if shuffle.balanced else None
        return EpochOrder(self.info.train_size, batch_size, seed=seed, epoch=epoch, order=order)

    @abstractmethod
    def train_batches(
        self, order: EpochOrder, rank: int, world_size: int, position: int = 0
    ) -> Iterator[Batch]:
        """Yield worker `rank`'s part of each global batch of an epoch.

        Args:
            order: order of samples in the epoch.
            rank: number of this worker.
            world_size: number of workers.
            position: number of samples of the epoch, over all workers, that are already done.
        """

    @abstractmethod
    def valid_batches(self, rank: int, world_size: int, batch_size: int) -> Iterator[Batch]:
        """Yield worker `rank`'s part of the validation data, without padding: each sample exactly once."""

    @abstractmethod
    def pictures(self, split: Split, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Return original pixels, uint8 (n, C, H, W) on the CPU, and class names of some rows of a split."""

    def names(self, split: Split, indices: Sequence[int]) -> list[str]:
        """Return names that identify some rows of a split for people: the pictures' paths if there are any."""
        return [f"row {index}" for index in indices]

    @abstractmethod
    def digest(self) -> str:
        """Return the hexadecimal SHA-256 of the whole content of the data set."""
