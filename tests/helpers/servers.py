"""Real servers for tests: object storage and a Ray cluster."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil

from k8s.services import SeaweedFS, answers, free_port
from tests.helpers import session
from tests.helpers.waiting import wait_until, work_of

_BIN = Path(sys.executable).parent


class S3Server:
    """SeaweedFS with a bucket named `bucket`; can be killed and started again on its port."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        """Keeps its files in `folder`; listens on `host`."""
        folder.mkdir(exist_ok=True)
        self._log = folder / "log"
        secret, sockets = secrets.token_hex(16), tempfile.gettempdir()
        self._server = SeaweedFS(folder, "bucket", "tests", secret, sockets=sockets, host=host)
        self._process: subprocess.Popen[bytes] | None = None
        self.environment = self._server.environment

    def start(self) -> None:
        """Returns when the bucket is there."""
        command, environment = self._server.command, os.environ | self._server.keys
        with self._log.open("w") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        self._wait(self._process)

    def start_for_session(self) -> None:
        """The same for all tests: it ends with their session."""
        self._wait(session.serve(self._server.command, self._log, os.environ | self._server.keys))

    def stop(self, *, kill: bool = False) -> None:
        """In order, or as a machine that loses power."""
        if self._process is None:
            return
        listening = psutil.Process(self._process.pid).net_connections("unix") if kill else ()
        if kill:
            self._process.kill()
        else:
            self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        for socket in listening:  # in /tmp, whatever TMPDIR says
            if socket.laddr:
                Path(socket.laddr).unlink(missing_ok=True)
        self._process = None

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        wait_until(
            lambda: process.poll() is not None or self._server.has_bucket(),
            "the S3 server has its bucket",
            work_of(process.pid, self._log),
        )
        assert process.poll() is None, self._log.read_text()


def start_s3(folder: Path) -> dict[str, str]:
    """An S3 server for all tests. Returns the environment variables that make a process use it."""
    server = S3Server(folder)
    server.start_for_session()
    return server.environment


def choose_ray_token() -> None:
    """Name a token for all processes of the session: Ray looks for one when it is imported, and never again."""
    token = session.folder() / "ray-token"
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def start_ray(folder: Path, more: Mapping[str, str]) -> dict[str, str]:
    """A Ray cluster of one node with two CPUs, for all tests; nobody without the session's token gets in.

    more: environment variables of all its processes, as a container's. Returns those that make a job use it.
    """
    ports = {name: free_port() for name in ("gcs", "dashboard", "agent", "metrics", "client")}
    log = folder / "log"
    head = session.serve(
        [
            *(str(_BIN / "ray"), "start", "--head", "--block", "--num-cpus=2"),
            *("--disable-usage-stats", "--node-ip-address=127.0.0.1", f"--port={ports['gcs']}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={ports['dashboard']}"),
            *(f"--dashboard-agent-listen-port={ports['agent']}", f"--metrics-export-port={ports['metrics']}"),
            f"--ray-client-server-port={ports['client']}",
        ],
        log,
        {
            **{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
            **more,
            # Jobs say `python` and mean the one that runs the tests.
            "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}",
        },
    )
    address = f"http://127.0.0.1:{ports['dashboard']}"
    wait_until(
        lambda: head.poll() is not None or answers(f"{address}/api/version"),
        "the Ray dashboard answers",
        work_of(head.pid, log),
    )
    assert head.poll() is None, log.read_text()
    return {"RAY_ADDRESS": f"127.0.0.1:{ports['gcs']}", "RAY_API_SERVER_ADDRESS": address}
