"""Cost of checkpoints for the steps of a job with two Ray workers: seven an epoch against one an epoch.

Both sides are whole jobs on a local Ray, with a small CNN whose checkpoint takes 0.9 MB: what remains is what
the workers do and wait for at each checkpoint. Compared are the seconds from one epoch's end to the next one's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient

from benchmarks.harness import Comparison, summarize

ROOT = Path(__file__).resolve().parent.parent
PAIRS = 2
_EPOCHS = 12
_EVERY = 10  # steps between two checkpoints, of 63 in an epoch: six more in each epoch
_MORE = 6
_SECONDS = 400.0  # that one job may take


def measure() -> Iterator[Comparison]:
    """Run two pairs of jobs, with seven checkpoints an epoch and with one, and compare their seconds."""
    measured = []
    for _ in range(PAIRS):
        many, one = _epoch_seconds(_EVERY), _epoch_seconds(0)
        each = (many - one) / _MORE
        print(
            f"  an epoch with 7 checkpoints {many:.2f} s, with one {one:.2f} s: {each:.3f} s each", flush=True
        )
        measured.append((many, one))
    yield summarize(
        "checkpoints under Ray: seven an epoch / one", measured, unit="s/epoch", target=1.2, at_most=True
    )


def _epoch_seconds(every: int) -> float:
    """Return the mean seconds of an epoch, from the end of the second one to the end of the last."""
    words = ["digits-cnn", "--epochs", str(_EPOCHS), "--batch-size", "64", "--checkpoint-every", str(every)]
    words += ["--no-log-model", "--no-visualize", "--no-system-metrics", "--device", "cpu", "--name", "bench"]
    kept = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    with tempfile.TemporaryDirectory() as storage:
        done = subprocess.run(
            [sys.executable, "jobs/train.py", *words],
            cwd=ROOT,
            env={**kept, "CVDIST_STORAGE": storage},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
        (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
        ends = {m.step: m.timestamp for m in client.get_metric_history(run.info.run_id, "valid/correct")}
    return (ends[_EPOCHS] - ends[2]) / 1000 / (_EPOCHS - 2)
