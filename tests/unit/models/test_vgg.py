"""VGG with pretrained weights: what is frozen, what is trained, and where the weights come from."""

from __future__ import annotations

import re
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cvdist import models
from cvdist.config import ModelConfig
from cvdist.errors import UserError
from cvdist.models import InputSpec
from tests.helpers.networks import ALL, PHOTOS, small, without_memory


def pictures(n, height=32, width=32):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def trained_names(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# ---------------------------------------------------------------------------------------- sizes, by hand

# Weights and biases of the 3x3 convolutions of VGG16, block by block.
BLOCKS = [
    (3 * 9 * 64 + 64) + (64 * 9 * 64 + 64),  # 38,720
    (64 * 9 * 128 + 128) + (128 * 9 * 128 + 128),  # 221,440
    (128 * 9 * 256 + 256) + 2 * (256 * 9 * 256 + 256),  # 1,475,328
    (256 * 9 * 512 + 512) + 2 * (512 * 9 * 512 + 512),  # 5,899,776
    3 * (512 * 9 * 512 + 512),  # 7,079,424
]
# 512 x 7 x 7 = 25,088 inputs, two hidden layers of 4,096, two classes.
CLASSIFIER = (25_088 * 4_096 + 4_096) + (4_096 * 4_096 + 4_096) + (4_096 * 2 + 2)


@pytest.mark.parametrize("trainable_stages", range(6))
def test_parameter_counts(trainable_stages):
    model = without_memory("vgg16", trainable_stages)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert CLASSIFIER == 119_554_050
    assert sum(p.numel() for p in model.parameters()) == sum(BLOCKS) + CLASSIFIER == 134_268_738
    assert trained == CLASSIFIER + sum(BLOCKS[5 - trainable_stages :])


CLASSIFIER_NAMES = [f"classifier.{i}.{kind}" for i in (0, 3, 6) for kind in ("weight", "bias")]


@pytest.mark.parametrize(
    ("name", "trainable_stages", "layers"),
    [
        ("vgg16", 0, []),
        ("vgg16", 1, [24, 26, 28]),
        ("vgg16", 2, [17, 19, 21, 24, 26, 28]),
        ("vgg11", 1, [16, 18]),
        ("vgg19", 1, [28, 30, 32, 34]),
        # Three times convolution, batch norm, ReLU.
        ("vgg16_bn", 1, [34, 35, 37, 38, 40, 41]),
    ],
)
def test_the_last_blocks_are_trained(name, trainable_stages, layers):
    expected = [f"features.{i}.{kind}" for i in layers for kind in ("weight", "bias")] + CLASSIFIER_NAMES
    assert trained_names(without_memory(name, trainable_stages)) == expected


# ------------------------------------------------------------------------------------------- the two parts


def test_a_model_without_frozen_layers_is_its_trained_part():
    model = models.build_model(ModelConfig(), InputSpec(1, 28, 28), 10)
    assert models.frozen_and_trained(model) == models.FrozenAndTrained(frozen=None, trained=model)


def test_the_frozen_part_leaves_no_graph():
    model = small(trainable_stages=1).train()
    modules = models.frozen_and_trained(model)
    features = modules.frozen(pictures(2))
    assert not features.requires_grad
    modules.trained(features).sum().backward()
    assert all(p.grad is None for p in modules.frozen.parameters())
    assert all(p.grad is not None for p in modules.trained.parameters())


def test_channels_last_is_the_same_function():
    model, images = small(trainable_stages=1).eval(), pictures(2)
    expected = model(images)
    modules = models.frozen_and_trained(model)  # before the conversion: they share the layers
    model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(modules.trained(modules.frozen(images)), expected, rtol=1e-4, atol=1e-5)


def test_an_average_of_the_trained_part_stands_in_its_place():
    model = small(trainable_stages=1).eval()
    modules = models.frozen_and_trained(model)
    average = AveragedModel(modules.trained, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    averaged = models.with_trained(model, average.module)
    images = pictures(2)
    assert torch.equal(averaged(images), model(images))
    average.update_parameters(modules.trained)  # the first update copies
    with torch.no_grad():
        model.classifier[6].bias += 1.0
    average.update_parameters(modules.trained)
    # 0.9 of the old bias and 0.1 of the new one, which is larger by 1.
    torch.testing.assert_close(averaged(images) - model(images), torch.full((2, 2), -0.9), rtol=0, atol=1e-5)
    # No second copy of anything: the frozen tensors are the model's, the others the average's.
    assert averaged.features[0].weight.data_ptr() == model.features[0].weight.data_ptr()
    assert averaged.classifier[0].weight.data_ptr() == average.module.classifier[0].weight.data_ptr()
    assert averaged.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match=r"no conv1\.weight"):
        models.with_trained(model, nn.Sequential(OrderedDict(conv1=nn.Conv2d(1, 1, 1))))


# --------------------------------------------------------------------------------------- settings, refused


@pytest.mark.parametrize("name", ALL)
def test_gray_and_tiny_pictures_are_refused(name):
    spec = models.find(name)
    spec.check(InputSpec(3, 32, 32))
    for shape, text in [
        (InputSpec(1, 224, 224), "takes pictures of 3 channels, these have 1: use color pictures"),
        (InputSpec(3, 31, 224), "takes pictures of 32x32 pixels or more, these are 31x224"),
    ]:
        with pytest.raises(UserError, match=f"^--model {name} {re.escape(text)}"):
            spec.check(shape)


def test_without_weights_all_is_trained():
    model = without_memory("vgg11", 5)
    assert all(p.requires_grad for p in model.parameters())
    assert models.origin(model) is None
    assert models.frozen_and_trained(model).trained is model


@pytest.mark.parametrize(
    ("changes", "flag"),
    [({"weights": "IMAGENET1K_V1"}, "--weights"), ({"trainable_stages": 1}, "--trainable-stages")],
)
def test_a_model_that_ignores_a_setting_says_so(changes, flag):
    settings = ModelConfig(name="scratch-cnn", **changes)
    for ask in (lambda: models.build_model(settings, InputSpec(1, 28, 28), 10), lambda: needs(**changes)):
        with pytest.raises(UserError, match=f"^{flag} is for models .* not for --model scratch-cnn.*vgg16"):
            ask()


# --------------------------------------------------------------------------------------------- normalisation


def needs(model="scratch-cnn", **changes):
    return models.preprocessing(ModelConfig(name=model, **changes))


def test_more_stages_than_there_are_names_their_number():
    settings = ModelConfig(name="resnet18", weights="file.pth", trainable_stages=6)
    with pytest.raises(
        UserError, match=r"^--trainable-stages is 6: --model resnet18 has 5, of which the last begins"
    ):
        models.build_model(settings, PHOTOS, 2)
    settings = ModelConfig(name="vit_b_16", weights="file.pth", head="vgg")
    with pytest.raises(UserError, match=r"^--model vit_b_16 has no maps .* use --features-at pooled"):
        models.build_model(settings, PHOTOS, 2)
