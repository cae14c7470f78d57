"""Makes sure that only the newest attempt of a run writes to its folder.

A run's folder holds `attempts/JOB.ATTEMPT-ID.json`, one small file for each job of this name (ATTEMPT is 0) and
one for each start of its workers: JOB counts the jobs, ATTEMPT the starts within a job. The highest name is the
newest attempt, so of two jobs with one name the newer one wins. Nobody overwrites another one's file, so no two
attempts can be mistaken for each other, and a listing decides. S3, GCS and folders list consistently: what was
written is in the next listing.

What this guarantees: attempts never share a checkpoint's name (`suffix`), so a stale one can't overwrite or
mix with what a newer one wrote, even in the middle of an upload. What it does not: pyarrow has no conditional
put, so an attempt that was the newest when it looked may, for the length of a request, still have a checkpoint
of its own listed after a newer one has begun. Where the storage is a folder, a lock closes that gap as well.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs as arrow

from cvdist.errors import Superseded, UserError, superseded_by_another_job
from cvdist.lock import locked
from cvdist.storage import Folder

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(\d{6})\.(\d{6})-[0-9a-f]{8}\.json")
_SUFFIX = re.compile(r"-attempt-(\d+)\.(\d+)$")
_FIRST = (1, 1)
_TRIES = 8
_LOCK_SECONDS = 60.0
_WATCH_SECONDS = 10.0
_END_SECONDS = 5.0


@dataclass(frozen=True)
class Fence:
    """One attempt's place in the order of all attempts of a run. It can be sent to other processes.

    Attributes:
        folder: Folder of the run.
        name: Name of this attempt's file, or of the job's.
        number: Number of this attempt, counted over all jobs of this name, from 1. A job has the number of the
            last attempt before it, or 0.
    """

    folder: Folder
    name: str
    number: int

    @classmethod
    def claim_job(cls, uri: str) -> Fence:
        """Become the newest job of the run in the folder `uri`.

        Raises:
            UserError: If the storage can't be written.
        """
        folder = Folder.open(uri, "--storage", patient=True)
        return cls._claim(folder, lambda names: (max((_order(name)[0] for name in names), default=0) + 1, 0))

    def claim_attempt(self) -> Fence:
        """Become the next attempt of this job, which must still be the newest one.

        Raises:
            Superseded: If another job has begun.
            UserError: If the storage can't be reached.
        """
        job = self.attempt[0]

        def following(names: Sequence[str]) -> tuple[int, int]:
            _require_newest_job(self.folder, names, self.name)
            return job, max(_order(name)[1] for name in [*names, self.name] if _order(name)[0] == job) + 1

        return self._claim(self.folder, following)

    @classmethod
    def _claim(cls, folder: Folder, following: Callable[[Sequence[str]], tuple[int, int]]) -> Fence:
        with _exclusive(folder):
            for _ in range(_TRIES):
                names = _names(folder)
                order = following(names)
                mine = _write(folder, *order)
                if [name for name in _names(folder) if _order(name) >= order] == [mine]:
                    return cls(folder, mine, sum(_order(name)[1] > 0 for name in [*names, mine]))
                # Another one took the same number at the same moment: both take another number.
                folder.delete(f"attempts/{mine}")
                time.sleep(secrets.randbelow(1000) / 1000)
        raise UserError(
            f"too many jobs of one name start at once in {folder.uri}: give them names of their own"
        )

    def require_newest(self) -> None:
        """Check that there is no newer attempt.

        Raises:
            Superseded: If there is one.
            UserError: If the storage can't be reached.
        """
        names = _names(self.folder)
        _require_newest_job(self.folder, names, self.name)
        newest = max(names, default=self.name)  # none: somebody has deleted the run
        if newest != self.name:
            raise Superseded(
                f"attempt {self.name} of this run was given up but still runs: it leaves it to {newest}"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Require that this is the newest attempt and, where the storage is a folder, keep it so in the block.

        Raises:
            Superseded: If there is a newer one.
        """
        with _exclusive(self.folder):
            self.require_newest()
            yield

    @property
    def attempt(self) -> tuple[int, int]:
        """Number of the job, and number of the attempt within the job."""
        return _order(self.name)

    @property
    def suffix(self) -> str:
        """End of the names of this attempt's checkpoints; empty for the very first attempt."""
        job, attempt = self.attempt
        return "" if (job, attempt) == _FIRST else f"-attempt-{job}.{attempt}"


def attempt_of(name: str) -> tuple[int, int]:
    """Return the numbers of the job and the attempt that wrote the checkpoint of this name."""
    found = _SUFFIX.search(name)
    return (int(found[1]), int(found[2])) if found else _FIRST


class FenceWatch:
    """A thread that looks every few seconds whether an attempt is still the newest, so that training need not.

    Attributes:
        superseded: Whether a newer attempt has been seen.
    """

    def __init__(self, fence: Fence) -> None:
        """Start the thread, which ends with this object."""
        self.superseded = False
        stop = threading.Event()  # not an attribute: Ray Tune pickles what holds this
        asking = weakref.ref(self)
        thread = threading.Thread(target=_look, args=(fence, asking, stop), name="fence", daemon=True)
        thread.start()
        # When nobody asks any more, and before Python ends: it would abort in the middle of a request.
        weakref.finalize(self, _end, thread, stop)


def _look(fence: Fence, asking: weakref.ref[FenceWatch], stop: threading.Event) -> None:
    while not stop.wait(_WATCH_SECONDS):
        try:
            fence.require_newest()
        except Superseded:
            if watch := asking():
                watch.superseded = True
            return
        except UserError as error:  # the storage is away; what needs it says so
            logger.debug("%s", error)


def _end(thread: threading.Thread, stop: threading.Event) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(_END_SECONDS)


def _names(folder: Folder) -> list[str]:
    listed = Folder(folder.uri, folder.filesystem, f"{folder.root}/attempts", folder.flag).sizes()
    return [name for name in listed if _NAME.fullmatch(name)]


def _order(name: str) -> tuple[int, int]:
    """Return the number of the job, and the number of the attempt within it, 0 for the job itself."""
    return int(name[:6]), int(name[7:13])


def _write(folder: Folder, job: int, attempt: int) -> str:
    name = f"{job:06}.{attempt:06}-{secrets.token_hex(4)}.json"
    # For people; the name alone decides, so that clocks need not agree.
    about = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    folder.write(f"attempts/{name}", json.dumps(about).encode())
    return name


def _require_newest_job(folder: Folder, names: Sequence[str], mine: str) -> None:
    newest = max(names, default=mine)
    if _order(newest)[0] <= _order(mine)[0]:
        return
    try:
        there = json.loads(folder.find(f"attempts/{newest}") or b"{}")
        who = f" on {there['host']} at {there['started']}"
    except (ValueError, KeyError, TypeError):
        who = ""
    raise superseded_by_another_job(who)


@contextmanager
def _exclusive(folder: Folder) -> Iterator[None]:
    """Keep other attempts out of the block, where the file system has locks."""
    if not isinstance(folder.filesystem, arrow.LocalFileSystem):
        yield
        return
    root = Path(folder.root)
    root.mkdir(parents=True, exist_ok=True)
    try:
        with locked(root / ".lock", "", _LOCK_SECONDS):
            yield
    except TimeoutError as error:
        raise UserError(f"--storage {folder.uri}: {error}") from error
