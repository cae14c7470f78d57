"""A small run whose pictures have several labels, and every job that uses its model."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pandas
import pytest
from mlflow import MlflowClient
from sklearn.metrics import average_precision_score

from cvdist import config as configs
from cvdist import recipes
from cvdist.jobs.train import train
from cvdist.prediction.batch import identity_of
from cvdist.runtime import ray_cluster as connection
from cvdist.saved import open_model
from tests.helpers import feature_caches, pictures
from tests.helpers.jobs import call, the_error
from tests.helpers.multilabel import COLORS, multilabel_table
from tests.helpers.report_pages import Parsed
from tests.helpers.trained import Trained

NAMES = tuple(COLORS)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """The run `squares`, its pictures as a table, and its store."""
    folder = tmp_path_factory.mktemp("squares")
    table = multilabel_table(folder / "pictures", 240)
    config = configs.replace(
        recipes.find("dogs-cats-cnn"), data=str(table), label_separator=";", image_size=32, runtime="inline",
        cache=str(folder / "cache"), storage=str(folder / "runs"), name="squares", epochs=6, batch_size=16,
        lr=0.02, momentum=0.9, dropout=0.0, system_metrics=False, visualize_pictures=32,
    )  # fmt: skip
    result = train(config)
    assert result is not None
    return Trained(folder / "runs", result, result, result), table


def job(squares, kind, *words):
    done = call(kind, *words, storage=squares[0].storage)
    assert done.returncode == 0, done.stderr
    return done.stdout


def truth_of(table):
    """bool (n, classes) by path."""
    rows = csv.DictReader(io.StringIO(table.read_text()))
    return {row["path"]: [name in row["labels"].split(";") for name in NAMES] for row in rows}


def test_an_evaluation_counts_what_the_training_has_counted(squares, tmp_path):
    trained, _ = squares
    run = trained.good.run
    text = job(squares, "evaluate", "squares", "--output", tmp_path / "e.json", "--cache", tmp_path / "cache")
    (found,) = json.loads((tmp_path / "e.json").read_text())["models"]
    client = MlflowClient(run.tracking_uri)
    best = trained.good.summary.best.epoch

    def logged(name):
        return next(one.value for one in client.get_metric_history(run.run_id, name) if one.step == best)

    assert (found["correct"], found["total"]) == (logged("valid/correct"), logged("valid/total"))
    assert found["mean_average_precision"] == pytest.approx(logged("valid/mean_average_precision"), abs=1e-5)
    assert found["macro_f1"] == pytest.approx(logged("valid/macro_f1"), abs=1e-6)
    assert found["loss"] == pytest.approx(logged("valid/loss"), rel=1e-4)
    assert found["mean_average_precision"] > 0.6, "the network has learned something, or this shows little"
    path = Path(client.download_artifacts(run.run_id, "classes.csv", str(tmp_path)))
    classes = list(csv.DictReader(io.StringIO(path.read_text())))
    for mine, theirs in zip(found["classes"], classes, strict=True):
        assert (mine["name"], mine["total"]) == (theirs["class"], int(theirs["pictures"]))
        for name in ("average_precision", "threshold", "precision", "recall", "f1"):
            assert mine[name] == pytest.approx(float(theirs[name] or "nan"), abs=1e-5, nan_ok=True), name
    assert f"{found['correct']}/{found['total']}" in text and "mean average precision" in text
    (evaluated,) = client.search_runs([run.experiment_id], "tags.`cvdist.kind` = 'evaluation'")
    assert evaluated.data.metrics["evaluation/correct"] == found["correct"]
    figures = {file.path for file in client.list_artifacts(evaluated.info.run_id, "figures")}
    assert figures == {f"figures/{name}.png" for name in ("precision_recall", "reliability", "wrong_labels")}


def test_the_table_of_runs_has_the_metrics_that_such_a_run_has(squares):
    run = squares[0].good.run
    client = MlflowClient(run.tracking_uri)
    view = json.loads(client.get_experiment(run.experiment_id).tags["mlflow.sharedViewState.cvdist"])
    data = client.get_run(run.run_id).data
    for column in view["selectedColumns"]:
        kind, name = column.replace("`", "").split(".", 1)
        assert kind == "attributes" or name in {"metrics": data.metrics, "params": data.params}[kind], column
    assert "metrics.`valid/mean_average_precision`" in view["selectedColumns"]


def test_predictions_and_answers_of_the_server_are_the_model_s(squares, tmp_path):
    trained, table = squares
    output = tmp_path / "out"
    flags = ("--output", output, "--runtime", "inline")
    text = job(squares, "predict", "squares", "--data", table.parent, *flags)
    found = pandas.read_parquet(output / "predictions").sort_values("path", ignore_index=True)
    assert list(found.columns) == ["path", "labels", "probabilities"] and len(found) == 240
    thresholds = open_model(trained.saved("squares")).thresholds
    assert min(thresholds) > 0 and max(thresholds) < 1 and len(thresholds) == 3
    probabilities = np.stack(found["probabilities"].to_list()).astype(float)
    expected = [[name for name, p, at in zip(NAMES, row, thresholds, strict=True) if p >= at]
                for row in probabilities]  # fmt: skip
    assert [list(labels) for labels in found["labels"]] == expected
    assert len({tuple(labels) for labels in expected}) > 3, "the network tells pictures apart"
    manifest = json.loads((output / "manifest.json").read_text())
    without = expected.count([])
    assert manifest["counts"] == {name: sum(name in row for row in expected) for name in NAMES} | {"": without}
    assert without and f"{without} pictures of no class" in text
    assert manifest["identity"]["thresholds"] == list(thresholds)
    assert all(f"{name} {count}" in text for name, count in manifest["counts"].items() if name and count)
    paths = found["path"].tolist()[:20]
    answers = trained.served(trained.good).predict([(table.parent / path).read_bytes() for path in paths])
    for answer, labels, row in zip(answers, expected, probabilities, strict=False):
        assert set(answer) == {"labels", "probabilities"} and sorted(answer["labels"]) == labels
        assert [answer["probabilities"][name] for name in NAMES] == pytest.approx(row.tolist(), abs=1e-4)
    few = job(squares, "predict", "squares", "--data", *[table.parent / path for path in paths[:9]])
    cells = {line[0]: line[1] for text in few.splitlines() if ".png" in text
             for line in [re.split("  +", text.strip())]}  # fmt: skip
    for path, labels in zip(paths[:9], expected, strict=False):
        assert sorted(word.split(" ")[0] for word in cells[path].split(", ")) == labels or not labels
        assert (cells[path] == "no class") == (not labels)
    truth = np.array([truth_of(table)[path] for path in found["path"]])
    flags = (
        "--part",
        "all",
        "--tracking",
        "none",
        "--output",
        tmp_path / "e.json",
        "--cache",
        tmp_path / "cache",
    )
    job(squares, "evaluate", "squares", *flags)
    (measured,) = json.loads((tmp_path / "e.json").read_text())["models"]
    assert measured["correct"] == int(
        (truth == [[name in row for name in NAMES] for row in expected]).all(1).sum()
    )
    precisions = [row["average_precision"] for row in measured["classes"]]
    assert precisions == pytest.approx(average_precision_score(truth, probabilities, average=None).tolist())


def test_two_models_and_other_data(squares, tmp_path):
    trained = squares[0]
    folders = {path.parent for path in (trained.storage / "squares").rglob("checkpoint.json")}
    other = next(one for one in folders if one.name != f"epoch-{trained.good.summary.best.epoch:04}")
    text = job(squares, "evaluate", "squares", "--compare", other, "--output", tmp_path / "e.json")
    written = json.loads((tmp_path / "e.json").read_text())
    found, (one, other) = written["comparison"], written["models"]
    assert one["digest"] != other["digest"]
    assert found["both_right"] + found["only_first_right"] == one["correct"]
    assert found["both_right"] + found["only_second_right"] == other["correct"]
    assert "McNemar" in text and "average precision A" in text and "B - A" in text
    # Another table, then folders, whose name is a picture's only label.
    again = multilabel_table(tmp_path / "again", 24, first=500)
    flags = ("--tracking", "none", "--output", tmp_path / "e.json", "--data")
    job(squares, "evaluate", "squares", *flags, again, "--label-separator", ";")
    assert json.loads((tmp_path / "e.json").read_text())["models"][0]["total"] == 24
    message = the_error(call("evaluate", "squares", "--data", again, storage=trained.storage))
    assert "does not know: blue;green, " in message and "--label-separator says what" in message
    folders = pictures.write(tmp_path / "folders", {"red": 3, "blue": 2})
    job(squares, "evaluate", "squares", *flags, folders)
    (one,) = json.loads((tmp_path / "e.json").read_text())["models"]
    assert [row["total"] for row in one["classes"]] == [2, 0, 3] and one["total"] == 5
    assert one["classes"][1]["average_precision"] is None


def test_a_model_of_one_label_a_picture_is_no_model_of_several(squares, tmp_path):
    trained, table = squares
    config = configs.replace(
        recipes.find("dogs-cats-cnn"), image_size=32, runtime="inline", epochs=1, storage=str(trained.storage),
        data=str(pictures.write(tmp_path / "folders", {"red": 9, "blue": 9, "green": 9})), name="one",
        cache=str(tmp_path / "cache"), batch_size=9, system_metrics=False, visualize=False,
    )  # fmt: skip
    assert train(config) is not None
    flags = ("--data", table, "--label-separator", ";")
    message = the_error(call("evaluate", "one", *flags, storage=trained.storage))
    assert "has pictures with several labels, and runs:/" in message and "gives each picture one" in message
    message = the_error(call("evaluate", "one", "--compare", "squares", storage=trained.storage))
    assert "gives a picture several labels and" in message and "can't be compared" in message


def test_a_run_of_several_labels_is_exported_visualized_and_reported(squares, tmp_path):
    trained, table = squares
    output = tmp_path / "squares.pt2"
    text = job(squares, "export", "squares", "--output", output)
    assert "16 of 16 get the same labels" in text and 'about["thresholds"]' in text
    job(squares, "export", "squares", "--output", tmp_path / "squares.safetensors")
    about = json.loads((tmp_path / "squares.safetensors.json").read_text())
    assert about["thresholds"] == list(open_model(trained.saved("squares")).thresholds)
    assert about["output"].endswith("after a sigmoid")
    flags = ("--data", table, "--label-separator", ";", "--output", tmp_path / "figures")
    text = job(squares, "visualize", "squares", *flags)
    assert "right" in text and (tmp_path / "figures" / "gradcam" / "right.png").exists()
    job(squares, "report", "squares", "--output", tmp_path / "run.html")
    page = Parsed((tmp_path / "run.html").read_text())
    summary = trained.good.summary
    assert f"{summary.best.valid_mean_average_precision:.4f} mean average precision" in page.text
    assert f"{summary.best.valid_correct}/{summary.best.valid_total} exact matches" in page.text
    rows = {cells[0]: cells for cells in page.cells if cells}
    assert {name for name in NAMES if len(rows[name]) == 7} == set(NAMES)
    figures = [section["id"] for section in page.all("section") if "id" in section]
    assert {"precision-by-recall", "most-wrong", "classes"} <= set(figures)


def test_predictions_of_other_thresholds_are_other_predictions(squares):
    saved = open_model(squares[0].saved("squares"))
    assert pickle.loads(pickle.dumps(saved)).thresholds == saved.thresholds  # as actors get it
    config = configs.PredictConfig()
    other = dataclasses.replace(saved, thresholds=(0.1, 0.2, 0.3))
    assert identity_of(config, saved) != identity_of(config, other)


def test_a_convex_head_from_cached_features_is_evaluated_and_reported(weights, tmp_path):
    table = multilabel_table(tmp_path / "pictures", 64)
    config = feature_caches.config(
        *(table, tmp_path / "features", weights, tmp_path / "cache"),
        storage=str(tmp_path / "runs"), head="linear", hidden_size=0, fit="logistic", label_separator=";",
        precision="float32", runtime="inline", name="convex", tracking="required", system_metrics=False,
        visualize=False, log_model=True,
    )  # fmt: skip
    feature_caches.extract(config)
    result = train(config)
    assert result is not None
    words = ("convex", "--data", table, "--output", tmp_path / "e.json", "--cache", tmp_path / "cache")
    flags = ("--label-separator", ";", "--part", "valid", "--precision", "float32")
    done = call("evaluate", *words, *flags, storage=tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "e.json").read_text())["models"]
    summary = result.summary
    assert (found["correct"], found["total"]) == (summary.best.valid_correct, summary.best.valid_total)
    assert found["mean_average_precision"] == pytest.approx(summary.best.valid_mean_average_precision, abs=1e-4)
    assert call("report", "convex", "--output", tmp_path / "r.html", storage=tmp_path / "runs").returncode == 0
    page = Parsed((tmp_path / "r.html").read_text())
    assert f"{summary.ridge.mean_average_precision:.4f} mAP of a ridge probe" in page.text


def test_jobs_that_can_not_work_with_several_labels_say_so_at_once(ray_cluster, tmp_path, monkeypatch):
    table = multilabel_table(tmp_path / "pictures", 24)
    words = ("dogs-cats-cnn", "--data", table, "--label-separator", ";", "--image-size", "32")
    words = (*words, "--cache", tmp_path / "cache", "--num-workers", "1")
    done = call("preflight", *words, storage=tmp_path / "runs", **ray_cluster)
    assert done.returncode == 0 and "24 pictures in 3 classes, several a picture" in done.stdout, done.stdout
    done = call("preflight", *words, "--balanced-sampling", storage=tmp_path / "runs", **ray_cluster)
    assert done.returncode == 1 and "--balanced-sampling is for pictures with one class each" in done.stdout
    monkeypatch.setattr(connection, "connect", None)  # Ray is not even asked for
    message = the_error(call("sweep", *words, storage=tmp_path / "runs"))
    assert message.startswith(
        "a sweep compares trials by accuracy, and these pictures may have several classes"
    )
