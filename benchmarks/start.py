"""Seconds from start to the first step, against a minimal TorchTrainer of Ray.

Both sides are whole processes that start a local Ray with two CPU workers. The other side does what Ray's first
example does: a tiny model in DistributedDataParallel and one step. Our side also opens MLflow and loads data.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Comparison, compare

ROOT = Path(__file__).resolve().parent.parent

_MINIMAL = """
import time
import ray.train.torch, torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def work():
    model = ray.train.torch.prepare_model(torch.nn.Linear(784, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(torch.zeros(16, 784)).sum().backward()
    optimizer.step()
    return time.time()

result = TorchTrainer(
    work, scaling_config=ScalingConfig(num_workers=2), run_config=RunConfig(storage_path={storage!r})
).fit()
print("first step at", result.return_value)
"""


def measure() -> Iterator[Comparison]:
    """Measure the seconds to the first step in three pairs, after a warm-up."""
    yield compare(
        "start to first step: ours / minimal TorchTrainer",
        _ours,
        _minimal,
        unit="s",
        target=1.0,
        pairs=3,
        at_most=True,
    )


def _ours() -> float:
    with tempfile.TemporaryDirectory() as storage:
        words = ["jobs/train.py", "digits-cnn", "--epochs", "1", "--no-log-model"]
        _, output = _run([sys.executable, *words], storage)
        found = re.search(r"first step after ([\d.]+) s", output)  # counted from the process's start
        assert found, output
        return float(found[1])


def _minimal() -> float:
    with tempfile.TemporaryDirectory() as storage:
        started, output = _run([sys.executable, "-c", _MINIMAL.format(storage=storage)], storage)
        found = re.search(r"first step at ([\d.]+)", output)
        assert found, output
        return float(found[1]) - started


def _run(command: list[str], storage: str) -> tuple[float, str]:
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    started = time.time()
    done = subprocess.run(
        command,
        cwd=ROOT,
        # Not a cluster that happens to run, or to have run, on this machine.
        env={**environment, "CVDIST_STORAGE": storage, "RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return started, output
