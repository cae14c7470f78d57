"""Waits last as long as something moves."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests.helpers.jobs import run
from tests.helpers.waiting import STALL_VARIABLE, Stalled, wait_until


def test_a_wait_lasts_longer_than_the_limit_while_something_moves():
    began = time.monotonic()
    waited = lambda: time.monotonic() - began  # noqa: E731
    assert wait_until(
        lambda: waited() > 1,
        "a second is over",
        lambda: int(waited() * 10),
        stall_seconds=0.4,
        poll_seconds=0.02,
    )


def test_the_error_says_what_was_waited_for_and_what_was_seen():
    with pytest.raises(Stalled) as caught:
        wait_until(
            lambda: False,
            "the job ends",
            lambda: "RUNNING, step 3",
            detail=lambda: "the log's end",
            stall_seconds=0.2,
            poll_seconds=0.02,
        )
    assert str(caught.value) == (
        "waited until the job ends, but nothing has moved for 0.2 s; last seen: RUNNING, step 3\nthe log's end"
    )


def test_the_error_names_the_setting_of_the_limit(monkeypatch):
    monkeypatch.setattr("tests.helpers.waiting.STALL_SECONDS", 0.1)
    with pytest.raises(Stalled, match=rf"for 0.1 s \({STALL_VARIABLE} sets how long\)$"):
        wait_until(lambda: 0, "it is so", poll_seconds=0.02)


def test_a_process_that_says_something_is_waited_for_and_a_silent_one_is_killed(tmp_path):
    speak = "import time\nfor i in range(8): print(i, flush=True); time.sleep(0.25)"
    done = run(sys.executable, "-c", speak, storage=tmp_path, timeout=1)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, list("01234567"), "")
    sleep = ["sleep", f"9{os.getpid()}"]
    child = f"import subprocess; print('a child', flush=True); subprocess.run({sleep})"
    with pytest.raises(
        Stalled, match=r"(?s)nothing has moved for 0.5 s; last seen: 8 bytes of output.*a child"
    ):
        run(sys.executable, "-c", child, storage=tmp_path, timeout=0.5)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert " ".join(sleep) not in listed.splitlines()
