"""Draw pictures with their Grad-CAM heat maps, which show the parts that raised the score of a class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from cvdist.figures import style, tiles
from cvdist.figures.tiles import Line, Piece, Sheet, Tile
from cvdist.interpret.interpretation import ExplainedPrediction

_BETWEEN = 0.3  # inches between two pictures with their maps


def explained_predictions(
    explained: Sequence[ExplainedPrediction], images: Tensor, layer: str, *, title: str, counts: str
) -> Figure:
    """Draw pictures, each beside the Grad-CAM map of its predicted class and, if wrong, of its true class.

    Args:
        explained: The n predictions with their maps: of all or of none the map of the true class.
        images: Their pictures, uint8 (n, 1 or 3, H, W).
        layer: Name of the layer that the maps were computed for.
        title: What the maps show, for the title.
        counts: How many pictures these are and of how many, for the line below the title.
    """
    sheet = Sheet(f"Grad-CAM: {title}", f"{counts}; maps of {layer}, each from 0 to its own maximum")
    groups = [_tiles(one, image) for one, image in zip(explained, images, strict=True)]
    size = len(groups[0])
    per_row = 6 // size
    group = tiles.tile_width(per_row, tiles.ROOM, gap=_BETWEEN)
    width = tiles.tile_width(size, group, room=group)
    for start in range(0, len(groups), per_row):
        top = sheet.y
        for column, group_tiles in enumerate(groups[start : start + per_row]):
            sheet.y = top
            sheet.row(group_tiles, width, left=style.MARGIN + column * (group + _BETWEEN), space=0.22)
    return sheet.figure()


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
    strength = (large / (heat.max().item() or 1.0)).clamp(0, 1).numpy()
    gray = np.asarray(image.float().mean(0) / 255)[..., None].repeat(3, -1)
    # The lightness of this color map rises with the value, so that it can be read without telling hues apart.
    tint = colormaps["inferno"](0.3 + 0.65 * strength)[..., :3]
    opacity = 0.85 * strength[..., None] ** 0.8
    mixed: NDArray[np.float64] = (0.85 * gray + 0.15) * (1 - opacity) + tint * opacity
    return mixed


def _tiles(one: ExplainedPrediction, image: Tensor) -> list[Tile]:
    """Make the tiles of a picture: itself, the map of its predicted class, and perhaps of its true class."""
    true, predicted = one.prediction.true, one.prediction.predicted
    confidence = f", {style.confidence(one.prediction.confidence)}"
    name = Piece(true or "class unknown", style.GREEN if true else style.MUTED, "bold")
    color = style.GREEN if one.true_map is None else style.VERMILLION
    drawn = [
        Tile(tiles.pixels(image), [[name]]),
        Tile(
            overlay(image, one.predicted_map),
            [_caption(one.predicted_map, predicted + confidence, predicted, color)],
        ),
    ]
    if one.true_map is not None:
        drawn.append(Tile(overlay(image, one.true_map), [_caption(one.true_map, true, true, style.GREEN)]))
    return drawn


def _caption(heat: Tensor, text: str, name: str, color: str) -> Line:
    return [Piece(f"for {text}" if bool(torch.any(heat > 0)) else f"nothing for {name}", color, "bold")]
