"""What all processes of a test session share: things that are made once, and servers that are started once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.util import Finalize
from pathlib import Path
from typing import IO, TypeVar

Made = TypeVar("Made")

# Names the session's folder to processes that pytest-xdist starts.
_VARIABLE = "CVDIST_TEST_SESSION"
_held: list[IO[str]] = []


def begin() -> bool:
    """Make the session's folder and hold it; False in the processes that pytest-xdist has started.

    All temporary files of tests and servers go into it, but pytest's own folders, which stay after a failure.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        return False
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ[_VARIABLE] = tempfile.mkdtemp(prefix="cvt-", dir="/tmp")  # short: sockets lie in it
    os.environ.setdefault("CVDIST_CACHE", str(folder() / "cache"))
    temporary = folder() / "t"
    for made in (folder(), temporary):
        made.mkdir(exist_ok=True)
        made.chmod(0o711)  # PostgreSQL runs as another user
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    # After multiprocessing has removed its own folder within this one, at -100.
    Finalize(None, shutil.rmtree, (folder(), True), exitpriority=-200)
    lock = (folder() / "session.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    _held.append(lock)
    return True


def end() -> None:
    """End the servers, in the process that has begun; its folder goes when it exits."""
    if not _held:
        return
    _held.pop().close()
    with (folder() / "keepers.lock").open("w") as keepers:
        fcntl.flock(keepers, fcntl.LOCK_EX)  # granted when the servers are gone
    for kept in Path(os.environ["PYTEST_DEBUG_TEMPROOT"]).glob("pytest-of-*"):
        with contextlib.suppress(OSError):
            kept.rmdir()  # if no test has failed


def once(name: str, make: Callable[[Path], Made]) -> Made:
    """What `make` returns, which is called once for all processes.

    Args:
        name: of the thing in this session.
        make: gets an empty folder that stays until the session ends. What it returns is pickled.
    """
    own, done = folder() / name, folder() / f"{name}.made"
    with (folder() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            own.mkdir()
            try:
                made = pickle.dumps(make(own))
            except Exception:  # the others fail at once, for the same reason
                made = pickle.dumps(_Failure(traceback.format_exc()))
            done.write_bytes(made)
    value = pickle.loads(done.read_bytes())
    if isinstance(value, _Failure):
        raise AssertionError(f"{name} could not be made:\n{value.text}")
    return value


def serve(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a server that lives until the session ends, in whatever way that is. It inherits no input.

    Args:
        command: the server, in the foreground.
        log: what it prints goes there.
        environment: instead of this process's.

    Returns:
        The process that ends with the server.
    """
    keeper = [sys.executable, "-S", "-E", str(Path(__file__).with_name("keeper.py"))]
    with log.open("w") as output:
        return subprocess.Popen(
            [*keeper, str(folder() / "session.lock"), str(folder() / "keepers.lock"), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C is for pytest, which ends the session
            env=environment,
        )


class _Failure:
    """Instead of a thing that could not be made."""

    def __init__(self, text: str) -> None:
        self.text = text


def folder() -> Path:
    """Of the session; it is gone when that has ended."""
    return Path(os.environ[_VARIABLE])
