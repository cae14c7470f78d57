"""Helpers for figures that consist of rows of small pictures, called tiles. Lengths are in inches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from cvdist.figures import style

WIDTH = 9.0
ROOM = WIDTH - 2 * style.MARGIN
TOP = style.TITLE_HEIGHT + style.SUBTITLE_HEIGHT + 0.15  # height of title and subtitle
LINE = 0.18  # height of a line of a caption
LEGEND = 0.55  # height of the color bar with its numbers, at the lower edge of the figure
# Of tiles up to this many pixels wide, each pixel is drawn as a square; larger ones are smoothed.
_CRISP_SIDE = 64

# From negative over zero to positive. Zero is nearly white; lightness and hue show the distance from it.
DIVERGING = LinearSegmentedColormap.from_list(
    "diverging", ["#00304F", style.BLUE, "#A6CFE6", "#F7F7F7", "#F4B88F", style.VERMILLION, "#6B2B00"]
)
ZERO = 0.5
"""Where zero lies on the diverging color scale, and in the RGB values of filters that are drawn in color."""


def sheet(title: str, subtitle: str, below: float) -> tuple[Figure, Axes]:
    """Create a figure with a title, and axes over all of it whose coordinates are inches.

    The y axis points up from the lower edge, so content begins at `height - TOP`.

    Args:
        title: Title of the figure.
        subtitle: A line below the title.
        below: Height in inches of the space below title and subtitle.
    """
    figure = style.new_figure(WIDTH, TOP + below)
    # In vector formats, keep each tile as a separate image of few pixels instead of one large composite.
    figure.suppressComposite = True
    style.add_title(figure, title, subtitle)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=(0, WIDTH), ylim=(0, TOP + below))
    return figure, axes


def columns_for(count: int, most: int) -> int:
    """Return the number of columns, at most `most`, with the fewest rows of the most equal lengths."""
    return math.ceil(count / math.ceil(count / most)) if count else 1


def draw(
    axes: Axes,
    values: NDArray[Any],
    left: float,
    top: float,
    width: float,
    height: float,
    *,
    cmap: Colormap | str | None = None,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw one tile: RGB (h, w, 3), or numbers (h, w) in the colors of `cmap`, which spans `limits`."""
    crisp = max(values.shape[:2]) <= _CRISP_SIDE
    low, high = limits or (None, None)
    axes.imshow(
        values,
        cmap=cmap,
        vmin=low,
        vmax=high,
        interpolation="none" if crisp else "antialiased",
        extent=(left, left + width, top - height, top),
        aspect="auto",
    )
    frame(axes, left, top, width, height, style.GRID, 0.6)


def frame(
    axes: Axes, left: float, top: float, width: float, height: float, color: str, linewidth: float
) -> None:
    """Draw the outline of a rectangle."""
    axes.add_patch(
        Rectangle((left, top - height), width, height, fill=False, edgecolor=color, linewidth=linewidth)
    )


def write(
    axes: Axes,
    text: str,
    left: float,
    top: float,
    room: float,
    *,
    size: float = style.SMALL_SIZE,
    color: str = style.INK,
    weight: str = "normal",
    ha: str = "left",
) -> None:
    """Write one line of text, cut if it is wider than `room` inches.

    `ha` is the horizontal alignment: "left", "center" or "right" of the text is placed at `left`.
    """
    axes.text(
        left,
        top,
        style.elide(text, room, size, weight=weight),
        size=size,
        color=color,
        weight=weight,
        ha=ha,
        va="top",
        parse_math=False,
    )


def legend(axes: Axes, cmap: Colormap | str, limits: tuple[float, float], what: str) -> None:
    """Draw a color bar at the lower edge, with numbers at its ends and at zero, and `what` beside it."""
    left, top, width, height = style.MARGIN, LEGEND - 0.12, 2.6, 0.14
    ramp = np.linspace(*limits, 256)[None]
    # 256 steps, since vector formats do not interpolate between the pixels of an image.
    axes.imshow(
        ramp,
        cmap=cmap,
        vmin=limits[0],
        vmax=limits[1],
        interpolation="none",
        extent=(left, left + width, top - height, top),
        aspect="auto",
    )
    low, high = limits
    marks = [(low, "left"), (high, "right")]
    if low < 0 < high:
        marks.insert(1, (0.0, "center"))
    for value, ha in marks:
        at = left + width * (value - low) / ((high - low) or 1)
        write(axes, number(value), at, top - height - 0.03, 1.2, color=style.MUTED, ha=ha)
    write(axes, what, left + width + 0.2, top + 0.01, WIDTH - width - 3 * style.MARGIN, color=style.MUTED)


def note(axes: Axes, text: str) -> None:
    """Write a line of text at the lower edge, in place of a color bar."""
    write(axes, text, style.MARGIN, LEGEND - 0.12, ROOM, color=style.MUTED)


def number(value: float) -> str:
    """Format a number with three significant digits, or as an integer from 1,000 on, with a real minus."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("-", "−")


def numbers(values: Sequence[int], most: int = 12) -> str:
    """List numbers as `3, 5, 7`. Of more than `most` numbers, list the first ones `and 20 more`."""
    listed = ", ".join(map(str, values[:most]))
    return f"{listed} and {len(values) - most} more" if len(values) > most else listed


def pixels(image: Tensor) -> NDArray[np.uint8]:
    """Convert a picture, uint8 (1 or 3, H, W), to RGB (H, W, 3)."""
    shown: NDArray[np.uint8] = image.cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()
    return shown


def single(color: str) -> ListedColormap:
    """Create a color map of one color."""
    return ListedColormap([color])
