"""One cluster for all tests: each of them leaves it with two nodes that live."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.harness import Cluster, reason_to_skip
from tests.cluster.outcome import EPOCHS, Weights, reference_weights, undisturbed_training


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The head, and two nodes with a CPU each."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="cvc-", dir="/tmp"))  # Ray's socket names have to be short
    try:
        started = Cluster(folder)
        try:
            started.add_node(), started.add_node()
            started.ready(2)
            yield started
        finally:
            started.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """The weights that two workers reach if nothing happens, on this machine without Ray."""
    with undisturbed_training(tmp_path_factory.mktemp("reference"), EPOCHS) as training:
        return reference_weights(training, EPOCHS)
