"""A folder of a job's own for all temporary files: its libraries', its workers' and those of the Ray it starts.

Workers that are killed can't remove their sockets, and Ray keeps the folder of each session. So all of them are
removed with the job's folder, at its end or, after `kill -9`, by the next job on this machine.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX, _LOCK = "cvdist-", "lock"
_LONGEST = 36  # characters: sockets of Ray lie 70 deeper, and their paths may have 107


@contextmanager
def temporary_folder() -> Iterator[None]:
    """Use a folder of this process' own below $TMPDIR until the context ends, and remove those of dead jobs."""
    base = Path(tempfile.gettempdir())
    _remove_abandoned(base)
    before = os.environ.get("TMPDIR")
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    folder.chmod(0o711)  # a process of another user may be given a file in it
    with (folder / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if len(str(folder)) <= _LONGEST:
            os.environ["TMPDIR"], tempfile.tempdir = str(folder), None
        try:
            yield
        finally:
            tempfile.tempdir = None
            if before is None:
                os.environ.pop("TMPDIR", None)
            else:
                os.environ["TMPDIR"] = before
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(base: Path) -> None:
    for folder in base.glob(f"{_PREFIX}*"):
        with suppress(OSError), (folder / _LOCK).open("r+") as lock:  # another user's can't be opened
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
