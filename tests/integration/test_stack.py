"""`k8s/stack.py`, and jobs submitted to it as users submit them: S3, the MLflow server, several Ray nodes."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import json
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
import requests
import torch
import uvicorn
from mlflow import MlflowClient
from mlflow.pyfunc import scoring_server
from PIL import Image
from pyarrow import fs as arrow

from cvdist import recipes
from cvdist.loaders import open_loader
from k8s.services import answers, free_port
from tests.helpers import pictures
from tests.helpers.feature_caches import write_weights
from tests.helpers.jobs import ROOT, mlflow_store, run, the_error
from tests.helpers.waiting import wait_until

RAY = Path(sys.executable).parent / "ray"
SERVER = ROOT / ".venv-mlflow" / "bin"


def stack(*arguments):
    return run(sys.executable, "k8s/stack.py", *arguments, storage=ROOT, timeout=480, OMP_NUM_THREADS="1")


def server_has(module):
    """Whether MLflow's own environment has it; else that of the tests, in which MLflow then runs."""
    if not (SERVER / "mlflow").exists():
        return importlib.util.find_spec(module) is not None
    return bool(list(SERVER.parent.glob(f"lib/python*/site-packages/{module}")))


@pytest.fixture(scope="module")
def running():
    """A stack, and the variables that its `env` file sets."""
    parent = Path(tempfile.mkdtemp(prefix="test-stack-"))
    parent.chmod(0o755)  # PostgreSQL has a user of its own, who has to get there: pytest's folders are private
    folder = parent / "stack"
    ports = ("--s3-port", "0", "--mlflow-port", "0", "--dashboard-port", "0")
    started = stack("up", "--folder", folder, *ports, "--timeout", "240")  # a machine may have much else to do
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        lines = (folder / "env").read_text().splitlines()
        environment = dict(shlex.split(line)[1].split("=", 1) for line in lines)
        yield started, folder, environment
    finally:
        processes = json.loads((folder / "state.json").read_text()) if (folder / "state.json").exists() else []
        stopped = stack("down", "--folder", folder)
        logs = {path.name: path.read_text(errors="replace")[-2000:] for path in (folder / "logs").glob("*")}
    assert stopped.returncode == 0, (stopped.stderr, logs)
    assert not [p for p in processes if psutil.pid_exists(p["pid"])]
    marks = [str(folder), *(p["temporary"] for p in processes if p["temporary"])]
    said = [str(p.info["cmdline"]) for p in psutil.process_iter(["cmdline"])]
    inside = [words for words in said if any(mark in words for mark in marks)]
    assert not inside  # nor anything that they had started
    assert "no stack is running" in stack("down", "--folder", folder).stderr
    shutil.rmtree(parent)


def submit(environment, *words):
    """`ray job submit --working-dir . -- python ...`, with metrics of the system each second."""
    runtime = {"env_vars": {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1", "CVDIST_COMMIT": "abc123"}}
    return run(
        *(RAY, "job", "submit", "--working-dir", ".", "--runtime-env-json", json.dumps(runtime)),
        *("--", "python", *words),
        storage=Path(environment["CVDIST_STORAGE"]),
        timeout=480,
        **environment,
    )


@pytest.fixture(scope="module")
def bucket(running):
    """The stack's S3 server."""
    _, _, environment = running
    return arrow.S3FileSystem(
        access_key=environment["AWS_ACCESS_KEY_ID"],
        secret_key=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=environment["AWS_ENDPOINT_URL"],
        region="us-east-1",
    )


@pytest.mark.timeout(1200)
def test_pictures_in_the_bucket_become_features_there(running, bucket, tmp_path):
    _, _, environment = running
    photos = pictures.write(tmp_path / "photos", pictures.FOUR)
    weights = write_weights(tmp_path / "vgg11.pth")
    arrow.copy_files(str(photos), "cvdist/pictures", destination_filesystem=bucket)
    arrow.copy_files(str(weights), "cvdist/vgg11.pth", destination_filesystem=bucket)
    done = submit(
        *(environment, "jobs/preprocess.py", "dogs-cats-vgg16-features", "--features", "s3://cvdist/features"),
        *("--image-size", "32", "--model", "vgg11", "--weights", "s3://cvdist/vgg11.pth"),
        *("--weights-preprocessing", "imagenet", "--data", "s3://cvdist/pictures", "--shard-size", "4"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "extracting on 2 CPU actors" in done.stdout
    assert re.search(r"pictures  16 of 16, 0 can't be decoded", done.stdout)
    assert bucket.get_file_info("cvdist/features").type == arrow.FileType.Directory


@pytest.fixture(scope="module")
def submitted(running):
    """A finished training: its output, a client of the MLflow server, and its run there."""
    _, _, environment = running
    words = ("digits-cnn", "--epochs", "4", "--batch-size", "64", "--name", "submitted")
    done = submit(environment, "jobs/train.py", *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    (found,) = client.search_runs([client.get_experiment_by_name("cvdist").experiment_id])
    return done.stdout, client, found


def test_submitted_job_prints_its_plan_and_its_result(running, submitted):
    _, _, environment = running
    output, _, found = submitted
    assert "batch      64 = 32 on each of 2 workers; 63 steps an epoch, 4 epochs" in output
    assert re.search(r"best accuracy  9\d\.\d\d% \(\d+/1000\) at epoch \d", output)
    page = f"#/experiments/{found.info.experiment_id}/runs/{found.info.run_id}"
    assert f"next: open {environment['MLFLOW_TRACKING_URI']}/{page}" in output


def test_the_run_tells_everything(submitted):
    output, client, found = submitted
    assert found.info.status == "FINISHED" and found.info.run_name == "submitted"
    metrics, params, tags = found.data.metrics, found.data.params, found.data.tags
    assert metrics["valid/total"] == 1000 and metrics["train/total"] == 4000
    assert metrics["valid/accuracy"] == metrics["valid/correct"] / 1000 > 0.9
    assert [m.step for m in client.get_metric_history(found.info.run_id, "valid/loss")] == [1, 2, 3, 4]
    steps = client.get_metric_history(found.info.run_id, "step/loss")
    assert [m.step for m in steps] == [50, 63, 113, 126, 176, 189, 239, 252]
    assert {"speed/samples_per_second", "speed/epoch_seconds", "memory/peak_mb"} <= set(metrics)
    # The head takes no work, so the two workers are on two nodes; each has reported on its own.
    assert {name.split("/")[1] for name in metrics if name.startswith("system/")} == {"node-0", "node-1"}
    assert params["loop.batch_size"] == "64" and params["run.world_size"] == "2"
    assert params["optimizer.momentum"] == "0.9" and len(params["data.sha256"]) == 64
    assert tags["mlflow.source.git.commit"] == "abc123"
    submission = re.search(r"Job '(\S+)' submitted", output).group(1)
    assert tags["ray.job_id"] == submission
    assert torch.__version__.startswith(tags["version.torch"])
    (dataset,) = found.inputs.dataset_inputs
    assert dataset.dataset.name == "digits" and params["data.sha256"].startswith(dataset.dataset.digest)


def test_results_are_in_the_bucket_and_the_database(running, bucket, submitted):
    started, _, _ = running
    _, _, found = submitted
    assert bucket.get_file_info("cvdist/runs/submitted").type == arrow.FileType.Directory
    # Clients send artifacts to the server, which puts them where it keeps them.
    assert found.info.artifact_uri.startswith("mlflow-artifacts:")
    kept = bucket.get_file_info(arrow.FileSelector("cvdist/mlflow", recursive=True, allow_not_found=True))
    assert bool([f for f in kept if f.path.endswith("figures/loss.png")]) == server_has("boto3")
    postgres = server_has("psycopg2") and any(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    assert ("database   PostgreSQL" if postgres else "database   sqlite: ") in started.stderr


def test_the_page_begins_with_result_command_and_figures(submitted):
    _, client, found = submitted
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
def logged_model(running, submitted):
    _, _, environment = running
    _, _, found = submitted
    (output,) = found.outputs.model_outputs
    with mlflow_store(environment["MLFLOW_TRACKING_URI"]):
        yield f"models:/{output.model_id}", found


@pytest.fixture(scope="module")
def validation():
    loader = open_loader(recipes.find("digits-cnn"), torch.device("cpu"))
    images, labels = loader.pictures("valid", range(1000))
    return images.numpy(), np.array([int(label) for label in labels])


def test_the_model_serves_over_http(logged_model, validation):
    """Of pixels and of files, by MLflow's own server, here in a thread instead of as `mlflow models serve`."""
    uri, _ = logged_model
    images, labels = validation
    port = free_port()
    app = scoring_server.init(mlflow.pyfunc.load_model(uri))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    serving = threading.Thread(target=server.run)
    serving.start()
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/ping"), "the model server answers")

        def post(*inputs):
            url = f"http://127.0.0.1:{port}/invocations"
            return requests.post(url, json={"inputs": inputs}, timeout=60)

        files = []
        for image in images[:20]:
            file = io.BytesIO()
            Image.fromarray(image[0]).save(file, "PNG")
            files.append(base64.b64encode(file.getvalue()).decode())
        of_pixels, of_files = post(*images[:20].tolist()), post(*files)
        assert of_pixels.status_code == 200, of_pixels.text
        predictions = of_files.json()["predictions"]
        assert predictions == of_pixels.json()["predictions"]
        right = [one["class"] == str(label) for one, label in zip(predictions, labels[:20], strict=True)]
        assert sum(right) >= 18 and set(predictions[0]) == {"class", "confidence", "probabilities"}
        refused = post(*files[:2], files[2][:120])
        assert refused.status_code == 400 and len(refused.text) < 300
        assert refused.json()["message"].startswith("inputs[2]: the picture can't be decoded: ")
    finally:
        server.should_exit = True
        serving.join()


def test_secrets_are_for_their_owner_alone(running):
    _, folder, environment = running
    for name in ("env", "secrets.json", "ray-token", "state.json"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name
    secrets = json.loads((folder / "secrets.json").read_text()).values()
    said = [path.read_text(errors="replace") for path in (folder / "logs").iterdir()]
    for entry in json.loads((folder / "state.json").read_text()):
        said.append(" ".join(psutil.Process(entry["pid"]).cmdline()))
    assert not [secret for secret in secrets for text in said if secret in text]
    # Nobody submits a job without the token.
    stranger = {k: v for k, v in environment.items() if k != "RAY_AUTH_TOKEN_PATH"}
    refused = submit({**stranger, "RAY_AUTH_TOKEN": "x" * 48}, "-c", "print('in')")
    assert refused.returncode != 0 and "in\n" not in refused.stdout


def test_mistakes_are_one_line(running, tmp_path):
    _, folder, environment = running
    assert "a stack is running in" in the_error(stack("up", "--folder", folder))
    port = environment["MLFLOW_TRACKING_URI"].rpartition(":")[2]
    line = the_error(stack("up", "--folder", tmp_path / "other", "--s3-port", port))
    assert line == f"port {port} is taken: --s3-port names another one, 0 any free one"
    assert not (tmp_path / "other" / "state.json").exists()
    line = the_error(stack("up", "--folder", tmp_path / "other", "--workers", "0"))
    assert line == "--workers is 0: it takes 1 or more"
    # What is in a stale state.json is another process by now, or none: left alone.
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        stale = [{"name": "mlflow", "pid": other.pid, "started": psutil.Process(other.pid).create_time() - 100}]
        (tmp_path / "other" / "state.json").write_text(json.dumps(stale))
        assert stack("down", "--folder", tmp_path / "other").returncode == 0
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    assert (folder / "env").exists()
