"""The sweep's flags, its progress, and when it stops weak trials."""

from __future__ import annotations

import re

import pytest

from cvdist.errors import UserError


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
