"""Draw the picture patches that activate channels of a layer most."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from torch import Tensor

from cvdist.figures import filters, style, tiles
from cvdist.figures.tiles import Piece, Sheet, Tile
from cvdist.interpret.top_activations import TopActivations

Box = tuple[int, int, int, int]  # top, left, bottom, right

_CHANNELS = 8
_LEFT = 1.05
# A patch of a few pixels is hard to recognize: it is drawn with its surroundings, this many times as wide as
# the patch, and at least this many pixels wide.
_CONTEXT = 3
_SMALLEST = 48


def shown_channels(top_activations: TopActivations) -> list[int]:
    """Return the numbers of the 8 channels with the greatest activations, without dead channels."""
    peaks = top_activations.values[:, 0]
    order = peaks.argsort(descending=True, stable=True)[:_CHANNELS].tolist()
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
    channels, (total, count) = shown_channels(top_activations), top_activations.pictures.shape
    pictures = f"{seen} pictures" if seen == available else f"{seen} of {available} pictures"
    never = f"; {dead} {'is' if dead == 1 else 'are'} never active" if dead else ""
    sheet = Sheet(
        f"{name}: top activations of its channels",
        f"the {len(channels)} of {total} channels that reach the highest values, over {pictures}{never}",
    )
    if not channels:
        sheet.write([Piece("no picture activates any channel", style.INK, size=14)], style.MARGIN, tiles.ROOM)
        sheet.y += 0.5
    width = tiles.tile_width(max(count, 1), 0.95, room=tiles.ROOM - _LEFT)
    boxed = not channels
    for channel in channels:
        top = sheet.y
        sheet.write([Piece(f"channel {channel}", style.INK, "bold")], style.MARGIN, _LEFT - 0.1)
        if weight.shape[1] in (1, 3):
            kernel = weight[channel].float()
            sheet.y += 0.22
            sheet.row([filters.tile(kernel, kernel.abs().max().item() or 1.0)], 0.5, left=style.MARGIN + 0.1)
        sheet.y, drawn = top, []
        for row, place, value in zip(
            top_activations.pictures[channel].tolist(),
            top_activations.places[channel].tolist(),
            top_activations.values[channel].tolist(),
            strict=True,
        ):
            text = f"{labels[row]}: {tiles.number(value)}" if labels[row] else tiles.number(value)
            drawn.append(_patch(images[row], top_activations.field.box(*place), text))
        sheet.row(drawn, width, left=style.MARGIN + _LEFT, space=0.13)
        boxed = boxed or any(tile.box for tile in drawn)
    height, wide = top_activations.field.size
    around = ", with their surroundings" if max(height, wide) * _CONTEXT < _SMALLEST else ""
    what = f"box: the {height}×{wide} pixels that the value depends on{around}"
    if not boxed:
        what = f"the value depends on the whole picture (its receptive field is {height}×{wide})"
    value = f"the value after {top_activations.activation}" if top_activations.activation else "the value"
    sheet.legend(f"{what}; below: the class and {value}")
    return sheet.figure()


def _patch(image: Tensor, box: Box, caption: str) -> Tile:
    """Cut the square around a receptive field out of a picture, and mark the field unless it is all of it."""
    side = min(max(_CONTEXT * max(box[2] - box[0], box[3] - box[1]), _SMALLEST), *image.shape[1:])
    top, left = (
        min(max((low + high - side) // 2, 0), limit - side)
        for low, high, limit in ((box[0], box[2], image.shape[1]), (box[1], box[3], image.shape[2]))
    )
    inside = [min(max(edge - start, 0), side) for edge, start in zip(box, (top, left) * 2, strict=True)]
    mark = None if inside == [0, 0, side, side] else (inside[0], inside[1], inside[2], inside[3])
    return Tile(tiles.pixels(image[:, top : top + side, left : left + side]), [[Piece(caption)]], box=mark)
