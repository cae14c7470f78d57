"""A run on an MLflow server, as on a cluster, and what a person sees of it in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from playwright.sync_api import expect

from tests.helpers.browser import CHROMIUM, RunPages, browser, mlflow_server
from tests.helpers.jobs import call


class Served(NamedTuple):
    """A finished run, the server that has it, and what the job printed."""

    uri: str
    run: Run
    client: MlflowClient
    printed: str
    folder: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    store = f"sqlite:///{folder}/server.db"
    with mlflow_server(folder, store, "--artifacts-destination", folder / "kept") as uri:
        words = ["digits-cnn", "--runtime", "inline", "--epochs", "2", "--name", "seen", "--no-system-metrics"]
        done = call("train", *words, storage=folder / "runs", MLFLOW_TRACKING_URI=uri)
        assert done.returncode == 0, done.stderr
        client = MlflowClient(uri)
        (run,) = client.search_runs([client.get_experiment_by_name("cvdist").experiment_id])
        yield Served(uri, run, client, done.stdout, folder)


def test_a_server_with_its_own_artifact_store(served):
    """As on a cluster: the job knows the server's address and nothing of where it keeps things."""
    run = served.run
    assert run.info.status == "FINISHED"
    assert f"next: open {served.uri}/#/experiments/1/runs/{run.info.run_id}" in served.printed
    figures = {Path(file.path).stem for file in served.client.list_artifacts(run.info.run_id, "figures")}
    assert {"accuracy", "loss", "confusion_matrix", "most_wrong", "samples"} <= figures
    assert [file.path for file in served.client.list_artifacts(run.info.run_id)].count("report.html") == 1
    assert len(list((served.folder / "kept").rglob("*.pt2"))) == 1
    assert not (served.folder / "runs" / "mlflow.db").exists()


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium, or name it by CVDIST_CHROMIUM")
def test_a_person_finds_the_result(served):
    run = served.run
    correct = served.client.get_metric_history(run.info.run_id, "valid/correct")
    best = int(max(point.value for point in correct))
    with browser() as chromium:
        pages = RunPages(chromium, served.uri, run.info.experiment_id, run.info.run_id)

        overview = pages.overview()
        expect(overview.get_by_role("heading", name="seen", exact=True)).to_be_visible()
        expect(overview.get_by_text(f"{best / 10:.2f}% ({best}/1000) at epoch")).to_be_visible()
        expect(overview.get_by_text("Finished", exact=True)).to_be_visible()

        charts = pages.charts("valid/(loss|accuracy)$")
        expect(charts.get_by_text("seen (valid/loss)")).to_be_visible()
        expect(charts.get_by_text("seen (valid/accuracy)")).to_be_visible()

        figure = pages.artifact("figures/accuracy.png").get_by_alt_text("figures/accuracy.png").first
        expect(figure).to_be_visible()
        assert figure.evaluate("image => image.naturalWidth") > 500

        report = pages.report()
        expect(report.get_by_role("heading", name="seen", exact=True)).to_be_visible()
        expect(report.locator(".score")).to_have_text(f"{best / 10:.2f}%")
        assert all(report.locator("img").evaluate_all("images => images.map(image => image.naturalWidth > 0)"))
        configuration = report.get_by_role("heading", name="Configuration")
        expect(configuration).not_to_be_in_viewport()
        report.get_by_role("link", name="Configuration").click()
        expect(configuration).to_be_in_viewport()

        assert pages.elsewhere == []
