"""A run's report: the page from plain values, and from a real run."""

from __future__ import annotations

import dataclasses
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from PIL import Image

from cvdist import config as configs
from cvdist import recipes, tracking
from cvdist.config import ReportConfig
from cvdist.data.dataset import DatasetInfo
from cvdist.errors import UserError
from cvdist.jobs import report as make_report
from cvdist.jobs.report import log_report_or_warn
from cvdist.report_html import figures
from cvdist.report_html.content import DataSummary, FigureFile, ModelSummary, Report, Setting
from cvdist.report_html.page import MAX_BYTES, render
from cvdist.results import EpochRecord
from cvdist.tracking.mlflow_tracker import log_dataset_input
from cvdist.training.reporting import epoch_metrics, quarantine_table
from tests.jobs import run as run_job
from tests.jobs import the_error

HOSTILE = "<script>alert(1)</script>\" onerror='x' & ]]> <!-- \x00 \udcff"


class Parsed(HTMLParser):
    """Elements with their attributes, and the text without that of styles and scripts."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self._inside = [], "", ""
        self.cells, self._open = [], []
        self.feed(page)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "tr":
            self.cells.append([])

    def handle_data(self, data):
        if self._inside in ("style", "script"):
            return
        self.text += data + " "
        if self._inside in ("td", "th") and self.cells:
            self.cells[-1].append(data)

    def handle_endtag(self, tag):
        self._inside = ""

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def record(epoch, correct, **changes):
    values = {
        "epoch": epoch,
        "train_loss": 0.5,
        "train_correct": 30,
        "train_total": 40,
        "valid_loss": 0.25,
        "valid_correct": correct,
        "valid_total": 1000,
        "learning_rate": 0.01,
        "seconds": 2.0,
        "samples_per_second": 1234.0,
        "peak_memory": 2**20,
    }
    return EpochRecord(**{**values, **changes})


def png(width=8, height=8, *, noise=False, mode="RGB"):
    pixels = np.zeros((height, width, len(mode)), np.uint8)
    if noise:
        pixels = np.random.default_rng(width * height).integers(0, 256, pixels.shape, np.uint8)
    output = io.BytesIO()
    Image.fromarray(pixels, mode).save(output, "PNG")
    return output.getvalue()


def gif(frames, side):
    generator = np.random.default_rng(frames)
    images = [Image.fromarray(generator.integers(0, 256, (side, side), np.uint8), "L") for _ in range(frames)]
    output = io.BytesIO()
    images[0].save(output, "GIF", save_all=True, append_images=images[1:], duration=100)
    return output.getvalue()


def report(**changes):
    values = {
        "name": "run",
        "recipe": "digits-cnn",
        "command": "python jobs/train.py digits-cnn --lr 0.1",
        "data": DataSummary("digits", "a package", "1x28x28", ("cat", "dog"), 4000, 1000, "ab" * 32),
        "model": ModelSummary("scratch-cnn", trained=21840),
        "workers": 2,
        "hardware": "two cores",
        "precision": "float32",
        "epochs": (record(1, 900), record(2, 988), record(3, 988)),
        "first_step_seconds": 12.3,
        "settings": (Setting("optimizer", "lr", "0.1", "0.02"), Setting("optimizer", "momentum", "0.9", "0.9")),
        "versions": (("torch", "2.15.0"),),
        "pictures": (FigureFile("loss.png", png()), FigureFile("confusion_matrix.png", png())),
    }
    return Report(**{**values, **changes})


# ---------------------------------------------------------------------------------------- content to page


def test_the_page_says_what_a_reader_asks_first():
    page = Parsed(render(report()))
    for said in (
        "98.80%",
        "988/1000",
        "2 of 3",
        "python jobs/train.py digits-cnn --lr 0.1",
        "4,000 for training, 1,000 for validation",
        "2: cat, dog",
        "ab" * 32,
        "2 on two cores",
        "21,840 trained",
        "12.3 s from the job's start",
        "Differs from the recipe digits-cnn",
        "lr: 0.1 (recipe: 0.02)",
        "2.15.0",
    ):
        assert said in page.text
    (row,) = [cells for cells in page.cells if cells and cells[0] == "2 (best)"]
    assert row == ["2 (best)", "0.5000", "75.00% (30/40)", "0.2500", "98.80% (988/1000)", "0.01", "2.0",
                   "1,234", "1"]  # fmt: skip
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in page.all("img"))
    targets = {link["href"].removeprefix("#") for link in page.all("a")}
    assert targets == {section["id"] for section in page.all("section") if "id" in section}


def test_nothing_is_loaded_from_elsewhere():
    page = Parsed(render(report(pictures=(FigureFile("filters/forming.gif", gif(2, 8)),))))
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:")
    loading = [a.get(key, "") for _, a in page.elements for key in ("src", "srcset", "href", "poster", "data")]
    assert all(not value or value.startswith(("data:", "#")) for value in loading)
    assert not {"link", "iframe", "object", "embed", "base"} & {name for name, _ in page.elements}
    assert "url(" not in render(report()) and "@import" not in render(report())


def test_names_are_shown_as_text():
    hostile = report(
        name=HOSTILE,
        recipe=HOSTILE,
        command=HOSTILE,
        address=((HOSTILE, HOSTILE),),
        data=DataSummary(HOSTILE, HOSTILE, HOSTILE, (HOSTILE, "ok"), 1, 1, HOSTILE),
        model=ModelSummary(HOSTILE, 1, 0, HOSTILE, HOSTILE, HOSTILE),
        hardware=HOSTILE,
        precision=HOSTILE,
        settings=(Setting(HOSTILE, HOSTILE, HOSTILE, "other"),),
        facts=((HOSTILE, HOSTILE),),
        versions=((HOSTILE, HOSTILE),),
        quarantine=((HOSTILE, HOSTILE),),
        pictures=(
            FigureFile(f"{HOSTILE.replace('/', '')}.png", png()),
            FigureFile(f"filters/{HOSTILE}.png", png()),
        ),
        left_out=(HOSTILE,),
    )
    page, plain = Parsed(render(hostile)), Parsed(render(report()))
    render(hostile).encode()  # has no lone surrogate
    assert len(page.all("script")) == len(plain.all("script")) == 1
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "\\x00" in page.text and "\\udcff" in page.text


def test_the_same_content_gives_the_same_bytes_whatever_the_order_of_its_figures():
    one = report()
    other = dataclasses.replace(one, pictures=tuple(reversed(one.pictures)))
    assert render(one) == render(report()) == render(other)


@pytest.mark.parametrize("status", ["", "failed", "killed", "running"])
def test_what_is_unknown_is_left_out(status):
    page = Parsed(render(Report(name="empty", status=status)))
    assert "empty" in page.text and "No epoch has been finished" in page.text
    assert "None" not in page.text and "nan" not in page.text
    assert bool(status) == (page.text.count("This run") == 1)
    assert not page.all("img") and not page.all("table")


def test_a_long_run_keeps_its_table_readable():
    epochs = tuple(record(epoch, 990 if epoch == 777 else 900) for epoch in range(1, 3001))
    rows = [cells[0] for cells in Parsed(render(report(epochs=epochs))).cells if cells]
    assert "777 (best)" in rows and "3000" in rows and "1" in rows
    assert len(rows) < 320


def test_ten_megabytes_hold_any_run():
    """The least important pictures lose first; what was done to them is said."""
    many = [FigureFile(f"activations/layer.{n}.png", png(900, 900, noise=True)) for n in range(6)]
    pictures = (FigureFile("loss.png", png(40, 40)), FigureFile("filters/forming.gif", gif(6, 900)), *many)
    assert sum(len(picture.data) for picture in pictures) > 1.5 * MAX_BYTES
    page = render(report(pictures=pictures))
    assert len(page.encode()) < MAX_BYTES
    parsed = Parsed(page)
    assert len(parsed.all("img")) == len(pictures)  # all are there, some of them smaller
    assert "is smaller here than among the artifacts" in parsed.text
    (loss,) = [image for image in parsed.all("img") if image["alt"].startswith("Line chart")]
    assert loss["src"].startswith("data:image/png")


def test_what_has_no_room_is_named():
    drawing = b"<svg xmlns='http://www.w3.org/2000/svg'>" + b" " * 4_000_000 + b"</svg>"
    pictures = [FigureFile(f"{name}.svg", drawing) for name in ("other", "samples", "loss")]
    page = render(report(pictures=(*pictures, FigureFile("accuracy.png", b"no picture"))))
    assert len(page.encode()) < MAX_BYTES
    text = Parsed(page).text
    assert "figures/other.svg is left out" in text and "figures/samples.svg is left out" in text
    assert "figures/accuracy.png can't be read as a picture" in text
    assert "figures/loss.svg is left out" not in text


def test_each_figure_has_its_place():
    paths = ["filters/conv.png", "filters/conv-before-after.png", "filters/forming.gif", "gradcam/wrong.png",
             "activations/features.10.png", "activations/features.2.png",
             "top_activations/features.2.png", "roc.png",
             "accuracy.png", "loss.png", "most_wrong.png", "samples.png", "new/thing.png"]  # fmt: skip
    order = [path for path, _ in figures.order_figures(paths)]
    assert order[:4] == ["loss.png", "accuracy.png", "most_wrong.png", "samples.png"]
    assert order.index("activations/features.2.png") < order.index("activations/features.10.png")
    assert order.index("filters/forming.gif") < order.index("filters/conv-before-after.png")
    assert set(order[-2:]) == {"roc.png", "new/thing.png"}
    assert all(figures.caption(path).alt for path in paths)


def test_of_snapshots_the_first_and_the_last_and_of_two_formats_one():
    snapshots = [f"filters/features.0-epoch-{epoch:04}.png" for epoch in (0, 4, 8, 12)]
    taken, left_out = figures.select_figures([*snapshots, "filters/features.0.png", "filters/features.0.svg"])
    assert set(taken) == {snapshots[0], snapshots[-1], "filters/features.0.png"}
    assert left_out == ["2 snapshots of a layer's filters: figures/filters/features.0-epoch-*"]
    taken, _ = figures.select_figures([*snapshots, "filters/features.0-before-after.png"])
    assert taken == ["filters/features.0-before-after.png"]


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
    client.log_text(ref.run_id, quarantine_table([]) + "Cat/666.jpg,not a JPEG\n", "quarantine.csv")
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
    assert "cd" * 32 in page.text and "cat, <b>" in page.text
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
    assert make_report(settings).path == tmp_path / "page.html"
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
    with pytest.raises(UserError, match=r"--output .* can't be written: "):
        make_report(configs.replace(settings, output=str(tmp_path / "no" / "x.html")))


def test_the_command_names_its_mistakes(tmp_path):
    done = run_job(sys.executable, "jobs/report.py", "run", "--outptu", "x", storage=tmp_path)
    assert the_error(done) == "unknown flag --outptu: did you mean --output?"
