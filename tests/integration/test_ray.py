"""Training on a real Ray cluster: how it is found and asked, and what is said before anything starts."""

from __future__ import annotations

import http.server
import os
import re
import signal
import subprocess
import sys
import threading

import ray
import requests
from ray._raylet import GcsClient
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.train import WorkerGroupError

from cvdist.config import RuntimeConfig
from cvdist.errors import UserError
from cvdist.runtime import ray_cluster as connection
from cvdist.runtime.ray_train import cause_of
from tests.helpers import pictures
from tests.helpers.jobs import ROOT, call, on_ray, the_error
from tests.helpers.stores import empty_store, the_run
from tests.helpers.waiting import wait_until, work_of


def test_processes_of_a_job_know_the_cluster_that_they_belong_to(ray_cluster, monkeypatch):
    """Ray's own would ask the machine's newest about this training, and end it where that knows of none."""
    for name, value in ray_cluster.items():
        monkeypatch.setenv(name, value)
    connection.connect(connection.ResourceRequest.of_workers(RuntimeConfig()))
    try:
        known = ray.get(ray.remote(lambda: os.environ["RAY_ADDRESS"]).remote())
    finally:
        ray.shutdown()
    port = ray_cluster["RAY_ADDRESS"].rpartition(":")[2]  # of another address of this machine, perhaps
    assert known.endswith(f":{port}")


def test_neither_driver_nor_workers_ask_the_cluster_through_a_proxy(ray_cluster, monkeypatch):
    """An office network: http_proxy is set, and no_proxy is not. All others are asked through it."""
    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def answer(self):
            asked.append(self.path)
            self.send_error(503)

        do_GET = do_POST = do_CONNECT = answer

        def log_message(self, *arguments):
            pass

    def ask(address):
        outside = requests.get("http://outside.test", timeout=30).status_code
        return outside, len(ray.util.state.list_nodes(address=address))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        proxies = dict.fromkeys(("http_proxy", "https_proxy"), f"http://127.0.0.1:{server.server_port}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "")
        for name, value in (ray_cluster | proxies).items():
            monkeypatch.setenv(name, value)
        dashboard = ray_cluster["RAY_API_SERVER_ADDRESS"]
        connection.connect(connection.ResourceRequest.of_workers(RuntimeConfig()))
        try:
            remote = ray.get(ray.remote(ask).options(runtime_env={"env_vars": proxies}).remote(dashboard))
            assert remote == ask(dashboard) == (503, 1)
        finally:
            ray.shutdown()
            server.shutdown()
    assert set(asked) == {"http://outside.test/"}


def test_of_several_errors_the_one_that_came_first_is_shown():
    """When one worker fails, the others lose their connections to it."""
    lost = RuntimeError("[gloo] Connection closed by peer [10.0.0.1]:1234")
    failed = WorkerGroupError("failed", {0: lost, 1: ValueError("its own"), 2: lost})
    assert str(cause_of(failed)) == "its own"
    corrected = WorkerGroupError("failed", {0: lost, 1: UserError("correct this")})
    assert isinstance(cause_of(corrected), UserError)


# ----------------------------------------------------------------------------------------------- preflight


def test_preflight_looks_at_all_that_a_job_needs(ray_cluster, tmp_path):
    root = pictures.write(tmp_path / "some", {"a": 3, "b": 3})
    (root / "b" / "0001.jpg").write_bytes(b"no picture")
    words = ("dogs-cats-cnn", "--data", root, "--num-workers", "2")
    done = call("preflight", *words, storage=tmp_path / "runs", **ray_cluster)
    assert done.returncode == 1, done.stderr
    for found in (
        r"machine .*\d+ cores, no GPU, [\d.]+ of [\d.]+ GiB memory free",
        r"storage .*write \d+ ms, read \d+ ms, delete \d+ ms for 1 MiB",
        r"versions .*Python 3\.\d+\.\d+, cvdist .*torch .*ray ",
        r"MLflow .*experiment cvdist in sqlite",
        r"data .*FAILED",
        r"1 of 6 pictures can't be decoded: b/0001.jpg",
        r"all-reduce  2 workers .*\d+ MB/s each way; a step averages [\d.]+ MB in \d+ ms",
        r"\d of \d+ checks are well",
    ):
        assert re.search(found, done.stdout), (found, done.stdout)
    assert not list((tmp_path / "runs" / ".preflight").iterdir())


def test_a_cache_that_is_not_there_is_one_row_of_a_preflight(ray_cluster, tmp_path):
    words = (
        "dogs-cats-vgg16-mlp",
        "--features",
        tmp_path / "nowhere",
        "--weights",
        "none",
        "--num-workers",
        "2",
    )
    done = call("preflight", *words, storage=tmp_path / "runs", **ray_cluster)
    assert done.returncode == 1, done.stderr
    assert re.search(r"data .*FAILED", done.stdout) and re.search(r"all-reduce  2 workers .*MB/s", done.stdout)


# -------------------------------------------------------------------------------------------------- Ctrl-C


def test_a_training_that_is_interrupted_says_how_it_goes_on(ray_cluster, tmp_path):
    def interrupt():
        wait_until(lambda: list(tmp_path.glob("run/epoch-*")), "an epoch is done", poll_seconds=0.05)
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    words = ("digits-cnn", "--epochs", "1000", "--name", "run", "--no-system-metrics", "--no-log-model")
    done = call("train", *words, storage=empty_store(tmp_path), **ray_cluster)
    interrupting.join()
    assert done.returncode == 130
    assert done.stderr.endswith("--name run goes on from the last checkpoint\nstopped\n")
    _, found = the_run(tmp_path)
    assert found.info.status == "KILLED"


# ----------------------------------------------------------------------------------------------- bad input


def test_too_many_workers_is_said_at_once(ray_cluster, tmp_path):
    line = the_error(call("train", "digits-cnn", "--num-workers", "64", storage=tmp_path, **ray_cluster))
    assert "--num-workers 64 with --cpus-per-worker 1 needs 64 CPUs, the cluster has 2 CPUs and 0 GPUs" in line


def test_what_a_job_asks_of_the_autoscaler_ends_with_the_job(ray_cluster, tmp_path):
    """Nodes would stay, and be paid for, as long as anybody asks for them."""

    def asked():
        state = get_cluster_resource_state(GcsClient(address=ray_cluster["RAY_ADDRESS"]))
        groups = [len(gang.requests) for gang in state.pending_gang_resource_requests]
        return groups + [len(c.resource_requests) for c in state.cluster_resource_constraints]

    words = ("digits-cnn", "--num-workers", "64", "--resource-timeout")
    process = subprocess.Popen(
        [sys.executable, "jobs/train.py", *words, "900"],
        cwd=ROOT, env={**os.environ, **ray_cluster, "CVDIST_STORAGE": str(tmp_path)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(asked, "the autoscaler is asked for workers", work_of(process.pid))
        assert asked() == [64] and process.poll() is None
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not asked(), "nothing is asked for after the job was killed", stall_seconds=60)
    line = the_error(call("train", *words, "1", storage=tmp_path, **ray_cluster))
    assert "--num-workers 64" in line
    wait_until(lambda: not asked(), "nothing is asked for after the job gave up", stall_seconds=60)


def test_gpus_that_are_not_there(ray_cluster, tmp_path):
    line = the_error(call("train", "digits-cnn", "--device", "cuda", storage=tmp_path, **ray_cluster))
    assert "--num-workers 2 --device cuda needs 2 GPUs, the cluster has 2 CPUs and 0 GPUs on 1 node" in line


def test_missing_data_is_found_by_the_workers_and_not_retried(ray_cluster, tmp_path):
    words = ("mnist-cnn", "--data", tmp_path / "none", "--workers", "1")
    environment = {"https_proxy": "http://127.0.0.1:9", **on_ray({"https_proxy": "http://127.0.0.1:9"})}
    done = call("train", *words, storage=empty_store(tmp_path), **environment, **ray_cluster)
    assert "holds no MNIST" in the_error(done)
    _, found = the_run(tmp_path)
    assert found.info.status == "FAILED"


def test_no_cluster_at_the_address(tmp_path):
    line = the_error(call("train", "digits-cnn", storage=tmp_path, RAY_ADDRESS="127.0.0.1:1"))
    assert "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1 within 10 s (--connect-timeout)" in line
