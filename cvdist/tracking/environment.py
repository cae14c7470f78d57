"""The environment of a job: host, versions, command and commit."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cvdist
from cvdist.log import redact

_PACKAGES = ("torch", "torchvision", "ray", "mlflow", "numpy")
# The environment variable in which `ray job submit` passes the id of the job to the driver.
_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def is_installed(package: str) -> bool:
    """Return whether `package` can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


@contextmanager
def variables(**values: str) -> Iterator[None]:
    """Set environment variables for the duration of the context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def run_tags() -> dict[str, str]:
    """Return tags that describe the environment, under MLflow's own names where there are any."""
    tags = {
        "mlflow.source.name": " ".join(sys.argv[:1]),
        "mlflow.source.type": "JOB",
        "cvdist.command": command(),
        "cvdist.version": cvdist.__version__,
        "version.python": platform.python_version(),
        "host.name": platform.node(),
        "host.os": platform.platform(),
    }
    for package in _PACKAGES:
        if is_installed(package):
            tags[f"version.{package}"] = importlib.metadata.version(package)
    if commit := git_commit():
        tags["mlflow.source.git.commit"] = commit
    if job := ray_job_id():
        tags["ray.job_id"] = job
    return tags


def command() -> str:
    """Return the command that reproduces the job, quoted for a shell, with credentials masked."""
    words = [redact(word) for word in sys.argv]
    script = Path(words[0])
    if script.name == "cvdist":  # the console script
        return shlex.join([script.name, *words[1:]])
    if script.is_absolute() and script.is_relative_to(Path.cwd()):
        words[0] = str(script.relative_to(Path.cwd()))
    return shlex.join(["python", *words])


def git_commit() -> str:
    """Return the git commit of the code, with `-dirty` if files differ from it. Empty outside a checkout.

    In an image without git, the environment variable CVDIST_COMMIT names the commit.
    """
    if commit := os.environ.get("CVDIST_COMMIT"):
        return commit
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(here, "status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.SubprocessError):
        return ""


def ray_job_id() -> str:
    """Return the submission id under `ray job submit`, else Ray's job id, or an empty text without Ray."""
    try:
        metadata = json.loads(os.environ.get(_RAY_JOB, "{}")).get("metadata", {})
        if submitted := metadata.get("job_submission_id"):
            return str(submitted)
    except ValueError:
        pass
    ray = sys.modules.get("ray")
    return str(ray.get_runtime_context().get_job_id()) if ray is not None and ray.is_initialized() else ""


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=True
    )
    return done.stdout.strip()
