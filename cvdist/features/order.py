"""The order of an epoch over a cache that does not fit a node: shuffled shards, then a shuffle by window.

All shards of an epoch, in random order, form one line of samples. It is cut into a stream for each worker, and
each stream is shuffled within windows of some shards. So a worker needs few shards at a time, each of them
once an epoch, and each sample is still seen exactly once. Woven together, the streams are one global order,
dealt like any other (`cvdist.data.sampler`), and an epoch can go on with another number of workers.
"""

from __future__ import annotations

import numpy as np
import torch

from cvdist.data.sampler import EpochOrder, partition
from cvdist.seeding import derive_seed


def windowed(
    shard: np.ndarray, batch_size: int, *, seed: int, epoch: int, streams: int, window: int
) -> EpochOrder:
    """The order of one epoch.

    Args:
        shard: int (n,), in which shard each sample is.
        batch_size: global.
        seed: what the order depends on,
        epoch: besides all other arguments.
        streams: number of workers that are to read few shards each.
        window: shards that are shuffled together.
    """
    random = np.random.default_rng(derive_seed("shards", seed, epoch))
    size = len(shard)
    rank = random.permutation(int(shard.max(initial=-1)) + 1)
    line = np.argsort(rank[shard], kind="stable")
    full, rest = divmod(size, batch_size)
    order = np.empty(size, dtype=np.int64)
    whole, tail = order[: full * batch_size].reshape(full, batch_size), order[full * batch_size :]
    start = 0
    for stream in range(streams):
        mine, last = partition(batch_size, stream, streams), partition(rest, stream, streams)
        stop = start + full * len(mine) + len(last)
        shuffled = _shuffle(line[start:stop], shard, window, random)
        whole[:, mine.start : mine.stop] = shuffled[: full * len(mine)].reshape(full, len(mine))
        tail[last.start : last.stop] = shuffled[full * len(mine) :]
        start = stop
    return EpochOrder(size, batch_size, seed=seed, epoch=epoch, order=torch.from_numpy(order))


def _shuffle(samples: np.ndarray, shard: np.ndarray, window: int, random: np.random.Generator) -> np.ndarray:
    """Samples in the order of the line, shuffled within every `window` shards."""
    number = np.cumsum(np.diff(shard[samples], prepend=-1) != 0) - 1
    which = number // window
    # Sorted by window, and within one by a random number.
    return samples[np.lexsort((random.random(len(samples)), which))]
