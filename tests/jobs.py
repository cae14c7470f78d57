"""Jobs as a user runs them: commands, in processes of their own."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import mlflow

from tests.waiting import kill_with_children, wait_for_exit

ROOT = Path(__file__).resolve().parent.parent


def run(
    *command: str | Path, storage: Path, timeout: float | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `command` in the repository's root, with its files under `storage`, until it ends.

    Args:
        command: The program and its arguments.
        storage: Becomes CVDIST_STORAGE.
        timeout: Seconds without any output after which it is killed; `STALL_SECONDS` by default.
        environment: More environment variables.

    Raises:
        Stalled: If it was killed.
    """
    env = {
        **{k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")},
        "CVDIST_STORAGE": str(storage),
        **environment,
    }
    words = list(map(str, command))
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:

        def sizes() -> str:
            return f"{_size(output)} bytes of output, {_size(errors)} bytes of errors"

        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=output, stderr=errors)
        try:
            wait_for_exit(
                process,
                shlex.join(words),
                sizes,
                detail=lambda: _text(output)[-3000:] + _text(errors)[-6000:],
                stall_seconds=timeout,
            )
        except BaseException:
            kill_with_children(process)
            raise
        return subprocess.CompletedProcess(words, process.returncode, _text(output), _text(errors))


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _text(file: IO[bytes]) -> str:
    # The process writes at the same position in the file that a seek here would move.
    return io.TextIOWrapper(io.BytesIO(os.pread(file.fileno(), _size(file), 0))).read()


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
    """While the context lasts, MLflow's functions without a client read the store of `storage`."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(f"sqlite:///{storage}/mlflow.db")
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before or "")
        if before is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # which set_tracking_uri has set


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """The one error line of a job that ended because of what its user can correct."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0].removeprefix("error: ")
