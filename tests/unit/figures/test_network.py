"""Figures of what a network has learned, during training and of saved models."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from cvdist.figures import network, tiles
from cvdist.figures.activations import feature_maps
from cvdist.figures.animation import animate_filters
from cvdist.figures.filters import before_and_after, filter_grid
from cvdist.figures.gradcam import explained_predictions
from cvdist.figures.top_activations import top_activation_patches
from cvdist.interpret.activations import StrongestChannels
from cvdist.interpret.interpretation import ExplainedPrediction, Prediction
from cvdist.interpret.layers import ReceptiveField
from cvdist.interpret.top_activations import TopActivations
from tests.helpers.figures import LONG_NAMES, assert_tidy, images, pixels, png, says, tiles_of


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tile_pixels(figure, number, at):
    """RGB in [0, 1] of the middle of the weight at (row, column) of the tile that was drawn as `number`."""
    box, values = tiles_of(figure)[number]
    rows, columns = values.shape[:2]
    across = box.x0 + box.width * (at[1] + 0.5) / columns
    down = box.y1 - box.height * (at[0] + 0.5) / rows
    picture = pixels(figure)
    return picture[len(picture) - 1 - int(down), int(across)]


# ------------------------------------------------------------------------------------------------ filters


def test_a_known_weight_has_its_color():
    weight = torch.zeros(2, 1, 3, 3)
    weight[0, 0, 0, 2], weight[1, 0, 2, 1] = 0.5, -0.5
    weight[1, 0, 0, 0] = 0.25
    figure = filter_grid(weight, "conv1")
    assert tile_pixels(figure, 0, (1, 1)) == pytest.approx(tiles.DIVERGING(0.5)[:3], abs=0.01)
    assert tile_pixels(figure, 0, (0, 2)) == pytest.approx(tiles.DIVERGING(1.0)[:3], abs=0.01)
    assert tile_pixels(figure, 1, (2, 1)) == pytest.approx(tiles.DIVERGING(0.0)[:3], abs=0.01)
    assert tile_pixels(figure, 1, (0, 0)) == pytest.approx(tiles.DIVERGING(0.75)[:3], abs=0.01)


def test_filters_on_colors_are_in_color_and_grey_is_zero():
    weight = torch.zeros(1, 3, 2, 2)
    weight[0, :, 0, 1] = torch.tensor([0.2, -0.2, 0.1])
    figure = filter_grid(weight, "features.0")
    assert tile_pixels(figure, 0, (0, 0)) == pytest.approx((0.5, 0.5, 0.5), abs=0.01)
    assert tile_pixels(figure, 0, (0, 1)) == pytest.approx((1, 0, 0.75), abs=0.01)


def test_an_outlier_does_not_leave_the_others_pale():
    weight = random(40, 1, 6, 6).clamp(-1, 1)
    weight[0, 0, 0, 0] = 100.0
    figure = filter_grid(weight, "conv")
    row, column = divmod(int(weight[1, 0].abs().argmax()), 6)
    shown = tile_pixels(figure, 1, (row, column))
    assert np.abs(shown - to_rgb("#F7F7F7")).max() > 0.5


def test_the_title_has_shape_and_statistics():
    weight = torch.tensor([1.0, -1.0, 0.5, 0.005]).view(1, 1, 2, 2)
    said = says(filter_grid(weight, "conv1", when="after epoch 3"))
    assert "conv1: 1 filter of 1×2×2, after epoch 3" in said
    assert any(line.startswith("mean 0.126, deviation 0.739, from −1 to 1, 25.0% near zero") for line in said)


def test_deep_layers_show_the_strongest_or_the_mean():
    weight = 0.01 * random(40, 20, 3, 3)
    weight[7, 13] = 5.0
    figure = filter_grid(weight, "deep")
    assert (tiles_of(figure)[0][1] == 5).all()  # the strongest input of the strongest filter
    assert {"filter 7", "13"} <= set(says(figure))
    mean = filter_grid(weight, "deep", channels="mean")
    drawn = [values for _, values in tiles_of(mean)]
    assert np.allclose(drawn[7], weight[7].mean(0), atol=1e-6)
    assert len(drawn) == 40 + 1  # and the color bar


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (63, 3), (1, 64), (512, 64)])
def test_filters_are_readable_at_any_number_of_channels(outputs, inputs):
    weight = random(outputs, inputs, 3, 3)
    assert_tidy(filter_grid(weight, "features.28"))
    if inputs > 3:
        assert_tidy(filter_grid(weight, "features.28", channels="mean"))
    assert_tidy(before_and_after(weight, weight + random(outputs, inputs, 3, 3), "features.28"))


def test_before_and_after_with_the_difference():
    before = random(4, 1, 3, 3)
    after = before + 0.1
    figure = before_and_after(before, after, "conv1", when="after epoch 20")
    order = sorted(tiles_of(figure), key=lambda tile: (-round(tile[0].y0), tile[0].x0))
    drawn = [values for _, values in order[::4]]  # the first column
    assert np.allclose(drawn[0], before[0, 0]) and np.allclose(drawn[1], after[0, 0])
    assert np.allclose(drawn[2], 0.1, atol=1e-6)
    assert "conv1: before training and after epoch 20" in says(figure)


def test_small_vectors_and_the_same_file_twice(tmp_path):
    weight = random(64, 3, 3, 3)
    svg = network.filters_svg("features.0", weight)
    assert svg == network.filters_svg("features.0", weight) and 10_000 < len(svg) < 200_000
    assert b"2026" not in svg and b"Matplotlib v" not in svg
    one, other = (png(filter_grid(weight, "features.0"), tmp_path) for _ in range(2))
    assert one == other


def test_an_animation_has_a_frame_for_each_moment_and_is_the_same_twice():
    frames = [(epoch, random(10, 1, 5, 5) * epoch) for epoch in range(4)]
    made = animate_filters(frames, "conv1")
    assert made == animate_filters(frames, "conv1")
    with Image.open(io.BytesIO(made)) as animation:
        assert animation.n_frames == 4 and animation.info["loop"] == 0
        assert 900 <= animation.width <= 1200
    with pytest.raises(ValueError, match="without frames"):
        animate_filters([], "conv1")


# ------------------------------------------------------------------------------------- the other figures


@pytest.mark.parametrize(("count", "total"), [(1, 1), (20, 20), (64, 512)])
def test_activations_are_readable_and_name_dead_channels(count, total):
    channels = tuple(range(3, 3 + count))
    before = random(count, 8, 8)
    shown = StrongestChannels(channels, before, before.relu(), total, silent=1)
    dead = [3, 5] if count > 1 else []
    figure = feature_maps(
        shown, images(1, 3, 90, 224)[0], "features.28", label=", ".join(LONG_NAMES), dead=dead, seen=128
    )
    assert_tidy(figure)
    said = says(figure)
    if dead:
        assert f"2 of {total} channels are dead, zero after ReLU in all of 128 pictures: 3, 5" in said
    else:
        assert "no dead channel: each of the 1 was above zero somewhere in 128 pictures" in said
    limited = f"{count} of {total} channels, the strongest in this picture, by number"
    assert (limited in said) == (count < total)
    assert any(np.array_equal(values, before[0].numpy()) for _, values in tiles_of(figure))


@pytest.mark.parametrize(("pictures", "field"), [(1, 3), (9, 500)])
def test_top_activations_are_readable_and_marked(pictures, field):
    values = torch.arange(30.0, 0, -1).view(10, 3)[:, : min(3, pictures)].repeat(1, 3)[:, :pictures] - 3
    top_activations = TopActivations(
        values=values,
        pictures=torch.arange(pictures).expand(10, -1),
        places=torch.full((10, pictures, 2), 20),
        field=ReceptiveField((field, field), (-1, -1), (2, 2)),
    )
    figure = top_activation_patches(
        top_activations,
        dict(enumerate(images(pictures, 3, 90, 100))),
        dict(enumerate((LONG_NAMES * 3)[:pictures])),
        random(10, 3, 3, 3),
        "features.0",
        seen=pictures,
        available=400,
        dead=1,
    )
    assert_tidy(figure)
    assert any(f"over {pictures} of 400 pictures; 1 is never active" in line for line in says(figure))


def test_grad_cam_beside_pictures():
    judged = [Prediction(n, LONG_NAMES[n % 3], LONG_NAMES[(n + 1) % 3], 0.9999) for n in range(4)]
    heat = torch.zeros(4, 4)
    heat[1, 1] = 2.0
    wrong = [ExplainedPrediction(one, heat, torch.zeros(4, 4)) for one in judged]
    figure = explained_predictions(
        wrong, images(4, 3, 80, 80), "features.28", title="wrong", counts="4/400 wrong"
    )
    assert_tidy(figure)
    said = says(figure)
    assert any(line.startswith("4/400 wrong; maps of features.28") for line in said)
    assert (
        sum(line.startswith("for ") for line in said)
        == sum(line.startswith("nothing for") for line in said)
        == 4
    )
    right = [ExplainedPrediction(dataclasses.replace(one, predicted=one.true), heat, None) for one in judged]
    figure = explained_predictions(right, images(4, 1, 40, 90), "conv2", title="right", counts="396/400 right")
    assert_tidy(figure)
    assert len(tiles_of(figure)) == 8
