"""Draw pictures with their Grad-CAM heat maps, which show the parts that raised the score of a class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from cvdist.figures import style, tiles
from cvdist.interpret.interpretation import ExplainedPrediction

_GAP = 0.06
_BETWEEN = 0.3  # inches between two pictures with their maps
_HEAT = "inferno"


def correct_predictions(
    explained: Sequence[ExplainedPrediction], images: Tensor, layer: str, *, right: int, seen: int
) -> Figure:
    """Draw correctly classified pictures, each beside the Grad-CAM map of its class.

    Args:
        explained: The n predictions with their maps.
        images: Their pictures, uint8 (n, 1 or 3, H, W).
        layer: Name of the layer that the maps were computed for.
        right: How many of all classified pictures were classified correctly.
        seen: How many pictures were classified.
    """
    title = "Grad-CAM: what spoke for the right answer"
    return _sheet(explained, images, title, f"{right}/{seen} right; {_HOW.format(layer=layer)}", kinds=1)


def wrong_predictions(
    explained: Sequence[ExplainedPrediction], images: Tensor, layer: str, *, wrong: int, seen: int
) -> Figure:
    """Draw wrongly classified pictures, each beside the Grad-CAM maps of the predicted and of the true class.

    Args:
        explained: The n predictions with their maps. If there are none, the figure says that all are correct.
        images: Their pictures, uint8 (n, 1 or 3, H, W).
        layer: Name of the layer that the maps were computed for.
        wrong: How many of all classified pictures were classified wrongly.
        seen: How many pictures were classified.
    """
    title = "Grad-CAM: what misled the network"
    if not explained:
        figure, axes = tiles.sheet(title, "", 1.0)
        tiles.write(
            axes, f"no mistakes: all {seen}/{seen} right", tiles.WIDTH / 2, 0.8, tiles.ROOM, size=18,
            color=style.GREEN, ha="center",
        )  # fmt: skip
        return figure
    subtitle = f"{wrong}/{seen} wrong, those with most confidence; {_HOW.format(layer=layer)}"
    return _sheet(explained, images, title, subtitle, kinds=2)


def unlabeled_predictions(
    explained: Sequence[ExplainedPrediction], images: Tensor, layer: str, *, seen: int
) -> Figure:
    """Draw pictures whose true class is unknown, each beside the Grad-CAM map of the predicted class.

    Args:
        explained: The n predictions with their maps.
        images: Their pictures, uint8 (n, 1 or 3, H, W).
        layer: Name of the layer that the maps were computed for.
        seen: How many pictures were classified.
    """
    title = "Grad-CAM: what spoke for the prediction"
    return _sheet(explained, images, title, f"{len(explained)} of {seen}; {_HOW.format(layer=layer)}", kinds=1)


_HOW = "maps of {layer}, each from 0 to its own maximum"


def overlay(image: Tensor, heat: Tensor) -> NDArray[np.float64]:
    """Lay a heat map over a picture in gray.

    Args:
        image: The picture, uint8 (1 or 3, H, W).
        heat: The map, float (h, w), 0 or more. It is enlarged to the size of the picture.

    Returns:
        RGB float64 (H, W, 3) in [0, 1].
    """
    height, width = image.shape[1:]
    large = F.interpolate(heat[None, None].float(), (height, width), mode="bilinear", align_corners=False)[0, 0]
    strength = (large / heat.max().clamp(min=1e-12)).clamp(0, 1).numpy()
    gray = np.asarray(image.float().mean(0) / 255)[..., None].repeat(3, -1)
    # The lightness of this color map rises with the value, so that it can be read without telling hues apart.
    tint = colormaps[_HEAT](0.3 + 0.65 * strength)[..., :3]
    opacity = 0.85 * strength[..., None] ** 0.8
    mixed: NDArray[np.float64] = (0.85 * gray + 0.15) * (1 - opacity) + tint * opacity
    return mixed


def _sheet(
    explained: Sequence[ExplainedPrediction], images: Tensor, title: str, subtitle: str, kinds: int
) -> Figure:
    """Draw each picture with `kinds` maps beside it."""
    per_row = 3 if kinds == 1 else 2
    group = (tiles.ROOM + _BETWEEN) / per_row - _BETWEEN
    width = (group + _GAP) / (kinds + 1) - _GAP
    height = width * images.shape[2] / images.shape[3] if len(images) else width
    pitch = height + tiles.LINE + 0.22
    rows = -(-len(explained) // per_row)
    figure, axes = tiles.sheet(title, subtitle, max(rows, 1) * pitch + 0.1)
    top = figure.get_size_inches()[1] - tiles.TOP
    for place, (one, image) in enumerate(zip(explained, images, strict=True)):
        row, column = divmod(place, per_row)
        left, upper = style.MARGIN + column * (group + _BETWEEN), top - row * pitch
        wrong = one.true_map is not None
        tiles.draw(axes, tiles.pixels(image), left, upper, width, height)
        name = one.prediction.true or "class unknown"
        tiles.write(
            axes, name, left, upper - height - 0.05, width, weight="bold",
            color=style.GREEN if one.prediction.true else style.MUTED,
        )  # fmt: skip
        x = left + width + _GAP
        confidence = f", {style.confidence(one.prediction.confidence)}"
        _map(
            axes, image, one.predicted_map, x, upper, width, height, one.prediction.predicted, confidence, wrong
        )
        if one.true_map is not None:
            x += width + _GAP
            _map(axes, image, one.true_map, x, upper, width, height, one.prediction.true, "", False)
    return figure


def _map(
    axes: Axes,
    image: Tensor,
    heat: Tensor,
    left: float,
    top: float,
    width: float,
    height: float,
    name: str,
    confidence: str,
    wrong: bool,
) -> None:
    """Draw one map and below it a line that names its class, in orange if that class is a wrong prediction."""
    tiles.draw(axes, overlay(image, heat), left, top, width, height)
    text = f"for {name}{confidence}" if bool(torch.any(heat > 0)) else f"nothing for {name}"
    tiles.write(
        axes, text, left, top - height - 0.05, width,
        color=style.VERMILLION if wrong else style.GREEN, weight="bold",
    )  # fmt: skip
