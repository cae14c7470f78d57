"""A VGG16 with the convolutions that torchvision offers."""

from __future__ import annotations

import math
from hashlib import sha256

import pytest
import torch
from torch import nn

from cvdist import models
from cvdist.config import ModelConfig, SavedModelConfig
from cvdist.errors import UserError
from cvdist.saved import open_model
from tests.helpers.networks import PHOTOS


@pytest.fixture(scope="module")
def features_file(shared_data):
    path = shared_data / "weights" / "vgg16_features.pth"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path


@pytest.fixture(scope="module")
def vgg16(features_file):
    torch.manual_seed(0)
    settings = ModelConfig(
        name="vgg16", weights=str(features_file), weights_preprocessing="vgg-features", dropout=0.2
    )
    return models.build_model(settings, PHOTOS, 2)


def test_the_file_gives_the_convolutions_and_the_rest_is_new(vgg16, features_file):
    saved = torch.load(features_file, weights_only=True, mmap=True)
    state = vgg16.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())
    trained = {name.split(".")[0] for name, tensor in vgg16.named_parameters() if tensor.requires_grad}
    assert trained == {"classifier"}
    linear = [vgg16.classifier[i] for i in (0, 3, 6)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [
        (25_088, 4_096), (4_096, 4_096), (4_096, 2)
    ]  # fmt: skip
    for layer in linear:
        # Uniform, with variance 1 / (3 inputs); the spread over n weights is known to within less than 1 /
        # sqrt(2 n).
        expected = (3 * layer.in_features) ** -0.5
        assert layer.weight.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * layer.weight.numel()))
    assert [layer.p for layer in vgg16.classifier if isinstance(layer, nn.Dropout)] == [0.2, 0.2]


def test_origin_is_what_sha256sum_says(vgg16, features_file):
    assert models.origin(vgg16).digest == sha256(features_file.read_bytes()).hexdigest()
    assert models.origin(vgg16).source == str(features_file)
    assert models.origin(vgg16).preprocessing.name == "vgg-features"


def test_convolutions_alone_serve_for_all_but_answers(features_file):
    saved = open_model(
        SavedModelConfig(source=str(features_file), model="vgg16", weights_preprocessing="vgg-features")
    )
    state = torch.load(features_file, weights_only=True)
    assert torch.equal(saved.model.features[28].weight, state["features.28.weight"])
    assert not saved.has_classifier and saved.std == (1 / 255,) * 3
    with pytest.raises(UserError, match="has no classifier"):
        saved.require_classifier()
