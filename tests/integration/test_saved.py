"""Trained models are opened from wherever they are, as what they are; and what may go wrong."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import mlflow
import pytest
import torch
from pyarrow import fs as arrow

from cvdist import recipes
from cvdist.checkpoints import format as ckpt
from cvdist.config import SavedModelConfig
from cvdist.loaders import open_loader
from cvdist.saved import open_model
from tests.helpers import pictures
from tests.helpers.jobs import mlflow_store, user_error
from tests.helpers.trained import REGISTERED


def test_every_name_of_a_model_gives_the_same_one(trained, bucket):
    run = trained.good.run.run_id
    sources = [
        "good",
        run,
        f"runs:/{run}",
        f"models:/{REGISTERED}/1",
        f"models:/{REGISTERED}@candidate",
        trained.storage / "good",  # the best of its checkpoints
    ]
    opened = [open_model(trained.saved(source)) for source in sources]
    assert len({one.digest for one in opened}) == 1
    assert {one.identity for one in opened} == {opened[0].identity}
    assert {(one.mean, one.std) for one in opened} == {((0.1314,), (0.3087,))}
    assert all(one.run.run_id == run and one.data.dataset == "digits" for one in opened[:5])
    assert all(one.precision == "float32" and one.model_id for one in opened[:5])
    assert opened[0].data == recipes.find("digits-cnn").data and opened[0].name == "good"
    arrow.copy_files(str(trained.storage / "good"), bucket)
    assert open_model(SavedModelConfig(source=bucket)).digest == opened[0].digest


def test_the_model_is_what_was_logged_with_its_layers_by_name(trained):
    saved = open_model(trained.saved("good"))
    pixels, _ = open_loader(recipes.find("digits-cnn"), torch.device("cpu")).pictures("valid", range(50))
    images = (pixels / 255 - saved.mean[0]) / saved.std[0]
    with torch.inference_mode():
        ours = saved.model(images).softmax(1)
    answers = trained.served(trained.good).predict(list(pixels.numpy()))
    theirs = [[answer["probabilities"][name] for name in saved.identity.classes] for answer in answers]
    torch.testing.assert_close(ours, torch.tensor(theirs), atol=1e-5, rtol=1e-4)
    assert [name for name, _ in saved.model.named_children()][:3] == ["conv1", "conv1_pool", "conv1_relu"]
    assert not saved.model.training and not any(p.requires_grad for p in saved.model.parameters())


def test_the_average_is_used_where_there_is_one(trained):
    folder = trained.storage / "averaged"
    saved = open_model(trained.saved(folder))
    assert saved.digest == open_model(trained.saved("averaged")).digest  # which was logged by MLflow
    state = ckpt.load(folder / "epoch-0001").state
    assert torch.equal(saved.model.state_dict()["conv1.weight"], state["ema"]["module.conv1.weight"])
    assert not torch.equal(saved.model.state_dict()["conv1.weight"], state["model"]["conv1.weight"])


def test_what_is_not_there_is_one_line_with_the_nearest(trained, tmp_path):
    def error(source, **changes):
        return user_error(open_model, trained.saved(source, **changes))

    assert "is called 'goood': did you mean good" in error("goood")
    assert f"no run has the id {'0' * 32}" in error("0" * 32)
    assert "the run weak (finished) has no model, only" in error("weak") and "--log-model" in error("weak")
    assert "no model is registered as 'digit-raeder': did you mean digit-reader" in error(
        "models:/digit-raeder/1"
    )
    has = r"it has @candidate, (@champion, )?1"  # another test may have promoted it
    assert re.search(rf"{REGISTERED} has no version '9', {has}", error(f"models:/{REGISTERED}/9"))
    assert re.search(rf"{REGISTERED} has no alias 'best', {has}", error(f"models:/{REGISTERED}@best"))
    assert "is models:/NAME/VERSION or models:/NAME@ALIAS" in error(f"models:/{REGISTERED}")
    assert "there is no experiment 'other'" in error("good", experiment="other")
    assert "there is no such file or folder" in error(tmp_path / "gone")
    # Other tests add some.
    assert re.search(r"it holds the runs .*averaged, .*good, .*weak.*: name one", error(trained.storage))
    (tmp_path / "empty").mkdir()
    assert "is no checkpoint and holds none" in error(tmp_path / "empty")
    (tmp_path / "text.pth").write_text("no weights")
    assert "name its architecture with --model" in error(tmp_path / "text.pth")
    text = error(tmp_path / "text.pth", model="vgg11", weights_preprocessing="imagenet")
    assert text.startswith(f"MODEL {tmp_path}/text.pth is a text file, not weights")
    assert "torchvision's weights for vgg16 are IMAGENET1K_V1" in error("vgg16:IMAGENET1K_V7")
    assert "MODEL is needed" in error("")
    no_store = user_error(open_model, SavedModelConfig(source="good", storage=str(tmp_path)))
    assert f"there is no MLflow store {tmp_path}/mlflow.db" in no_store and "--storage" in no_store
    secret = "http://me:hunter2@127.0.0.1:9"
    assert "hunter2" not in user_error(open_model, SavedModelConfig(source="good", tracking_uri=secret))


def test_a_damaged_or_foreign_checkpoint(trained, tmp_path):
    newest = trained.storage / "good" / "epoch-0002"
    copy = tmp_path / "epoch-0002"
    copy.mkdir()
    meta = json.loads((newest / "checkpoint.json").read_text())
    write_meta(copy, meta)
    (copy / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:1000])
    assert "is damaged" in user_error(open_model, SavedModelConfig(source=str(copy)))
    (copy / "state.pt").write_bytes((newest / "state.pt").read_bytes())
    meta["model"]["classes"] = ["a", "b"]
    write_meta(copy, meta)
    text = user_error(open_model, SavedModelConfig(source=str(copy), weights_preprocessing="imagenet"))
    assert "does not fit the model scratch-cnn (2 classes" in text


def test_a_logged_model_says_which_input_is_no_picture(trained):
    served, good = trained.served(trained.good), pictures.jpeg(1)
    blank = [[[255] * 28] * 28]
    answers = served.predict([base64.b64encode(good).decode(), good, blank, served.input_example[0]])
    assert (
        answers[0] == answers[1]
        and [sum(answer["probabilities"].values()) for answer in answers] == [pytest.approx(1, abs=1e-5)] * 4
    )
    assert all(max(answer["probabilities"].values()) == answer["confidence"] for answer in answers)
    pixels = "neither base64 of a picture's file nor integer pixels of 1x28x28"
    for bad, reason in (
        ("photo.jpg", "a picture is sent as base64 of its file"),
        (b"no picture", "no picture of a known kind (JPEG, PNG, WEBP, GIF, BMP)"),
        (good[: len(good) // 2], "the picture can't be decoded: image file is truncated"),
        ([[[0.5] * 28] * 28], pixels),
        ([[255] * 28] * 28, pixels),
        ([[[1], [2, 3]]], pixels),
        (None, pixels),
        ([[[256] * 28] * 28], "pixels are from 0 to 255"),
    ):
        with pytest.raises(mlflow.MlflowException) as refused:
            served.predict([good] * 20 + [bad])
        assert str(refused.value).startswith(f"inputs[20]: {reason}")
    assert served.predict([]) == []


def test_a_model_that_another_tool_has_logged(trained):
    with mlflow_store(trained.storage), mlflow.start_run(experiment_id=trained.good.run.experiment_id) as run:
        mlflow.pytorch.log_model(
            torch.nn.Linear(2, 1),
            name="model",
            serialization_format="pt2",
            pip_requirements=[],  # which another process would find out
            input_example=torch.ones(1, 2).numpy(),
        )
    assert "was not logged by cvdist" in user_error(open_model, trained.saved(run.info.run_id))


def write_meta(folder, meta):
    """As if it had been written so."""
    meta = {name: value for name, value in meta.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (folder / "checkpoint.json").write_text(json.dumps({**meta, "sha256": digest}))
