"""The training that the cluster's jobs do, and what such a job must have left, whatever happened to it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from mlflow import MlflowClient
from pyarrow import fs as arrow

from tests.cluster.harness import Cluster, LoggedProcess
from tests.helpers.jobs import ROOT
from tests.helpers.waiting import kill_with_children

# With dropout, augmentation and momentum, which a checkpoint has to restore.
TRAINING = [
    *("digits-cnn", "--batch-size", "64", "--lr-scheduler", "constant", "--checkpoint-every", "20"),
    *("--log-every-steps", "10", "--device", "cpu", "--precision", "float32", "--no-log-model"),
    *("--no-system-metrics", "--step-timeout", "120", "--connect-timeout", "120"),
]
EPOCHS = 14
SAMPLES = 4000
"""Training samples of an epoch."""
STEPS = 63
"""Steps of an epoch."""
LOGGED_STEPS = [10, 20, 30, 40, 50, 60, 63]
"""Steps of an epoch that have metrics: every tenth, those with checkpoints, and the last."""

Weights = dict[str, torch.Tensor]


@contextlib.contextmanager
def undisturbed_training(storage: Path, epochs: int) -> Iterator[LoggedProcess]:
    """The reference: two workers under torchrun on this machine, without Ray, to which nothing happens.

    They have as many threads as those of the cluster. `reference_weights` returns what they reached; at the end
    of the block they are killed if they still run.
    """
    file = storage / "reference.log"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*TRAINING, "--epochs", str(epochs), "--name", "reference", "--tracking", "none"]
    with file.open("w") as log:
        process = subprocess.Popen(
            [*launcher, "jobs/train.py", *words],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "CVDIST_STORAGE": str(storage), "OMP_NUM_THREADS": "1"},
        )
    try:
        yield LoggedProcess(process, file)
    finally:
        kill_with_children(process)


def reference_weights(training: LoggedProcess, epochs: int) -> Weights:
    """Wait for the end of `undisturbed_training`; returns its weights and momentum."""
    assert training.end() == 0, training.log()
    return weights_in(training.file.parent / "reference" / f"epoch-{epochs:04}" / "state.pt")


def weights_in(file: object) -> Weights:
    """The weights and the momentum in a checkpoint's file, by name."""
    state = torch.load(file, weights_only=True)
    momentum = {f"momentum {k}": v["momentum_buffer"] for k, v in state["optimizer"]["state"].items()}
    return {**state["model"], **momentum}


def bucket(cluster: Cluster) -> arrow.S3FileSystem:
    """The S3 server of `cluster`."""
    keys = cluster.s3.environment
    return arrow.S3FileSystem(
        access_key=keys["AWS_ACCESS_KEY_ID"],
        secret_key=keys["AWS_SECRET_ACCESS_KEY"],
        region="us-east-1",
        endpoint_override=keys["AWS_ENDPOINT_URL"],
    )


def checkpoints(cluster: Cluster, name: str) -> list[str]:
    """The names of a run's complete checkpoints, in order."""
    listed = bucket(cluster).get_file_info(arrow.FileSelector(f"bucket/runs/{name}", recursive=True))
    return sorted(i.path.split("/")[-2] for i in listed if i.path.endswith("/checkpoint.json"))


def require_same_weights(cluster: Cluster, name: str, reference: Weights, epochs: int = EPOCHS) -> None:
    """Require that a run's last checkpoint has the bits of the reference."""
    found = checkpoints(cluster, name)
    last = [c for c in found if re.match(rf"epoch-{epochs:04}(-attempt-[\d.]+)?$", c)]
    assert len(last) == 1, f"{name} has the checkpoints {found}, which should have one of epoch {epochs}"
    with bucket(cluster).open_input_file(f"bucket/runs/{name}/{last[0]}/state.pt") as file:
        reached = weights_in(io.BytesIO(file.read()))
    require_equal(reached, reference)


def require_equal(reached: Weights, reference: Weights) -> None:
    """Require the same tensors, bit for bit."""
    assert reached.keys() == reference.keys()
    different = [key for key, tensor in reference.items() if not torch.equal(reached[key], tensor)]
    assert not different, f"these tensors differ from the reference: {different}"


def require_complete_run(
    cluster: Cluster, name: str, epochs: int = EPOCHS, *, more_steps: bool = False
) -> dict[str, str]:
    """Require one finished MLflow run that has each metric once, and counts each sample in each epoch.

    Args:
        cluster: Has the MLflow server.
        name: The run's `--name`.
        epochs: How many it was to train.
        more_steps: Whether there may be metrics of further steps, at checkpoints that could not be foreseen.

    Returns:
        The run's tags.
    """
    client = MlflowClient(cluster.mlflow.uri)
    experiment = client.get_experiment_by_name("cvdist")
    assert experiment is not None, "MLflow has no experiment"
    runs = client.search_runs([experiment.experiment_id], f"tags.`cvdist.name` = '{name}'")
    assert len(runs) == 1, f"MLflow has {len(runs)} runs of {name}, not one"
    run = runs[0]
    assert run.info.status == "FINISHED", f"MLflow has the run {name} as {run.info.status}"
    history = lambda metric: client.get_metric_history(run.info.run_id, metric)  # noqa: E731
    validated = [metric.step for metric in history("valid/correct")]
    assert validated == list(range(1, epochs + 1)), f"{name} has validation metrics of the epochs {validated}"
    wanted = {epoch * STEPS + step for epoch in range(epochs) for step in LOGGED_STEPS}
    steps = [metric.step for metric in history("step/loss")]
    assert steps == sorted(set(steps)), f"{name} has metrics of steps twice, or not in order: {steps}"
    assert wanted <= set(steps), f"{name} lacks metrics of the steps {sorted(wanted - set(steps))}"
    assert more_steps or wanted == set(steps), (
        f"{name} has metrics of more steps: {sorted(set(steps) - wanted)}"
    )
    samples = sum(metric.value for metric in history("step/total"))
    assert samples == epochs * SAMPLES, f"{name} has metrics of {samples} samples, not {epochs * SAMPLES}"
    attempts = [metric.value for metric in history("run/attempt")]
    tag = run.data.tags["cvdist.attempt"]
    assert attempts[-1] == float(tag), f"{name} has the attempts {attempts}, and the tag {tag}"
    return run.data.tags
