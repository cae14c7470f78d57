"""Every sample goes to exactly one worker exactly once an epoch: for any sizes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cvdist.data.sampler import EpochOrder, partition

sizes = st.integers(1, 300)
batches = st.integers(1, 64)
worlds = st.integers(1, 17)
seeds = st.integers(0, 2**31)


@given(sizes, batches, worlds, seeds)
def test_every_sample_once_and_equal_steps(size, batch_size, world, seed):
    order = EpochOrder(size, batch_size, seed=seed, epoch=1)
    by_worker = [list(order.local_batches(rank, world)) for rank in range(world)]
    seen = torch.cat([local.indices for local_batches in by_worker for local in local_batches])
    assert sorted(seen.tolist()) == list(range(size))
    assert {len(local_batches) for local_batches in by_worker} == {order.steps()}
    for local_batches in zip(*by_worker, strict=True):
        lengths = [len(local.indices) for local in local_batches]
        assert max(lengths) - min(lengths) <= 1
        assert sum(lengths) == local_batches[0].global_size <= batch_size


@given(sizes, batches, worlds, seeds)
def test_global_batches_do_not_depend_on_the_number_of_workers(size, batch_size, world, seed):
    order = EpochOrder(size, batch_size, seed=seed, epoch=1)
    alone = [local.indices.tolist() for local in order.local_batches(0, 1)]
    by_worker = [order.local_batches(rank, world) for rank in range(world)]
    together = [
        torch.cat([local.indices for local in local_batches]).tolist()
        for local_batches in zip(*by_worker, strict=True)
    ]
    assert together == alone


@given(sizes, batches, worlds, worlds, seeds, st.data())
def test_a_saved_position_continues_with_other_workers(size, batch_size, before, after, seed, data):
    order = EpochOrder(size, batch_size, seed=seed, epoch=3)
    stop = data.draw(st.integers(0, order.steps()))
    first = [local for rank in range(before) for local in list(order.local_batches(rank, before))[:stop]]
    position = min(stop * batch_size, size)
    again = EpochOrder(size, batch_size, seed=seed, epoch=3)
    rest = [local for rank in range(after) for local in again.local_batches(rank, after, position)]
    seen = torch.cat([local.indices for local in first + rest])
    assert sorted(seen.tolist()) == list(range(size))
    assert again.steps(position) == order.steps() - stop


@given(seeds)
def test_epochs_and_seeds_shuffle_differently_and_repeatably(seed):
    def order(seed, epoch):
        return EpochOrder(1000, 10, seed=seed, epoch=epoch).order.tolist()

    assert order(seed, 1) == order(seed, 1)
    assert order(seed, 1) != order(seed, 2)
    # Seed s in epoch e + 1 must not be seed s + 1 in epoch e.
    assert order(seed, 2) != order(seed + 1, 1)


@given(st.integers(0, 1000), worlds)
def test_validation_is_dealt_without_padding(count, world):
    parts = [partition(count, rank, world) for rank in range(world)]
    assert [row for part in parts for row in part] == list(range(count))
