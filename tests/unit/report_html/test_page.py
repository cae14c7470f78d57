"""A run's report: the page from plain values, and from a real run."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import re

import numpy as np
import pytest
from PIL import Image

from cvdist.report_html import figures
from cvdist.report_html.content import FigureFile, Report, Setting
from cvdist.report_html.page import MAX_BYTES, render
from cvdist.results import RidgeResult
from tests.helpers.report_pages import HOSTILE, Parsed, png, record


def gif(frames, side):
    generator = np.random.default_rng(frames)
    images = [Image.fromarray(generator.integers(0, 256, (side, side), np.uint8), "L") for _ in range(frames)]
    output = io.BytesIO()
    images[0].save(output, "GIF", save_all=True, append_images=images[1:], duration=100)
    return output.getvalue()


def report(**changes):
    values = {
        "name": "run",
        "subject": "scratch-cnn on digits",
        "recipe": "digits-cnn",
        "command": "python jobs/train.py digits-cnn --lr 0.1",
        "trained": {"Data": "digits", "Workers": "2 on two cores", "Pretrained weights": ""},
        "epochs": (record(1, 900), record(2, 988), record(3, 988)),
        "first_step_seconds": 12.3,
        "settings": (Setting("optimizer", "lr", "0.1", "0.02"), Setting("optimizer", "momentum", "0.9", "0.9")),
        "environment": {"Host": "", "torch": "2.15.0"},
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
        "scratch-cnn on digits",
        "Workers 2 on two cores",
        "12.3 s from the job's start",
        "Differs from the recipe digits-cnn",
        "lr: 0.1 (recipe: 0.02)",
        "torch 2.15.0",
    ):
        assert said in page.text
    assert "Pretrained weights" not in page.text and "Host" not in page.text  # not known
    (row,) = [cells for cells in page.cells if cells and cells[0] == "2 (best)"]
    assert row == ["2 (best)", "0.5000", "75.00% (30/40)", "0.2500", "98.80% (988/1000)",
                   "97.50%", "0.9876", "0.01", "2.0", "1,234", "1"]  # fmt: skip
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in page.all("img"))
    targets = {link["href"].removeprefix("#") for link in page.all("a")}
    assert targets == {section["id"] for section in page.all("section") if "id" in section}


def test_of_several_labels_the_page_says_how_well_each_class_is_told():
    first, second = (
        record(epoch, correct, valid_mean_average_precision=value, select_by="mean_average_precision")
        for epoch, correct, value in ((1, 700, 0.8123), (2, 650, 0.9012))
    )
    sofa = ("sofa", "40", "0.9100", "0.3000", "0.8000", "0.7000", "0.7467")
    page = Parsed(
        render(
            report(
                epochs=(first, second),
                ridge=RidgeResult(600, 1000, 0.1, 2.0, mean_average_precision=0.7654),
                classes=(
                    ("sofa", "40", "0.9100", "0.3000", "0.8000", "0.7000", "0.7467"),
                    ("cat", *"0------"[:6]),
                ),
                pictures=(FigureFile("precision_recall.png", png()), FigureFile("wrong_labels.png", png())),
            )
        )
    )
    for said in ("0.9012 mean average precision", "650/1000 exact matches", "0.7654 mAP of a ridge probe"):
        assert said in page.text
    assert "ccurac" not in page.text
    assert "best epoch by" not in page.text
    rows = [cells for cells in page.cells if cells]
    assert list(sofa) in rows
    assert any(cells[:1] == ["2 (best)"] and "0.9012" in cells for cells in rows)
    titles = [section["id"] for section in page.all("section") if "id" in section]
    assert titles.index("precision-by-recall") < titles.index("most-wrong") < titles.index("classes")


def test_nothing_is_loaded_from_elsewhere():
    text = render(report(pictures=(FigureFile("filters/forming.gif", gif(2, 8)),)))
    page = Parsed(text)
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:")
    (script,) = re.findall("<script>(.*)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.endswith(f"script-src 'sha256-{digest}'")  # the page's own script runs, and no other
    loading = [a.get(key, "") for _, a in page.elements for key in ("src", "srcset", "href", "poster", "data")]
    assert all(not value or value.startswith(("data:", "#")) for value in loading)
    assert not {"link", "iframe", "object", "embed", "base"} & {name for name, _ in page.elements}
    assert "url(" not in text and "@import" not in text


def test_names_are_shown_as_text():
    hostile = report(
        name=HOSTILE,
        recipe=HOSTILE,
        command=HOSTILE,
        subject=HOSTILE,
        started=HOSTILE,
        trained={HOSTILE: HOSTILE},
        settings=(Setting(HOSTILE, HOSTILE, HOSTILE, HOSTILE + "x"), Setting(HOSTILE, HOSTILE, HOSTILE)),
        environment={HOSTILE: HOSTILE},
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
    many = [
        FigureFile(f"activations/layer.{n}.png", one) for one in [png(1200, 1200, noise=True)] for n in range(3)
    ]
    pictures = (FigureFile("loss.png", png(40, 40)), FigureFile("filters/forming.gif", gif(3, 900)), *many)
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
