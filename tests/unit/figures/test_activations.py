"""Figures say which activation follows a convolution, and speak of dead channels only behind ReLU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cvdist.figures.activations import feature_maps
from cvdist.figures.filters import filter_grid
from cvdist.figures.gradcam import overlay
from cvdist.figures.top_activations import top_activation_patches
from cvdist.interpret.activations import StrongestChannels
from cvdist.interpret.layers import ReceptiveField
from cvdist.interpret.top_activations import TopActivations
from tests.helpers.figures import assert_tidy, images, says, tiles_of


@pytest.mark.parametrize(("activation", "function"), [("SiLU", F.silu), ("ReLU6", F.relu6), ("", lambda x: x)])
def test_feature_maps_name_the_activation(activation, function):
    before = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0))
    shown = StrongestChannels((0, 1, 2), before, function(before), 3, 1, activation)
    figure = feature_maps(shown, images(1)[0], "conv", label="class 1", dead=[], seen=9)
    assert_tidy(figure)
    said = says(figure)
    if activation:
        assert {f"before {activation}, 5×5 each", f"after {activation}, 5×5 each"} <= set(said)
    else:
        assert "output of the convolution, 5×5 each" in said and not any("after" in one for one in said)
    about_dead = [one for one in said if "dead" in one or "zero" in one]
    assert bool(about_dead) == (activation == "ReLU6")
    if activation != "ReLU6":
        assert f"3 channels, followed by {activation or 'no activation'}" in said
    assert sum(np.array_equal(values, before[0].numpy()) for _, values in tiles_of(figure)) == 1


@pytest.mark.parametrize(
    ("size", "activation", "legend"),
    [
        (5, "GELU", "box: the 5×5 pixels that the value depends on, with their surroundings"),
        (300, "", "the value depends on the whole picture (its receptive field is 300×300)"),
    ],
)
def test_top_activations_name_the_activation(size, activation, legend):
    top = TopActivations(
        values=torch.ones(2, 3),
        pictures=torch.arange(3).expand(2, -1),
        places=torch.full((2, 3, 2), 20),
        field=ReceptiveField((size, size), (-size // 2, -size // 2), (2, 2)),
        activation=activation,
    )
    pictures = dict(enumerate(images(3, 3, 64, 64)))
    labels = dict.fromkeys(range(3), "cat")
    figure = top_activation_patches(
        top, pictures, labels, torch.randn(2, 8, 3, 3), "conv", seen=3, available=3, dead=0
    )
    assert_tidy(figure)
    value = f"the value after {activation}" if activation else "the value"
    assert f"{legend}; below: the class and {value}" in says(figure)


def test_numbers_of_four_digits_fit_and_small_heat_is_seen():
    figure = filter_grid(torch.randn(1280, 8, 1, 1, generator=torch.Generator().manual_seed(0)), "features.8.0")
    assert not any("…" in text for text in says(figure))
    heat = torch.zeros(4, 4)
    heat[1, 1] = 1.0
    assert np.allclose(overlay(images(1)[0], heat), overlay(images(1)[0], heat * 1e-20))
