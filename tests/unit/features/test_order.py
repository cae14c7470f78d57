"""The order in which a cache's samples are read: each once, a window of shards at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import made_up_features
from cvdist import config as configs
from cvdist.data.dataset import Shuffle
from cvdist.features import open as opening
from cvdist.features.order import windowed
from tests.helpers.feature_caches import CPU, config, epoch

# ----------------------------------------------------------------------------------------- every sample, once


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A cache of 23 + 9 made-up pictures in shards of four, its features by path, and a loader maker."""
    root = tmp_path_factory.mktemp("made-up")
    made = made_up_features.write(root / "features", 23, 9, shape=(40,), shard_size=4, views=3)
    return made, made_up_features.everything(made, root / "features"), root


def loader_of(made_up, window=0, views=1):
    _, _, root = made_up
    limit = 0.0
    if window:
        largest = max(entry.raw_bytes for entry in made_up[0].shards)
        limit = (3 * window * largest + 10) / 1e9
    flips = {"horizontal_flip": 0.5} if views > 1 else {}
    chosen = config("", root / "features", Path("unused"), root / f"cache-{window}", local_cache_gb=limit)
    chosen = configs.replace(chosen, views=views)
    loader = opening.load(chosen, CPU, 1)
    assert loader.shuffle(2) == (Shuffle(2, window) if window else Shuffle()), flips
    return loader


@settings(max_examples=20)
@given(
    batch_size=st.integers(1, 25),
    world=st.integers(1, 5),
    number=st.integers(1, 3),
    window=st.integers(0, 2),
    views=st.integers(1, 3),
)
def test_all_workers_together_see_each_sample_once(made_up, batch_size, world, number, window, views):
    _, features, _ = made_up
    loader = loader_of(made_up, window, views)
    shares = [epoch(loader, batch_size, number=number, rank=r, world=world) for r in range(world)]
    assert len({len(share) for share in shares}) == 1  # the same number of steps for all
    seen = torch.cat([batch.indices for share in shares for batch in share]).tolist()
    assert sorted(seen) == list(range(23))
    for batches in zip(*shares, strict=True):
        assert sum(len(batch.labels) for batch in batches) == batches[0].global_size
        for batch in batches:
            paths = loader.names("train", batch.indices.tolist())
            assert batch.labels.tolist() == [int(path.split("/")[1] == "dog") for path in paths]
            for path, row in zip(paths, batch.images, strict=True):
                assert any(torch.equal(row, view.float()) for view in features[path][:views])
    valid = [batch for rank in range(world) for batch in loader.valid_batches(rank, world, batch_size)]
    assert sorted(torch.cat([batch.indices for batch in valid]).tolist()) == list(range(9))
    for batch in valid:
        for path, row in zip(loader.names("valid", batch.indices.tolist()), batch.images, strict=True):
            assert torch.equal(row, features[path][0].float())


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    batch_size=st.integers(1, 20),
    streams=st.integers(1, 5),
    window=st.integers(1, 4),
    now=st.integers(1, 5),
    data=st.data(),
)
def test_windowed_order_is_a_permutation_also_after_a_change_of_workers(
    sizes, batch_size, streams, window, now, data
):
    numbers = np.repeat(np.arange(len(sizes)), sizes)
    order = windowed(numbers, batch_size, seed=1, epoch=2, streams=streams, window=window)
    again = windowed(numbers, batch_size, seed=1, epoch=2, streams=streams, window=window)
    assert torch.equal(order.order, again.order)
    step = data.draw(st.integers(0, order.steps()))
    position = min(step * batch_size, order.size)
    before = order.order[:position].tolist()
    after = [
        i for rank in range(now) for s in order.local_batches(rank, now, position) for i in s.indices.tolist()
    ]
    assert sorted(before + after) == list(range(len(numbers)))


def test_windowed_order_reads_each_shard_on_one_worker_and_in_one_window():
    numbers = np.repeat(np.arange(40), 25)
    order = windowed(numbers, 64, seed=0, epoch=1, streams=4, window=3)
    where = []
    for rank in range(4):
        mine = np.concatenate([numbers[share.indices] for share in order.local_batches(rank, 4)])
        where.append(set(mine.tolist()))
        assert len(where[-1]) <= 12  # ten, and what is cut at the ends
        # Never more than a window of shards within as many samples as it holds, wherever one looks.
        for start in range(0, len(mine), 75):
            assert len(set(mine[start : start + 75].tolist())) <= 2 * 3
    assert sum(map(len, where)) <= 40 + 3  # a shard is shared where the line is cut
    other = windowed(numbers, 64, seed=0, epoch=2, streams=4, window=3)
    assert not torch.equal(order.order, other.order)


def test_epochs_draw_all_views_and_validation_the_first(made_up):
    _, features, _ = made_up
    loader = loader_of(made_up, views=3)
    drawn = []
    for number in range(1, 12):
        for batch in epoch(loader, 23, number=number):
            for path, row in zip(loader.names("train", batch.indices.tolist()), batch.images, strict=True):
                drawn.append(next(v for v in range(3) if torch.equal(row, features[path][v].float())))
    counts = np.bincount(drawn, minlength=3)
    assert counts.sum() == 11 * 23 and counts.min() > 50
    first, again = epoch(loader, 23, number=1), epoch(loader, 23, number=1)
    assert torch.equal(first[0].images, again[0].images)
