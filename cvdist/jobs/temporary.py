"""A folder of a job's own for all temporary files: its libraries', its workers' and those of the Ray it starts.

Workers that are killed can't remove their sockets, and Ray keeps the folder of each session. So all of them are
removed with the job's folder, at its end or, after `kill -9`, by the next job on this machine.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from io import TextIOBase
from multiprocessing.util import Finalize
from pathlib import Path

_PREFIX, _LOCK = "cvdist-", "lock"
_LONGEST = 36  # characters: sockets of Ray lie 70 deeper, and their paths may have 107
_LAST = -200  # after multiprocessing has removed its own folder within this one, at -100


def use_temporary_folder() -> None:
    """Use a folder of this process' own below $TMPDIR until it ends, and remove those of dead jobs."""
    base = Path(tempfile.gettempdir())
    _remove_abandoned(base)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    folder.chmod(0o711)  # a process of another user may be given a file in it
    lock = (folder / _LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    if len(str(folder)) <= _LONGEST:
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    Finalize(None, _remove, (folder, lock), exitpriority=_LAST)


def _remove(folder: Path, lock: TextIOBase) -> None:
    with lock:  # held until the folder is gone
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(base: Path) -> None:
    for folder in base.glob(f"{_PREFIX}*"):
        with suppress(OSError), (folder / _LOCK).open("r+") as lock:  # another user's can't be opened
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder, lock)
