"""Decides which worker sees which sample in which step.

Each epoch has one global order of samples, which depends on the seed and the epoch alone. It is cut into global
batches, and each global batch is partitioned over the workers into contiguous local batches whose sizes differ
by one at most. For any number of workers and any sizes this gives three properties, which
`tests/unit/data/test_sampler.py` checks:

- Every sample belongs to exactly one worker exactly once an epoch. With balanced sampling the same holds for
  the samples that are drawn, some of which are drawn more than once.
- All workers take the same number of steps, so collective operations can't hang. A local batch may be empty.
- The position in an epoch is a count of samples, which means the same for any number of workers, so a run can
  be continued with more or fewer of them in the middle of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cvdist.seeding import generator


@dataclass(frozen=True, slots=True)
class LocalBatch:
    """The samples of one global batch that one worker computes.

    Attributes:
        indices: int64 (n,), rows of the data set. n may be 0 if the global batch is smaller than the number of
            workers.
        start: Position of the global batch in the epoch's order, in samples.
        offset: Position of this local batch in the global batch, in samples. -1: it begins with the last one.
        global_size: Samples in the global batch, over all workers.
    """

    indices: Tensor
    start: int
    offset: int
    global_size: int

    @property
    def places(self) -> Tensor:
        """The samples' positions in the global batch, int64 (n,)."""
        return torch.arange(self.offset, self.offset + len(self.indices)) % max(self.global_size, 1)


class EpochOrder:
    """The order of one epoch's samples, and its division into global and local batches."""

    def __init__(
        self, size: int, batch_size: int, *, seed: int, epoch: int, order: Tensor | None = None
    ) -> None:
        """Shuffle the samples, or take the order that is given.

        Args:
            size: Number of samples.
            batch_size: Samples in a global batch; the last one of the epoch may have fewer.
            seed: Seed of the shuffle.
            epoch: The epoch, counted from 1; each epoch has another order.
            order: int64 (size,), an order to use in place of the shuffle.
        """
        self.size = size
        self.batch_size = batch_size
        self.epoch = epoch
        self.order = torch.randperm(size, generator=generator("order", seed, epoch)) if order is None else order

    def steps(self, position: int = 0) -> int:
        """Return the number of optimizer steps from `position`, in samples, to the end of the epoch."""
        return -(-(self.size - position) // self.batch_size)

    def local_batches(
        self, rank: int, world_size: int, position: int = 0, *, partner: bool = False
    ) -> Iterator[LocalBatch]:
        """Yield what worker `rank` of `world_size` computes in each step, from `position`, in samples, on.

        With `partner`, a local batch that is not empty begins with one more sample: the one before the worker's
        own in the global batch, of which the last one precedes the first.
        """
        for start in range(position, self.size, self.batch_size):
            stop = min(start + self.batch_size, self.size)
            mine = partition(stop - start, rank, world_size)
            indices = self.order[start + mine.start : start + mine.stop]
            first = mine.start
            if partner and mine:
                first -= 1
                indices = torch.cat([self.order[start:stop][first].view(1), indices])
            yield LocalBatch(indices, start=start, offset=first, global_size=stop - start)


def draw_balanced(labels: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Draw as many samples as there are, with replacement: each time a class, then one of its samples.

    All classes are equally likely, and so are all samples of a class.

    Args:
        labels: int64 (n,), the samples' classes.
        seed: Seed of the draw.
        epoch: The epoch, counted from 1; each epoch has another draw.

    Returns:
        int64 (n,), rows in random order.
    """
    random = generator("balanced order", seed, epoch)
    by_class, counts = labels.argsort(stable=True), labels.bincount()
    first, present = counts.cumsum(0) - counts, counts.nonzero().flatten()
    drawn = present[torch.randint(len(present), (len(labels),), generator=random)]
    within = torch.rand(len(labels), generator=random, dtype=torch.float64) * counts[drawn]
    return by_class[first[drawn] + within.long()]


def partition(count: int, rank: int, world_size: int) -> range:
    """Return the contiguous part of `range(count)` that belongs to worker `rank` of `world_size`.

    The workers' parts differ in length by one at most.
    """
    return range(count * rank // world_size, count * (rank + 1) // world_size)
