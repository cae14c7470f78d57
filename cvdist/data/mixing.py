"""Mixtures of two pictures and of their labels: mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899).

As in torchvision, each sample of a global batch is mixed with the one before it, the first with the last, and
one strength is drawn for all of them. It depends on the seed, the epoch and the batch's place in the epoch's
order. A worker also loads the picture before its own ones, so any number of workers makes the same mixtures.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F

from cvdist.config import MixingConfig
from cvdist.data.dataset import Batch
from cvdist.seeding import derive_seed


class Mixture(NamedTuple):
    """The way the samples of a global batch are mixed.

    Attributes:
        share: share of its own pixels that a sample keeps, in [0, 1].
        cut: middle of the rectangle that CutMix takes from the other picture, x and y as fractions of width and
            height in [0, 1). None: mixup.
    """

    share: float
    cut: tuple[float, float] | None

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the edges in pixels of CutMix's rectangle: top, bottom, left, right. Borders may cut it."""
        assert self.cut is not None
        x, y = int(self.cut[0] * width), int(self.cut[1] * height)
        half = 0.5 * math.sqrt(1 - self.share)
        dx, dy = int(half * width), int(half * height)
        return max(y - dy, 0), min(y + dy, height), max(x - dx, 0), min(x + dx, width)


@dataclass(frozen=True)
class Mixing:
    """Mixes the samples of training batches.

    Attributes:
        mixup: strengths of mixup are drawn from Beta(mixup, mixup); 0: no mixup.
        cutmix: the same for CutMix. If both are above 0, each batch takes one of them by chance.
        classes: number of classes.
        seed: seed of the random numbers.
    """

    mixup: float
    cutmix: float
    classes: int
    seed: int

    @classmethod
    def from_config(cls, config: MixingConfig, classes: int, seed: int) -> Mixing | None:
        """Return the configured mixing; None if there is none."""
        if not (config.mixup_alpha or config.cutmix_alpha):
            return None
        return cls(config.mixup_alpha, config.cutmix_alpha, classes, seed)

    def draw(self, epoch: int, start: int) -> Mixture:
        """Draw how the global batch is mixed that begins at sample `start` of an epoch's order."""
        numbers = random.Random(derive_seed("mixture", self.seed, epoch, start))
        turn, cut = numbers.random(), (numbers.random(), numbers.random())
        if self.mixup and (turn < 0.5 or not self.cutmix):
            return Mixture(numbers.betavariate(self.mixup, self.mixup), None)
        return Mixture(numbers.betavariate(self.cutmix, self.cutmix), cut)

    def mix(self, batch: Batch, mixture: Mixture) -> Batch:
        """Mix each sample with the one before it.

        Args:
            batch: n + 1 samples, the first of which is only mixed into the second; or none.
            mixture: how they are mixed.

        Returns:
            n samples, whose labels are the shares of the classes, float32 (n, classes).
        """
        own, other, share = batch.images[1:], batch.images[:-1], mixture.share
        if mixture.cut is None:
            images = other.mul(1 - share).add_(own.mul(share))
        else:
            height, width = own.shape[-2:]
            top, bottom, left, right = mixture.box(height, width)
            images = own.clone()
            images[..., top:bottom, left:right] = other[..., top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / (height * width)
        labels = batch.labels
        if not labels.is_floating_point():  # one class each
            labels = F.one_hot(labels, self.classes).float()
        labels = labels[:-1].mul(1 - share).add_(labels[1:].mul(share))
        return Batch(images, labels, batch.indices[1:], batch.global_size)
