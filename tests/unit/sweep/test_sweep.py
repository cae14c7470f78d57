"""Sweeps: what is searched and what becomes of it, alone; and one real sweep that is killed and goes on."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvdist.errors import UserError
from cvdist.storage import Folder
from cvdist.sweep import importance, space
from cvdist.sweep.record import Trial, TrialEpoch, TrialStore, best_of
from tests.helpers.jobs import user_error
from tests.helpers.sweeps import parse, trial, tried

# ------------------------------------------------------------------------------------------ what is searched


@given(
    low=st.floats(1e-8, 1e3),
    factor=st.floats(1, 1e6),
    logarithmic=st.booleans(),
    share=st.floats(0, 1, exclude_max=True),
)
def test_a_range_gives_values_inside_it_in_its_order(low, factor, logarithmic, share):
    one = space.Dimension("lr", float, low=low, high=low * factor, logarithmic=logarithmic)
    value = one.value_at(share)
    assert one.low <= value <= one.high
    assert one.value_at(share / 2) <= value
    assert -1e-9 <= one.fraction_of(value) <= 1 + 1e-9


@pytest.mark.parametrize(
    ("word", "shares", "values"),
    [
        ("lr=1e-4:1e-2:log", (0, 0.5, 0.999), (1e-4, 1e-3, 0.00995)),
        ("dropout=0:0.8", (0, 0.5), (0, 0.4)),
        ("batch-size=16,64,256", (0, 0.4, 0.99), (16, 64, 256)),
        ("batch-size=1:4", (0, 0.26, 0.999), (1, 2, 4)),
        ("batch_size=8:8192:log", (0, 0.5), (8, 256)),
        ("optimizer=sgd,adamw", (0.49, 0.5), ("sgd", "adamw")),
        ("nesterov=true,false", (0, 0.9), (True, False)),
    ],
)
def test_ranges_as_users_write_them(word, shares, values):
    (one,) = parse(word)
    assert [one.value_at(share) for share in shares] == pytest.approx(list(values))
    assert parse(str(one)) == (one,)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["lr"], "--search lr: it takes FLAG=RANGE, such as lr=1e-5:1e-2:log"),
        (["lr=a:1"], "'a' is not a number"),
        (["lr=0:1:log"], "a logarithmic range begins above 0"),
        (["lr=1:0.1"], "1 is above 0.1: name the lower end first"),
        (["lr=1:2:3"], "a range is FROM:TO, or FROM:TO:log"),
        (["droput=0:1"], "droput can't be searched: did you mean dropout?"),
        (["workers=1,2"], "the settings that can be searched are batch-size, "),
        (["optimizer=sgd:adamw"], "optimizer takes choices, optimizer=sgd,adamw"),
        (["optimizer=adam"], "'adam' is not one of sgd, adamw"),
        (["dropout=0:1.5"], "--search dropout=0:1.5: --dropout is 1.5: it takes a number in [0, 1)"),
        (["lr=nan:1"], "'nan' is not a finite number"),
        (["lr=1:2", "lr=3:4"], "--search names lr twice"),
        (["batch-size=1.5"], "'1.5' is not a whole number"),
    ],
)
def test_a_bad_search_is_one_line(words, error):
    assert error in user_error(parse, *words)


def test_the_points_depend_on_the_seed_alone_and_more_trials_keep_the_first_ones():
    search = parse("lr=1e-4:1e-1:log", "dropout=0:0.8", "optimizer=sgd,adamw")
    points = space.sample_points(search, 0, 32)
    assert space.sample_points(search, 0, 8) == points[:8] and space.sample_points(search, 1, 8) != points[:8]
    assert len({json.dumps(point) for point in points}) == 32
    # Evenly spread: each half of each range gets its half, as random numbers seldom do.
    for dimension in search:
        assert sum(dimension.fraction_of(point[dimension.name]) < 0.5 for point in points) in range(14, 19)


def test_a_search_with_few_points_tries_each_once():
    assert len(space.sample_points(parse("optimizer=sgd,adamw", "nesterov=true,false"), 0, 20)) == 4


def test_the_usual_search_is_around_the_recipe():
    words = [str(dimension) for dimension in parse()]
    assert words[0] == "lr=0.002:0.2:log" and "dropout=0:0.8" in words


def test_the_best_is_the_one_with_most_right_then_the_lowest_loss():
    low = Trial(2, {}, "finished", (TrialEpoch(1, 90, 100, 0.2),))
    assert low.score > trial(1, corrects=[90]).score
    assert best_of([trial(1, corrects=[90]), low, trial(3, "stopped", corrects=[99])]) is low
    assert best_of([trial(1, "stopped", [99])]) is None
    one = trial(1, corrects=[80, 95, 95])
    assert one.best.epoch == 2 and one.after(1).correct == 80 and one.after(4) is None


def test_records_are_kept_and_another_search_is_refused(tmp_path):
    records = TrialStore(Folder.open(str(tmp_path), "--storage"))
    assert not records.begin({"--search": ["lr=1:2"], "--epochs": 3})
    done = trial(2, "stopped", [50, 60], lr=0.1)
    records.write(done)
    points = [{"lr": 0.2}, {"lr": 0.1}, {"lr": 0.3}]
    assert records.read(points) == [Trial(1, points[0]), done, Trial(3, points[2])]
    assert records.begin({"--search": ["lr=1:2"], "--epochs": 3})
    with pytest.raises(UserError, match="--epochs 3, now 4"):
        records.begin({"--search": ["lr=1:2"], "--epochs": 4})


def test_importance_finds_what_matters():
    search, trials = tried()
    found = importance.permutation_importance(search, trials, 2)
    assert found.flags[0] == "lr" and found.drops[0] > 0.5 > 5 * max(found.drops[1:])
    assert found.explained > 0.7 and found.trials == 19
    assert importance.permutation_importance(search, trials[:6], 2) is None


def test_importance_of_a_choice_between_two_others():
    search = parse("lr=1e-4:1e-1:log", "batch-size=16,64,256,512")
    trials = [
        trial(number, corrects=[50 + 40 * (point["batch_size"] == 64)], **point)
        for number, point in enumerate(space.sample_points(search, 0, 30), start=1)
    ]
    found = importance.permutation_importance(search, trials, 1)
    assert found.flags[0] == "batch-size" and found.drops[0] > 1 and found.explained > 0.8
