"""Draw the feature maps of one picture before and after ReLU, with the picture beside them."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from torch import Tensor

from cvdist.figures import style, tiles
from cvdist.interpret.activations import StrongestChannels

_COLUMNS = 16
_WIDEST_TILE = 0.8
_GAP = 0.06
_PICTURE = 1.5  # inches
_LINES_HEIGHT = 1.15
_COLD_TO_HOT = "viridis"
# The color scale ends at this percentile of the values: with the maximum, one bright spot would leave all else
# dark.
_CUT = 99.5


def feature_maps(
    strongest: StrongestChannels, image: Tensor, name: str, *, label: str, dead: list[int], seen: int
) -> Figure:
    """Draw one layer's feature maps of one picture: the convolution's outputs above, those of its ReLU below.

    Args:
        strongest: The channels to draw, with their maps.
        image: The picture, uint8 (1 or 3, H, W).
        name: Name of the layer.
        label: A line beside the picture that names its class and the predicted one.
        dead: Numbers of the channels that were zero after ReLU in all of `seen` pictures.
        seen: How many pictures were run through the network to find the dead channels.
    """
    count = len(strongest.channels)
    columns = tiles.columns_for(count, _COLUMNS)
    rows = -(-count // columns)
    width = min(tiles.ROOM / columns - _GAP, _WIDEST_TILE)
    heights = [width * maps.shape[1] / maps.shape[2] for maps in (strongest.before, strongest.after)]
    blocks = [0.36 + rows * (height + tiles.LINE + 0.1) for height in heights]
    picture_height = min(_PICTURE * image.shape[1] / image.shape[2], 2 * _PICTURE)
    head = max(picture_height, _LINES_HEIGHT) + 0.15
    figure, axes = tiles.sheet(
        f"{name}: feature maps of one picture",
        _about_dead(strongest, dead, seen),
        head + sum(blocks),
    )
    top = figure.get_size_inches()[1] - tiles.TOP
    tiles.draw(axes, tiles.pixels(image), style.MARGIN, top, _PICTURE, picture_height)
    _describe(axes, strongest, label, style.MARGIN + _PICTURE + 0.25, top, count)
    top -= head
    reach = float(np.percentile(strongest.before.abs().numpy(), _CUT)) or 1.0
    high = float(np.percentile(strongest.after.numpy(), _CUT)) or float(strongest.after.max()) or 1.0
    # A network may pool before ReLU: max pooling and ReLU commute, and ReLU has less to do on the smaller maps.
    pooled = strongest.before.shape != strongest.after.shape
    blocks_drawn: tuple[tuple[str, Tensor, Colormap | str, tuple[float, float]], ...] = (
        ("before ReLU", strongest.before, tiles.DIVERGING, (-reach, reach)),
        ("after pooling and ReLU" if pooled else "after ReLU", strongest.after, _COLD_TO_HOT, (0.0, high)),
    )
    for (words, maps, cmap, limits), height, block in zip(blocks_drawn, heights, blocks, strict=True):
        _head(axes, words, f"{maps.shape[1]}×{maps.shape[2]}", cmap, limits, top)
        for place, number in enumerate(strongest.channels):
            row, column = divmod(place, columns)
            left, upper = style.MARGIN + column * (width + _GAP), top - 0.36 - row * (height + tiles.LINE + 0.1)
            tiles.draw(axes, maps[place].numpy(), left, upper, width, height, cmap=cmap, limits=limits)
            gone = number in dead
            tiles.write(
                axes, f"{number}", left + width / 2, upper - height - 0.04, width + _GAP, ha="center",
                color=style.VERMILLION if gone else style.MUTED, weight="bold" if gone else "normal",
            )  # fmt: skip
        top -= block
    return figure


def _about_dead(strongest: StrongestChannels, dead: list[int], seen: int) -> str:
    if not dead:
        return f"no dead channel: each of the {strongest.total} was above zero somewhere in {seen} pictures"
    return (
        f"{len(dead)} of {strongest.total} channels are dead, zero after ReLU in all of {seen} pictures: "
        f"{tiles.numbers(dead)}"
    )


def _describe(
    axes: Axes, strongest: StrongestChannels, label: str, left: float, top: float, count: int
) -> None:
    room = tiles.WIDTH - left - style.MARGIN
    lines = [
        (label, style.LABEL_SIZE, style.INK),
        (
            f"all {count} channels, by number"
            if count == strongest.total
            else f"{count} of {strongest.total} channels, the strongest in this picture, by number",
            style.TEXT_SIZE,
            style.MUTED,
        ),
        (
            f"{strongest.silent} of {strongest.total} are zero after ReLU in this picture",
            style.TEXT_SIZE,
            style.MUTED,
        ),
        ("all maps of a block share one color scale", style.TEXT_SIZE, style.MUTED),
    ]
    for number, (text, size, color) in enumerate(lines):
        tiles.write(axes, text, left, top - 0.05 - 0.27 * number, room, size=size, color=color)


def _head(
    axes: Axes, words: str, shape: str, cmap: Colormap | str, limits: tuple[float, float], top: float
) -> None:
    """Write the heading of a block, such as `before ReLU, 224×224 each`, with a color bar at the right."""
    tiles.write(
        axes, f"{words}, {shape} each", style.MARGIN, top - 0.08, 4, size=style.LABEL_SIZE, weight="bold"
    )
    width, right = 2.0, tiles.WIDTH - style.MARGIN - 0.55
    axes.imshow(
        np.linspace(*limits, 256)[None],
        cmap=cmap,
        vmin=limits[0],
        vmax=limits[1],
        interpolation="none",
        extent=(right - width, right, top - 0.24, top - 0.1),
        aspect="auto",
    )
    low, high = map(tiles.number, limits)
    tiles.write(axes, low, right - width - 0.06, top - 0.09, 0.6, color=style.MUTED, ha="right")
    tiles.write(axes, high, right + 0.06, top - 0.09, 0.6, color=style.MUTED)
