"""`make soak` ends with its table in every case, and says why in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.harness import LoggedProcess
from tests.cluster.soak import parse
from tests.helpers.jobs import ROOT
from tests.helpers.network import reason_to_skip
from tests.helpers.waiting import STALL_VARIABLE, kill_with_children

pytestmark = pytest.mark.timeout(3600)  # waits end by themselves when nothing moves

SOAK = [sys.executable, "tests/cluster/soak.py"]


@pytest.fixture(autouse=True)
def root() -> None:
    if reason := reason_to_skip():
        pytest.skip(reason)


@contextmanager
def soak(folder: Path, *arguments: str, **environment: str) -> Iterator[LoggedProcess]:
    """The soak, whose temporary files are in `folder`."""
    file = folder / "soak.log"
    with file.open("w") as log:
        process = subprocess.Popen(
            [*SOAK, *arguments],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
    try:
        yield LoggedProcess(process, file)
    finally:
        kill_with_children(process)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_the_table(tmp_path: Path, number: signal.Signals) -> None:
    with soak(tmp_path, "1", "7") as started:
        started.wait_for("reference training: ")
        started.process.send_signal(number)
        assert started.end() == 128 + number
        *_, reason, empty, last = started.log().splitlines()
        assert reason == f"error: the soak has ended early: stopped by {number.name}"
        assert (empty, last) == (
            "",
            "0 of 0 jobs ended as the reference, with a complete run; seed 7; 0 faults",
        )
        assert "Traceback" not in started.log()


def test_a_hang_ends_it_with_the_table_and_one_line(tmp_path: Path) -> None:
    """The reference training says nothing while it imports its libraries: a hang, if that is the limit."""
    with soak(tmp_path, **{STALL_VARIABLE: "0.5"}) as started:
        assert started.end() == 1
        (reason,) = [line for line in started.log().splitlines() if line.startswith("error: ")]
        assert reason.startswith(
            "error: the soak has ended early: waited until reference.log ends, but nothing"
        )
        assert "0 of 0 jobs ended as the reference" in started.log().splitlines()[-1]
        assert "Traceback" not in started.log()


@pytest.mark.parametrize("wrong", [["soon"], ["0"], ["nan"], ["1", "first"]])
def test_wrong_arguments_are_one_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(wrong)
    assert caught.value.code == 2
    _usage, line = capsys.readouterr().err.splitlines()
    assert "error: " in line
