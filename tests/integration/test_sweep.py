"""A trial without a cluster; and one real sweep that is killed and goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import threading

import pytest
from mlflow import MlflowClient

from cvdist import config as configs
from cvdist.jobs import trials as running
from cvdist.sweep import space
from cvdist.sweep.record import Trial, TrialEpoch, best_of
from tests.helpers import pictures
from tests.helpers.feature_caches import config as tiny
from tests.helpers.feature_caches import extract
from tests.helpers.jobs import ROOT, call, mlflow_store, on_ray, the_error
from tests.helpers.sweeps import trial
from tests.helpers.waiting import wait_until

# --------------------------------------------------------------------------------- a trial, without a cluster


def test_a_trial_stops_when_told_and_goes_on_from_its_best_checkpoint(weights, tmp_path):
    photos = pictures.write(
        tmp_path / "photos", {"train/cat": 6, "train/dog": 6, "valid/cat": 3, "valid/dog": 3}
    )
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


def test_progress_counts():
    trials = [trial(1, corrects=[90], lr=0.1), trial(2, "stopped", [80]), trial(3, "running", [95], lr=0.2)]
    trials += [trial(4, "waiting"), trial(5, "diverged")]
    assert running.progress(trials, 1) == (
        "trials 3/5 done, 1 running, 1 stopped early, 1 diverged or failed, best 95.00% (95/100) lr=0.2"
    )


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
def cache(s3, bucket, weights, tmp_path):
    """Features of 24 tiny pictures in a bucket: flags for a sweep over them, the proxy, the environment."""
    counts = {"train/cat": 8, "train/dog": 8, "valid/cat": 4, "valid/dog": 4}
    photos = pictures.write(tmp_path / "photos", counts)
    extract(tiny(photos, bucket, weights, tmp_path / "other", log_model=False))
    proxy = CountingProxy(s3["AWS_ENDPOINT_URL"], "/shards/")
    flags = [
        *("dogs-cats-vgg16-features", "--features", bucket, "--model", "vgg11"),
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
    addresses = {**s3, "AWS_ENDPOINT_URL": proxy.endpoint}
    yield list(map(str, flags)), proxy, {**addresses, **on_ray(addresses)}
    proxy.close()


def test_a_killed_sweep_goes_on_to_a_registered_model(cache, ray_cluster, tmp_path):
    """Two trials at a time from one copy of the cache; what has ended is neither lost nor done again."""
    flags, proxy, environment = cache
    command = [sys.executable, "jobs/sweep.py", *flags, "--name", "s", "--trials", "4", "--no-early-stopping"]
    command += ["--no-ridge-probe"]  # which might have the best one's head solved
    command += ["--search", "head=mlp,linear", "lr=1e-4:1e-2:log", "hidden-size=4,8"]
    records = tmp_path / "s" / "trials"
    state = lambda: {  # noqa: E731
        int(path.stem): json.loads(path.read_text()) for path in records.glob("[0-9]*.json")
    }
    log = tmp_path / "log"
    with log.open("w") as output:
        first = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "CVDIST_STORAGE": str(tmp_path), **environment, **ray_cluster},
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_until(
            lambda: first.poll() is not None or sum(t["state"] == "finished" for t in state().values()) >= 2,
            "two trials have finished",
            lambda: (state(), log.stat().st_size),
            poll_seconds=0.05,
        )
        assert first.poll() is None, log.read_text()[-3000:]
    finally:
        first.kill()
        first.wait()
    before = {number: one for number, one in state().items() if one["state"] == "finished"}
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("cvdist").experiment_id
    statuses = lambda: [one.info.status for one in client.search_runs([experiment])]  # noqa: E731
    wait_until(
        lambda: not {"RUNNING", "SCHEDULED"} & set(statuses()), "the killed job's runs are ended", statuses
    )

    again = {"storage": tmp_path, **environment, **ray_cluster}
    done = call("sweep", *command[2:], "--register", "pets", **again)
    assert done.returncode == 0, done.stderr[-4000:]
    after = state()
    assert f"{len(before)} trials have ended and are kept, {4 - len(before)} are left" in done.stderr
    assert {number: after[number] for number in before} == before
    assert len(after) == 4 and all(one["state"] == "finished" for one in after.values())
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
    assert set(runs) == {f"s-trial-{n:02}" for n in range(1, 5)} | {f"s-best-{best.number:02}"}
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

    line = the_error(call("sweep", *command[2:], "--epochs", "5", **again))
    assert "--epochs 4, now 5. Start it with the same flags, or give this one another --name" in line
