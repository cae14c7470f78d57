"""Who sees which sample when.

One global order an epoch, a function of (seed, epoch) alone. It is cut into global batches, and each global
batch is dealt over the workers in contiguous shares whose sizes differ by at most one. Three properties follow
by construction, for any number of workers and any sizes (`tests/test_sampler.py`):

- every sample belongs to exactly one worker exactly once an epoch;
- every worker takes the same number of steps, so collectives can't hang (a share may be empty);
- the position in an epoch is a count of samples that holds for any number of workers, so that a job can go on
  with more or fewer of them in mid-epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cvdist.seeding import generator


@dataclass(frozen=True, slots=True)
class Share:
    """One worker's part of one global batch.

    indices: int64 (n,), rows of the data set; n may be 0 when the batch is smaller than the number of workers.
    start: position of the global batch in the epoch's order, in samples.
    offset: position of this share in the global batch, in samples.
    global_size: samples in the global batch, over all workers.
    """

    indices: Tensor
    start: int
    offset: int
    global_size: int


class EpochOrder:
    """The order of one epoch and its division into batches and shares."""

    def __init__(
        self, size: int, batch_size: int, *, seed: int, epoch: int, order: Tensor | None = None
    ) -> None:
        """Shuffle `size` samples by (seed, epoch); `batch_size` is global, the last batch may be smaller.

        order: int64 (size,), another order than that.
        """
        self.size = size
        self.batch_size = batch_size
        self.epoch = epoch
        self.order = torch.randperm(size, generator=generator("order", seed, epoch)) if order is None else order

    def steps(self, position: int = 0) -> int:
        """Optimiser steps from `position` (in samples) to the epoch's end."""
        return -(-(self.size - position) // self.batch_size)

    def shares(self, rank: int, world_size: int, position: int = 0) -> Iterator[Share]:
        """What worker `rank` of `world_size` computes in each step, from `position` (in samples) on."""
        for start in range(position, self.size, self.batch_size):
            stop = min(start + self.batch_size, self.size)
            mine = deal(stop - start, rank, world_size)
            indices = self.order[start + mine.start : start + mine.stop]
            yield Share(indices, start=start, offset=mine.start, global_size=stop - start)


def deal(count: int, rank: int, world_size: int) -> range:
    """Contiguous part of `range(count)` that belongs to `rank`; parts differ in length by at most one."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)
