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
from tests.helpers import logistic_workers, multilabel_workers

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
    first = results[0][0]
    for found, _ in results:
        assert torch.equal(found.weight, first.weight) and torch.equal(found.bias, first.bias)
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
    for several in (False, True):
        alone = logistic_workers.fitted_separable(several=several)
        for _, separable in results:
            assert (separable[several].penalty, separable[several].correct) == (alone.penalty, alone.correct)


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory):
    """What one worker makes of pictures with several labels: a trained network, and logistic regression."""
    folder = tmp_path_factory.mktemp("one")
    return multilabel_workers.trained(folder, **SEVERAL), multilabel_workers.fitted()


SEVERAL = {"dropout": 0.0, "class_weights": "balanced", "label_smoothing": 0.1, "mixup_alpha": 0.4}


@pytest.mark.parametrize("workers", [2, 3])
def test_several_workers_learn_several_labels_as_one_does(pool, one_worker, tmp_path, workers):
    work = [pool.submit(multilabel_workers.work, rank, workers, tmp_path, SEVERAL) for rank in range(workers)]
    ((state, best, history), fit), results = one_worker, [future.result(300) for future in work]
    for (mine, my_best, my_history), my_fit in results:
        for name, tensor in state.items():
            torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-4)
        for found, expected in zip(my_history, history, strict=True):
            assert found.valid_total == expected.valid_total == 200
            assert found.train_loss == pytest.approx(expected.train_loss, rel=1e-4)
            assert found.valid_loss == pytest.approx(expected.valid_loss, rel=1e-4)
            precision = found.valid_mean_average_precision
            assert precision == pytest.approx(expected.valid_mean_average_precision, abs=1e-3)
        # All workers have the same numbers, to the last bit.
        first = results[0][0][1].labels
        for name in ("average_precision", "thresholds", "curves"):
            assert torch.equal(getattr(my_best.labels, name), getattr(first, name))
        torch.testing.assert_close(
            my_best.labels.average_precision, best.labels.average_precision, atol=1e-3, rtol=0
        )
        torch.testing.assert_close(my_fit.weight, fit.weight, rtol=1e-3, atol=1e-4)
        assert (my_fit.penalty, my_fit.correct) == (fit.penalty, fit.correct)
