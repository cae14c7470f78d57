"""What a network has learned, as numbers: compared with plain forward passes and gradients."""

from __future__ import annotations

import copy
import logging
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cvdist.errors import UserError
from cvdist.interpret.activations import capture_activations, dead_channels, strongest_channels
from cvdist.interpret.gradcam import grad_cam, last_maps
from cvdist.interpret.hooks import watch_activations, without_softmax
from cvdist.interpret.interpretation import Limits, interpret_model
from cvdist.interpret.layers import convolutions, select_layers
from cvdist.interpret.top_activations import TopActivationCollector, receptive_fields
from cvdist.models.registry import InputSpec
from cvdist.models.scratch_cnn import scratch_cnn


def scratch(side=28):
    torch.manual_seed(0)
    return scratch_cnn(InputSpec(1, side, side), 10, (50,), 0.5)


def vgg(name="vgg11"):
    """With a classifier of 400 thousand weights instead of 119 million."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    model.features.to_empty(device="cpu")
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
    hidden = nn.Linear(25088, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 16), nn.ReLU(True), nn.Dropout()
    model.classifier = nn.Sequential(*hidden, nn.Linear(16, 3))
    return model


def pictures(model, count=3, side=32):
    torch.manual_seed(1)
    side = 28 if isinstance(model, nn.Sequential) else side
    return torch.randn(count, convolutions(model)[0].module.in_channels, side, side)


def hooks_of(model):
    return sum(len(module._forward_hooks) for module in model.modules())


# ----------------------------------------------------------------------------------------------- layers


def test_layers_by_name_number_and_place():
    model = vgg("vgg16")
    names = [layer.name for layer in convolutions(model)]
    assert len(names) == 13 and names[:2] == ["features.0", "features.2"] and names[-1] == "features.28"

    def chosen(asked):
        return [layer.name for layer in select_layers(model, asked)]

    assert chosen("") == chosen("first,fifth,last") == ["features.0", "features.10", "features.28"]
    assert chosen("last, features.2,1") == ["features.0", "features.2", "features.28"]
    assert chosen("all") == names
    assert [layer.name for layer in select_layers(scratch())] == ["conv1", "conv2"]


@pytest.mark.parametrize("word", ["conv3", "0", "3", "fifth", "fc1", "relu"])
def test_a_layer_that_does_not_exist_is_an_error_with_those_that_do(word):
    with pytest.raises(UserError, match=rf"--layers {word}: the model has no .*it has 2: conv1, conv2 "):
        select_layers(scratch(), word)


def test_a_model_without_convolutions_says_so():
    with pytest.raises(UserError, match="has no convolution layers"):
        select_layers(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn"])
def test_what_hooks_see_is_a_manual_forward_to_that_layer(name):
    """These ReLUs work in place: they would overwrite what a hook has kept without a copy."""
    model = vgg(name)
    images = pictures(model)
    maps = capture_activations(model, images, convolutions(model))
    plain = copy.deepcopy(model).eval()
    x = images
    with torch.inference_mode():
        for number, layer in enumerate(plain.features):
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                of_layer = maps[f"features.{number}"]
                assert torch.equal(of_layer.before, x)
                assert (of_layer.before < 0).any()
            elif isinstance(layer, nn.ReLU):
                assert torch.equal(of_layer.after, x)
    assert len(maps) == 8


def test_pooling_between_a_convolution_and_its_relu():
    model = scratch().eval()
    images = pictures(model)
    maps = capture_activations(model, images, convolutions(model))
    assert torch.equal(maps["conv2"].before, model[:4](images))
    assert torch.equal(maps["conv2"].after, model[:7](images))


def test_hooks_are_removed_also_after_an_error():
    model = vgg()
    capture_activations(model, pictures(model), convolutions(model))
    assert hooks_of(model) == 0 and model.training

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), watch_activations(model, convolutions(model), fail):
        assert hooks_of(model) > 8
        model(pictures(model))
    assert hooks_of(model) == 0
    with pytest.raises(RuntimeError, match="channels"):
        capture_activations(model, torch.zeros(1, 2, 32, 32), convolutions(model))
    with pytest.raises(RuntimeError, match="channels"):
        grad_cam(model, convolutions(model)[-1], torch.zeros(1, 2, 32, 32), torch.tensor([0]))
    assert hooks_of(model) == 0 and model.training
    assert all(module.inplace for module in model.modules() if isinstance(module, nn.ReLU))


def top_activations(model, batches, count=9):
    top = TopActivationCollector(model, convolutions(model), count)
    for images, rows in batches:
        top.update(images, rows)
    return top.results()


def test_dead_channels_are_found_and_only_they():
    model = scratch()
    with torch.no_grad():
        model.conv1.weight[[2, 7]] = 0
        model.conv1.bias[[2, 7]] = torch.tensor([-1.0, 0.0])
    found = top_activations(model, [(pictures(model, 20), torch.arange(20))])
    assert dead_channels(found["conv1"].values[:, 0]) == [2, 7]
    maps = capture_activations(model, pictures(model, 1), convolutions(model))["conv1"]
    assert strongest_channels(maps, 0, 64).silent == 2


def test_the_strongest_channels_are_shown_in_order():
    model = scratch()
    maps = capture_activations(model, pictures(model, 2), convolutions(model))["conv2"]
    shown = strongest_channels(maps, 1, 5)
    means = maps.after[1].mean((1, 2))
    assert len(shown.channels) == 5 and shown.total == 20 and list(shown.channels) == sorted(shown.channels)
    rest = [channel for channel in range(20) if channel not in shown.channels]
    assert means[list(shown.channels)].min() >= means[rest].max()
    assert torch.equal(shown.after, maps.after[1, list(shown.channels)])


# ------------------------------------------------------------------------------------- exciting pictures


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 6), st.booleans())
@settings(max_examples=15)
def test_top_pictures_of_any_batches_are_those_of_a_sort(sizes, count, some_equal):
    model = scratch()
    images = pictures(model, sum(sizes))
    if some_equal:
        images[::2] = images[0].clone()
    batches = zip(images.split(sizes), torch.arange(len(images)).split(sizes), strict=True)
    found = top_activations(model, batches, count)
    maps = capture_activations(model, images, convolutions(model))
    for name, layer in maps.items():
        peaks = layer.after.flatten(2).amax(2).T
        best = found[name]
        assert best.values.shape == (len(peaks), min(count, len(images)))
        for channel, peak in enumerate(peaks.tolist()):
            rows = sorted(range(len(peak)), key=lambda row: (-round(peak[row], 4), row))[:count]
            assert best.values[channel].tolist() == pytest.approx([peak[row] for row in rows], abs=1e-3)
            for row, place, value in zip(
                best.pictures[channel].tolist(),
                best.places[channel].tolist(),
                best.values[channel],
                strict=True,
            ):
                assert layer.after[row, channel][tuple(place)] == pytest.approx(value.item(), abs=1e-4)


def test_of_equal_pictures_the_first_rows_are_kept():
    model = scratch()
    same = pictures(model, 1).expand(6, -1, -1, -1)
    batches = [(same[:4], torch.tensor([9, 4, 7, 1])), (same[4:], torch.tensor([0, 5]))]
    found = top_activations(model, batches, 3)
    assert found["conv1"].pictures.tolist() == [[0, 1, 4]] * 10


def test_receptive_fields_of_vgg16():
    with torch.device("meta"):
        model = torchvision.models.vgg16()
        found = receptive_fields(model, torch.zeros(1, 3, 224, 224), convolutions(model))
    # As computed by hand: 3x3 convolutions with padding 1, and four poolings of 2 before the last block.
    assert [found[f"features.{n}"].size[0] for n in (0, 2, 5, 10, 28)] == [3, 5, 10, 24, 196]
    assert found["features.28"].step == (16, 16)
    assert found["features.0"].box(0, 5) == (-1, 4, 2, 7)


@pytest.mark.parametrize(("name", "place"), [("conv1", (3, 8)), ("conv2", (1, 2))])
def test_nothing_outside_the_box_matters(name, place):
    model = scratch()
    image = pictures(model, 1)
    box = receptive_fields(model, image, convolutions(model))[name].box(*place)
    inside = torch.zeros(28, 28, dtype=torch.bool)
    inside[box[0] : box[2], box[1] : box[3]] = True
    assert 0 < inside.sum() < 28 * 28

    def map_of(changed):
        return capture_activations(model, changed, convolutions(model))[name].after[0, :, place[0], place[1]]

    noise = torch.randn(1, 1, 28, 28)
    assert torch.allclose(map_of(image), map_of(torch.where(inside, image, noise)), atol=1e-5)
    assert not torch.allclose(map_of(image), map_of(torch.where(inside, noise, image)), atol=1e-2)


# ---------------------------------------------------------------------------------------------- Grad-CAM


def by_hand(features, head, images, classes):
    """Equations 1 and 2 of the paper."""
    maps = features(images).detach().requires_grad_()
    scores = head(maps).gather(1, classes[:, None]).sum()
    (gradient,) = torch.autograd.grad(scores, maps)
    return (gradient.mean((2, 3), keepdim=True) * maps).sum(1).relu().detach()


def test_grad_cam_is_the_papers_with_relus_in_place_and_all_frozen():
    model = vgg().requires_grad_(False)
    images, classes = pictures(model, 5, side=64), torch.tensor([0, 1, 2, 2, 1])
    found = grad_cam(model, last_maps(model, images[:1]), images, classes)
    plain = copy.deepcopy(model).eval()
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    last = [n for n, layer in enumerate(plain.features) if isinstance(layer, nn.ReLU)][-1]
    head = nn.Sequential(plain.features[last + 1 :], plain.avgpool, nn.Flatten(), plain.classifier)
    expected = by_hand(plain.features[: last + 1], head, images, classes)
    assert found.shape == (5, 4, 4) and found.max() > 0
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_grad_cam_asks_for_scores_not_for_log_probabilities():
    model = scratch()
    images, classes = pictures(model, 3), torch.tensor([3, 1, 4])
    found = grad_cam(model, last_maps(model, images[:1]), images, classes)
    plain = copy.deepcopy(model).eval()
    expected = by_hand(plain[:7], plain[7:-1], images, classes)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7) and found.max() > 0
    with without_softmax(model), torch.inference_mode():
        assert torch.allclose(model.eval()(images), plain[:-1](images))
    assert hooks_of(model) == 0


# ------------------------------------------------------------------------------------------------- study


class Numbered:
    """Random pictures whose class is their row's last digit."""

    size = available = 30

    def __init__(self):
        self._pixels = torch.randint(0, 256, (30, 1, 28, 28), dtype=torch.uint8)
        self.most_at_once = 0

    def read(self, rows):
        return self._pixels[list(rows)], [str(row % 10) for row in rows]


class SeveralNumbers(Numbered):
    """Random pictures with the last digit of their row and the next one as labels; each fifth has no label."""

    def read(self, rows):
        names = [f"{row % 10}, {(row + 1) % 10}" if row % 5 else "no class" for row in rows]
        return super().read(rows)[0], names


def look(model=None, source=None, **changes):
    model, source = model or scratch(), source or Numbered()
    values = {"limits": Limits(pictures=12, top_activations=3), **changes}
    device = torch.device("cpu")
    names = [str(n) for n in range(10)]
    return interpret_model(model, source, names, lambda x: x / 255, device, select_layers(model), **values)


def test_an_interpretation_is_bounded_and_holds_the_included_rows():
    result = look(include=[7, 29])
    assert (result.seen, result.available) == (12, 30)
    assert result.num_correct + result.num_wrong == 12
    rows = {int(row) for row in result.top_activations["conv1"].pictures.flatten()}
    judged = {one.prediction.row for one in result.correct + result.wrong}
    assert len(rows | judged) <= 12
    assert all(
        one.prediction.true != one.prediction.predicted and one.true_map is not None for one in result.wrong
    )
    sure = [one.prediction.confidence for one in result.wrong]
    assert sure == sorted(sure, reverse=True)
    everything = look(limits=Limits(pictures=100), include=[7, 29])
    assert everything.seen == 30


def test_of_several_labels_the_most_probable_class_has_to_be_one():
    torch.manual_seed(1)
    model, source = scratch()[:-1], SeveralNumbers()
    limits = Limits(pictures=100, grad_cams=100)
    result = look(model, source, limits=limits, multilabel=True)
    pixels, names = source.read(range(30))
    with torch.inference_mode():
        probabilities = model.eval()(pixels / 255).sigmoid()
    labels = [() if name == "no class" else tuple(map(int, name.split(", "))) for name in names]
    best = probabilities.argmax(1).tolist()
    right = {row for row, mine in enumerate(labels) if best[row] in mine}
    wrong = {row for row, mine in enumerate(labels) if mine} - right
    assert 0 < len(right) < 24
    assert {one.prediction.row for one in result.correct} == right and result.num_correct == len(right)
    assert {one.prediction.row for one in result.wrong} == wrong and result.num_wrong == len(wrong)
    for one in result.correct + result.wrong:
        row, found = one.prediction.row, one.prediction
        assert found.predicted == str(best[row])
        assert found.confidence == pytest.approx(float(probabilities[row].max()))
        assert found.true == str(max(labels[row], key=probabilities[row].__getitem__))
    assert all(one.true_map is not None for one in result.wrong)


def test_an_interpretation_is_deterministic_and_has_no_grad_cam_without_a_classifier():
    one, other = look(), look()
    assert all(
        torch.equal(one.top_activations[n].pictures, other.top_activations[n].pictures)
        for n in one.top_activations
    )
    assert [e.prediction for e in one.wrong] == [e.prediction for e in other.wrong]
    silent = look(has_classifier=False)
    assert not silent.correct and not silent.wrong and silent.top_activations and silent.maps


def test_a_network_without_maps_has_no_grad_cam_and_says_so(caplog):
    caplog.set_level(logging.INFO, "cvdist")
    result = look(nn.Sequential(nn.Conv2d(1, 6, 28), nn.Flatten(), nn.Linear(6, 10)).eval())
    assert not result.cam_layer and not result.correct and not result.wrong
    assert result.top_activations and result.num_correct + result.num_wrong == 12
    assert "without Grad-CAM: the answer rests on no maps of more than one place" in caplog.text


# ------------------------------------------------------------------------------- networks of other families


def family(name):
    torch.manual_seed(0)
    if name == "vit":
        model = torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 64)
        nn.init.normal_(model.heads.head.weight)  # which begins at zero
    else:
        options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        model = torchvision.models.get_model(name, weights=None, **options)
    return model.eval(), torch.randn(2, 3, 64, 64)


FAMILIES = {
    "resnet18": ("layer4", (2, 2), {"ReLU": 20}),
    "googlenet": ("inception5b", (2, 2), {"ReLU": 57}),
    "mobilenet_v2": ("features", (2, 2), {"ReLU6": 35, "": 17}),
    "mobilenet_v3_small": ("features", (2, 2), {"Hardswish": 18, "ReLU": 14, "Hardsigmoid": 9, "": 11}),
    "efficientnet_b0": ("features", (2, 2), {"SiLU": 49, "Sigmoid": 16, "": 16}),
    "swin_t": ("permute", (2, 2), {"": 1}),
    "vit": ("encoder.layers.encoder_layer_1.ln_1", (4, 4), {"": 1}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_and_last_maps_of_each_family(name):
    model, images = family(name)
    layer, size, activations = FAMILIES[name]
    found = capture_activations(model, images, convolutions(model))
    assert Counter(one.activation for one in found.values()) == activations
    assert all(torch.equal(one.before, one.after) for one in found.values() if not one.activation)
    chosen = last_maps(model, images[:1])
    assert chosen.name == layer
    maps = grad_cam(model, chosen, images, torch.tensor([1, 2]))
    assert maps.shape == (2, *size) and (maps >= 0).all() and maps.isfinite().all()
    assert hooks_of(model) == 0


def test_grad_cam_of_tokens_is_the_papers_over_the_grid():
    model, images = family("vit")
    block = model.encoder.layers[-1]
    tokens = {}
    handle = block.ln_1.register_forward_hook(lambda _module, _inputs, output: tokens.update(found=output))
    score = model(images)[:, 5].sum()
    handle.remove()
    (slope,) = torch.autograd.grad(score, [tokens["found"]])
    patches, slopes = tokens["found"][:, 1:], slope[:, 1:]  # without the class token
    expected = (patches * slopes.mean(1, keepdim=True)).sum(2).relu().reshape(2, 4, 4)
    found = grad_cam(model, last_maps(model, images[:1]), images, torch.tensor([5, 5]))
    torch.testing.assert_close(found, expected.detach())


class Block(nn.Module):
    """Activations as functions, behind normalization and an addition; branches that meet."""

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.two, self.beside = nn.Conv2d(4, 4, 5, stride=2, padding=2), nn.Conv2d(4, 4, 1, stride=2)
        self.gate, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = F.silu(self.norm(self.one(x)))
        y = self.two(x)
        y += self.beside(x)
        y = torch.relu_(y)
        gated = y * F.hardtanh(self.gate(y), 0, 6)
        return self.last(torch.cat([y, gated], 1)).mean((2, 3))


def test_an_activation_is_found_whatever_lies_before_it_and_however_it_is_called():
    torch.manual_seed(0)
    model = Block().eval()
    nn.init.normal_(model.norm.bias)
    images = torch.randn(2, 1, 16, 16)
    found = capture_activations(model, images, convolutions(model))
    kinds = {"one": "SiLU", "two": "ReLU", "beside": "ReLU", "gate": "ReLU6", "last": ""}
    assert {name: one.activation for name, one in found.items()} == kinds
    x = F.silu(model.norm(model.one(images)))
    y = (model.two(x) + model.beside(x)).relu()
    torch.testing.assert_close(found["one"].after, x)
    torch.testing.assert_close(found["two"].before, model.two(x))
    assert torch.equal(found["two"].after, found["beside"].after)
    torch.testing.assert_close(found["two"].after, y)
    torch.testing.assert_close(found["gate"].after, F.relu6(model.gate(y)))
    # Branches side by side don't add up: the step is two pixels behind both.
    fields = receptive_fields(model, images, convolutions(model))
    assert [(fields[name].size, fields[name].step) for name in kinds] == [
        ((3, 3), (1, 1)),
        *[((7, 7), (2, 2))] * 4,
    ]


def test_dead_channels_are_spoken_of_only_where_a_channel_can_be_dead():
    layers = nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.ReLU()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 24 * 24, 10)).eval()
    nn.init.constant_(layers[2].bias, -100)
    result = look(model)
    assert result.dead == {"2": [0, 1, 2, 3]}
    drawn = result.maps[0][1]
    assert [(name, one.activation) for name, one in drawn.items()] == [("0", "SiLU"), ("2", "ReLU")]
    assert result.top_activations["0"].activation == "SiLU"
