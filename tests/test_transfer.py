"""Transfer learning as a user runs it: jobs on image folders, with a small VGG and random convolutions."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import pytest
import torch
import torchvision
from mlflow import MlflowClient

from cvdist import models
from cvdist.config import ModelConfig
from cvdist.errors import UserError
from tests import pictures
from tests.jobs import the_error, torchrun, train
from tests.test_torchrun import results

FEATURES = 9_220_480  # parameters of VGG11's convolutions
CLASSIFIER = 119_554_050


@pytest.fixture(scope="module")
def place(module_path):
    """Sixteen pictures, one bad one, and weights."""
    root = module_path
    counts = {"train/cat": 8, "train/dog": 8, "valid/cat": 3, "valid/dog": 3}
    pictures.write(root / "pictures", counts)
    (root / "pictures" / "train" / "dog" / "damaged.jpg").write_bytes(pictures.jpeg(1)[:300])
    torch.manual_seed(0)
    with torch.device("meta"):
        vgg = torchvision.models.vgg11()
    features = vgg.features.to_empty(device="cpu")
    for layer in features:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            torch.nn.init.zeros_(layer.bias)
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save(state, root / "weights.pth")
    return root


def arguments(place, *more):
    return [
        *("dogs-cats-vgg16", "--model", "vgg11", "--data", place / "pictures", "--image-size", "32"),
        *("--weights", place / "weights.pth", "--weights-preprocessing", "imagenet", "--lr", "0.001"),
        *("--max-bad-fraction", "0.1", "--batch-size", "8", "--log-every-steps", "1", "--no-log-model"),
        *("--dropout", "0", "--precision", "float32", "--cache", place / "cache"),
        *("--no-visualize", *more),
    ]


@pytest.fixture(scope="module")
def alone(place):
    done = train(*arguments(place, "--runtime", "inline", "--name", "one", "--epochs", "2"), storage=place)
    assert done.returncode == 0, done.stderr
    return done


def test_only_the_classifier_is_trained_and_the_checkpoint_is_an_ordinary_vgg(place, alone):
    assert f"{CLASSIFIER:,} trained parameters, {FEATURES:,} frozen" in alone.stderr
    before = torch.load(place / "weights.pth", weights_only=True)
    (checkpoint,) = (place / "one").glob("epoch-0002")
    state = torch.load(checkpoint / "state.pt", weights_only=True, mmap=True)
    with torch.device("meta"):
        plain = torchvision.models.vgg11(num_classes=2)
    plain.load_state_dict(state["model"], strict=True, assign=True)
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in before.items())
    assert (
        sum(buffers["momentum_buffer"].numel() for buffers in state["optimizer"]["state"].values())
        == CLASSIFIER
    )


def test_the_run_says_what_it_came_from_and_what_was_left_out(place, alone):
    run, losses = results(place, "one")
    assert len(losses) == 4 and losses[-1] < losses[0]
    parameters = run.data.params
    digest = hashlib.sha256((place / "weights.pth").read_bytes()).hexdigest()
    assert parameters["weights.sha256"] == digest and parameters["weights.normalization"] == "imagenet"
    assert parameters["run.frozen_parameters"] == str(FEATURES)
    assert parameters["data.mean"] == "(0.485, 0.456, 0.406)"
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    path = client.download_artifacts(run.info.run_id, "quarantine.csv", str(place))
    (bad,) = csv.DictReader(Path(path).read_text().splitlines())
    assert bad["path"] == "train/dog/damaged.jpg" and bad["reason"]
    assert (
        "left out: 1 of 23 pictures (4.35%), which can't be decoded, e.g. train/dog/damaged.jpg" in alone.stderr
    )


def test_two_workers_learn_what_one_learns(place, alone):
    done = torchrun(2, *arguments(place, "--name", "two", "--epochs", "2"), storage=place)
    assert done.returncode == 0, done.stderr
    run, losses = results(place, "two")
    expected, expected_losses = results(place, "one")
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    for metric in ("valid/correct", "valid/total", "train/total"):
        assert run.data.metrics[metric] == expected.data.metrics[metric], metric


def test_fine_tuning_the_last_blocks_with_moving_averages(place):
    more = ("--trainable-blocks", "2", "--backbone-lr-scale", "0.1", "--model-ema-decay", "0.5", "--visualize")
    done = train(
        *arguments(place, "--runtime", "inline", "--name", "fine", "--epochs", "1", *more),
        *(
            "--horizontal-flip",
            "0.5",
            "--rotation",
            "5",
            "--random-resized-crop",
            "0.7",
            "--color-jitter",
            "0.2",
        ),
        storage=place,
    )
    assert done.returncode == 0, done.stderr
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    run, _ = results(place, "fine")
    shown = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "figures/filters")}
    # Those of the frozen first layer are as they were, and do not form.
    changed = {f"features.{n}-before-after.png" for n in (11, 18)}
    assert shown == {"features.0.svg", *(f"features.{n}.png" for n in (0, 11, 18)), *changed}
    before = torch.load(place / "weights.pth", weights_only=True)
    state = torch.load(place / "fine" / "epoch-0001" / "state.pt", weights_only=True, mmap=True)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, state["model"][name])}
    blocks = {f"features.{i}.{kind}" for i in (11, 13, 16, 18) for kind in ("weight", "bias")}
    assert changed and changed <= blocks and len(changed) >= 4
    done = train(*arguments(place, "--runtime", "inline", "--name", "fine", "--epochs", "2"), storage=place)
    assert the_error(done) == (
        "checkpoint epoch-0001 of this run trained other layers than this run does: set --trainable-blocks as "
        "it was, or start under another --name"
    )


def test_weights_that_do_not_fit_are_one_line_before_anything_starts(place):
    done = train(*arguments(place, "--runtime", "inline", "--model", "vgg16"), storage=place)
    assert the_error(done).endswith(
        "weights.pth is not of vgg16: features.2.weight is absent in the file and 64x64x3x3 in the model"
    )
    assert "run  " not in done.stderr


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"weights": "nowhere.pth"},
            "--weights nowhere.pth: there is no such file; torchvision's names for vgg11",
        ),
        ({"weights_preprocessing": ""}, "set --weights-preprocessing to the normalization that it was trained"),
        (
            {"weights": "none", "trainable_blocks": 5},
            "--weights-preprocessing is for the file that --weights names",
        ),
        ({"name": "scratch-cnn-photo"}, "--weights is for models that go on from pretrained weights"),
        (
            {"weights": "", "weights_preprocessing": ""},
            "would freeze convolutions that are random: name --weights",
        ),
    ],
)
def test_settings_of_weights_that_make_no_sense(place, settings, text):
    named = {"name": "vgg11", "weights": str(place / "weights.pth"), "weights_preprocessing": "imagenet"}
    with pytest.raises(UserError) as error:
        models.prepare(ModelConfig(**{**named, **settings}))
    assert text in str(error.value) and "\n" not in str(error.value)


def test_accuracy_on_real_photographs(shared_data, tmp_path):
    """Thirty-two photographs to learn from are enough for most, if weights and normalization are right."""
    features = shared_data / "weights" / "vgg16_features.pth"
    photographs = shared_data / "dogs-vs-cats"
    if not features.is_file() or not photographs.is_dir():
        pytest.skip("no photographs or weights in CVDIST_TEST_DATA")
    for part, count in (("train", 16), ("valid", 20)):
        for name in ("cat", "dog"):
            target = tmp_path / "few" / part / name
            target.mkdir(parents=True)
            for file in sorted((photographs / part / name).iterdir())[:count]:
                (target / file.name).symlink_to(file)
    done = train(
        *("dogs-cats-vgg16", "--data", tmp_path / "few", "--weights", features, "--runtime", "inline"),
        *("--weights-preprocessing", "vgg-features", "--batch-size", "8", "--epochs", "2", "--no-log-model"),
        *("--lr-warmup-epochs", "0", "--cache", tmp_path / "cache", "--name", "few", "--no-visualize"),
        storage=tmp_path,
        OMP_NUM_THREADS="2",
    )
    assert done.returncode == 0, done.stderr
    run, _ = results(tmp_path, "few")
    assert run.data.metrics["valid/total"] == 40 and run.data.metrics["valid/correct"] >= 34, done.stderr
