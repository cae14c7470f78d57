"""What of the lines of workers and libraries reaches the console."""

from __future__ import annotations

import io
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvdist import log
from cvdist.errors import UserError
from cvdist.jobs import cli, quiet

WORKER = "\x1b[36m(RayTrainWorker pid=16585, ip=10.0.0.7)\x1b[0m "
FOR_PEOPLE = "18:15:11 data       digits: 4,000 training pictures\n"
CONTINUED = "18:15:11            a picture may have several\n"
ERROR = "error: no such folder\n"
CHATTER = [
    "\x1b[36m(TrainController pid=163)\x1b[0m [2026-11-28 18:14:52,628 E 16305 1639] core_worker.cc:2465: A\n",
    f"{WORKER}/site-packages/torch/x.py:3: FutureWarning: old\n",
    f"{WORKER}  warnings.warn(\n",
    "\x1b[33m(raylet)\x1b[0m A worker died or was killed\n",
    "2026-11-28 18:13:57,031\tWARNING token.py:85 -- Token authentication is enabled\n",
    "2026/11/28 18:13:57 INFO mlflow.store.db.utils: Creating initial MLflow database tables...\n",
    "[2026-11-28 18:14:52,628 E 16305 16391] (python) metrics_agent_client.cc:54: Failed to connect\n",
]


class Terminal(io.StringIO):
    """A terminal's text."""

    def isatty(self):
        return True


@pytest.fixture
def messages(tmp_path):
    return quiet.LibraryMessages(tmp_path / "logs" / "train.log")


@given(cuts=st.lists(st.integers(0, 900), max_size=8))
def test_lines_for_people_are_shown_and_the_others_kept(tmp_path_factory, cuts):
    messages = quiet.LibraryMessages(tmp_path_factory.mktemp("logs") / "train.log")
    out = io.StringIO()
    console = quiet.Console(out, messages)
    text = "".join(
        [*CHATTER[:3], WORKER, FOR_PEOPLE, WORKER, CONTINUED, *CHATTER[3:], "error: no such folder\n"]
    )
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    for start, stop in pairwise(places):
        console.write(text[start:stop])  # in any pieces
    assert out.getvalue() == f"{FOR_PEOPLE}{CONTINUED}{ERROR}"
    kept = messages.path.read_text()
    assert "PreemptionWatcher" not in kept and kept.count("\n") == len(CHATTER) == len(messages.last())


def test_progress_of_a_worker_is_one_line_on_a_terminal(messages, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    shown = Terminal()
    console = quiet.Console(shown, messages)
    for step in (1, 2):
        console.write(f"{WORKER}{log.LIVE}epoch 1/2  step {step}/125{' ' * 80}\n")
    console.write(f"{WORKER}{FOR_PEOPLE}")
    *progress, rest = shown.getvalue().split("\r\x1b[K")
    assert [text.strip() for text in progress[1:]] == ["epoch 1/2  step 1/125", "epoch 1/2  step 2/125"]
    assert max(map(len, progress)) <= 39 and rest == FOR_PEOPLE


def test_a_warning_takes_the_place_of_the_progress_of_this_process(messages, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    shown = Terminal()
    progress, warnings = (quiet.Console(shown, messages) for _ in range(2))
    log.overwrite(progress, "epoch 1/2")
    warnings.write(FOR_PEOPLE)
    warnings.write(FOR_PEOPLE)
    assert shown.getvalue() == f"{log.CLEAR}epoch 1/2{log.CLEAR}{FOR_PEOPLE}{FOR_PEOPLE}"


@pytest.mark.parametrize("relayed", [True, False])
def test_an_error_takes_the_place_of_the_progress(monkeypatch, relayed):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)

    def fail(words):
        if relayed:
            sys.stderr.write(f"{WORKER}{log.LIVE}epoch 1/2\n")
        else:
            log.overwrite(sys.stderr, "epoch 1/2")
        raise UserError("the loss became nan")

    assert cli.main(fail, []) == 2
    assert shown.getvalue().endswith("epoch 1/2\r\x1b[Kerror: the loss became nan\n")


def test_only_the_newest_files_are_kept(messages):
    messages.path.parent.mkdir()
    for number in range(30):
        (messages.path.parent / f"{number}.log").write_text("")
    messages.add("a line\n")
    assert len(list(messages.path.parent.iterdir())) == 20 and messages.path.read_text() == "a line\n"


def test_an_unexpected_error_shows_what_libraries_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CVDIST_CACHE", str(tmp_path))

    def job(words):
        sys.stdout.write(f"{CHATTER[1]}")
        raise RuntimeError("worker died")

    assert cli.main(job, []) == 1
    said = capsys.readouterr().err
    assert "FutureWarning: old" in said and said.endswith("RuntimeError: worker died (--debug shows where)\n")
    assert cli.main(job, ["--verbose"]) == 1
    assert capsys.readouterr().out == CHATTER[1]
