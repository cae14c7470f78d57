"""Training on a real Ray cluster: what it costs to lose a worker, and what is said before anything starts."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import threading

import psutil
import ray
import requests
from mlflow import MlflowClient
from ray.train import WorkerGroupError

from cvdist.checkpoints import format as ckpt
from cvdist.checkpoints.store import CheckpointStore
from cvdist.config import CheckpointConfig, RuntimeConfig
from cvdist.errors import UserError
from cvdist.runtime import ray_cluster as connection
from cvdist.runtime.ray_train import cause_of
from cvdist.storage import Folder
from tests.helpers import feature_caches, pictures
from tests.helpers.jobs import call, on_ray, the_error
from tests.helpers.stores import empty_store
from tests.helpers.waiting import wait_until, work_of


def the_run(storage):
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("cvdist").experiment_id])
    return client, found


def train_workers():
    """Ray Train's processes on the Ray that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if any("ray::RayTrainWorker" in word for word in process.cmdline()):
                found.append(process)
    return found


def test_a_killed_worker_costs_neither_the_job_nor_its_run(s3, tmp_path, monkeypatch):
    """On a Ray that the job starts itself, with a divided head, each of whose checkpoints two workers write."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    photos = pictures.write(tmp_path / "photos", pictures.FOUR)
    weights = feature_caches.write_weights(tmp_path / "vgg11.pth")
    features, cache = tmp_path / "features", tmp_path / "cache"
    feature_caches.extract(feature_caches.config(photos, features, weights, cache))
    words = [
        *("dogs-cats-vgg16-features", "--features", features, "--model", "vgg11", "--weights", weights),
        *("--weights-preprocessing", "imagenet", "--image-size", "32", "--batch-size", "4", "--cache", cache),
        *("--parallel", "head", "--hidden-size", "16", "--epochs", "12", "--workers", "2", "--device", "cpu"),
        *("--name", "survivor", "--no-log-model", "--no-visualize", "--storage", "s3://bucket/killed"),
        *("--tracking-uri", f"sqlite:///{empty_store(tmp_path)}/mlflow.db"),
    ]
    folder = Folder.open("s3://bucket/killed/survivor", "--storage")
    checkpoints = lambda: [name for name in folder.sizes() if name.endswith("/checkpoint.json")]  # noqa: E731
    killed = []

    def kill():
        wait_until(
            lambda: len(checkpoints()) >= 2, "two epochs are done", work_of(os.getpid()), poll_seconds=0.05
        )
        victim = train_workers()[0]
        victim.kill()
        killed.append(victim.pid)

    killing = threading.Thread(target=kill)
    killing.start()
    done = call("train", *words, storage=tmp_path)
    killing.join()
    assert killed and done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    # Ray may not have heard of them yet when the worker died.
    assert "resuming   at epoch" in said and "parallel   head: " in said
    assert re.search(r"ridge probe +[\d.]+% \(\d/5\) in", done.stdout)  # from the sums of both
    assert len(checkpoints()) <= CheckpointConfig.keep + 1  # those included: none stays for ever
    client, found = the_run(tmp_path)
    assert found.info.status == "FINISHED"
    epochs = [metric.step for metric in client.get_metric_history(found.info.run_id, "valid/correct")]
    assert sorted(epochs) == list(range(1, 13))  # none lost with the process, none twice
    name = next(name for name in checkpoints() if name.startswith("epoch-0012"))
    with CheckpointStore.at("s3://bucket/killed/survivor").open(name.partition("/")[0]) as last:
        saved = ckpt.load(last)
    assert saved.workers == 2 and saved.state["model"]["classifier.0.weight"].shape == (16, 25088)


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


# ----------------------------------------------------------------------------------------------- bad input


def test_too_many_workers_is_said_at_once(ray_cluster, tmp_path):
    line = the_error(call("train", "digits-cnn", "--num-workers", "64", storage=tmp_path, **ray_cluster))
    assert "--num-workers 64 with --cpus-per-worker 1 needs 64 CPUs, the cluster has 2 CPUs and 0 GPUs" in line


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
