"""What several processes of one node do together, in one pool."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import made_up_features
from cvdist.features import manifest
from cvdist.features.copies import FeatureRows, MappedCopy
from cvdist.features.local import LocalShards
from cvdist.storage import Folder
from tests.helpers import logistic_workers

SHARDS, ROWS = 6, 8


@pytest.fixture(scope="module")
def pool():
    """Three processes, forked from one that has imported PyTorch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cvdist.features.copies", "torch.distributed"])
    with ProcessPoolExecutor(3, context) as pool:
        yield pool


class Counting(Folder):
    """Notes what is read."""

    def __init__(self, root: Path) -> None:
        """Open a folder."""
        opened = Folder.open(str(root), "--features")
        super().__init__(opened.uri, opened.filesystem, opened.root, opened.flag)
        object.__setattr__(self, "reads", [])

    def read(self, name):
        self.reads.append(name)
        return super().read(name)


def read_all(root: Path, cache: Path) -> tuple[float, int]:
    """The sum of all features of a node's copy, and how many files this process has fetched."""
    folder = Counting(root)
    shards = LocalShards(folder, manifest.read(folder), cache, limit=1 << 30, timeout=600.0)
    fetched = len(folder.reads)
    copy = MappedCopy(shards, fetch_threads=3, timeout=600.0)
    copy.expect(range(SHARDS))
    shard, row = np.divmod(np.arange(SHARDS * ROWS), ROWS)
    total = copy.gather(FeatureRows(shard, row, np.zeros_like(row))).double().sum().item()
    copy.close()
    return total, len(folder.reads) - fetched


def test_processes_of_a_node_share_the_copy(pool, tmp_path):
    made = made_up_features.write(tmp_path / "source", SHARDS * ROWS, 0, shape=(64,), shard_size=ROWS)
    everything = torch.stack(list(made_up_features.everything(made, tmp_path / "source").values()))
    futures = [pool.submit(read_all, tmp_path / "source", tmp_path / "cache") for _ in range(3)]
    found = [future.result(120) for future in futures]
    assert {total for total, _ in found} == {everything.double().sum().item()}
    assert sum(reads for _, reads in found) == SHARDS


def test_several_workers_find_by_logistic_regression_what_one_finds(pool, tmp_path):
    futures = [pool.submit(logistic_workers.work, rank, 3, tmp_path) for rank in range(3)]
    one, results = logistic_workers.fitted(), [future.result(300) for future in futures]
    for found in results:
        assert torch.equal(found.weight, results[0].weight) and torch.equal(found.bias, results[0].bias)
        torch.testing.assert_close(found.weight, one.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.bias, one.bias, rtol=1e-3, atol=1e-3)
        assert (found.penalty, found.correct) == (one.penalty, one.correct)
        for held, expected in zip(found.path, one.path, strict=True):
            assert (held.penalty, held.correct, held.total) == (
                expected.penalty,
                expected.correct,
                expected.total,
            )
            assert held.loss == pytest.approx(expected.loss, rel=1e-3)
