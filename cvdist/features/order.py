"""The order of an epoch over a cache that does not fit on a node: shards are shuffled, then samples in windows.

All shards, in random order, form one sequence of samples. It is cut into one stream per worker, and each stream
is shuffled within windows of a few shards. So a worker needs only a few shards at a time, and each shard once
per epoch, and each sample is still seen exactly once. The streams are interleaved into one global order, which
is divided among workers like any other (`cvdist.data.sampler`), so an epoch can be continued with another
number of workers.
"""

from __future__ import annotations

import numpy as np
import torch

from cvdist.data.sampler import EpochOrder, partition
from cvdist.seeding import derive_seed


def windowed(
    shard: np.ndarray, batch_size: int, *, seed: int, epoch: int, streams: int, window: int
) -> EpochOrder:
    """Return the order of one epoch, which depends only on the arguments.

    Args:
        shard: int (n,), the shard of each sample.
        batch_size: size of the global batch.
        seed: seed of the shuffle.
        epoch: number of the epoch.
        streams: number of workers when the epoch began.
        window: number of shards that each stream shuffles together.
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
    """Shuffle a stream of samples within windows of `window` consecutive shards."""
    number = np.cumsum(np.diff(shard[samples], prepend=-1) != 0) - 1
    which = number // window
    # Sorted by window, and within one by a random number.
    return samples[np.lexsort((random.random(len(samples)), which))]
