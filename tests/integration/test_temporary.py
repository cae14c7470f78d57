"""The folder of a job's temporary files: gone at its end, and after `kill -9` with the next job."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

_JOB = """
import multiprocessing.util, sys, tempfile
from cvdist.jobs.temporary import use_temporary_folder
use_temporary_folder()
multiprocessing.util.get_temp_dir()
print(tempfile.mkstemp()[1], flush=True)
sys.exit(sys.stdin.read())
"""


def start() -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", _JOB], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def base(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


def test_nothing_is_left_of_a_job_that_fails(base):
    job = start()
    assert Path(job.stdout.readline().strip()).parent.parent == base
    assert job.communicate("failed") == ("", "failed\n")
    assert not list(base.iterdir())


def test_the_next_job_removes_what_a_killed_one_left_and_nothing_of_one_that_runs(base):
    jobs = [start() for _ in range(2)]
    files = [Path(job.stdout.readline().strip()) for job in jobs]
    jobs[0].send_signal(signal.SIGKILL)
    jobs[0].communicate()
    assert all(file.exists() for file in files)
    start().communicate("")
    assert not files[0].parent.exists() and files[1].exists()
    jobs[1].communicate("")
    assert not list(base.iterdir())
