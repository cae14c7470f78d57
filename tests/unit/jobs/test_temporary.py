"""The folder of a job's temporary files: gone at its end, and after `kill -9` with the next job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cvdist.jobs.temporary import temporary_folder

_JOB = """
import sys, tempfile
from cvdist.jobs.temporary import temporary_folder
with temporary_folder():
    print(tempfile.mkstemp()[1], flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def base(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


def test_nothing_is_left_of_a_job_that_fails(base):
    with pytest.raises(RuntimeError), temporary_folder():
        assert Path(tempfile.mkstemp()[1]).parent.parent == base
        assert os.environ["TMPDIR"] != str(base)  # for the processes that it starts
        raise RuntimeError
    assert not list(base.iterdir())
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(base)


def test_the_next_job_removes_what_a_killed_one_left_and_nothing_of_one_that_runs(base):
    jobs = [
        subprocess.Popen([sys.executable, "-c", _JOB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    files = [Path(job.stdout.readline().strip()) for job in jobs]
    jobs[0].send_signal(signal.SIGKILL)
    jobs[0].wait()
    assert all(file.exists() for file in files)
    with temporary_folder():
        assert not files[0].parent.exists() and files[1].exists()
    jobs[1].communicate("")
    assert not list(base.iterdir())
