"""`jobs/evaluate.py`: figures checked by hand and by other means, on digits and on folders of pictures."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from pyarrow import fs as arrow

from cvdist import config as configs
from cvdist import recipes
from cvdist.config import EvaluateConfig
from cvdist.jobs import cli
from cvdist.jobs import evaluate as run_evaluation
from cvdist.jobs.evaluate import table as evaluation_table
from cvdist.jobs.train import table, train
from cvdist.loaders import open_loader
from tests.helpers import pictures
from tests.helpers.jobs import call, the_error, user_error
from tests.helpers.trained import REGISTERED

# ------------------------------------------------------------------------------------------------ the job


def evaluate(trained, source, *words):
    config = cli.parse("evaluate", [str(source), "--storage", str(trained.storage), *map(str, words)])
    assert isinstance(config, EvaluateConfig)
    return run_evaluation(config)


def eval_error(trained, source, *words):
    return user_error(evaluate, trained, source, *words)


def test_what_training_has_counted_is_counted_again_and_logged(trained, tmp_path):
    finished = evaluate(trained, "good", "--output", tmp_path / "e.json")
    measured, summary = finished.evaluation.first.metrics, trained.good.summary
    assert (measured.correct, measured.total) == (summary.best.valid_correct, 1000)
    client = MlflowClient(trained.good.run.tracking_uri)
    training = client.get_run(trained.good.run.run_id)
    history = client.get_metric_history(trained.good.run.run_id, "valid/loss")
    assert measured.loss == pytest.approx(
        next(m.value for m in history if m.step == summary.best.epoch), rel=1e-4
    )
    # By class, against the logged model as MLflow loads it.
    pixels, names = open_loader(recipes.find("digits-cnn"), torch.device("cpu")).pictures("valid", range(1000))
    answers = trained.served(trained.good).predict(list(pixels.numpy()))
    predicted = np.array([int(answer["class"]) for answer in answers])
    true = np.array([int(name) for name in names])
    for digit, one in enumerate(measured.by_class):
        assert one.correct == int(((true == digit) & (predicted == digit)).sum())
        assert (one.total, one.predicted) == (100, int((predicted == digit).sum()))

    run = client.get_run(finished.run.run_id)
    assert run.info.status == "FINISHED" and run.info.experiment_id == training.info.experiment_id
    assert run.data.metrics["evaluation/correct"] == measured.correct
    assert run.data.tags["mlflow.parentRunId"] == training.info.run_id
    assert run.data.tags["cvdist.model"] == f"runs:/{training.info.run_id} (good)"
    figures = {artifact.path for artifact in client.list_artifacts(run.info.run_id, "figures")}
    assert figures == {f"figures/{name}.png" for name in ("confusion_matrix", "reliability", "most_wrong")}
    assert run.data.tags["mlflow.note.content"].startswith("### ")
    written = json.loads((tmp_path / "e.json").read_text())
    assert written["models"][0]["correct"] == measured.correct
    assert sum(one["total"] for one in written["models"][0]["calibration"]) == 1000
    text = evaluation_table(finished)
    assert f"({measured.correct}/1000)" in text and "next: " in text and "ui --backend-store-uri" in text
    # The evaluation is not taken for the run of that name.
    assert evaluate(trained, "good", "--tracking", "none").run is None


def test_two_models_side_by_side_and_the_better_one_is_promoted(trained):
    weak = trained.storage / "weak"  # a checkpoint
    finished = evaluate(trained, "good", "--compare", weak, "--register", REGISTERED)
    one, other = finished.evaluation.first.metrics, finished.evaluation.second.metrics
    found = finished.evaluation.comparison
    assert found.total == 1000 and found.both + found.only_first == one.correct
    assert found.both + found.only_second == other.correct == trained.weak.summary.best.valid_correct
    assert found.p < 1e-6
    text = evaluation_table(finished)
    assert (
        f"both right {found.both:,}, only A {found.only_first:,}" in text
        and "different at the 5% level" in text
    )
    client = MlflowClient(trained.good.run.tracking_uri)
    assert finished.registered == f"models:/{REGISTERED}/1 @champion"  # the version that there was
    version = client.get_model_version_by_alias(REGISTERED, "champion")
    assert version.run_id == trained.good.run.run_id and f"({one.correct}/1000)" in version.description
    assert client.get_model_version_by_alias(REGISTERED, "candidate").version == version.version
    figures = {file.path for file in client.list_artifacts(finished.run.run_id, "figures")}
    assert "figures/differences.png" in figures


def test_training_registers_and_a_registry_that_fails_costs_nothing(trained, tmp_path, monkeypatch):
    client = MlflowClient(trained.good.run.tracking_uri)
    assert trained.good.registered == f"models:/{REGISTERED}/1 @candidate"
    assert "registered     models:/digit-reader/1 @candidate" in table(trained.good)
    version = client.get_model_version(REGISTERED, "1")
    assert version.tags["recipe"] == "digits-cnn" and version.tags["validation"].endswith("/1000)")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite:////dev/null/registry.db")
    config = configs.replace(
        recipes.find("digits-cnn"), storage=str(tmp_path), name="kept", runtime="inline", epochs=1,
        batch_size=500, system_metrics=False, visualize=False, register="x",
    )  # fmt: skip
    finished = train(config)
    assert finished.registered == "" and finished.not_registered.startswith("--register x: the MLflow registry")
    assert f"python jobs/evaluate.py runs:/{finished.run.run_id} --register x" in finished.not_registered
    assert MlflowClient(finished.run.tracking_uri).get_run(finished.run.run_id).info.status == "FINISHED"


def test_registering_is_checked_before_anything_is_trained():
    def error(**changes):
        return user_error(configs.check, configs.replace(recipes.find("digits-cnn"), **changes))

    assert "--no-log-model logs none" in error(register="x", log_model=False)
    assert "--tracking none logs none" in error(register="x", tracking="none")
    assert "--register 'a/b'" in error(register="a/b")
    assert "--alias 'latest'" in error(register="a", alias="latest")
    assert "--alias 'v1'" in error(register="a", alias="v1")


def test_bad_input_is_one_line(trained, tmp_path):
    assert "--register is for models that an MLflow run has logged" in eval_error(
        trained, trained.storage / "weak", "--dataset", "digits", "--register", "x", "--tracking", "none"
    )
    assert "does not say what it was trained on" in eval_error(trained, trained.storage / "weak")
    photos = pictures.write(tmp_path / "photos", {"0": 2, "bird": 2})
    unknown = eval_error(trained, "good", "--data", photos, "--tracking", "none")
    assert "has classes that runs:/" in unknown and "does not know: bird; it knows 0, 1" in unknown
    assert "--calibration-bins is 0" in eval_error(trained, "good", "--calibration-bins", 0)
    assert "unknown flag --datas: did you mean --data" in eval_error(trained, "good", "--datas", "x")
    assert "is not a file or folder" in eval_error(trained, "good", "--storage", tmp_path)
    done = call("evaluate", "goood", storage=trained.storage)
    assert "did you mean good" in the_error(done)


# -------------------------------------------------------------------------------------- folders of pictures


@pytest.fixture(scope="module")
def on_photos(trained, tmp_path_factory):
    """A run on a folder without a division of its own, one picture of which is damaged."""
    folder = tmp_path_factory.mktemp("photos")
    photos = pictures.write(folder / "all", {"ant": 20, "bee": 20, "cow": 20})
    (photos / "bee" / "0003.jpg").write_bytes(b"no picture")
    config = configs.replace(
        recipes.find("dogs-cats-cnn"), data=str(photos), image_size=32, max_bad_fraction=0.1,
        cache=str(folder / "cache"), storage=str(trained.storage), name="photos", runtime="inline", epochs=1,
        batch_size=16, precision="float32", system_metrics=False, visualize=False, decode_workers=1,
    )  # fmt: skip
    return train(config), photos, folder / "cache"


def test_the_split_of_training_is_found_again(trained, on_photos):
    finished, _, cache = on_photos
    words = ("--cache", cache, "--max-bad-fraction", "0.1", "--tracking", "none")
    found = evaluate(trained, "photos", *words).evaluation
    summary = finished.summary
    assert (found.first.metrics.correct, found.first.metrics.total) == (
        summary.best.valid_correct, summary.best.valid_total,
    )  # fmt: skip
    rest = evaluate(trained, "photos", *words, "--part", "train").evaluation.first.metrics
    whole = evaluate(trained, "photos", *words, "--part", "all").evaluation
    assert rest.total + summary.best.valid_total == whole.first.metrics.total == 59
    assert [picture.path for picture in whole.pictures.quarantine] == ["bee/0003.jpg"]
    assert whole.first.metrics.correct == rest.correct + summary.best.valid_correct
    assert "more than --max-bad-fraction 0.001 allows" in eval_error(
        trained, "photos", "--cache", cache, "--part", "all", "--tracking", "none"
    )


def test_other_pictures_are_matched_by_the_names_of_their_classes(trained, on_photos, bucket, tmp_path):
    """The folder has one class fewer, and so other numbers; it lies in a bucket, with a division of its own."""
    _, photos, _ = on_photos
    for part in ("train", "valid"):
        for name, count in (("bee", 3), ("cow", 9)):
            (tmp_path / part / name).mkdir(parents=True)
            for path in sorted((photos / name).glob("*.jpg"))[4 : 4 + count]:
                (tmp_path / part / name / path.name).write_bytes(path.read_bytes())
    arrow.copy_files(str(tmp_path), bucket)
    found = evaluate(trained, "photos", "--data", bucket, "--tracking", "none").evaluation.first
    assert [(one.name, one.total) for one in found.metrics.by_class] == [("ant", 0), ("bee", 3), ("cow", 9)]
    assert found.absent == ("ant",)
    assert dataclasses.asdict(found.metrics.by_class[0])["correct"] == 0


def test_an_optional_store_holds_the_results_where_it_can_be_reached(trained, tmp_path, caplog):
    checkpoint = trained.storage / "weak"
    words = (checkpoint, "--dataset", "digits", "--tracking", "optional")
    assert evaluate(trained, *words, "--tracking-uri", f"sqlite:///{tmp_path}/m.db").run is not None
    away = ("--tracking-uri", "http://127.0.0.1:9", "--tracking-timeout", "0.5")
    assert evaluate(trained, *words, *away).run is None
    assert "goes on without MLflow (--tracking optional)" in caplog.text
