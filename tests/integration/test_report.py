"""A run's report, from a real store."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from cvdist import config as configs
from cvdist import recipes, tracking
from cvdist.config import ReportConfig
from cvdist.data.dataset import DatasetInfo
from cvdist.data.quarantine import quarantine_csv
from cvdist.errors import UserError
from cvdist.jobs import report as make_report
from cvdist.jobs.report import log_report_or_warn
from cvdist.tracking.mlflow_tracker import log_dataset_input
from cvdist.training.reporting import epoch_metrics
from tests.helpers.report_pages import Parsed, png, record

# ------------------------------------------------------------------------------------------- from MLflow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in a real store, filled as a job fills it, with one broken figure; and its reference."""
    storage = tmp_path_factory.mktemp("store")
    config = configs.replace(recipes.find("digits-cnn"), storage=str(storage), name="kept", lr=0.125)
    ref = tracking.start_run(
        config, tracking.open_tracking_store(config.tracking, config.run.storage), continued=False
    )
    client = MlflowClient(ref.tracking_uri)
    for epoch in (record(1, 900), record(2, 977), record(3, 950)):
        metrics = [
            Metric(name, value, epoch.epoch, epoch.epoch) for name, value in epoch_metrics(epoch).items()
        ]
        client.log_batch(ref.run_id, metrics=metrics)
    client.log_metric(ref.run_id, "train/loss", 0.1, step=4)  # of an epoch that was killed
    info = DatasetInfo("digits", "s3://bucket/x", ("cat", "<b>"), 1, 28, 28, (0.1,), (0.3,), 40, 1000)
    log_dataset_input(client, ref.run_id, info, "cd" * 32)
    for name, value in {"parameters": 21840, "world_size": 2, "hardware": "two <i>cores</i>"}.items():
        client.log_param(ref.run_id, f"run.{name}", value)
    client.log_text(ref.run_id, quarantine_csv([]) + "Cat/666.jpg,not a JPEG\n", "quarantine.csv")
    for path in ("loss.png", "filters/conv1.png", "filters/conv1-epoch-0000.png"):
        folder = storage / "made" / path.removesuffix(path.rpartition("/")[2])
        folder.mkdir(parents=True, exist_ok=True)
        (storage / "made" / path).write_bytes(png(30, 20))
    client.log_artifacts(ref.run_id, str(storage / "made"), "figures")
    client.log_text(ref.run_id, "broken", "figures/accuracy.png")
    tracking.set_description(ref, "text", 7.5)
    return storage, ref, client


def test_the_report_of_a_run_in_mlflow(finished):
    _, ref, client = finished
    log_report_or_warn(ref)
    page = Parsed(Path(client.download_artifacts(ref.run_id, "report.html")).read_text(encoding="utf-8"))
    assert "97.70%" in page.text and "977/1000 validation pictures right" in page.text and "2 of 3" in page.text
    rows = [cells for cells in page.cells if cells and re.fullmatch(r"\d+( \(best\))?", cells[0])]
    assert [cells[0] for cells in rows] == ["1", "2 (best)", "3"]
    assert rows[1][4] == "97.70% (977/1000)" and rows[1][2] == "75.00% (30/40)"
    assert "lr: 0.125 (recipe: 0.02)" in page.text
    assert "7.5 s from the job's start" in page.text
    for said in (
        "Data digits · s3://bucket/x Pictures 40 for training, 1,000 for validation",
        "A picture 1x28x28 (channels, height, width) Classes 2: cat, <b> SHA-256",
        "cd" * 32,
        "Model scratch-cnn Parameters 21,840 trained Workers 2 on two <i>cores</i>",
        "scratch-cnn on digits · 20",
        "found at the start",
    ):
        assert said in page.text
    assert ["Cat/666.jpg", "not a JPEG"] in page.cells
    assert len(page.all("img")) == 3
    assert "figures/accuracy.png can't be read as a picture" in page.text
    assert "This run" not in page.text  # had not ended, or failed


def test_a_report_that_can_not_be_made_costs_a_warning(finished, caplog):
    _, ref, _ = finished
    log_report_or_warn(dataclasses.replace(ref, run_id="0" * 32))
    assert "no report.html" in caplog.text and "jobs/report.py" in caplog.text


def test_a_report_made_again(finished, tmp_path):
    storage, ref, _ = finished
    settings = configs.replace(
        ReportConfig(), run="kept", storage=str(storage), output=str(tmp_path / "page.html")
    )
    assert make_report(settings).path == str(tmp_path / "page.html")
    made = (tmp_path / "page.html").read_bytes()
    assert make_report(configs.replace(settings, run=ref.run_id)).size == len(made)
    assert (tmp_path / "page.html").read_bytes() == made
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(UserError, match="no run in the experiment 'cvdist' is called 'kpt': did you mean kept"):
        make_report(configs.replace(settings, run="kpt"))
    with pytest.raises(UserError, match="no run has the id"):
        make_report(configs.replace(settings, run="0" * 32))
    with pytest.raises(UserError, match="there is no MLflow store"):
        make_report(configs.replace(settings, storage=str(tmp_path / "gone")))
    with pytest.raises(UserError, match=r"--output .* can't be written"):
        make_report(configs.replace(settings, output="/proc/none/x.html"))
