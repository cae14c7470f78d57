"""Weights that are downloaded: once for all workers, whole or not at all, and not waited for without end."""

from __future__ import annotations

import http.server
import logging
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from cvdist.config import ModelConfig
from cvdist.errors import UserError
from cvdist.models import weights
from tests.helpers.networks import without_memory


class Server(http.server.ThreadingHTTPServer):
    """Answers each request with `content`, after `delay` seconds, and counts."""

    def __init__(self, content, delay=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.delay, self.requests = content, delay, 0

    def handle_error(self, *_):
        """A client that has given up is what some tests are about."""

    def url(self, digest=None):
        """Named as torchvision's files are, with the beginning of their SHA-256."""
        return f"http://127.0.0.1:{self.server_port}/vgg-{(digest or sha256(self.content).hexdigest())[:8]}.pth"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        time.sleep(self.server.delay)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Starts servers; the cache is an empty folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    servers = []

    def start(*arguments):
        servers.append(Server(*arguments))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_downloaded_once_for_all_workers(serve, caplog):
    server = serve(b"weights", 0.5)
    caplog.set_level(logging.INFO, "cvdist")
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: weights.fetch(server.url()), range(4)))
    assert server.requests == 1
    assert [path.read_bytes() for path in paths] == [b"weights"]
    messages = [record.getMessage() for record in caplog.records]
    assert sum("waiting for another process to download" in message for message in messages) == 3
    assert sum(message.startswith("downloading") for message in messages) == 1
    weights.fetch(server.url())
    assert server.requests == 1


def test_the_lock_of_a_killed_process_does_not_stay(serve):
    server = serve(b"weights")
    lock = Path(torch.hub.get_dir(), "checkpoints", Path(server.url()).stem + ".lock")
    lock.parent.mkdir(parents=True)
    hold = (
        f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", f"{hold}; time.sleep(60)"], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with ThreadPoolExecutor(1) as pool:
            path = pool.submit(weights.fetch, server.url())
            time.sleep(0.5)
            assert not path.done() and server.requests == 0
            holder.send_signal(signal.SIGKILL)
            assert path.result(60).read_bytes() == b"weights"


def test_waiting_has_an_end(serve, monkeypatch):
    server = serve(b"weights", 1.0)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(weights.fetch, server.url())
        while not server.requests:
            time.sleep(0.01)
        monkeypatch.setattr(weights, "WAIT_TIMEOUT", 0.1)
        with pytest.raises(weights.DownloadError, match=r"another process has held .*vgg-.*\.lock for 0.1 s"):
            weights.fetch(server.url())
        assert first.result(60).is_file()


def test_a_file_with_another_hash_is_not_kept(serve):
    server = serve(b"something else")
    with pytest.raises(weights.DownloadError, match="invalid hash value"):
        weights.fetch(server.url("0123456789"))
    assert [path.suffix for path in Path(torch.hub.get_dir(), "checkpoints").iterdir()] == [".lock"]


def test_a_silent_server_is_given_up(serve, monkeypatch):
    monkeypatch.setattr(weights, "SOCKET_TIMEOUT", 0.3)
    server = serve(b"weights", 3.0)
    with pytest.raises(weights.DownloadError, match="timed out"):
        weights.fetch(server.url())


def test_no_network_is_one_line_that_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies of the first call
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        weights.load(ModelConfig(name="vgg16", weights="IMAGENET1K_FEATURES"), without_memory("vgg16"))
    assert time.monotonic() - began < 60
    assert str(error.value) == (
        "--weights IMAGENET1K_FEATURES: https://download.pytorch.org/models/"
        f"vgg16_features-amdegroot-88682ab5.pth could not be downloaded to {tmp_path}/hub/checkpoints "
        "([Errno 111] Connection refused). A file that you have serves as well: "
        "--weights FILE"
    )


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(
        weights.DownloadError, match=r"could not be downloaded to .*file/hub/checkpoints \(.*Not a"
    ):
        weights.fetch("http://127.0.0.1:9/vgg-01234567.pth")
