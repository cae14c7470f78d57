"""Fixtures that several test files share."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from tests.helpers import pictures, session
from tests.helpers.jobs import ROOT
from tests.helpers.servers import S3Server, choose_ray_token, start_ray, start_s3

if TYPE_CHECKING:
    from tests.helpers.trained import Trained

# Several processes share few cores: a thread pool in each would slow them all down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Its statistics cost an actor for each Ray Data job, and log tracebacks from a thread.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# How fast a busy machine is says nothing about the code.
settings.register_profile(
    "cvdist", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("cvdist")


def pytest_configure() -> None:
    """Before the processes of pytest-xdist are started, which belong to the same session."""
    if session.begin():
        choose_ray_token()


def pytest_unconfigure() -> None:
    """When those have ended."""
    session.end()


# What takes longest is begun first, or one process would be left with it when the other has nothing to do. A
# process has always one group more in its queue: that of the longest has to be short.
_FIRST = [
    "cluster",
    "ray",
    *(f"tests/integration/test_{name}.py" for name in ("stack", "command_line", "split_head", "torchrun")),
    "tests/integration",
    "tests/unit/training",
]


@functools.cache
def _group_of(file: str) -> str:
    """What stays in one process: a file, all that uses the Ray cluster of two CPUs, and simulated clusters."""
    if file.startswith("tests/unit/"):
        return file
    if "ray_cluster" in (ROOT / file).read_text():
        return "ray"
    return "cluster" if file.startswith("tests/cluster/") else file


class _Groups(LoadScopeScheduling):
    """Gives each process of pytest-xdist whole groups of tests.

    pytest-xdist 3.8 has `--dist loadgroup` for this, which has no effect under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        return _group_of(nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Groups:
    """Schedule by groups, whatever `--dist` says."""
    return _Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by when their groups begin."""

    def rank(item: pytest.Item) -> int:
        group = _group_of(item.nodeid.partition("::")[0])
        return next((rank for rank, name in enumerate(_FIRST) if group.startswith(name)), len(_FIRST))

    items.sort(key=rank)


@pytest.fixture(autouse=True)
def log_reaches_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins with the package's log as it is before a job sets it up, and `caplog` sees it."""
    logger = logging.getLogger("cvdist")
    monkeypatch.setattr(logger, "propagate", True)
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session", autouse=True)
def digits_are_read_once() -> Iterator[None]:
    """The file of digits takes most of a second to read, and a hundred tests train on them."""
    from cvdist.data import digits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "load", functools.cache(digits.load))
        yield


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the tests of one file, gone after the last: checkpoints of VGG fill disks."""
    folder = tmp_path_factory.mktemp("module")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets and weights, named by CVDIST_TEST_DATA."""
    folder = os.environ.get("CVDIST_TEST_DATA")
    if not folder:
        pytest.skip("CVDIST_TEST_DATA is not set: no folder with real data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def ray_cluster(s3: dict[str, str]) -> dict[str, str]:
    """A real Ray cluster of one node with two CPUs: the environment variables that make a job use it.

    Its processes know the S3 server, unless a job names another one.
    """
    return session.once("ray", lambda folder: start_ray(folder, s3))


@pytest.fixture(scope="session")
def s3() -> dict[str, str]:
    """A real S3 server with a bucket named `bucket`: the environment variables that make a process use it."""
    return session.once("s3", start_s3)


@pytest.fixture
def bucket(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty place in the bucket; this process has the server's variables."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{uuid.uuid4().hex}"


@pytest.fixture(params=["folder", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, and an empty place in a bucket."""
    return str(tmp_path) if request.param == "folder" else request.getfixturevalue("bucket")


@pytest.fixture
def own_s3(tmp_path: Path) -> Iterator[S3Server]:
    """The same for one test, which may stop it."""
    server = S3Server(tmp_path / "s3")
    try:
        server.start()
        yield server
    finally:
        server.stop(kill=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Runs on digits in one MLflow store: `good`, `averaged` (a moving average), `weak` (without a model).

    They are trained once; each process of the session has a copy of their store, to write to.
    """
    from tests.helpers.trained import train_all

    return session.once("trained", train_all).copy(tmp_path_factory.mktemp("trained") / "runs")


COUNTS = {"train/cat": 7, "train/dog": 6, "valid/cat": 3, "valid/dog": 2}


@pytest.fixture(scope="session")
def weights() -> Path:
    """Random convolutions of a VGG11."""
    from tests.helpers.feature_caches import write_weights

    return session.once("vgg11", lambda folder: write_weights(folder / "vgg11.pth"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return pictures.write(tmp_path / "photos", COUNTS)


@pytest.fixture
def chosen(photos, weights, tmp_path):
    from tests.helpers.feature_caches import config

    return config(photos, tmp_path / "features", weights, tmp_path / "cache")


@pytest.fixture
def cached(chosen, weights):
    """The cache that `chosen` names is there, of its pictures. It is computed once for all tests."""
    from tests.helpers.feature_caches import config, extract

    def make(folder: Path) -> Path:
        photos = pictures.write(folder / "photos", COUNTS)
        extract(config(photos, folder / "features", weights, folder / "cache"))
        return folder

    made = session.once("features", make)
    shutil.copytree(made / "photos", chosen.data.uri, dirs_exist_ok=True)  # with their times
    shutil.copytree(made / "features", chosen.features.uri)
