"""One cluster for all cases: each of them leaves it with two nodes that live."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cluster.harness import Cluster, reason_to_skip
from tests.jobs import torchrun

EPOCHS = 14
# 63 steps an epoch, with dropout, augmentation and momentum, that a checkpoint has to restore.
TRAINING = [
    *("digits-cnn", "--batch-size", "64", "--lr-scheduler", "constant", "--checkpoint-every", "20"),
    *("--log-every-steps", "10", "--device", "cpu", "--precision", "float32", "--no-log-model"),
    *("--no-system-metrics", "--step-timeout", "120"),
]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The head, and two nodes with a CPU each."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="cvc-", dir="/tmp"))  # Ray's socket names have to be short
    made = Cluster(folder)
    try:
        made.add_node(), made.add_node()
        made.ready(2)
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that two workers reach if nothing happens, on this machine without Ray."""
    return undisturbed(tmp_path_factory.mktemp("reference"), EPOCHS)


def undisturbed(storage: Path, epochs: int) -> dict[str, torch.Tensor]:
    """What two workers under torchrun reach in `epochs`; with as many threads as those of the cluster."""
    words = [*TRAINING, "--epochs", str(epochs), "--name", "reference", "--tracking", "none"]
    done = torchrun(2, *words, storage=storage, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return weights(storage / "reference" / f"epoch-{epochs:04}" / "state.pt")


def weights(file: object) -> dict[str, torch.Tensor]:
    """A checkpoint's weights and momentum, by name."""
    state = torch.load(file, weights_only=True)
    momentum = {f"momentum {k}": v["momentum_buffer"] for k, v in state["optimizer"]["state"].items()}
    return {**state["model"], **momentum}
