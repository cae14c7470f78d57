"""Sweeps: what is searched and what becomes of it, alone; and one real sweep that is killed and goes on."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from cvdist import config as configs
from cvdist import recipes
from cvdist.errors import UserError
from cvdist.figures import sweep as figures
from cvdist.jobs import trials as running
from cvdist.jobs.sweep import description, trials_csv
from cvdist.storage import Folder
from cvdist.sweep import importance, space
from cvdist.sweep.record import Trial, TrialEpoch, TrialStore, best_of
from tests import pictures
from tests.conftest import wait_until
from tests.feature_caches import config as tiny
from tests.feature_caches import extract, write_weights
from tests.jobs import ROOT, mlflow_store, run, the_error

BASE = recipes.find("digits-cnn")


def parse(*words, base=BASE):
    return space.parse_search(words, base)


# ------------------------------------------------------------------------------------------ what is searched


@settings(deadline=None)
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
    with pytest.raises(UserError) as found:
        parse(*words)
    assert error in str(found.value) and "\n" not in str(found.value)


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


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--trials", "0"), "--trials is 0: it takes 1 or more"),
        (("--epochs", "3", "--trial-epochs", "4"), "--trial-epochs 4 is above --epochs 3"),
        (("--epochs", "3", "--grace-epochs", "4"), "--grace-epochs 4 is above --epochs 3"),
        (("--reduction-factor", "1"), "--reduction-factor is 1.0: it takes 1.1 or more"),
        (
            ("--runtime", "inline"),
            "--runtime is a setting of train, preprocess, predict",
        ),
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


# ------------------------------------------------------------------------------------------ what came of it


def trial(number, state="finished", corrects=(), **point):
    epochs = [TrialEpoch(i, correct, 100, 1.0) for i, correct in enumerate(corrects, start=1)]
    return Trial(number, point, state, tuple(epochs))


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


def test_early_stopping_remembers_what_earlier_jobs_have_reached():
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


@pytest.fixture
def tried():
    """Twenty trials whose accuracy depends on the learning rate alone; two lost ones and two stopped ones."""
    search = parse("lr=1e-4:1e-1:log", "dropout=0:0.8", "optimizer=sgd,adamw")
    found = []
    for number, point in enumerate(space.sample_points(search, 0, 20), start=1):
        right = round(500 + 450 * search[0].fraction_of(point["lr"]))
        epochs = tuple(TrialEpoch(i, right + i, 1000, 0.5) for i in range(1, 3 if number in (4, 5) else 4))
        found.append(Trial(number, point, "stopped" if number in (4, 5) else "finished", epochs))
    found[2] = Trial(3, found[2].settings, "diverged", (), "the loss became nan")
    point = {name: value for name, value in found[6].settings.items() if name != "dropout"}
    found[6] = Trial(7, point, "finished", found[6].epochs)
    return search, found


def test_importance_finds_what_matters(tried):
    search, trials = tried
    found = importance.permutation_importance(search, trials, 2)
    assert found.flags[0] == "lr" and found.drops[0] > 0.5 > 5 * max(found.drops[1:])
    assert found.explained > 0.7 and found.trials == 19
    assert importance.permutation_importance(search, trials[:6], 2) is None


def test_figures_and_table_show_all_trials(tried):
    search, trials = tried
    drawn = figures.parallel_coordinates(search, trials)
    lines = [line for line in drawn.axes[0].lines if len(line.get_xdata()) == len(search) + 1]
    assert len(lines) == 19
    best = max(lines, key=lambda line: line.get_linewidth())
    assert best.get_ydata()[-1] == pytest.approx(1) and best.get_ydata()[0] == max(
        line.get_ydata()[0] for line in lines
    )
    text = " ".join(item.get_text() for item in [*drawn.texts, *drawn.axes[0].texts])
    winner = best_of(trials)
    assert f"({winner.best.correct}/1000)" in text and "1 without a result" in text and "none" in text
    curves = figures.trial_curves(trials)
    assert sum(line.get_marker() == "x" for line in curves.axes[0].lines) == 2
    figures.importance_bars(importance.permutation_importance(search, trials, 2))
    rows = list(csv.DictReader(trials_csv(search, trials).splitlines()))
    assert [row["trial"] for row in rows] == [str(i) for i in range(1, 21)]
    assert rows[2]["state"] == "diverged" and rows[2]["reason"] == "the loss became nan"
    assert rows[winner.number - 1]["correct"] == str(winner.best.correct) and rows[6]["dropout"] == ""
    assert f"| {winner.number} |" in description(search, trials, "command", ())


def test_figures_of_a_sweep_without_results():
    search = parse("lr=1e-4:1e-1:log")
    for draw in (lambda: figures.parallel_coordinates(search, [trial(1, "failed", lr=0.1)]),
                 lambda: figures.trial_curves([trial(1, "failed", lr=0.1)])):  # fmt: skip
        assert any(item.get_text() == "no results" for item in draw().axes[0].texts)


def test_progress_counts():
    trials = [trial(1, corrects=[90], lr=0.1), trial(2, "stopped", [80]), trial(3, "running", [95], lr=0.2)]
    trials += [trial(4, "waiting"), trial(5, "diverged")]
    assert running.progress(trials, 1) == (
        "trials 3/5 done, 1 running, 1 stopped early, 1 diverged or failed, best 95.00% (95/100) lr=0.2"
    )


# --------------------------------------------------------------------------------- a trial, without a cluster


def test_a_trial_stops_when_told_and_goes_on_from_its_best_checkpoint(tmp_path):
    photos = pictures.write(
        tmp_path / "photos", {"train/cat": 6, "train/dog": 6, "valid/cat": 3, "valid/dog": 3}
    )
    weights = write_weights(tmp_path / "vgg11.pth")
    chosen = tiny(
        *(photos, tmp_path / "features", weights, tmp_path / "cache"),
        epochs=3,
        visualize=False,
        ridge_probe=False,
        head="mlp",
    )
    extract(chosen)
    task = running.Task(chosen, str(tmp_path / "s"), 3, 2, False, 0, {1: {"lr": 0.01}, 2: {"lr": 1e30}}, {})

    def process(number):
        made = running._Process.__new__(running._Process)
        made.setup({"trial": number}, task)
        return made

    def epochs(made):
        results = []
        while not results or not results[-1].get("done"):
            results.append(made.step())
        made.cleanup()
        return results

    whole = epochs(process(1))
    assert [one["epoch"] for one in whole] == [1, 2, 3] and whole[-1]["state"] == "finished"
    task = dataclasses.replace(task, folder=str(tmp_path / "other"))
    stopped = process(1)
    assert stopped.step()["epoch"] == 1
    stopped.cleanup()
    (checkpoint,) = (tmp_path / "other" / "trial-01").glob("*/checkpoint.json")
    assert checkpoint.parent.name == "epoch-0001"
    again = epochs(process(1))
    same = ("epoch", "correct", "loss", "score")
    assert [[one[name] for name in same] for one in again] == [[one[name] for name in same] for one in whole]
    # The same process goes on with another trial, which diverges.
    stopped.reset_config({"trial": 2})
    (ended,) = epochs(stopped)
    assert ended["state"] == "diverged" and re.match(r"the (loss became|weights are no)", ended["reason"])


# ------------------------------------------------------------------------------------ a real sweep, killed once


class CountingProxy:
    """Passes bytes on to an S3 server, and counts the reads of objects whose names hold `what`."""

    def __init__(self, endpoint, what):
        host, port = endpoint.removeprefix("http://").split(":")
        self._there, self._what = (host, int(port)), what.encode()
        self.reads: list[str] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._server.close()

    def _accept(self):
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            far = socket.create_connection(self._there)
            for one, other, counted in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pass, args=(one, other, counted), daemon=True).start()

    def _pass(self, one, other, counted):
        with one, other:
            try:
                while content := one.recv(1 << 16):
                    if counted:
                        found = re.findall(rb"GET (\S*" + self._what + rb"\S*) HTTP", content)
                        self.reads += [name.decode() for name in found]
                    other.sendall(content)
                other.shutdown(socket.SHUT_WR)
            except OSError:
                pass


@pytest.fixture
def cache(s3, monkeypatch, tmp_path):
    """Features of 24 tiny pictures in a bucket: flags for a sweep over them, the proxy, the environment."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    weights = write_weights(tmp_path / "vgg11.pth")
    counts = {"train/cat": 8, "train/dog": 8, "valid/cat": 4, "valid/dog": 4}
    photos = pictures.write(tmp_path / "photos", counts)
    extract(tiny(photos, "s3://bucket/sweep/features", weights, tmp_path / "other", log_model=False))
    proxy = CountingProxy(s3["AWS_ENDPOINT_URL"], "/shards/")
    flags = [
        *("dogs-cats-vgg16-features", "--features", "s3://bucket/sweep/features", "--model", "vgg11"),
        *(
            "--weights",
            weights,
            "--weights-preprocessing",
            "imagenet",
            "--image-size",
            "32",
            "--batch-size",
            "4",
        ),
        *("--precision", "float32", "--cache", tmp_path / "cache", "--num-workers", "1", "--epochs", "4"),
    ]
    # The cluster was started before the server: addresses come as `ray job submit` hands them on.
    addresses = {**s3, "AWS_ENDPOINT_URL": proxy.endpoint}
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": addresses}})}
    yield list(map(str, flags)), proxy, {**addresses, **job}
    proxy.close()


def test_a_killed_sweep_goes_on_to_a_registered_model(cache, ray_cluster, tmp_path):
    """Two trials at a time from one copy of the cache; what has ended is neither lost nor done again."""
    flags, proxy, environment = cache
    command = [sys.executable, "jobs/sweep.py", *flags, "--name", "s", "--trials", "6", "--no-early-stopping"]
    command += ["--search", "head=mlp,linear", "lr=1e-4:1e-2:log", "hidden-size=4,8"]
    records = tmp_path / "s" / "trials"
    state = lambda: {  # noqa: E731
        int(path.stem): json.loads(path.read_text()) for path in records.glob("[0-9]*.json")
    }
    first = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "CVDIST_STORAGE": str(tmp_path), **environment, **ray_cluster},
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "log").open("w"),
        start_new_session=True,
    )
    try:
        wait_until(
            lambda: first.poll() is not None or sum(t["state"] == "finished" for t in state().values()) >= 2,
            120,
            "two trials have finished",
        )
        assert first.poll() is None, (tmp_path / "log").read_text()[-3000:]
    finally:
        first.kill()
        first.wait()
    before = {number: one for number, one in state().items() if one["state"] == "finished"}
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("cvdist").experiment_id
    statuses = lambda: [one.info.status for one in client.search_runs([experiment])]  # noqa: E731
    wait_until(
        lambda: not {"RUNNING", "SCHEDULED"} & set(statuses()), 30, "the runs of the killed job are ended"
    )

    done = run(*command, "--register", "pets", storage=tmp_path, **environment, **ray_cluster)
    assert done.returncode == 0, done.stderr[-4000:]
    after = state()
    assert f"{len(before)} trials have ended and are kept, {6 - len(before)} are left" in done.stderr
    assert {number: after[number] for number in before} == before
    assert len(after) == 6 and all(one["state"] == "finished" for one in after.values())
    assert all([epoch["epoch"] for epoch in one["epochs"]] == [1, 2, 3, 4] for one in after.values())

    # Exact counts, everywhere the same ones.
    trials = [
        Trial(n, one["settings"], one["state"], tuple(TrialEpoch(**e) for e in one["epochs"]))
        for n, one in sorted(after.items())
    ]
    best = best_of(trials)
    result = f"{best.best.correct}/8"
    assert (
        f"trial {best.number}: {space.format_settings(best.settings)}" in done.stdout and result in done.stdout
    )
    runs = {one.data.tags["cvdist.name"]: one for one in client.search_runs([experiment])}
    parent = runs.pop("s")
    assert parent.info.status == "FINISHED" and parent.data.metrics["best/correct"] == best.best.correct
    assert set(runs) == {f"s-trial-{n:02}" for n in range(1, 7)} | {f"s-best-{best.number:02}"}
    for name, one in runs.items():
        assert one.info.status == "FINISHED", name
        assert one.data.tags["mlflow.parentRunId"] == parent.info.run_id
    for one in trials:
        found = runs[f"s-trial-{one.number:02}"]
        history = client.get_metric_history(found.info.run_id, "valid/correct")
        assert [m.value for m in sorted(history, key=lambda m: m.step)] == [e.correct for e in one.epochs]
        assert found.data.params["optimizer.lr"] == str(one.settings["lr"])
        if one.number in before:
            assert found.data.metrics["run/attempt"] == 1
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id, "figures")}
    assert artifacts == {f"figures/{name}.png" for name in ("parallel_coordinates", "trials")}
    assert (tmp_path / "s" / f"trial-{best.number:02}").glob("epoch-*/checkpoint.json")
    kept = {path.parent.parent.name for path in (tmp_path / "s").glob("trial-*/*/checkpoint.json")}
    assert kept == {f"trial-{best.number:02}"}

    # The best one is an ordinary run, whose model is the version with the alias.
    final = runs[f"s-best-{best.number:02}"]
    assert "report.html" in {item.path for item in client.list_artifacts(final.info.run_id)}
    with mlflow_store(tmp_path):
        version = client.get_model_version_by_alias("pets", "candidate")
    assert version.run_id == final.info.run_id and result in version.tags["validation"]

    # One copy for all trials of both jobs and the last training: each shard came once.
    assert len(proxy.reads) == len(set(proxy.reads)) == 6

    again = the_error(run(*command, "--epochs", "5", storage=tmp_path, **environment, **ray_cluster))
    assert "--epochs 4, now 5. Start it with the same flags, or give this one another --name" in again
