"""Fixtures that several test files share."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from pyarrow import fs as arrow

from tests import waiting

if TYPE_CHECKING:
    from tests.trained import Trained

# Several processes share few cores: a thread pool in each would slow them all down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# How fast a busy machine is says nothing about the code.
settings.register_profile("cvdist", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cvdist")


@pytest.fixture(autouse=True)
def log_reaches_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a job in this process has set up before, `caplog` sees the package's log."""
    monkeypatch.setattr(logging.getLogger("cvdist"), "propagate", True)


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
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real Ray cluster of one node with two CPUs, for the whole session.

    Yields the environment variables that make a process use it.
    """
    ports = {name: free_port() for name in ("gcs", "dashboard", "agent", "metrics", "client")}
    folder = tmp_path_factory.mktemp("ray")
    log, token = folder / "log", folder / "token"
    token.write_text(secrets.token_hex(32))
    # As on a real cluster, nobody without the token gets in.
    authentication = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with log.open("w") as output:
        head = subprocess.Popen(
            [
                *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2"),
                *("--disable-usage-stats", "--node-ip-address=127.0.0.1", f"--port={ports['gcs']}"),
                *("--dashboard-host=127.0.0.1", f"--dashboard-port={ports['dashboard']}"),
                *(
                    f"--dashboard-agent-listen-port={ports['agent']}",
                    f"--metrics-export-port={ports['metrics']}",
                ),
                f"--ray-client-server-port={ports['client']}",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
                **authentication,
                # Jobs say `python` and mean the one that runs the tests.
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            },
        )
    try:
        wait_until(
            lambda: head.poll() is not None or answers(f"http://127.0.0.1:{ports['dashboard']}/api/version"),
            90,
            "the Ray dashboard answers",
        )
        assert head.poll() is None, log.read_text()
        yield {
            "RAY_ADDRESS": f"127.0.0.1:{ports['gcs']}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard']}",
            **authentication,
        }
    finally:
        head.terminate()  # `ray start --block` takes its processes with it
        try:
            head.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


class S3Server:
    """SeaweedFS with a bucket named `bucket`; can be killed and started again on its port."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        """Keeps its files in `folder`; listens on `host`."""
        self._folder, self._host, self._port = folder, host, free_port()
        folder.mkdir(exist_ok=True)
        names = ("master.port", "volume.port", "filer.port", "admin.port")
        self._ports = [f"-{name}={free_port()}" for name in names]
        self._keys = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16)}
        self._process: subprocess.Popen[bytes] | None = None
        self.environment = {
            **self._keys,
            "AWS_ENDPOINT_URL": f"http://{host}:{self._port}",
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Returns when the bucket is there."""
        log = self._folder / "log"
        with log.open("w") as output:
            weed = str(Path(sys.executable).parent / "weed")
            server = self._process = subprocess.Popen(
                [
                    *(weed, "mini", f"-dir={self._folder}", "-bucket=bucket"),
                    *(f"-ip={self._host}", f"-ip.bind={self._host}", f"-s3.port={self._port}", *self._ports),
                    *("-master.telemetry=false", "-webdav=false", "-admin.ui=false"),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | self._keys,
            )
        there = arrow.S3FileSystem(
            access_key=self._keys["AWS_ACCESS_KEY_ID"],
            secret_key=self._keys["AWS_SECRET_ACCESS_KEY"],
            region="us-east-1",
            endpoint_override=self.environment["AWS_ENDPOINT_URL"],
        )

        def ready() -> bool:
            if server.poll() is not None:
                return True
            try:
                return (
                    answers(self.environment["AWS_ENDPOINT_URL"])
                    and there.get_file_info("bucket").type == arrow.FileType.Directory
                )
            except OSError:
                return False

        waiting.wait_until(
            ready, "the S3 server has its bucket", lambda: f"a log of {log.stat().st_size} bytes"
        )
        assert server.poll() is None, log.read_text()

    def stop(self, *, kill: bool = False) -> None:
        """In order, or as a machine that loses power."""
        if self._process is None:
            return
        if kill:
            self._process.kill()
        else:
            self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._process = None


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 server with a bucket named `bucket`, for the whole session.

    Yields the environment variables that make a process use it.
    """
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        server.start()
        yield server.environment
    finally:
        server.stop()


@pytest.fixture
def own_s3(tmp_path: Path) -> Iterator[S3Server]:
    """The same for one test, which may stop it."""
    (tmp_path / "s3").mkdir()
    server = S3Server(tmp_path / "s3")
    try:
        server.start()
        yield server
    finally:
        server.stop(kill=True)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    """Whether a server says anything at all at `url`."""
    try:
        urllib.request.urlopen(url, timeout=2)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll `condition` until it is true; fail after `seconds`."""
    waiting.wait_until(condition, what, stall_seconds=seconds, poll_seconds=0.2)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Runs on digits in one MLflow store: `good`, `averaged` (a moving average), `weak` (without a model)."""
    from tests.trained import train_all

    return train_all(tmp_path_factory.mktemp("trained"))
