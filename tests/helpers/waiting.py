"""Waiting in tests: as long as something moves, however slow the machine is."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")

STALL_VARIABLE = "CVDIST_TEST_STALL_SECONDS"
STALL_SECONDS = float(os.environ.get(STALL_VARIABLE, "240"))
"""Seconds without any movement after which a wait fails."""


class Stalled(AssertionError):
    """What was waited for has not come, and nothing moves any more."""


def _nothing() -> str:
    return ""


def wait_until(
    condition: Callable[[], T],
    what: str,
    watch: Callable[[], object] = _nothing,
    *,
    detail: Callable[[], str] = _nothing,
    stall_seconds: float | None = None,
    poll_seconds: float = 0.3,
) -> T:
    """Poll `condition` until it is true, for as long as what `watch` returns keeps changing.

    Args:
        condition: Is polled; may raise to end the wait at once.
        what: Completes the sentence "waited until ...".
        watch: Returns what is seen of the progress, e.g. a status and the size of a log; called at most once a
            second. It is compared with what was seen before, and the error shows it. By default nothing is
            watched, and `stall_seconds` bounds the whole wait.
        detail: Returns what else the error should show, e.g. the end of a log.
        stall_seconds: How long nothing may move; `STALL_SECONDS` by default.
        poll_seconds: The pause between two polls.

    Returns:
        What `condition` returned at last.

    Raises:
        Stalled: If nothing has moved for `stall_seconds`.
    """
    limit = STALL_SECONDS if stall_seconds is None else stall_seconds
    seen, looked_at = watch(), time.monotonic()
    moved_at = looked_at
    while not (result := condition()):
        if time.monotonic() - looked_at < min(1, limit / 4):
            time.sleep(poll_seconds)
            continue
        now, looked_at = watch(), time.monotonic()
        if now != seen:
            seen, moved_at = now, looked_at
        elif looked_at - moved_at >= limit:
            setting = f" ({STALL_VARIABLE} sets how long)" if stall_seconds is None else ""
            last = f"; last seen: {seen}" if str(seen) else ""
            more = f"\n{text}" if (text := detail()) else ""
            raise Stalled(f"waited until {what}, but nothing has moved for {limit:g} s{setting}{last}{more}")
    return result


def wait_for_exit(
    process: subprocess.Popen,
    what: str,
    watch: Callable[[], object] = _nothing,
    *,
    detail: Callable[[], str] = _nothing,
    stall_seconds: float | None = None,
) -> int:
    """Wait until `process` has ended, as `wait_until` does, and return its exit code."""

    def ended() -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.3)
        return process.returncode is not None

    wait_until(ended, f"{what} ends", watch, detail=detail, stall_seconds=stall_seconds, poll_seconds=0)
    return process.returncode


def kill_with_children(process: subprocess.Popen) -> None:
    """Kill a process and all that it has started, and wait for its end."""
    if process.poll() is not None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def work_of(pid: int, *files: Path) -> Callable[[], object]:
    """For `moving`: seconds of processor time that a process and all below it have used; sizes of files."""

    def moving() -> object:
        seconds = 0.0
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    seconds += sum(process.cpu_times()[:4])  # its own, and of children that have ended
        return round(seconds), [file.stat().st_size for file in files if file.exists()]

    return moving
