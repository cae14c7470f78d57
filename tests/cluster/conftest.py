"""One cluster for all tests: each of them leaves it with two nodes that live."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.harness import Cluster, LoggedProcess
from tests.cluster.outcome import EPOCHS, Weights, reference_weights, undisturbed_training
from tests.helpers.network import reason_to_skip


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoggedProcess]:
    """The training that nothing happens to; it goes on while the cluster and the first job start."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    with undisturbed_training(tmp_path_factory.mktemp("reference"), EPOCHS) as training:
        yield training


@pytest.fixture(scope="session")
def cluster(undisturbed: LoggedProcess) -> Iterator[Cluster]:
    """The head, and two nodes with a CPU each."""
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
def reference(cluster: Cluster, undisturbed: LoggedProcess) -> Weights:
    """The weights that two workers reach if nothing happens, on this machine without Ray."""
    return reference_weights(undisturbed, EPOCHS)
