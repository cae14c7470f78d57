"""What each worker has of a tensor, and groups of workers that can't work together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from cvdist.distributed.tensor_shard import shard_of, shard_range
from cvdist.errors import UserError
from cvdist.runtime.processes import require_same_devices

# ------------------------------------------------------------------------------------------- slices and files


@given(st.integers(1, 60), st.integers(1, 12))
def test_parts_are_everything_once(size, workers):
    rows = [i for rank in range(workers) for i in shard_range(size, workers, rank)]
    assert rows == list(range(size))
    whole = torch.arange(size)
    chunks = [shard_of((size,), 0, workers, rank).of(whole) for rank in range(workers)]
    assert all(map(torch.equal, [c for c in chunks if len(c)], whole.chunk(workers)))


def test_workers_on_gpus_and_on_cpus_are_one_line():
    store = HashStore()
    store.set("device-1", "cuda")
    store.set("device-2", "cpu")
    with pytest.raises(UserError, match="different devices, 2 on cpu and 1 on cuda: use nodes of one kind"):
        require_same_devices(store, 0, 3, "cpu")
    store.set("device-1", "cpu")
    require_same_devices(store, 0, 3, "cpu")
