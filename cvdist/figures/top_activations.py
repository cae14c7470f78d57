"""Draw the picture patches that activate channels of a layer most."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from cvdist.figures import style, tiles
from cvdist.figures.filters import colors
from cvdist.interpret.top_activations import TopActivations

Box = tuple[int, int, int, int]  # top, left, bottom, right

_CHANNELS = 8
_LEFT = 1.05
_GAP = 0.06
# A patch of a few pixels is hard to recognize: it is drawn with its surroundings, this many times as wide as
# the patch, and at least this many pixels wide.
_CONTEXT = 3
_SMALLEST = 48


def shown_channels(top_activations: TopActivations, most: int = _CHANNELS) -> list[int]:
    """Return the numbers of the `most` channels with the greatest activations, without dead channels."""
    peaks = top_activations.values[:, 0]
    order = peaks.argsort(descending=True, stable=True)[:most].tolist()
    return sorted(channel for channel in order if peaks[channel] > 0)


def top_activation_patches(
    top_activations: TopActivations,
    images: Mapping[int, Tensor],
    labels: Mapping[int, str],
    weight: Tensor,
    name: str,
    *,
    seen: int,
    available: int,
    dead: int,
) -> Figure:
    """Draw a row for each channel: the pictures that activate it most, the strongest first.

    A box marks the receptive field: the part of the picture that the activation depends on.

    Args:
        top_activations: The strongest activations of each channel of the layer.
        images: Pictures by row of the data set, uint8 (1 or 3, H, W).
        labels: Their class names by row of the data set; empty if the class is unknown.
        weight: Weights of the layer, float (outputs, inputs, h, w). Filters on pictures, with one or three
            inputs, are drawn beside their rows.
        name: Name of the layer.
        seen: How many pictures were run through the network.
        available: How many pictures the data set has.
        dead: How many channels are zero for all pictures.
    """
    channels = shown_channels(top_activations)
    columns = top_activations.pictures.shape[1]
    width = min((tiles.ROOM - _LEFT) / max(columns, 1) - _GAP, 0.95)
    pitch = width + tiles.LINE + 0.13
    size, total = top_activations.field.size, len(top_activations.values)
    pictures = f"{seen} pictures" if seen == available else f"{seen} of {available} pictures"
    figure, axes = tiles.sheet(
        f"{name}: top activations of its channels",
        f"the {len(channels)} of {total} channels that reach the highest values, over {pictures}"
        + (f"; {dead} are never active" if dead else ""),
        max(len(channels), 1) * pitch + 0.35,
    )
    top = figure.get_size_inches()[1] - tiles.TOP
    if not channels:
        tiles.write(axes, "no picture activates any channel", style.MARGIN, top, tiles.ROOM, size=14)
    for row, channel in enumerate(channels):
        upper = top - row * pitch
        tiles.write(axes, f"channel {channel}", style.MARGIN, upper - 0.03, _LEFT - 0.1, weight="bold")
        if weight.shape[1] in (1, 3):
            kernel = weight[channel].float()
            scale = kernel.abs().max().item() or 1.0
            limits = (-scale, scale)
            values = colors(kernel.numpy(), scale) if len(kernel) == 3 else kernel[0].numpy()
            tiles.draw(
                axes, values, style.MARGIN + 0.1, upper - 0.25, 0.5, 0.5, cmap=tiles.DIVERGING, limits=limits
            )  # fmt: skip
        for column in range(columns):
            picture = int(top_activations.pictures[channel, column])
            left = style.MARGIN + _LEFT + column * (width + _GAP)
            place = (
                int(top_activations.places[channel, column, 0]),
                int(top_activations.places[channel, column, 1]),
            )
            box = top_activations.field.box(*place)
            image = images[picture]
            window = _window(box, image.shape[1], image.shape[2])
            tiles.draw(
                axes,
                tiles.pixels(image[:, window[0] : window[2], window[1] : window[3]]),
                *(left, upper, width, width),
            )
            _mark(axes, box, window, left, upper, width)
            value = tiles.number(float(top_activations.values[channel, column]))
            text = f"{labels[picture]}: {value}" if labels[picture] else value
            tiles.write(axes, text, left, upper - width - 0.04, width + 0.02, color=style.MUTED)
    what = f"box: the {size[0]}×{size[1]} pixels that the value depends on"
    small = max(size) * _CONTEXT < max(_SMALLEST, 1)
    tiles.write(
        axes,
        f"{what}{', with their surroundings' if small else ''}; below: the class and the value after ReLU",
        style.MARGIN, 0.3, tiles.ROOM, color=style.MUTED,
    )  # fmt: skip
    return figure


def _window(box: Box, height: int, width: int) -> Box:
    """Return the edges of the square part of the picture that is drawn: `box` with its surroundings."""
    side = min(max(_CONTEXT * max(box[2] - box[0], box[3] - box[1]), _SMALLEST), height, width)
    edges = []
    for low, high, limit in ((box[0], box[2], height), (box[1], box[3], width)):
        start = min(max((low + high - side) // 2, 0), limit - side)
        edges.append((start, start + side))
    (top, bottom), (left, right) = edges
    return top, left, bottom, right


def _mark(
    axes: Axes,
    box: Box,
    window: Box,
    left: float,
    top: float,
    width: float,
) -> None:
    """Draw the outline of `box`, clipped to the window, in two colors that stand out on any picture."""
    side = window[2] - window[0]
    upper, start = max(box[0], window[0]) - window[0], max(box[1], window[1]) - window[1]
    lower, end = min(box[2], window[2]) - window[0], min(box[3], window[3]) - window[1]
    if lower - upper >= side and end - start >= side:
        return  # the box is the whole window
    scale = width / side
    place = (left + start * scale, top - upper * scale, (end - start) * scale, (lower - upper) * scale)
    tiles.frame(axes, *place, "white", 2.2)
    tiles.frame(axes, *place, style.VERMILLION, 1.0)
