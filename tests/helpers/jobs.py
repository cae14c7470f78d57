"""Jobs as a user runs them: commands, in processes of their own or, where that will do, in this one."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from cvdist.errors import UserError
from cvdist.jobs import cli
from tests.helpers.waiting import kill_with_children, wait_for_exit

ROOT = Path(__file__).resolve().parents[2]
# Those that begin with one of these say where a job's results go, which a test decides itself.
_UNSET = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")

Done = subprocess.CompletedProcess[str]


def run(*command: str | Path, storage: Path, timeout: float | None = None, **environment: str) -> Done:
    """Run `command` in the repository's root, with its files under `storage`, until it ends.

    A job has a folder for temporary files to itself, and must leave nothing there.

    Args:
        command: The program and its arguments.
        storage: Becomes CVDIST_STORAGE.
        timeout: Seconds without any output after which it is killed; `STALL_SECONDS` by default.
        environment: More environment variables.

    Raises:
        Stalled: If it was killed.
    """
    words = list(map(str, command))
    with (
        tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as temporary,  # short: sockets lie in it
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
    ):
        is_job = any(word.startswith("jobs/") for word in words)
        env = {
            **{k: v for k, v in os.environ.items() if k not in _UNSET},
            **({"TMPDIR": temporary} if is_job else {}),
            "CVDIST_STORAGE": str(storage),
            **environment,
        }

        def sizes() -> str:
            return f"{_size(output)} bytes of output, {_size(errors)} bytes of errors"

        process = subprocess.Popen(
            words, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=errors
        )
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
        # torchrun keeps the folder of its log.
        left = [one.name for one in Path(temporary).iterdir() if not one.name.startswith("torchelastic_")]
        assert not left or env.get("TMPDIR") != temporary, f"{shlex.join(words)} left {left}"
        return subprocess.CompletedProcess(words, process.returncode, _text(output), _text(errors))


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _text(file: IO[bytes]) -> str:
    # The process writes at the same position in the file that a seek here would move.
    return io.TextIOWrapper(io.BytesIO(os.pread(file.fileno(), _size(file), 0))).read()


def call(job: str, *arguments: str | Path, storage: Path, **environment: str) -> Done:
    """`python jobs/JOB.py ARGUMENTS` in this process, which saves the seconds that a new one takes to start."""
    import torch

    words = list(map(str, arguments))
    output, errors = io.StringIO(), io.StringIO()
    logger, before = logging.getLogger("cvdist"), sys.argv
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    threads = torch.get_num_threads()
    sys.argv = [f"jobs/{job}.py", *words]
    try:
        with (
            _variables({"CVDIST_STORAGE": str(storage), **environment}),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
        ):
            code = cli.run_job(job, words)
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()  # the next job may be for another cluster
        sys.argv = before
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate
        torch.set_num_threads(threads)
    return subprocess.CompletedProcess(sys.argv, code, output.getvalue(), errors.getvalue())


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables while the context lasts."""
    before = dict(os.environ)
    for name in _UNSET:
        os.environ.pop(name, None)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in {*values, *_UNSET}:
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


def on_ray(variables: Mapping[str, str]) -> dict[str, str]:
    """What gives a job's processes on a Ray cluster these environment variables, as `ray job submit` would."""
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": dict(variables)}})}


def train(*arguments: str | Path, storage: Path, **environment: str) -> Done:
    """`python jobs/train.py ...`."""
    return run(sys.executable, "jobs/train.py", *arguments, storage=storage, **environment)


def preprocess(*arguments: str | Path, storage: Path, **environment: str) -> Done:
    """`python jobs/preprocess.py ...`."""
    return run(sys.executable, "jobs/preprocess.py", *arguments, storage=storage, **environment)


def torchrun(workers: int, *arguments: str | Path, storage: Path, **environment: str) -> Done:
    """`torchrun --nproc-per-node WORKERS jobs/train.py ...`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    return run(*launcher, "jobs/train.py", *arguments, storage=storage, **environment)


@contextmanager
def mlflow_store(store: str | Path) -> Iterator[None]:
    """While the context lasts, MLflow's functions without a client read `store`: a run's storage, or a URI."""
    import mlflow  # only now: most tests need not wait for it

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(store if isinstance(store, str) else f"sqlite:///{store}/mlflow.db")
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before or "")
        if before is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # which set_tracking_uri has set


def user_error(function: Callable[..., Any], *arguments: Any, **more: Any) -> str:
    """The message, which is one short line, of the `UserError` that a call ends with."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **more)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def the_error(done: Done) -> str:
    """The one error line of a job that ended because of what its user can correct."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0].removeprefix("error: ")
