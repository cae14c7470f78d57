"""VGG with pretrained weights: what is frozen, what is trained, and where the weights come from."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from hashlib import sha256

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import VGG16_Weights

from cvdist import config as configs
from cvdist import models
from cvdist.config import ModelConfig, OptimizerConfig, TrainConfig
from cvdist.errors import UserError
from cvdist.models import InputSpec
from cvdist.models.servable import ServableClassifier
from cvdist.training.optimizer import build_optimizer, set_learning_rate
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


@pytest.mark.parametrize("name", ALL)
def test_state_dict_is_torchvisions(name):
    model = without_memory(name, num_classes=7)
    with torch.device("meta"):
        plain = torchvision.models.get_model(name, num_classes=7)
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in plain.state_dict().items()
    }


# ------------------------------------------------------------------------------------------- the two parts


@pytest.mark.parametrize("trainable_stages", range(6))
@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn"])
def test_one_part_after_the_other_is_the_model(name, trainable_stages):
    model = small(name, trainable_stages).eval()
    modules = models.frozen_and_trained(model)
    images = pictures(2)
    if modules.frozen is None:
        assert trainable_stages == 5 and modules.trained is model
        return
    assert torch.equal(modules.trained(modules.frozen(images)), model(images))
    assert model.state_dict().keys() == modules.frozen.state_dict().keys() | modules.trained.state_dict().keys()
    assert not modules.frozen.state_dict().keys() & modules.trained.state_dict().keys()
    assert (
        trained_names(modules.trained)
        == trained_names(model)
        == [n for n, _ in modules.trained.named_parameters()]
    )


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


def test_frozen_batch_norms_stay_in_evaluation_mode():
    model = small("vgg11_bn", trainable_stages=1)
    modules = models.frozen_and_trained(model)
    for mode_of in (model, modules.frozen, modules.trained):
        mode_of.train()
        modes = [layer.training for layer in model.features]
        assert modes == [False] * 22 + [True] * 7  # the last block: two times convolution, norm, ReLU; pooling
    assert modules.trained.training and model.classifier.training
    model.eval()
    assert not any(layer.training for layer in model.modules())


def test_training_changes_the_trained_blocks_and_nothing_of_the_frozen_ones():
    model = small("vgg11_bn", trainable_stages=1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=0.1))
    for _ in range(2):
        set_learning_rate(optimizer, 0.1)
        model(pictures(4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    # Of the last block: convolutions 22 and 25, batch norms 23 and 26 with their statistics.
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"features.{i}.{kind}" for i in (23, 26) for kind in statistics}
    expected |= {f"features.{i}.{kind}" for i in (22, 25) for kind in ("weight", "bias")}
    expected |= {f"classifier.{i}.{kind}" for i in (0, 3, 6) for kind in ("weight", "bias")}
    # A batch norm takes its convolution's bias away again, so that gradient is 0; decay leaves biases alone.
    assert expected - changed <= {"features.22.bias", "features.25.bias"}
    assert changed <= expected


def test_features_of_a_picture_do_not_depend_on_the_batch():
    model = small("vgg11_bn").train()  # norms over the batch would make them
    frozen = models.frozen_and_trained(model).frozen
    images = pictures(4)
    alone = torch.cat([frozen(image[None]) for image in images])
    torch.testing.assert_close(frozen(images), alone, rtol=1e-4, atol=1e-5)
    model.eval()
    torch.testing.assert_close(model(images)[:1], model(images[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trainable_stages", [0, 2])
def test_an_empty_share_takes_part_in_training(trainable_stages):
    modules = models.frozen_and_trained(
        small(trainable_stages=trainable_stages).to(memory_format=torch.channels_last).train()
    )
    scores = modules.trained(modules.frozen(pictures(0).to(memory_format=torch.channels_last)))
    assert scores.shape == (0, 2)
    scores.sum().backward()
    assert all(not p.grad.any() for p in modules.trained.parameters())


def test_channels_last_is_the_same_function():
    model, images = small(trainable_stages=1).eval(), pictures(2)
    expected = model(images)
    modules = models.frozen_and_trained(model)  # before the conversion: they share the layers
    model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(modules.trained(modules.frozen(images)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 70), (224, 224)])
def test_any_size_from_32_on(height, width):
    assert small().eval()(pictures(1, height, width)).shape == (1, 2)


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


def test_exports_with_any_number_of_pictures():
    servable = ServableClassifier(small(trainable_stages=1), (0.5,) * 3, (0.2,) * 3, multilabel=False).eval()
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    program = torch.export.export(servable, (pixels[:2],), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.testing.assert_close(program.module()(pixels), servable(pixels))


def test_backbone_has_a_learning_rate_of_its_own():
    model = small(trainable_stages=1)
    modules = models.frozen_and_trained(model)
    config = OptimizerConfig(weight_decay=0.5, backbone_lr_scale=0.1)
    optimizer = build_optimizer(modules.trained, config, stages=modules.stages)
    set_learning_rate(optimizer, 0.02)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    slow, fast = pytest.approx(0.002), pytest.approx(0.02)
    assert rates == {
        "features.16.weight": (slow, 0.5),
        "features.18.weight": (slow, 0.5),
        "features.16.bias": (slow, 0.0),
        "features.18.bias": (slow, 0.0),
        "classifier.0.weight": (fast, 0.5),
        "classifier.3.weight": (fast, 0.5),
        "classifier.6.weight": (fast, 0.5),
        "classifier.0.bias": (fast, 0.0),
        "classifier.3.bias": (fast, 0.0),
        "classifier.6.bias": (fast, 0.0),
    }


# --------------------------------------------------------------------------------------- real weights, photos


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


@pytest.fixture(scope="module")
def photos(shared_data):
    """Two cats, then two dogs."""
    folder = shared_data / "dogs-vs-cats" / "valid"
    paths = [*sorted((folder / "cat").glob("*.jpg"))[:2], *sorted((folder / "dog").glob("*.jpg"))[:2]]
    if len(paths) != 4:
        pytest.skip(f"no photographs in {folder}")
    return [Image.open(path).convert("RGB") for path in paths]


def test_the_file_gives_the_convolutions_and_the_rest_is_new(vgg16, features_file):
    saved = torch.load(features_file, weights_only=True, mmap=True)
    state = vgg16.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())
    assert trained_names(vgg16) == CLASSIFIER_NAMES
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


def test_features_of_photographs_make_sense_with_the_right_normalization_only(vgg16, photos):
    frozen = models.frozen_and_trained(vgg16).frozen

    def features(transform, photos):
        with torch.no_grad():
            return frozen(torch.stack([transform(photo) for photo in photos]))

    right = features(VGG16_Weights.IMAGENET1K_FEATURES.transforms(), photos)
    assert right.shape == (4, 512, 7, 7)
    zeros = (right == 0).float().mean((1, 2, 3))
    assert zeros.mean().item() == pytest.approx(0.85, abs=0.03)
    # Cats are more like cats, dogs like dogs.
    alike = torch.corrcoef(right.mean((2, 3)))
    same = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)) - torch.eye(4)
    assert (alike * same).sum() / same.sum() > alike[:2, 2:].mean() + 0.1
    # 57 times less contrast than these weights expect: hardly anything is found, and a cat looks like a dog.
    wrong = features(VGG16_Weights.IMAGENET1K_V1.transforms(), [photos[0], photos[-1]])
    assert wrong.mean() < right.mean() / 5
    assert (wrong == 0).float().mean() < 0.8
    assert torch.corrcoef(wrong.mean((2, 3)))[0, 1] > alike[0, 3] + 0.3


def test_loads_into_torchvisions_own_vgg16_and_is_the_same_function(vgg16):
    with torch.device("meta"):
        plain = torchvision.models.vgg16(num_classes=2)
    plain.load_state_dict(vgg16.state_dict(), strict=True, assign=True)
    images = pictures(2, 64, 64) * 50
    vgg16.eval()
    assert torch.equal(plain.eval()(images), vgg16(images))
    vgg16.train()


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


def test_random_convolutions_are_not_frozen():
    for none in ("", "none"):
        with pytest.raises(UserError, match=r"would freeze layers that are random.*--weights none"):
            models.build_model(ModelConfig(name="vgg11", weights=none, trainable_stages=4), PHOTOS, 2)


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


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"trainable_stages": -1}, "--trainable-stages is -1: it takes all, or 0 or more"),
        ({"backbone_lr_scale": -0.1}, "--backbone-lr-scale is -0.1: it takes 0 or more"),
    ],
)
def test_settings_out_of_range(changes, text):
    with pytest.raises(UserError, match=re.escape(text)):
        configs.check(configs.replace(TrainConfig(), **changes))


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
