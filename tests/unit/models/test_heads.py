"""Heads on a VGG's convolutions: what they compute, which weights fit them, and that one cache serves all."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from cvdist import models
from cvdist.config import ModelConfig, SavedModelConfig
from cvdist.errors import UserError
from cvdist.models import HeadSize, InputSpec
from cvdist.models.transfer import give_values
from cvdist.results import ModelIdentity
from cvdist.saved import open_model

TINY = InputSpec(3, 32, 32)


def head(kind, hidden_size=0, **changes):
    given = {"name": "vgg11", "features_at": "maps", "trainable_stages": 5, **changes}
    return ModelConfig(head=kind, hidden_size=hidden_size, **given)


def linear_layers(model):
    return [tuple(layer.weight.shape) for layer in model.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize(
    ("settings", "layers", "size"),
    [
        (head("vgg"), [(4096, 25088), (4096, 4096), (3, 4096)], HeadSize("vgg", 4096)),
        (head("vgg", 1024), [(1024, 25088), (1024, 1024), (3, 1024)], HeadSize("vgg", 1024)),
        (head("mlp"), [(256, 512), (3, 256)], HeadSize("mlp", 256)),
        (head("mlp", 64), [(64, 512), (3, 64)], HeadSize("mlp", 64)),
        (head("linear"), [(3, 25088)], HeadSize("linear", 0)),
    ],
)
def test_sizes_and_what_tells_heads_apart(settings, layers, size):
    model = models.skeleton(settings, num_classes=3)
    assert linear_layers(model) == layers
    assert settings.head_size == size
    assert all(type(layer) in (nn.Linear, nn.ReLU, nn.Dropout) for layer in model.classifier)
    assert [layer.p for layer in model.classifier if isinstance(layer, nn.Dropout)] == [0.5] * (len(layers) - 1)
    # Nothing but the classifier has weights: any head's state dict is features and classifier.
    assert {name.split(".")[0] for name in model.state_dict()} == {"features", "classifier"}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "swin_t", "vgg11", "squeezenet1_1"])
@pytest.mark.parametrize("kind", ["mlp", "vgg"])
def test_heads_on_what_any_network_computes(name, kind):
    """On maps they are called `classifier`, on a vector they take the place of the last layer."""
    for at in ("maps", "pooled"):
        model = models.skeleton(head(kind, 8, name=name, features_at=at, trainable_stages=0), 3).to("meta")
        modules = models.frozen_and_trained(model)
        on_maps = at == "maps" or name == "squeezenet1_1"
        assert (modules.head == "classifier") == on_maps
        assert (
            modules.frozen.state_dict().keys() | modules.trained.state_dict().keys()
            == model.state_dict().keys()
        )
        features = modules.frozen(torch.zeros(2, 3, 224, 224, device="meta"))
        assert features.ndim == (4 if on_maps else 2)
        assert modules.trained(features).shape == (2, 3)
        assert linear_layers(modules.trained)[-1] == (3, 8)


def test_a_linear_probe_and_an_mlp_are_what_their_names_say():
    torch.manual_seed(0)
    images = torch.randn(1, 3, 224, 224)
    probe = models.skeleton(head("linear"), 2, TINY).eval()
    give_values(probe)
    features = probe.features(images)
    weight, bias = probe.classifier[0].weight, probe.classifier[0].bias
    torch.testing.assert_close(probe(images), features.flatten(1) @ weight.T + bias)
    mlp = models.skeleton(head("mlp", 16), 2, TINY).eval()
    give_values(mlp)
    first, last = mlp.classifier[0], mlp.classifier[-1]
    hidden = (mlp.features(images).mean((2, 3)) @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(mlp(images), hidden @ last.weight.T + last.bias)


def test_a_new_model_begins_as_torchvisions():
    """In distribution: without weights convolutions by He et al., linear layers with deviation 0.01."""
    torch.manual_seed(0)
    model = models.build_model(head("vgg", 64, name="vgg11_bn"), TINY, 1000)
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx((2 / (9 * layer.out_channels)) ** 0.5, rel=0.1)
            assert not layer.bias.any()
        elif isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.eq(1).all() and not layer.bias.any()
            assert layer.running_var.eq(1).all() and not layer.running_mean.any()
    assert model.classifier[0].weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (head("linear", 8), "--hidden-size 8 is for --head vgg and mlp, the linear head has no hidden layer"),
        (ModelConfig(head="mlp"), "--head is for models that go on from pretrained weights, not for --model"),
        (ModelConfig(hidden_size=8), "--hidden-size is for models that go on from pretrained weights, not"),
    ],
)
def test_settings_that_make_no_sense(settings, text):
    with pytest.raises(UserError, match=f"^{text}"):
        models.prepare(settings)


# --------------------------------------------------------------------------------------- files of weights


def file_of(folder, settings, num_classes=5):
    """A state dict of small tensors that look large: each 0.5 over and over."""
    state = models.skeleton(settings, num_classes).state_dict()
    path = folder / f"{settings.head_size}.pth".replace(" ", "-")
    torch.save({name: torch.tensor(0.5).expand(tensor.shape) for name, tensor in state.items()}, path)
    return path


def goes_on_from(path, settings):
    """Which parameters a model for 2 classes takes over from the file, and what is said about that."""
    given = {"weights": str(path), "weights_preprocessing": "imagenet", "trainable_stages": 0}
    settings = dataclasses.replace(settings, **given)
    models.prepare(settings)
    model = models.build_model(settings, TINY, 2)
    return {name for name, p in model.named_parameters() if p.eq(0.5).all()}, models.origin(model).note


def test_what_a_head_takes_over_from_a_file(tmp_path):
    """The file's head, if it is the same one, but for its last layer; else the convolutions, which is said."""
    whole, small = file_of(tmp_path, head("vgg")), file_of(tmp_path, head("mlp", 8))
    convolutions = {name for name in models.skeleton(head("mlp")).state_dict() if name.startswith("features.")}
    first = {"classifier.0.weight", "classifier.0.bias"}
    assert goes_on_from(small, head("mlp", 8)) == (convolutions | first, "without its last layer, of 5 classes")
    left_out = "without classifier.0, classifier.3, which the model's head has not"
    assert goes_on_from(small, head("mlp", 9)) == (convolutions, left_out)
    for settings in (head("mlp"), head("linear"), head("vgg", 8)):
        taken, note = goes_on_from(whole, settings)
        assert taken == convolutions and note.startswith("without classifier.0, classifier.3 and 1 more, which")


@pytest.mark.parametrize("settings", [head("mlp", 8), head("linear")], ids=["mlp", "linear"])
def test_a_state_dict_is_opened_with_the_head_that_it_has(tmp_path, settings):
    path = file_of(tmp_path, settings)
    saved = open_model(SavedModelConfig(source=str(path), model="vgg11", weights_preprocessing="imagenet"))
    assert (saved.identity.head, saved.identity.hidden_size) == settings.head_size
    assert saved.has_classifier and saved.identity.classes == tuple("01234")
    assert saved.model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


# --------------------------------------------------------------------------------------------------- runs


def test_the_identity_of_a_model_names_its_head():
    vgg = ModelIdentity("vgg16", ("a", "b"), 3, 32, 32, "vgg", 4096, "maps")
    mlp = dataclasses.replace(vgg, head="mlp", hidden_size=64)
    assert ModelIdentity.from_dict(json.loads(json.dumps(dataclasses.asdict(mlp)))) == mlp != vgg
    plain = dataclasses.replace(vgg, head="linear", hidden_size=0, features_at="pooled")
    assert str(plain) == "vgg16 (2 classes, 3x32x32)"
    assert str(vgg) == "vgg16, vgg head of 4096 hidden units on maps (2 classes, 3x32x32)"
    assert str(mlp) == "vgg16, mlp head of 64 hidden units on maps (2 classes, 3x32x32)"
