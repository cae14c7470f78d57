"""Every sample goes to exactly one worker exactly once an epoch: for any sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvdist.data.sampler import EpochOrder, draw_balanced, partition

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


@given(st.lists(st.integers(1, 400), min_size=2, max_size=5), seeds, worlds, worlds, st.data())
def test_balanced_epochs_draw_all_classes_alike_at_any_number_of_workers(counts, seed, before, after, data):
    labels = torch.arange(2 * len(counts))[::2].repeat_interleave(torch.tensor(counts))  # every other is empty
    drawn = draw_balanced(labels, seed=seed, epoch=2)
    assert len(drawn) == len(labels) and torch.equal(drawn, draw_balanced(labels, seed=seed, epoch=2))
    share = labels[drawn].bincount(minlength=2 * len(counts))[::2] / len(drawn)
    deviation = (1 / len(counts) * (1 - 1 / len(counts)) / len(drawn)) ** 0.5
    assert (share - 1 / len(counts)).abs().max() < 6 * deviation
    # A position continues the same draw with another number of workers.
    order = EpochOrder(len(labels), 7, seed=seed, epoch=2, order=drawn)
    steps = data.draw(st.integers(0, order.steps()))
    first = [list(order.local_batches(rank, before))[:steps] for rank in range(before)]
    rest = [list(order.local_batches(rank, after, min(7 * steps, len(labels)))) for rank in range(after)]
    seen = [local.indices for part in (first, rest) for step in zip(*part, strict=True) for local in step]
    assert torch.equal(torch.cat(seen), drawn)


def test_balanced_epochs_draw_all_samples_of_a_class_alike():
    labels = torch.tensor([0] * 9 + [1])
    drawn = torch.cat([draw_balanced(labels, seed=seed, epoch=1) for seed in range(2000)]).bincount()
    assert drawn[9] / drawn.sum() == pytest.approx(0.5, abs=0.02)
    assert (drawn[:9] / drawn.sum()).tolist() == pytest.approx([0.5 / 9] * 9, rel=0.15)
    assert not torch.equal(*(draw_balanced(labels.repeat(9), seed=0, epoch=epoch) for epoch in (1, 2)))
