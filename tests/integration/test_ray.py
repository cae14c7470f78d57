"""Jobs on a real Ray cluster, submitted as users submit them, read back from a real MLflow store."""

from __future__ import annotations

import html
import http.server
import json
import os
import re
import sys
import threading
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
import ray
import requests
import torch
import uvicorn
from mlflow import MlflowClient
from mlflow.pyfunc import scoring_server
from ray.train import WorkerGroupError

from cvdist import recipes
from cvdist.checkpoints import format as ckpt
from cvdist.checkpoints.store import CheckpointStore
from cvdist.config import CheckpointConfig, RuntimeConfig
from cvdist.errors import UserError
from cvdist.loaders import open_loader
from cvdist.runtime import ray_cluster as connection
from cvdist.runtime.ray_train import cause_of
from cvdist.storage import Folder
from tests.helpers import feature_caches, pictures
from tests.helpers.jobs import call, mlflow_store, on_ray, run, the_error
from tests.helpers.stores import empty_store
from tests.helpers.waiting import answers, free_port, wait_until, work_of

RAY = Path(sys.executable).parent / "ray"


def submit(cluster, storage, *arguments, **environment):
    """`ray job submit --working-dir . -- python jobs/train.py ...`."""
    runtime = {"env_vars": {"CVDIST_STORAGE": str(storage), "CVDIST_COMMIT": "abc123", **environment}}
    return run(
        *(RAY, "job", "submit", "--working-dir", ".", "--runtime-env-json", json.dumps(runtime)),
        *("--", "python", "jobs/train.py", *arguments),
        storage=storage,
        timeout=240,
        **cluster,
    )


def the_run(storage):
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("cvdist").experiment_id])
    return client, found


@pytest.fixture(scope="module")
def submitted(ray_cluster, tmp_path_factory):
    """A finished job: its output and its storage."""
    storage = empty_store(tmp_path_factory.mktemp("storage"))
    done = submit(
        *(ray_cluster, storage, "digits-cnn", "--epochs", "4", "--batch-size", "64", "--name", "submitted"),
        MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL="1",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, storage


def test_submitted_job_prints_its_plan_and_its_result(submitted):
    output, _ = submitted
    assert "batch      64 = 32 on each of 2 workers; 63 steps an epoch, 4 epochs" in output
    assert re.search(r"best accuracy  9\d\.\d\d% \(\d+/1000\) at epoch \d", output)
    assert re.search(r"next: make ui   then open http://localhost:5000/#/experiments/1/runs/\w{32}", output)


def test_the_run_tells_everything(submitted):
    output, storage = submitted
    client, found = the_run(storage)
    assert found.info.status == "FINISHED" and found.info.run_name == "submitted"
    metrics, params, tags = found.data.metrics, found.data.params, found.data.tags
    assert metrics["valid/total"] == 1000 and metrics["train/total"] == 4000
    assert metrics["valid/accuracy"] == metrics["valid/correct"] / 1000 > 0.9
    assert [m.step for m in client.get_metric_history(found.info.run_id, "valid/loss")] == [1, 2, 3, 4]
    steps = client.get_metric_history(found.info.run_id, "step/loss")
    assert [m.step for m in steps] == [50, 63, 113, 126, 176, 189, 239, 252]
    assert {"speed/samples_per_second", "speed/epoch_seconds", "memory/peak_mb"} <= set(metrics)
    assert any(name.startswith("system/node-0/cpu") for name in metrics)
    assert params["loop.batch_size"] == "64" and params["run.world_size"] == "2"
    assert params["optimizer.momentum"] == "0.9" and len(params["data.sha256"]) == 64
    assert tags["mlflow.source.git.commit"] == "abc123"
    submission = re.search(r"Job '(\S+)' submitted", output).group(1)
    assert tags["ray.job_id"] == submission
    assert torch.__version__.startswith(tags["version.torch"])
    (dataset,) = found.inputs.dataset_inputs
    assert dataset.dataset.name == "digits" and params["data.sha256"].startswith(dataset.dataset.digest)


def test_the_page_begins_with_result_command_and_figures(submitted):
    _, storage = submitted
    client, found = the_run(storage)
    note = found.data.tags["mlflow.note.content"]
    assert re.match(r"### 9\d\.\d\d% \(\d+/1000\) at epoch \d", note)
    assert "jobs/train.py digits-cnn --epochs 4 --batch-size 64 --name submitted" in note
    figures = {artifact.path for artifact in client.list_artifacts(found.info.run_id, "figures")}
    names = {"samples", "augmentation", "loss", "accuracy", "confusion_matrix", "most_wrong"}
    folders = {"filters", "activations", "top_activations", "gradcam"}
    assert figures == {f"figures/{name}.png" for name in names} | {f"figures/{name}" for name in folders}
    assert all(f"`figures/{name}.png`" in note for name in names)
    assert all(f"`figures/{name}/`" in note for name in folders)
    filters = {artifact.path for artifact in client.list_artifacts(found.info.run_id, "figures/filters")}
    assert "figures/filters/forming.gif" in filters
    report = Path(client.download_artifacts(found.info.run_id, "report.html")).read_text(encoding="utf-8")
    text = html.unescape(report)
    assert re.search(r"9\d\.\d\d% \(\d+/1000\)", note)[0] in text and "from the job's start" in text
    assert report.count("<img ") > len(names) + len(folders)


@pytest.fixture(scope="module")
def logged_model(submitted):
    _, storage = submitted
    _, found = the_run(storage)
    (output,) = found.outputs.model_outputs
    with mlflow_store(storage):
        yield f"models:/{output.model_id}", found


@pytest.fixture(scope="module")
def validation():
    loader = open_loader(recipes.find("digits-cnn"), torch.device("cpu"))
    images, labels = loader.pictures("valid", range(1000))
    return images.numpy(), np.array([int(label) for label in labels])


def test_the_model_is_the_best_one_and_takes_pixels(logged_model, validation):
    uri, found = logged_model
    images, labels = validation
    best = max(m.value for m in MlflowClient().get_metric_history(found.info.run_id, "valid/correct"))
    model = mlflow.pytorch.load_model(uri)
    probabilities = model(torch.from_numpy(images)).detach().numpy()
    assert (probabilities.argmax(1) == labels).sum() == best
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    served = mlflow.pyfunc.load_model(uri)
    np.testing.assert_allclose(served.predict(images[:7]), probabilities[:7], atol=1e-5)
    assert served.metadata.signature.inputs.inputs[0].type == np.dtype("uint8")
    assert served.metadata.metadata["cvdist"]["classes"] == [str(digit) for digit in range(10)]


def test_the_model_serves_over_http(logged_model, validation):
    """By MLflow's own server, here in a thread instead of as `mlflow models serve`."""
    uri, _ = logged_model
    images, labels = validation
    port = free_port()
    app = scoring_server.init(mlflow.pyfunc.load_model(uri))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    serving = threading.Thread(target=server.run)
    serving.start()
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/ping"), "the model server answers")
        answer = requests.post(
            f"http://127.0.0.1:{port}/invocations", json={"inputs": images[:20].tolist()}, timeout=60
        )
        assert answer.status_code == 200, answer.text
        predictions = np.array(answer.json()["predictions"])
        assert predictions.shape == (20, 10)
        assert (predictions.argmax(1) == labels[:20]).sum() >= 18
    finally:
        server.should_exit = True
        serving.join()


def train_workers():
    """Ray Train's processes on the Ray that this process has started."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if any("ray::RayTrainWorker" in word for word in process.cmdline())]


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
