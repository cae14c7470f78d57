"""Time lost to a killed worker, against the checkpoint interval plus the time of Ray's own restart of workers.

Our side is a job with two Ray workers, one of which is killed during training. The lost time is counted until
training has passed the step at which it was interrupted, less the time that those steps take anyway. The other
side is one checkpoint interval of the same job, plus the time from the kill to the next first step of a minimal
TorchTrainer without data, checkpoints or MLflow.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from mlflow import MlflowClient

from benchmarks.harness import Comparison, summarize

ROOT = Path(__file__).resolve().parent.parent
PAIRS = 2
INTERVAL = 125  # steps between two checkpoints: an epoch of 4,000 digits
_SECONDS = 180.0  # that one side may take

_MINIMAL = """
import os, time
import ray.train.torch, torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def work():
    again = os.path.exists({starts!r})
    model = ray.train.torch.prepare_model(torch.nn.Linear(784, 10))
    while True:
        model(torch.zeros(16, 784)).sum().backward()
        if ray.train.get_context().get_world_rank() == 0 and (again or not os.path.exists({starts!r})):
            with open({starts!r}, "a") as file:
                print(time.time(), file=file)
        if again:
            return
        time.sleep(0.01)

TorchTrainer(
    work, scaling_config=ScalingConfig(num_workers=2),
    run_config=RunConfig(storage_path={storage!r}, failure_config=FailureConfig(max_failures=1)),
).fit()
"""


def measure() -> Iterator[Comparison]:
    """Measure the time lost in two pairs."""
    measured = []
    for _ in range(PAIRS):
        lost, interval = _ours()
        rays_own = _minimal()
        print(f"  lost {lost:.1f} s; checkpoint interval {interval:.1f} s, Ray's own restart {rays_own:.1f} s")
        measured.append((lost, interval + rays_own))
    yield summarize(
        "a killed worker: time lost / interval + Ray's restart", measured, unit="s", target=1.3, at_most=True
    )


def _ours() -> tuple[float, float]:
    """Run our job, and return the seconds lost and the seconds between two checkpoints."""
    with tempfile.TemporaryDirectory() as storage:
        words = [
            "digits-cnn",
            "--epochs",
            "14",
            "--lr-scheduler",
            "constant",
            "--checkpoint-every",
            str(INTERVAL),
        ]
        words += [
            "--log-every-steps",
            "10",
            "--no-log-model",
            "--no-visualize",
            "--no-system-metrics",
            "--verbose",
        ]
        with _job([sys.executable, "jobs/train.py", *words, "--name", "bench"], storage) as (job, log):
            _wait(job, lambda: re.search(r"epoch 6/\d+  train", log.read_text()), log)
            first = re.search(r"RayTrainWorker pid=(\d+)[^\n]* data  ", log.read_text())  # of rank 0
            assert first, log.read_text()
            killed_at = _kill(job, but=int(first[1]))
            _wait(job, lambda: job.poll() is not None, log)
            assert job.returncode == 0, log.read_text()[-5000:]
        client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
        (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
        history = client.get_metric_history(run.info.run_id, "step/loss")
    points = sorted((metric.step, metric.timestamp / 1000) for metric in history)
    before = [(step, at) for step, at in points if at <= killed_at]
    pairs = itertools.pairwise(before)
    pace = statistics.median((at - at_0) / (step - step_0) for (step_0, at_0), (step, at) in pairs)
    last, last_at = before[-1]
    step, at = next(point for point in points if point[0] > last)
    return at - last_at - (step - last) * pace, INTERVAL * pace


def _minimal() -> float:
    """Run the minimal TorchTrainer, and return the seconds from the kill to the next first step."""
    with tempfile.TemporaryDirectory() as storage:
        starts = Path(storage) / "starts"
        script = _MINIMAL.format(storage=storage, starts=str(starts))
        # Not on a cluster that happens to run on this machine.
        with _job([sys.executable, "-c", script], storage, RAY_ADDRESS="local") as (job, log):
            _wait(job, starts.exists, log)
            time.sleep(2.0)
            killed_at = _kill(job)
            _wait(job, lambda: job.poll() is not None, log)
            assert job.returncode == 0, log.read_text()[-5000:]
        return float(starts.read_text().split()[1]) - killed_at


@contextmanager
def _job(command: list[str], storage: str, **variables: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Start a job with its own local Ray, and end it on exit. Yields the process and the file of its output."""
    log = Path(storage) / "log"
    environment = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    with log.open("w") as file:
        job = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=file,
            # Each of the workers by name in the log.
            env={**environment, "CVDIST_STORAGE": storage, "RAY_DEDUP_LOGS": "0", **variables},
        )
    try:
        yield job, log
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait(60)


def _kill(job: subprocess.Popen[bytes], but: int = 0) -> float:
    """Kill a worker, but not the one with process id `but`, and return the time in seconds since 1970."""
    for process in psutil.Process(job.pid).children(recursive=True):
        words = " ".join(process.cmdline()[:1])
        if words.startswith("ray::") and "RayTrainWorker" in words and process.pid != but:
            process.send_signal(signal.SIGKILL)
            return time.time()
    raise AssertionError("there is no worker")


def _wait(job: subprocess.Popen[bytes], condition: Callable[[], object], log: Path) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()[-5000:]
        time.sleep(0.05)
