"""Figures and tables of a sweep."""

from __future__ import annotations

import csv

import pytest

from cvdist.figures import sweep as figures
from cvdist.jobs.sweep import description, trials_csv
from cvdist.sweep import importance
from cvdist.sweep.record import best_of
from tests.helpers.figures import assert_readable, says
from tests.helpers.sweeps import parse, trial, tried


def test_figures_and_table_show_all_trials():
    search, trials = tried()
    drawn = figures.parallel_coordinates(search, trials)
    lines = [line for line in drawn.axes[0].lines if len(line.get_xdata()) == len(search) + 1]
    assert len(lines) == 19
    best = max(lines, key=lambda line: line.get_linewidth())
    assert best.get_ydata()[-1] == pytest.approx(1) and best.get_ydata()[0] == max(
        line.get_ydata()[0] for line in lines
    )
    text = " ".join(says(drawn))
    winner = best_of(trials)
    assert f"({winner.best.correct}/1000)" in text and "1 without a result" in text and "none" in text
    curves = figures.trial_curves(trials)
    assert sum(line.get_marker() == "x" for line in curves.axes[0].lines) == 2
    bars = figures.importance_bars(importance.permutation_importance(search, trials, 2))
    for figure in (curves, bars):
        assert_readable(figure)
    rows = list(csv.DictReader(trials_csv(search, trials).splitlines()))
    assert [row["trial"] for row in rows] == [str(i) for i in range(1, 21)]
    assert rows[2]["state"] == "diverged" and rows[2]["reason"] == "the loss became nan"
    assert rows[winner.number - 1]["correct"] == str(winner.best.correct) and rows[6]["dropout"] == ""
    assert f"| {winner.number} |" in description(search, trials, "command", ())


def test_an_importance_below_zero_can_be_read():
    found = importance.Importance(
        ("lr", "optimizer", "dropout"), (2, -0.3, -0.001), (0.3, 0.1, 0.1), 0.9, 20, 2
    )
    figure = figures.importance_bars(found)
    assert {"-0.30", "0.00"} <= set(says(figure)) and "-0.00" not in says(figure)
    assert_readable(figure)


def test_figures_of_a_sweep_without_results():
    search = parse("lr=1e-4:1e-1:log")
    for draw in (lambda: figures.parallel_coordinates(search, [trial(1, "failed", lr=0.1)]),
                 lambda: figures.trial_curves([trial(1, "failed", lr=0.1)])):  # fmt: skip
        assert "no results" in says(draw())
