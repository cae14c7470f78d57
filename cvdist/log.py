"""Log lines and progress for people, on a terminal and in a log file."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable
from typing import TextIO

_DEBUG = "CVDIST_DEBUG"  # set while --debug is, for the processes that this one starts
RELAYED = "CVDIST_RELAYED"  # set where a process that this one works for shows its lines on a terminal
CLEAR = "\r\x1b[K"  # empties the line of a terminal that the cursor is on
LIVE = "\x1e"  # begins a line of progress for such a process
_BAR = 12  # characters: with it, the time left of a training is within 80 columns


def setup(*, debug: bool | None = None) -> None:
    """Configure the log of this package: one line per message, with the time, on standard error.

    Args:
        debug: whether to log more; None: as in the process that started this one.
    """
    if debug is not None:
        os.environ[_DEBUG] = "1" if debug else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("cvdist")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if os.environ.get(_DEBUG) else logging.INFO)
    logger.propagate = False


def duration(seconds: float) -> str:
    """Format a duration as `48 s`, `3:05` (minutes) or `2:03:05` (hours)."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def percent(correct: int, total: int) -> str:
    """Format an accuracy as `98.94% (9894/10000)`."""
    return f"{100 * correct / total if total else float('nan'):.2f}% ({correct}/{total})"


def natural(name: str) -> tuple[list[str | int], str]:
    """Return a key that sorts names as people count: `2` before `10`."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def redact(text: str) -> str:
    """Mask user names and passwords in the URIs of `text`."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def overwrite(stream: TextIO, text: str) -> None:
    """Replace the current line of a terminal by `text`, cut to the terminal's width.

    Commas or two spaces are between the parts of a line of progress. A part that has no room is left out, not
    cut: half a number would be read as a whole one.
    """
    width = shutil.get_terminal_size().columns - 1
    if len(text) > width:
        whole = re.match(r".{20,}(?=  |, )", text[: width + 2])
        text = whole[0] if whole else text[:width]
    stream.write(f"{CLEAR}{text}")
    stream.flush()


class ProgressLine:
    """Shows progress: one line that is overwritten on a terminal, or a new line every few seconds in a file.

    A process whose lines another one shows on a terminal (`RELAYED`) marks them with `LIVE` instead.
    """

    def __init__(self, logger: logging.Logger, *, enabled: bool, every: float = 10.0) -> None:
        """Prepare the line.

        Args:
            logger: Logger for the lines of a log file.
            enabled: Whether to show progress at all.
            every: Seconds between two lines of a log file.
        """
        self._logger = logger
        self._enabled = enabled
        self._terminal = sys.stderr.isatty()
        self._relayed = not self._terminal and bool(os.environ.get(RELAYED))
        self._every = 0.2 if self._terminal else 0.5 if self._relayed else every
        self._last = time.monotonic()

    def due(self) -> bool:
        """Return whether enough time has passed since the last line."""
        return self._enabled and time.monotonic() - self._last >= self._every

    def show(self, text: str, done: float | None = None) -> None:
        """Show `text` as the current progress, on a terminal behind a bar that is filled to `done`, 0 to 1."""
        self._last = time.monotonic()
        if not (self._terminal or self._relayed):
            self._logger.info("%s", text)
            return
        if done is not None:
            filled = round(_BAR * min(max(done, 0.0), 1.0))
            text = "━" * filled + "·" * (_BAR - filled) + f"  {text}"
        if self._terminal:
            overwrite(sys.stderr, text)
        else:
            sys.stderr.write(f"{LIVE}{text}\n")
            sys.stderr.flush()

    def clear(self) -> None:
        """Clear the line on a terminal, so that an ordinary line can be printed."""
        if self._enabled and self._terminal:
            sys.stderr.write(CLEAR)
            sys.stderr.flush()


def some(names: Iterable[str]) -> str:
    """Format up to five names, in natural order, and how many more there are."""
    listed = sorted(names, key=natural)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return (", ".join(listed[:5]) or "none") + more
