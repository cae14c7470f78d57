"""Which attempt of a run may write: the newest, and no other.

A run's folder holds `attempts/JOB.ATTEMPT-ID.json`, one small file for each time that its workers were started:
JOB counts the jobs of this name, ATTEMPT the starts of workers within a job (0: the job itself, under Ray).
The highest name is the newest attempt: of two jobs with one name, the newer one wins. Nobody overwrites another
one's file, so no two attempts can be mistaken for each other, and a listing decides. S3, GCS and folders list
consistently: what was written is in the next listing.

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
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs as arrow

from cvdist.errors import Superseded, UserError, superseded_by_another_job
from cvdist.lock import locked
from cvdist.storage import Folder

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(\d{6})\.(\d{6})-[0-9a-f]{8}\.json")
_TRIES = 8
_LOCK_SECONDS = 60.0
_WATCH_SECONDS = 10.0
_END_SECONDS = 5.0


@dataclass(frozen=True)
class Fence:
    """One attempt's place in the order of all attempts of a run.

    number: of this attempt, counted over all jobs of this name, from 1; 0 for a job that has no workers yet.
    """

    folder: Folder
    name: str
    number: int

    @classmethod
    def claim_job(cls, uri: str, *, attempt: int) -> Fence:
        """Become the newest job of the run in the folder `uri`, with `attempt` 0 or 1.

        Raises:
            UserError: if the storage can't be written.
        """
        folder = Folder.open(uri, "--storage", patient=True)
        with _exclusive(folder):
            for _ in range(_TRIES):
                names = _names(folder)
                job = max((_job(name) for name in names), default=0) + 1
                mine = _write(folder, job, attempt)
                if [name for name in _names(folder) if _job(name) >= job] == [mine]:
                    return cls(folder, mine, _count([*names, mine]))
                # Another job took the same number at the same moment: both take another one.
                folder.delete(f"attempts/{mine}")
                time.sleep(secrets.randbelow(1000) / 1000)
        raise UserError(
            f"too many jobs of one name start at once in {folder.uri}: give them names of their own"
        )

    def claim_attempt(self) -> Fence:
        """The next attempt of this job, which must still be the newest one.

        Raises:
            Superseded: if another job has begun.
            UserError: if the storage can't be reached.
        """
        with _exclusive(self.folder):
            names = _names(self.folder)
            _require_job(self.folder, names, self.name)
            attempt = max(_attempt(name) for name in names if _job(name) == _job(self.name)) + 1
            mine = _write(self.folder, _job(self.name), attempt)
            return Fence(self.folder, mine, _count([*names, mine]))

    def require_newest(self) -> None:
        """Refuse to go on as a stale attempt.

        Raises:
            Superseded: if there is a newer one.
            UserError: if the storage can't be reached.
        """
        names = _names(self.folder)
        _require_job(self.folder, names, self.name)
        newest = max(names, default=self.name)  # none: somebody has deleted the run
        if newest != self.name:
            raise Superseded(
                f"attempt {self.name} of this run was given up but still runs: it leaves it to {newest}"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the newest attempt, and remain so within the block where the storage is a folder.

        Raises:
            Superseded: if there is a newer one.
        """
        with _exclusive(self.folder):
            self.require_newest()
            yield

    @property
    def job_is_newest(self) -> bool:
        """Whether no other job of this name has begun since; True where that can't be found out."""
        try:
            _require_job(self.folder, _names(self.folder), self.name)
        except Superseded:
            return False
        except UserError as error:
            logger.warning("%s", error)
        return True

    @property
    def suffix(self) -> str:
        """What this attempt's checkpoints are named by, after the step; nothing for the first of all."""
        job, attempt = _job(self.name), _attempt(self.name)
        return "" if (job, attempt) == (1, 1) else f"-attempt-{job}.{attempt}"


class FenceWatch:
    """Looks every few seconds whether an attempt is still the newest, in a thread: training does not wait."""

    def __init__(self, fence: Fence) -> None:
        """Begin to look."""
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


def _job(name: str) -> int:
    return int(name[:6])


def _attempt(name: str) -> int:
    return int(name[7:13])


def _count(names: list[str]) -> int:
    return sum(_attempt(name) > 0 for name in names)


def _write(folder: Folder, job: int, attempt: int) -> str:
    name = f"{job:06}.{attempt:06}-{secrets.token_hex(4)}.json"
    # For people; the name alone decides, so that clocks need not agree.
    about = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    folder.write(f"attempts/{name}", json.dumps(about).encode())
    return name


def _require_job(folder: Folder, names: list[str], mine: str) -> None:
    newest = max(names, default=mine)
    if _job(newest) <= _job(mine):
        return
    about = folder.find(f"attempts/{newest}")
    try:
        there = json.loads(about or b"{}")
        who = f" on {there['host']} at {there['started']}"
    except (ValueError, KeyError, TypeError):
        who = ""
    raise superseded_by_another_job(who)


@contextmanager
def _exclusive(folder: Folder) -> Iterator[None]:
    """Alone among the attempts, where the file system has locks."""
    if not isinstance(folder.filesystem, arrow.LocalFileSystem):
        with nullcontext():
            yield
        return
    root = Path(folder.root)
    root.mkdir(parents=True, exist_ok=True)
    try:
        with locked(root / ".lock", "", _LOCK_SECONDS):
            yield
    except TimeoutError as error:
        raise UserError(f"--storage {folder.uri}: {error}") from error
