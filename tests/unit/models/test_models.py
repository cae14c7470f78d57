"""Models: what the registry finds, and what the scratch CNN computes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cvdist import models
from cvdist.config import ModelConfig
from cvdist.models import InputSpec, registry
from tests.helpers.jobs import user_error

DIGITS = InputSpec(channels=1, height=28, width=28)
PHOTOS = InputSpec(channels=3, height=224, width=224)


def build(name="scratch-cnn", shape=DIGITS, num_classes=10, dropout=0.5):
    torch.manual_seed(0)
    settings = ModelConfig(name=name, dropout=dropout)
    return models.build_model(settings, shape, num_classes)


def build_without_memory(*args, **kwargs):
    """The same on the meta device, shapes without values: the photo model has 28 million weights."""
    with torch.device("meta"):
        return build(*args, **kwargs)


def batch(n, shape=DIGITS):
    return torch.randn(n, shape.channels, shape.height, shape.width, generator=torch.Generator().manual_seed(1))


def outputs_of(model, layer, images):
    """What the layer of that name returns in a forward pass."""
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _module, _args, out: seen.append(out))
    try:
        model(images)
    finally:
        handle.remove()
    return seen[0]


# ---------------------------------------------------------------------------------------------- the registry


def test_each_model_takes_the_input_that_it_names():
    inputs = {"scratch-cnn": DIGITS, "scratch-cnn-photo": PHOTOS, "vgg11": PHOTOS, "resnet18": PHOTOS}
    for name, shape in (inputs | {"inception_v3": InputSpec(3, 299, 299)}).items():
        assert name in models.names() and models.find(name).default_input == shape
        model = models.skeleton(ModelConfig(name=name), 7).to("meta")
        assert model(batch(2, shape).to("meta")).shape == (2, 7)


def test_unknown_name_suggests_the_nearest():
    message = user_error(models.find, "scrach-cnn")
    assert message == "unknown model 'scrach-cnn': did you mean scratch-cnn or scratch-cnn-photo?"
    assert user_error(build, "zzz") == (
        "unknown model 'zzz': --model takes scratch-cnn, scratch-cnn-photo, and the classifiers of "
        "torchvision, such as resnet50"
    )


def test_a_registered_model_is_built_with_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(registry, "MODELS", {})
    spec = models.ModelSpec(
        name="linear",
        default_input=DIGITS,
        problem=lambda shape: "",
        build=lambda shape, num_classes, config: nn.Sequential(
            nn.Dropout(config.dropout), nn.Linear(shape.width, num_classes)
        ),
    )
    models.register(spec)
    model = build("linear", InputSpec(1, 1, 6), num_classes=3, dropout=0.125)
    assert (model[0].p, model[1].in_features, model[1].out_features) == (0.125, 6, 3)
    with pytest.raises(ValueError, match="'linear' is registered already"):
        models.register(spec)


# ------------------------------------------------------------------------------------- sizes, worked by hand


@pytest.mark.parametrize(
    ("name", "shape", "flattened", "linear_sizes"),
    [
        # 28 -conv-> 24 -pool-> 12 -conv-> 8 -pool-> 4; 20 channels x 4 x 4 = 320
        ("scratch-cnn", DIGITS, 320, [(320, 50), (50, 10)]),
        # 224 -> 220 -> 110 -> 106 -> 53; 20 x 53 x 53 = 56180
        ("scratch-cnn-photo", PHOTOS, 56180, [(56180, 500), (500, 50), (50, 10)]),
        # 33 -> 29 -> 14 -> 10 -> 5 and 40 -> 36 -> 18 -> 14 -> 7; 20 x 5 x 7 = 700
        ("scratch-cnn", InputSpec(2, 33, 40), 700, [(700, 50), (50, 10)]),
    ],
)
def test_flattened_size(name, shape, flattened, linear_sizes):
    model = build_without_memory(name, shape)
    assert outputs_of(model, "flatten", batch(2, shape).to("meta")).shape == (2, flattened)
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == linear_sizes


@pytest.mark.parametrize(
    ("name", "shape", "num_classes", "expected"),
    [
        # conv1 10*(1*25)+10 = 260; conv2 20*(10*25)+20 = 5020; fc1 320*50+50 = 16050; fc2 50*10+10 = 510
        ("scratch-cnn", DIGITS, 10, 21_840),
        # conv1 10*(3*25)+10 = 760; conv2 5020; fc1 56180*500+500 = 28090500; fc2 500*50+50 = 25050;
        # fc3 50*2+2 = 102
        ("scratch-cnn-photo", PHOTOS, 2, 28_121_432),
    ],
)
def test_parameter_count(name, shape, num_classes, expected):
    model = build_without_memory(name, shape, num_classes)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_layers_have_the_books_order_and_names():
    photo = build_without_memory("scratch-cnn-photo", PHOTOS)
    convolutions = ["conv1", "conv1_pool", "conv1_relu", "conv2", "conv2_dropout", "conv2_pool", "conv2_relu"]
    linear = ["fc1", "fc1_relu", "fc1_dropout", "fc2"]
    assert [name for name, _ in build().named_children()] == [
        *convolutions, "flatten", *linear, "log_softmax"
    ]  # fmt: skip
    assert [name for name, _ in photo.named_children()] == [
        *convolutions, "flatten", *linear, "fc2_relu", "fc2_dropout", "fc3", "log_softmax"
    ]  # fmt: skip


# ---------------------------------------------------------------------------------- any input, any classes


@settings(max_examples=25)
@given(
    channels=st.integers(1, 5),
    height=st.integers(16, 40),
    width=st.integers(16, 40),
    num_classes=st.integers(1, 12),
    n=st.integers(0, 3),
)
def test_any_size_channels_and_classes(channels, height, width, num_classes, n):
    shape = InputSpec(channels, height, width)
    for name in ("scratch-cnn", "scratch-cnn-photo"):
        probabilities = build(name, shape, num_classes)(batch(n, shape)).exp()
        assert probabilities.shape == (n, num_classes)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(n))


@pytest.mark.parametrize("shape", [InputSpec(1, 15, 28), InputSpec(1, 28, 15), InputSpec(3, 4, 4)], ids=str)
@pytest.mark.parametrize("name", ["scratch-cnn", "scratch-cnn-photo"])
def test_a_picture_that_is_too_small_is_refused_with_the_smallest_that_works(name, shape):
    message = user_error(build, name, shape)
    assert message.startswith(f"--model {name} takes pictures of 16x16 pixels or more, ")
    assert f"these are {shape.height}x{shape.width}:" in message


def test_dropouts_have_the_rate_asked_for():
    photo = build_without_memory("scratch-cnn-photo", PHOTOS, dropout=0.3)
    found = {name: (type(layer), layer.p) for name, layer in photo.named_children() if "dropout" in name}
    linear = (nn.Dropout, 0.3)
    assert found == {"conv2_dropout": (nn.Dropout2d, 0.3), "fc1_dropout": linear, "fc2_dropout": linear}


# ------------------------------------------------------------------------------- other ways of running it


def test_bfloat16_autocast_returns_log_probabilities_in_float32():
    model, images = build().eval(), batch(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(images)
    assert half.dtype == torch.float32
    # In bfloat16 the sum would be wrong by up to 2^-8.
    torch.testing.assert_close(half.exp().sum(1), torch.ones(16), rtol=0, atol=1e-6)
    torch.testing.assert_close(half, model(images), rtol=0, atol=0.05)


def test_float64_keeps_its_precision():
    assert build().double()(batch(2).double()).dtype == torch.float64
