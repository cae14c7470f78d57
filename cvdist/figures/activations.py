"""Draw the feature maps of one picture before and after their activation, with the picture beside them."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from torch import Tensor

from cvdist.figures import style, tiles
from cvdist.figures.tiles import Piece, Sheet, Tile
from cvdist.interpret.activations import StrongestChannels, can_be_dead

_COLUMNS = 16
_WIDEST_TILE = 0.8
_PICTURE = 1.5  # inches
_MOST_NAMED = 12
# The color scale ends at this percentile of the values: with the maximum, one bright spot would leave all else
# dark.
_CUT = 99.5


def feature_maps(
    strongest: StrongestChannels, image: Tensor, name: str, *, label: str, dead: list[int], seen: int
) -> Figure:
    """Draw one layer's feature maps of one picture: the convolution's outputs above, activations below.

    Args:
        strongest: The channels to draw, with their maps.
        image: The picture, uint8 (1 or 3, H, W).
        name: Name of the layer.
        label: A line beside the picture that names its class and the predicted one.
        dead: Numbers of the channels that were zero after the activation in all of `seen` pictures.
        seen: How many pictures were run through the network to find the dead channels.
    """
    activation = strongest.activation
    about = _about_dead(strongest.total, dead, seen, activation)
    sheet = Sheet(f"{name}: feature maps of one picture", about)
    top = sheet.y
    sheet.row([Tile(tiles.pixels(image))], min(_PICTURE, 2 * _PICTURE * image.shape[2] / image.shape[1]))
    count, total = len(strongest.channels), strongest.total
    some = f"{count} of {total} channels, the strongest in this picture"
    silent = f"{strongest.silent} of {total} are zero after {activation} in this picture"
    facts = [
        f"{f'all {count} channels' if count == total else some}, by number",
        *([silent] if can_be_dead(activation) else []),
        "all maps of a block share one color scale",
    ]
    lines = [
        [Piece(label, style.INK, size=style.LABEL_SIZE)],
        *([Piece(fact, size=style.TEXT_SIZE)] for fact in facts),
    ]
    left = style.MARGIN + _PICTURE + 0.25
    for number, line in enumerate(lines):
        sheet.write(line, left, style.WIDTH - style.MARGIN - left, top=top + 0.05 + 0.27 * number)
    sheet.y = max(sheet.y, top + 1.15) + 0.05
    before, after = strongest.before.numpy(), strongest.after.numpy()
    reach = float(np.percentile(np.abs(before), _CUT)) or 1.0
    high = float(np.percentile(after, _CUT)) or float(after.max()) or 1.0
    # A network may pool before ReLU: max pooling and ReLU commute, and ReLU has less to do on the smaller maps.
    words = f"after {activation}" if before.shape == after.shape else f"after pooling and {activation}"
    blocks: list[tuple[str, np.ndarray, Colormap | str, tuple[float, float]]] = [
        (f"before {activation}", before, tiles.DIVERGING, (-reach, reach)),
        (words, after, "viridis", (min(float(after.min()), 0.0), high)),
    ]
    if not activation:
        blocks = [("output of the convolution", *blocks[0][1:])]
    columns = tiles.columns_for(count, _COLUMNS)
    for words, maps, cmap, limits in blocks:
        heading = f"{words}, {maps.shape[1]}×{maps.shape[2]} each"
        sheet.y += 0.08
        sheet.write([Piece(heading, style.INK, "bold", style.LABEL_SIZE)], style.MARGIN, 4)
        sheet.color_bar(style.WIDTH - 2.9, cmap, limits)
        sheet.y += 0.28
        drawn = [
            Tile(one, [[_number(channel, channel in dead)]], cmap, limits)
            for channel, one in zip(strongest.channels, maps, strict=True)
        ]
        for start in range(0, count, columns):
            sheet.row(drawn[start : start + columns], tiles.tile_width(columns, _WIDEST_TILE), center=True)
    return sheet.figure()


def _number(channel: int, dead: bool) -> Piece:
    return Piece(str(channel), style.VERMILLION, "bold") if dead else Piece(str(channel))


def _about_dead(total: int, dead: list[int], seen: int, activation: str) -> str:
    if not can_be_dead(activation):
        return f"{total} channels, followed by {activation or 'no activation'}"
    if not dead:
        return f"no dead channel: each of the {total} was above zero somewhere in {seen} pictures"
    more = f" and {len(dead) - _MOST_NAMED} more" if len(dead) > _MOST_NAMED else ""
    named = ", ".join(map(str, dead[:_MOST_NAMED])) + more
    return (
        f"{len(dead)} of {total} channels are dead, zero after {activation} in all of {seen} pictures: {named}"
    )
