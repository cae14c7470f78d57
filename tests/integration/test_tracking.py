"""Runs in a real MLflow store: opened once, filled, and ended in every case."""

from __future__ import annotations

import dataclasses
import http.server
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient, experiments
from mlflow.exceptions import MlflowException

from cvdist import config as configs
from cvdist import recipes, tracking
from cvdist.config import LookupConfig, TrackingConfig
from cvdist.errors import Superseded, UserError
from cvdist.log import redact
from cvdist.tracking import environment, mlflow_tracker
from cvdist.tracking import run as tracking_run
from cvdist.tracking.find import find_run
from cvdist.tracking.mlflow_tracker import MlflowTracker
from k8s.services import free_port
from tests.helpers.jobs import ROOT, call, mlflow_store, run, the_error, user_error
from tests.helpers.stores import empty_store
from tests.helpers.waiting import wait_until, work_of

INLINE = ["digits-cnn", "--runtime", "inline", "--no-visualize"]


@pytest.fixture
def storage(tmp_path):
    return empty_store(tmp_path)


def runs(storage):
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    return client, client.search_runs([client.get_experiment_by_name("cvdist").experiment_id])


def config_in(storage, **changes):
    return configs.replace(recipes.find("digits-cnn"), storage=str(storage), **{"name": "run", **changes})


def open_run(storage, *, continued=False, **changes):
    config = config_in(storage, system_metrics=False, **changes)
    return tracking.start_run(
        config, tracking.open_tracking_store(config.tracking, config.run.storage), continued=continued
    )


# -------------------------------------------------------------------------------------- the end of a run


def test_a_killed_job_leaves_no_running_run(storage):
    """Nothing in it can do anything any more: another process ends the run."""
    command = [sys.executable, "jobs/train.py", *INLINE, "--epochs", "1000", "--no-system-metrics"]
    log = storage / "log"
    with log.open("w") as output:
        job = subprocess.Popen(
            command, cwd=ROOT, stderr=output, env={**os.environ, "CVDIST_STORAGE": str(storage)}
        )
    try:
        wait_until(
            lambda: "epoch 1/1000  train" in log.read_text() or job.poll() is not None,
            "an epoch is done",
            work_of(job.pid, log),
        )
        assert runs(storage)[1][0].info.status == "RUNNING"
    finally:
        job.kill()
        job.wait(30)
    wait_until(lambda: runs(storage)[1][0].info.status != "RUNNING", "the run is ended")
    assert runs(storage)[1][0].info.status == "KILLED"


def test_a_job_that_is_told_to_end_ends_its_run(storage):
    def tell():
        wait_until(lambda: list(storage.glob("told/epoch-*")), "an epoch is done", poll_seconds=0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    telling = threading.Thread(target=tell)
    telling.start()
    words = [*INLINE, "--name", "told", "--epochs", "1000", "--no-system-metrics", "--no-log-model"]
    with pytest.raises(SystemExit) as ended:
        call("train", *words, storage=storage)
    telling.join()
    assert ended.value.code == 143 and runs(storage)[1][0].info.status == "KILLED"


def test_a_failed_job_leaves_a_failed_run(storage):
    done = call("train", *INLINE, "--lr", "1e9", "--epochs", "1", storage=storage)
    assert "the loss became" in the_error(done)
    assert runs(storage)[1][0].info.status == "FAILED"


def test_the_same_name_continues_the_same_run(storage):
    words = [*INLINE, "--name", "twice", "--batch-size", "200", "--no-log-model", "--no-system-metrics"]
    assert call("train", *words, "--epochs", "1", storage=storage).returncode == 0
    assert call("train", *words, "--epochs", "2", storage=storage).returncode == 0
    client, (run,) = runs(storage)
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "valid/loss")] == [1, 2]
    assert run.data.params["loop.epochs"] == "1" and run.data.tags["changed.loop.epochs"] == "2"


# ----------------------------------------------------------------------------------------------- delivery


def test_metrics_arrive_once_and_in_order_over_attempts(storage):
    ref = open_run(storage)
    first = MlflowTracker(ref, "node")
    for epoch in (1, 2, 3):
        first.log_metrics({"valid/loss": 1 / epoch}, epoch)
    first.close()
    second = MlflowTracker(open_run(storage, continued=True), "node")
    for epoch in (1, 2, 3, 4):  # a resumed attempt tells all it knows
        second.log_metrics({"valid/loss": 1 / epoch}, epoch)
    second.close()
    client, (run,) = runs(storage)
    history = client.get_metric_history(run.info.run_id, "valid/loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]


class Proxy:
    """MLflow's client, away when it is told to be: it takes what is logged, or says that it does not."""

    def __init__(self, client):
        self.client, self.away, self.after = client, False, False

    def __getattr__(self, name):
        def call(*arguments, **words):
            if self.away and not self.after:
                raise MlflowException("API request failed: connection refused")
            result = getattr(self.client, name)(*arguments, **words)
            if self.away:  # it was done, and the answer was lost
                raise MlflowException("API request failed: connection reset")
            return result

        return call


@pytest.mark.parametrize("answer_lost", [False, True])
def test_metrics_of_an_outage_arrive_in_order_and_once(storage, monkeypatch, answer_lost):
    ref = open_run(storage, cache=str(storage / "cache"))
    server = Proxy(MlflowClient(ref.tracking_uri))
    monkeypatch.setattr(mlflow_tracker, "mlflow_client", lambda uri: server)
    monkeypatch.setattr(mlflow_tracker, "FLUSH_SECONDS", 0.1)
    tracker = MlflowTracker(ref, "node", tracking.Attempt(1))
    for step in range(1, 10):
        tracker.log_metrics({"step/loss": 1 / step, "step/total": 1.0}, step)
        if step == 3:
            wait_until(
                lambda: len(server.client.get_metric_history(ref.run_id, "step/loss")) == 3, "all is there"
            )
            server.away, server.after = True, answer_lost
        if step == 6:
            wait_until(
                lambda: Path(ref.journal).exists() and Path(ref.journal).read_text().count("step/loss") >= 3,
                "the journal has them",
            )
    server.away = False
    tracker.close()
    for metric in ("step/loss", "step/total"):
        history = server.client.get_metric_history(ref.run_id, metric)
        assert [point.step for point in history] == list(range(1, 10))
    assert [p.value for p in server.client.get_metric_history(ref.run_id, "run/attempt")] == [1.0]
    assert not Path(ref.journal).exists()


def test_a_tracker_that_never_comes_back_leaves_a_journal_to_replay(storage, monkeypatch, caplog):
    ref = dataclasses.replace(open_run(storage, cache=str(storage / "cache")), drain_timeout=0.5)
    server = Proxy(MlflowClient(ref.tracking_uri))
    server.away = True
    monkeypatch.setattr(mlflow_tracker, "mlflow_client", lambda uri: server)
    monkeypatch.setattr(mlflow_tracker, "FLUSH_SECONDS", 0.1)
    tracker = MlflowTracker(ref, "node", tracking.Attempt(1))
    for epoch in (1, 2, 3):
        tracker.log_metrics({"valid/loss": 1 / epoch}, epoch)
    tracker.close()
    command = re.search(r"python jobs/replay.py (\S+)", caplog.text)[1]
    assert command == f"{storage}/run/undelivered-1.jsonl"
    for again in (False, True):  # the second time, there is nothing left to do
        done = (
            call("replay", command, storage=storage)
            if again
            else run(sys.executable, "jobs/replay.py", command, storage=storage)
        )
        assert done.returncode == 0 and "has all 4 values" in done.stdout, done.stderr
        _, (replayed,) = runs(storage)
        history = server.client.get_metric_history(replayed.info.run_id, "valid/loss")
        assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    bad = call("replay", storage / "mlflow.db", storage=storage)
    assert "mlflow.db is not a journal of metrics" in the_error(bad)


def test_a_finished_job_waits_for_a_server_that_is_away(storage, monkeypatch, caplog):
    ref = dataclasses.replace(open_run(storage), tracking_uri="http://mlflow:5000", drain_timeout=60)
    server = Proxy(MlflowClient(f"sqlite:///{storage}/mlflow.db"))
    monkeypatch.setattr(tracking_run, "mlflow_client", lambda uri: server)
    monkeypatch.setattr(tracking_run, "RETRY_SECONDS", 0.1)
    server.away = True
    assert not tracking.wait_for_server(dataclasses.replace(ref, drain_timeout=0.3))
    timer = threading.Timer(0.5, setattr, (server, "away", False))
    timer.start()
    with caplog.at_level("WARNING", "cvdist"):
        assert tracking.wait_for_server(ref)
    assert "MLflow is away: waiting 60 s for it (--tracking-drain-timeout)" in caplog.text
    tracking.set_status(ref, "FINISHED")
    assert server.client.get_run(ref.run_id).info.status == "FINISHED"


def test_a_stale_attempt_does_not_write_into_the_run(storage):
    def refuse():
        raise Superseded("another attempt goes on")

    ref = open_run(storage, cache=str(storage / "cache"))
    tracker = MlflowTracker(ref, "node", tracking.Attempt(1, refuse))
    tracker.log_metrics({"valid/loss": 1.0}, 1)
    tracker.close()
    _, (run,) = runs(storage)
    assert not run.data.metrics and not Path(ref.journal).exists()


def test_a_run_that_another_job_has_taken_over_is_not_ended(storage):
    config = config_in(storage)
    store = tracking.open_tracking_store(config.tracking, config.run.storage)
    older = tracking.start_run(config, store, continued=False, job="1")
    with tracking.end_run_on_exit(older):
        tracking.start_run(config, store, continued=True, job="2")
    _, (run,) = runs(storage)
    assert run.info.status == "RUNNING"


def test_optional_tracking_trains_without_a_server(tmp_path):
    uri = f"http://127.0.0.1:{free_port()}"
    words = [*INLINE, "--tracking", "optional", "--tracking-uri", uri, "--epochs", "1", "--batch-size", "500"]
    done = call("train", *words, storage=tmp_path)
    assert done.returncode == 0 and "goes on without MLflow (--tracking optional)" in done.stderr


def test_a_figure_that_can_not_be_drawn_costs_only_itself(storage, caplog):
    tracker = MlflowTracker(open_run(storage), "node")
    tracker.log_figure("broken", lambda: 1 / 0)
    tracker.log_metrics({"valid/loss": 0.5}, 1)
    tracker.close()
    _, (run,) = runs(storage)
    assert run.data.metrics["valid/loss"] == 0.5


def test_no_credentials_in_what_is_shown(monkeypatch, storage):
    uri = "http://me:hunter2@mlflow.example:5000/x"
    assert redact(uri) == "http://***@mlflow.example:5000/x"
    assert (
        redact(f"no answer from {uri}, nor http://x/a@b") == f"no answer from {redact(uri)}, nor http://x/a@b"
    )
    monkeypatch.setattr(sys, "argv", ["jobs/train.py", "x", f"--tracking-uri={uri}"])
    assert "hunter2" not in environment.command()
    ref = open_run(storage, experiment="secrets", data=uri)
    run = MlflowClient(ref.tracking_uri).get_run(ref.run_id)
    assert "hunter2" not in str(run.data.params) + str(run.data.tags)


# ---------------------------------------------------------------------------------------------- bad input


def test_no_server_is_said_quickly_with_the_alternatives(tmp_path):
    uri = f"http://user:hunter2@127.0.0.1:{free_port()}"
    line = the_error(call("train", *INLINE, "--tracking-uri", uri, storage=tmp_path))
    assert line.startswith("no MLflow server answers at http://***@127.0.0.1")
    assert "--tracking none" in line and "hunter2" not in line


def test_a_server_with_a_login_is_asked_by_its_host_alone():
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:  # answers 501
        threading.Thread(target=server.handle_request, daemon=True).start()
        tracking.require_server(f"http://user:hunter2@127.0.0.1:{server.server_port}/", 10)


def test_unwritable_storage(tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in the_error(call("train", *INLINE, storage=tmp_path / "file" / "runs"))


def test_a_store_that_is_no_store(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is no database" * 100)
    line = the_error(call("train", *INLINE, storage=tmp_path))
    assert "the MLflow store sqlite:///" in line and "refused" in line


@pytest.mark.parametrize("name", ["a%20b", "100%", "a?b#c d+é字"])
def test_any_name_of_a_folder_and_an_experiment_will_do(tmp_path, name):
    storage = empty_store(tmp_path / name)
    ref = open_run(storage, experiment=f"{name}/x")
    tracking.log_file(ref, "report.html", b"content")
    lookup = LookupConfig(storage=str(storage), experiment=f"{name}/x")
    assert find_run(lookup, "run").run_id == ref.run_id
    (report,) = (storage / "mlartifacts" / name / "x").rglob("report.html")
    assert report.read_bytes() == b"content"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_store_that_can_not_be_is_not_waited_for():
    began = time.monotonic()
    with pytest.raises(UserError, match="unable to open database file"):
        tracking.open_tracking_store(TrackingConfig(uri="sqlite:////proc/mlflow.db"), "")
    assert time.monotonic() - began < 30  # MLflow itself tries for 102 s


def test_a_deleted_experiment_is_restored_by_the_command_that_is_named(storage):
    store = f"sqlite:///{storage}/mlflow.db"
    client = MlflowClient(store)
    client.delete_experiment(client.create_experiment("gone"))
    line = user_error(tracking.open_tracking_store, TrackingConfig(experiment="gone"), str(storage))
    assert line.startswith("the experiment 'gone' is deleted: restore it with ")
    command = shlex.split(re.search("restore it with (.*), or name", line)[1])
    assert command[:4] == [f"MLFLOW_TRACKING_URI={store}", "mlflow", "experiments", "restore"]
    with mlflow_store(store):
        restored = CliRunner().invoke(experiments.commands, command[3:])
    assert restored.exit_code == 0, restored.output
    assert tracking.open_tracking_store(TrackingConfig(experiment="gone"), str(storage)) is not None


def test_storage_by_uri_needs_a_server_by_name():
    with pytest.raises(
        UserError, match=r"--storage s3://bucket/x is a URI: name an MLflow server with --tracking-uri"
    ):
        tracking.open_tracking_store(TrackingConfig(), "s3://bucket/x")


def test_a_file_store_does_not_do_for_several_nodes(storage):
    ref = open_run(storage)
    ref.require_reachable_from(1)
    with pytest.raises(UserError, match="is a file of this machine and the cluster has 3 nodes"):
        ref.require_reachable_from(3)


def test_a_checkpoint_that_is_missing(tmp_path):
    words = [*INLINE, "--resume", tmp_path / "gone", "--tracking", "none"]
    line = the_error(call("train", *words, storage=tmp_path))
    assert line == f"{tmp_path}/gone is no checkpoint: it has no checkpoint.json"
