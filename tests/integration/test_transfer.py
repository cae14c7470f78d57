"""Transfer learning as a user runs it: jobs on image folders, with a small VGG and random convolutions."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import pytest
import torch
import torchvision

from tests.helpers import pictures
from tests.helpers.feature_caches import write_weights
from tests.helpers.jobs import call, the_error
from tests.helpers.stores import the_run

FEATURES = 9_220_480  # parameters of VGG11's convolutions
HIDDEN = 16  # units of the classifier's hidden layers, for a checkpoint of 40 MB instead of a gigabyte
CLASSIFIER = (25_088 * HIDDEN + HIDDEN) + (HIDDEN * HIDDEN + HIDDEN) + (HIDDEN * 2 + 2)


@pytest.fixture(scope="module")
def place(module_path):
    """Sixteen pictures, one bad one, and weights."""
    root = module_path
    counts = {"train/cat": 8, "train/dog": 8, "valid/cat": 3, "valid/dog": 3}
    pictures.write(root / "pictures", counts)
    (root / "pictures" / "train" / "dog" / "damaged.jpg").write_bytes(pictures.jpeg(1)[:300])
    write_weights(root / "weights.pth")
    return root


def arguments(place, *more):
    return [
        *("dogs-cats-vgg16", "--model", "vgg11", "--data", place / "pictures", "--image-size", "32"),
        *("--weights", place / "weights.pth", "--weights-preprocessing", "imagenet", "--lr", "0.001"),
        *("--max-bad-fraction", "0.1", "--batch-size", "8", "--log-every-steps", "1", "--no-log-model"),
        *("--dropout", "0", "--precision", "float32", "--cache", place / "cache", "--hidden-size", str(HIDDEN)),
        *("--no-visualize", *more),
    ]


@pytest.fixture(scope="module")
def alone(place):
    done = call(
        "train", *arguments(place, "--runtime", "inline", "--name", "one", "--epochs", "2"), storage=place
    )
    assert done.returncode == 0, done.stderr
    return done


def test_only_the_classifier_is_trained_and_the_checkpoint_is_an_ordinary_vgg(place, alone):
    """With torchvision's names, and its shapes but for the size of the hidden layers."""
    assert f"{CLASSIFIER:,} trained parameters, {FEATURES:,} frozen" in alone.stderr
    before = torch.load(place / "weights.pth", weights_only=True)
    (checkpoint,) = (place / "one").glob("epoch-0002")
    state = torch.load(checkpoint / "state.pt", weights_only=True, mmap=True)
    with torch.device("meta"):
        plain = torchvision.models.vgg11(num_classes=2)
        for layer, sizes in ((0, (25_088, HIDDEN)), (3, (HIDDEN, HIDDEN)), (6, (HIDDEN, 2))):
            plain.classifier[layer] = torch.nn.Linear(*sizes)
    plain.load_state_dict(state["model"], strict=True, assign=True)
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in before.items())
    assert (
        sum(buffers["momentum_buffer"].numel() for buffers in state["optimizer"]["state"].values())
        == CLASSIFIER
    )


def test_the_run_says_what_it_came_from_and_what_was_left_out(place, alone):
    client, run = the_run(place, "one")
    losses = [one.value for one in client.get_metric_history(run.info.run_id, "step/loss")]
    assert len(losses) == 4 and losses[-1] < losses[0]
    parameters = run.data.params
    digest = hashlib.sha256((place / "weights.pth").read_bytes()).hexdigest()
    assert parameters["weights.sha256"] == digest and parameters["weights.normalization"] == "imagenet"
    assert parameters["run.frozen_parameters"] == str(FEATURES)
    assert parameters["data.mean"] == "(0.485, 0.456, 0.406)"
    path = client.download_artifacts(run.info.run_id, "quarantine.csv", str(place))
    (bad,) = csv.DictReader(Path(path).read_text().splitlines())
    assert bad["path"] == "train/dog/damaged.jpg" and bad["reason"]
    assert (
        "left out: 1 of 23 pictures (4.35%), which can't be decoded, e.g. train/dog/damaged.jpg" in alone.stderr
    )


def test_fine_tuning_the_last_blocks_with_moving_averages(place):
    more = ("--trainable-stages", "2", "--backbone-lr-scale", "0.1", "--model-ema-decay", "0.5", "--visualize")
    done = call(
        "train",
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
    client, run = the_run(place, "fine")
    shown = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "figures/filters")}
    # Those of the frozen first layer are as they were, and do not form.
    changed = {f"features.{n}-before-after.png" for n in (11, 18)}
    assert shown == {"features.0.svg", *(f"features.{n}.png" for n in (0, 11, 18)), *changed}
    before = torch.load(place / "weights.pth", weights_only=True)
    state = torch.load(place / "fine" / "epoch-0001" / "state.pt", weights_only=True, mmap=True)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, state["model"][name])}
    blocks = {f"features.{i}.{kind}" for i in (11, 13, 16, 18) for kind in ("weight", "bias")}
    assert changed and changed <= blocks and len(changed) >= 4
    done = call(
        "train", *arguments(place, "--runtime", "inline", "--name", "fine", "--epochs", "2"), storage=place
    )
    assert the_error(done) == (
        "checkpoint epoch-0001 of this run trained other layers than this run does: set --trainable-stages and "
        "--layer-decay as they were, or start under another --name"
    )


def test_weights_that_do_not_fit_are_one_line_before_anything_starts(place):
    done = call("train", *arguments(place, "--runtime", "inline", "--model", "vgg16"), storage=place)
    assert "weights.pth is not of vgg16: features.2.weight, features.2.bias and" in the_error(done)
    assert "run  " not in done.stderr
