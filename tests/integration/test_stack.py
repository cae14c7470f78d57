"""`k8s/stack.py`, and jobs submitted to it as users submit them: S3, the MLflow server, several Ray nodes."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from pyarrow import fs as arrow

from tests.helpers import pictures
from tests.helpers.feature_caches import write_weights
from tests.helpers.jobs import ROOT, run, the_error

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
    """`ray job submit --working-dir . -- python jobs/...`, with its settings and metrics each second."""
    often = {"env_vars": {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}}
    return run(
        *(RAY, "job", "submit", "--working-dir", ".", "--runtime-env-json", json.dumps(often)),
        *("--", "python", *words),
        storage=Path(environment["CVDIST_STORAGE"]),
        timeout=480,
        **environment,
    )


@pytest.mark.timeout(1200)
def test_a_job_of_each_kind_from_pictures_to_a_run_in_mlflow(running, tmp_path):
    started, _, environment = running
    bucket = arrow.S3FileSystem(
        access_key=environment["AWS_ACCESS_KEY_ID"],
        secret_key=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=environment["AWS_ENDPOINT_URL"],
        region="us-east-1",
    )
    photos = pictures.write(tmp_path / "photos", pictures.FOUR)
    weights = write_weights(tmp_path / "vgg11.pth")
    arrow.copy_files(str(photos), "cvdist/pictures", destination_filesystem=bucket)
    arrow.copy_files(str(weights), "cvdist/vgg11.pth", destination_filesystem=bucket)
    common = (
        *("dogs-cats-vgg16-features", "--features", "s3://cvdist/features", "--image-size", "32"),
        *("--model", "vgg11", "--weights", "s3://cvdist/vgg11.pth", "--weights-preprocessing", "imagenet"),
    )
    done = submit(
        environment, "jobs/preprocess.py", *common, "--data", "s3://cvdist/pictures", "--shard-size", "4"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "extracting on 2 CPU actors" in done.stdout
    assert re.search(r"pictures  16 of 16, 0 can't be decoded", done.stdout)

    done = submit(
        *(environment, "jobs/train.py", *common, "--num-workers", "2", "--epochs", "1", "--batch-size", "4"),
        *("--name", "from-the-stack", "--hidden-size", "16", "--no-visualize"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    correct = int(re.search(r"best accuracy  [\d.]+% \((\d)/5\)", done.stdout)[1])

    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    (found,) = client.search_runs([client.get_experiment_by_name("cvdist").experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "from-the-stack"
    assert (found.data.metrics["valid/correct"], found.data.metrics["valid/total"]) == (correct, 5)
    assert found.data.params["run.world_size"] == "2"
    # The head takes no work, so the two workers are on two nodes; each has reported on its own.
    assert {m.split("/")[1] for m in found.data.metrics if m.startswith("system/")} == {"node-0", "node-1"}
    # Clients send artifacts to the server, which puts them where it keeps them.
    assert found.info.artifact_uri.startswith("mlflow-artifacts:")
    assert {a.path for a in client.list_artifacts(found.info.run_id)} >= {"figures"}
    assert bucket.get_file_info("cvdist/runs/from-the-stack").type == arrow.FileType.Directory
    kept = bucket.get_file_info(arrow.FileSelector("cvdist/mlflow", recursive=True, allow_not_found=True))
    assert bool([f for f in kept if f.path.endswith("figures/loss.png")]) == server_has("boto3")

    postgres = server_has("psycopg2") and any(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    assert ("database   PostgreSQL" if postgres else "database   sqlite: ") in started.stderr


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
