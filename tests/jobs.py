"""Jobs as a user runs them: commands, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow

ROOT = Path(__file__).resolve().parent.parent


def run(
    *command: str | Path, storage: Path, timeout: float = 180, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `command` in the repository's root, with its files under `storage`."""
    env = {
        **{k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")},
        "CVDIST_STORAGE": str(storage),
        **environment,
    }
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


def train(*arguments: str | Path, storage: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python jobs/train.py ...`."""
    return run(sys.executable, "jobs/train.py", *arguments, storage=storage, **environment)


def preprocess(*arguments: str | Path, storage: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python jobs/preprocess.py ...`."""
    return run(sys.executable, "jobs/preprocess.py", *arguments, storage=storage, **environment)


def torchrun(
    workers: int, *arguments: str | Path, storage: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node WORKERS jobs/train.py ...`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    return run(*launcher, "jobs/train.py", *arguments, storage=storage, **environment)


@contextmanager
def mlflow_store(storage: Path) -> Iterator[None]:
    """MLflow's functions without a client look into the store of `storage`, while the context lasts."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(f"sqlite:///{storage}/mlflow.db")
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before or "")
        if before is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # which set_tracking_uri has set


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """The one error line of a job that the user can mend."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0].removeprefix("error: ")
