"""The sweep's flags, its progress, and when it stops weak trials."""

from __future__ import annotations

import re

import pytest

from cvdist import config as configs
from cvdist.errors import UserError
from tests.helpers.sweeps import trial


@pytest.fixture
def running():
    """What runs trials. It imports Ray Tune, which only these tests need."""
    from cvdist.jobs import trials

    return trials


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--trials", "0"), "--trials is 0: it takes 1 or more"),
        (("--epochs", "3", "--trial-epochs", "4"), "--trial-epochs 4 is above --epochs 3"),
        (("--epochs", "3", "--grace-epochs", "4"), "--grace-epochs 4 is above --epochs 3"),
        (("--reduction-factor", "1"), "--reduction-factor is 1.0: it takes 1.1 or more"),
        (("--runtime", "inline"), "--runtime is a setting of train, preprocess, probe, inspect, predict"),
        (("--register", "m", "--no-train-best"), "--register takes the best trial trained on"),
        (("--search", "lr=1"), "--search has one point alone"),
        (("--trial", "3"), "unknown flag --trial: did you mean --trials"),
    ],
)
def test_bad_flags_are_one_line(flags, error, tmp_path):
    from cvdist.jobs import cli, sweep

    with pytest.raises(UserError, match=re.escape(error)):
        sweep(cli.parse("sweep", ["digits-cnn", "--storage", str(tmp_path), *flags]))
    assert not any(tmp_path.iterdir())


def test_early_stopping_remembers_what_earlier_jobs_have_reached(running):
    sweep = configs.SweepConfig(grace_epochs=1, reduction_factor=2)
    earlier = [trial(i, corrects=[60 + i, 70 + i, 80]) for i in range(4)]
    scheduler = running.build_scheduler(sweep, 9, earlier)

    class Weak:
        trial_id = "weak"

    scheduler.on_trial_add(None, Weak)
    weak = {"epoch": 1, "score": 10.0}
    assert scheduler.on_trial_result(None, Weak, weak) == "STOP"
    forgetful = running.build_scheduler(sweep, 9, [])
    forgetful.on_trial_add(None, Weak)
    assert forgetful.on_trial_result(None, Weak, weak) == "CONTINUE"


def test_progress_counts(running):
    trials = [trial(1, corrects=[90], lr=0.1), trial(2, "stopped", [80]), trial(3, "running", [95], lr=0.2)]
    trials += [trial(4, "waiting"), trial(5, "diverged")]
    assert running.progress(trials, 1) == (
        "trials 3/5 done, 1 running, 1 stopped early, 1 diverged or failed, best 95.00% (95/100) lr=0.2"
    )
