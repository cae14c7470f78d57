"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Several processes share few cores: a thread pool in each would slow them all down.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets and weights, named by CVDIST_TEST_DATA."""
    folder = os.environ.get("CVDIST_TEST_DATA")
    if not folder:
        pytest.skip("CVDIST_TEST_DATA is not set: no folder with real data sets")
    return Path(folder)
