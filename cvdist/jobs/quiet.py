"""What a job shows on the console: its own lines and those of its workers, and not what libraries say.

Ray shows each line that a worker writes, behind the worker's name, and what Ray and MLflow say themselves is
mixed into it. Here the lines of this package appear as if this process had written them, and the others go to a
file, whose last lines are shown where a job fails unexpectedly.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from cvdist import log
from cvdist.config import cache_folder

logger = logging.getLogger(__name__)

_WORKER = re.compile(
    r"(?:\x1b\[\d+m)?\((?:raylet|autoscaler|[^()\n]*\bpid=\d+)[^()\n]*\)(?:\x1b\[0m)? (?P<text>.*)", re.DOTALL
)
_OURS = re.compile(r"\d\d:\d\d:\d\d +\S")  # as `log.setup` has it
_LIBRARY = re.compile(
    r"\d{4}[-/]\d\d[-/]\d\d \d\d:\d\d:\d\d[,.\d]*\s+(DEBUG|INFO|WARNING|ERROR)\b"  # Ray, MLflow
    r"|\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ [DIWEFC] \d+ \d+\]"  # Ray's core
    r"|(INFO|WARNING) +\[alembic"
)
_KEPT_LINES = 20  # lines that are shown after an unexpected error
_KEPT_FILES = 20
_STDERR = 2  # file descriptor


class LibraryMessages:
    """The file for messages of libraries. The first of them creates it and deletes old files of other jobs."""

    def __init__(self, path: Path) -> None:
        """Prepare the file at `path`, without writing it yet."""
        self.path = path
        self._file: TextIO | None = None
        self._told = False

    def open(self) -> TextIO:
        """Return the file, opened to write at its end.

        Raises:
            OSError: if it can't be written.
        """
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for old in sorted(self.path.parent.glob("*.log"), key=os.path.getmtime)[: -_KEPT_FILES + 1]:
                old.unlink(missing_ok=True)
            self._file = self.path.open("a", encoding="utf-8", errors="replace", buffering=1)
        return self._file

    def add(self, line: str) -> None:
        """Write a line. If the disk is full, the line is lost and the job goes on."""
        with suppress(OSError):
            self.open().write(line)
            self.tell()

    def tell(self) -> None:
        """Log where the file is, once."""
        if not self._told:
            self._told = True
            logger.info("messages   of Ray and MLflow are in %s (--verbose shows them)", self.path)

    def last(self) -> list[str]:
        """Return the last lines of the file."""
        with suppress(OSError), self.path.open(encoding="utf-8", errors="replace") as file:
            return list(deque(file, maxlen=_KEPT_LINES))
        return []

    def close(self) -> None:
        """Close the file, and delete it if nobody was told of it and nothing is in it."""
        if self._file is not None:
            self._file.close()
            if not self._told and not self.path.stat().st_size:
                self.path.unlink()


class Console(io.TextIOBase):
    """A stream that passes on the lines for people, and keeps one line of progress at the end on a terminal."""

    _live = ""  # the line of progress that is shown now, on whichever stream

    def __init__(self, stream: TextIO, messages: LibraryMessages) -> None:
        """Pass on to `stream`."""
        self._stream, self._messages, self._part = stream, messages, ""
        self._before: TextIO | None = None

    def write(self, text: str) -> int:
        """Take a text. An incomplete last line waits for its rest, unless it is a line of progress."""
        *lines, self._part = (self._part + text).split("\n")
        for line in lines:
            self._line(f"{line}\n")
        if self._part.startswith("\r"):
            Console._live = self._part.removeprefix(log.CLEAR)
            self._stream.write(self._part)
            self._part = ""
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return the stream's file descriptor."""
        return self._stream.fileno()

    def divert(self) -> None:
        """Send to the file of messages what is written past Python, as Ray's core does: to the file descriptor.

        This stream goes on writing where it did. Nothing is done where that is not the standard error that the
        process was started with.
        """
        with suppress(OSError):
            if self._before is None and self._stream.fileno() == _STDERR:
                file = self._messages.open()
                self._stream.flush()
                self._before = self._stream
                self._stream = os.fdopen(
                    os.dup(_STDERR), "w", buffering=1, encoding=self.encoding, errors="replace"
                )
                os.dup2(file.fileno(), _STDERR)

    def restore(self) -> None:
        """Undo `divert`."""
        if self._before is not None:
            self._stream.flush()
            os.dup2(self._stream.fileno(), _STDERR)
            self._stream.close()
            self._stream, self._before = self._before, None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's encoding."""
        return self._stream.encoding

    def _line(self, line: str) -> None:
        found = _WORKER.fullmatch(line)
        if found is None:
            if _LIBRARY.match(line):
                self._messages.add(line)
            else:
                self._pass_on(line)
        elif found["text"].startswith(log.LIVE):
            Console._live = found["text"][1:].rstrip()
            if self._stream.isatty():
                log.overwrite(self._stream, Console._live)
        elif _OURS.match(found["text"]):
            self._pass_on(found["text"])
        else:
            self._messages.add(found["text"])

    def _pass_on(self, text: str) -> None:
        if self._before is not None and _in_cluster():
            self._messages.tell()  # before anything can end this process without a word on the console
        if Console._live and self._stream.isatty():
            log.overwrite(self._stream, "")
        self._stream.write(text)
        if text.endswith("\n"):
            Console._live = ""


@contextmanager
def console(name: str, *, verbose: bool) -> Iterator[LibraryMessages]:
    """Show only lines for people until the context ends.

    Args:
        name: the job's name, for the file of messages.
        verbose: show everything instead.
    """
    began = time.strftime("%Y%m%d-%H%M%S")
    messages = LibraryMessages(cache_folder("") / "logs" / f"{name}-{began}-{os.getpid()}.log")
    global _joined_before
    _joined_before = _in_cluster()
    before = sys.stdout, sys.stderr
    # Read by Ray when it is imported: otherwise it holds back lines that two workers have in common.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if not verbose:
        if sys.stderr.isatty():
            os.environ[log.RELAYED] = "1"
        sys.stdout, sys.stderr = Console(sys.stdout, messages), Console(sys.stderr, messages)
    try:
        yield messages
    finally:
        disconnect()
        with suppress(OSError):
            messages.close()
        sys.stdout, sys.stderr = before
        if sys.stderr.isatty():  # an error must not stand behind a line of progress
            log.overwrite(sys.stderr, "")


def expect_ray() -> None:
    """Keep what Ray's core writes to the standard error of this process off the console."""
    if isinstance(sys.stderr, Console):
        sys.stderr.divert()


def disconnect() -> None:
    """Leave the cluster that the job has joined, so that no line of Ray's comes after the job's result."""
    if _in_cluster() and not _joined_before:
        sys.modules["ray"].shutdown()
    if isinstance(sys.stderr, Console):
        sys.stderr.restore()


_joined_before = False  # whether the process had joined a cluster before the job began


def _in_cluster() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
