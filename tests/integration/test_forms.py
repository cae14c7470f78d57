"""Pictures as folders, tars and Parquet files, on a disk and in a bucket, are one data set for all jobs."""

from __future__ import annotations

import pytest
import torch
from pyarrow import fs as arrow

from cvdist import config as configs
from cvdist import recipes, storage
from cvdist.config import SavedModelConfig
from cvdist.jobs import cli, evaluate, predict
from cvdist.jobs.train import train
from cvdist.saved import open_model
from tests.helpers import feature_caches, forms, pictures


@pytest.fixture
def uris(bucket, monkeypatch, tmp_path):
    """`--data` by form and place."""
    monkeypatch.setenv("CVDIST_CACHE", str(tmp_path / "cache"))
    here = tmp_path / "here"
    root = pictures.write(here / "folder", {"train/cat": 9, "train/dog": 8, "val/cat": 4, "val/dog": 3})
    found = forms.write_all(root, here)
    filesystem, path = storage.locate(bucket)
    arrow.copy_files(str(here), path, destination_filesystem=filesystem)
    return found | {f"{form}, in a bucket": uri.replace(str(here), bucket) for form, uri in found.items()}


def test_pictures_in_any_form_are_the_same_data_set(uris, weights, tmp_path):
    chosen = feature_caches.config(uris["folder"], tmp_path / "features", weights, tmp_path / "cache")
    assert len(feature_caches.extract(chosen)[1]) == 24
    seen = []
    for form, uri in uris.items():
        named = configs.replace(chosen, data=uri)
        assert feature_caches.extract(named)[1] == [], form  # all features are there
        loaders = [feature_caches.opened(named), feature_caches.opened(named, features="", dataset="images")]
        batches = [batch for loader in loaders for batch in feature_caches.epoch(loader, 4)]
        seen.append([loaders[0].digest(), loaders[1].digest(), *(batch.images for batch in batches)])
        seen[-1] += [batch.labels for batch in batches]
    for other in seen[1:]:
        assert other[:2] == seen[0][:2]
        assert all(torch.equal(*pair) for pair in zip(other[2:], seen[0][2:], strict=True))


def test_a_training_has_the_same_result_and_all_jobs_take_all_forms(uris, tmp_path):
    trained = {}
    for name, form in {"one": "folder", "two": "tars, in a bucket", "three": "a folder of Parquet"}.items():
        config = configs.replace(
            recipes.find("dogs-cats-cnn"), data=uris[form], image_size=32, cache=str(tmp_path / "cache"),
            storage=str(tmp_path), name=name, runtime="inline", epochs=1, batch_size=8, tracking="none",
            visualize=False,
        )  # fmt: skip
        finished = train(config)
        model = open_model(SavedModelConfig(source=str(tmp_path / name))).model.state_dict()
        trained[name] = finished.summary.best.valid_correct, model

    correct, model = trained["one"]
    for other, state in trained.values():
        assert other == correct and all(torch.equal(state[key], model[key]) for key in model)
    for form in ("tars", "Parquet, in a bucket"):
        flags = [str(tmp_path / "three"), "--data", uris[form]]
        done = evaluate(cli.parse("evaluate", [*flags, "--tracking", "none"])).evaluation.first.metrics
        assert (done.correct, done.total) == (correct, 7)
        words = [*flags, "--output", str(tmp_path / form), "--runtime", "inline"]
        assert predict(cli.parse("predict", words)).predictions.rows == 24
