"""The phases of a start."""

from __future__ import annotations

import pickle
import time

from cvdist import startup
from cvdist.startup import Waterfall


def test_phases_follow_each_other_also_in_another_process(monkeypatch):
    clock = startup.BEGAN_AT
    monkeypatch.setattr(time, "time", lambda: clock)
    start = Waterfall()
    for phase, seconds in {"imports": 2.0, "run": 0.5}.items():
        clock += seconds
        start.end(phase)
    fast, slow = (pickle.loads(pickle.dumps(start)) for _ in range(2))
    clock += 3
    fast.end("workers")
    clock += 1.5
    slow.end("workers")
    clock -= 60  # on another node
    slow.end("model")
    fast.end("model")
    said = "7.0 s: imports 2.0, run 0.5, workers 3.0-4.5"
    assert startup.describe([fast.phases, slow.phases]) == said
