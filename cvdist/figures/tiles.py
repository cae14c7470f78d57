"""Small pictures in rows: what figures of a network have in common. Places and sizes are in inches."""

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
TOP = style.TITLE_HEIGHT + style.SUBTITLE_HEIGHT + 0.15  # for title and subtitle
LINE = 0.18  # of a caption
LEGEND = 0.55  # height of a colour bar with its numbers, below everything else
# Up to this side, in pixels, each pixel is shown as a square; larger pictures are photographs, shown smooth.
_CRISP_SIDE = 64

# Negative, zero, positive: told apart by lightness as well as by hue; zero is in the middle, and nearly white.
DIVERGING = LinearSegmentedColormap.from_list(
    "diverging", ["#00304F", style.BLUE, "#A6CFE6", "#F7F7F7", "#F4B88F", style.VERMILLION, "#6B2B00"]
)
ZERO = 0.5
"""Where zero is on the diverging colours, and in filters that are shown in colour."""


def sheet(title: str, subtitle: str, below: float) -> tuple[Figure, Axes]:
    """A figure with `below` inches under its title, and axes over all of it whose coordinates are inches.

    y is counted upwards from the lower edge, so content begins at `height - TOP`.
    """
    figure = style.new_figure(WIDTH, TOP + below)
    # Each tile is a picture of its own in vector formats, with its own few pixels.
    figure.suppressComposite = True
    style.add_title(figure, title, subtitle)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=(0, WIDTH), ylim=(0, TOP + below))
    return figure, axes


def columns_for(count: int, most: int) -> int:
    """The columns that make as few rows as `most` would, of lengths as equal as can be."""
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
    """One tile: RGB (h, w, 3), or numbers (h, w) in the colours of `cmap` between `limits`."""
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
    """A rectangle around a place."""
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
    """One line of text, cut where it is wider than `room`. ha: what of the text is at `left`."""
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
    """A colour bar at the lower edge with its ends and zero as numbers, and `what` beside it."""
    left, top, width, height = style.MARGIN, LEGEND - 0.12, 2.6, 0.14
    ramp = np.linspace(*limits, 256)[None]
    # Vector formats would show few pixels as few stripes.
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
    """A line at the lower edge, in the place of a colour bar."""
    write(axes, text, style.MARGIN, LEGEND - 0.12, ROOM, color=style.MUTED)


def number(value: float) -> str:
    """Three digits, or a whole number from 1,000 on, with a real minus sign."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("-", "−")


def numbers(values: Sequence[int], most: int = 12) -> str:
    """`3, 5, 7`, or the first of them `and 20 more`."""
    listed = ", ".join(map(str, values[:most]))
    return f"{listed} and {len(values) - most} more" if len(values) > most else listed


def pixels(image: Tensor) -> NDArray[np.uint8]:
    """A picture uint8 (1 or 3, H, W) as RGB (H, W, 3)."""
    shown: NDArray[np.uint8] = image.cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()
    return shown


def single(color: str) -> ListedColormap:
    """A colour map of one colour."""
    return ListedColormap([color])
