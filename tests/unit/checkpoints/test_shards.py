"""Checkpoints that several workers write together."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvdist.checkpoints import shards
from cvdist.distributed.tensor_shard import shard_of


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(5, 12), st.integers(0, 1))
def test_what_some_workers_wrote_others_read(tmp_path_factory, writers, readers, size, dim):
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(size)
    weight, momentum = torch.randn(size, size), torch.randn(size, size)

    def local(rank, count):
        mine = {"w": shard_of((size, size), dim, count, rank)}
        return shards.slices_by_path(mine, ["other", "w"]), mine["w"]

    states = []
    for rank in range(writers):
        slice_of, mine = local(rank, writers)
        state = {
            "model": {"w": mine.of(weight).clone(), "other": torch.ones(3)},
            "optimizer": {"state": {1: {"momentum_buffer": mine.of(momentum).clone(), "step": torch.ones(())}}},
            "rng": [{"cpu": torch.zeros(2)}],
        }
        rest, split = shards.separate(state, slice_of)
        assert set(split) == {"model/w", "optimizer/state/1/momentum_buffer"}
        shards.write(folder, rank, writers, split)
        states.append(rest)
    read = shards.join(states[0], folder, writers)
    for rank in range(readers):
        slice_of, mine = local(rank, readers)
        found = shards.take_shards(read, slice_of, "cpu")
        assert torch.equal(found["model"]["w"], mine.of(weight))
        assert torch.equal(found["optimizer"]["state"][1]["momentum_buffer"], mine.of(momentum))
        assert torch.equal(found["model"]["other"], torch.ones(3))
    assert torch.equal(shards.whole(read, "cpu")["model"]["w"], weight)


def test_a_damaged_or_missing_part_is_found(tmp_path):
    for rank in range(2):
        mine = shard_of((6, 2), 0, 2, rank)
        shards.write(tmp_path, rank, 2, {"model/w": (torch.ones(mine.local_shape), mine)})
    marked = {"model": {"w": {"cvdist.parts": 0}}}
    assert shards.whole(shards.join(marked, tmp_path, 2), "cpu")["model"]["w"].shape == (6, 2)
    data, receipt = (tmp_path / name for name in shards.names(2, 1))
    written = json.loads(receipt.read_text())
    receipt.write_text(json.dumps({**written, "rows": {"model/w": [3, 900]}}))
    with pytest.raises(ValueError, match="has other rows of model/w than it says"):
        shards.join(marked, tmp_path, 2)
    receipt.write_text(json.dumps({**written, "rows": {}}))
    with pytest.raises(ValueError, match="rows of model/v are missing"):
        shards.join({"model": {"v": {"cvdist.parts": 0}}}, tmp_path, 2)
    receipt.write_text(json.dumps(written))
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="is not what was written"):
        shards.join(marked, tmp_path, 2)
    data.unlink()
    with pytest.raises(OSError, match="No such file"):
        shards.join(marked, tmp_path, 2)
