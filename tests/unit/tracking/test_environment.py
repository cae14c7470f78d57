"""What is recorded of where a run came from."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cvdist.tracking import environment

# -------------------------------------------------------------------------------------------- environment


def test_the_command_is_ready_to_paste(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(Path.cwd() / "jobs" / "train.py"), "mnist-cnn", "--data", "my data"])
    assert environment.command() == "python jobs/train.py mnist-cnn --data 'my data'"


def test_the_commit_is_recorded(monkeypatch):
    monkeypatch.delenv("CVDIST_COMMIT", raising=False)
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", environment.git_commit())
    monkeypatch.setenv("CVDIST_COMMIT", "abc")
    assert environment.git_commit() == "abc"
