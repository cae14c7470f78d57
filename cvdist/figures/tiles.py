"""Sheets: figures that are filled from the top with rows of small pictures, called tiles; lengths in inches.

All tiles are in one axes. With axes for each tile, as `Figure.subplots` makes them, drawing takes five times as
long, and captions would not know how wide their tiles become.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from cvdist.figures import style

ROOM = style.WIDTH - 2 * style.MARGIN
LINE = 0.18  # height of a line of a caption
GAP = 0.06
_SPACE = 0.04  # between two pieces of a line
# Of tiles up to this many pixels wide, each pixel is drawn as a square; larger ones are smoothed.
_CRISP_SIDE = 64

# From negative over zero to positive. Zero is nearly white; lightness and hue show the distance from it.
DIVERGING = LinearSegmentedColormap.from_list(
    "diverging", ["#00304F", style.BLUE, "#A6CFE6", "#F7F7F7", "#F4B88F", style.VERMILLION, "#6B2B00"]
)


class Piece(NamedTuple):
    """A piece of text in a line, in one color, weight and size. Pieces are separated by spaces."""

    text: str
    color: str = style.MUTED
    weight: str = "normal"
    size: float = style.SMALL_SIZE


Line = Sequence[Piece]


def line_width(line: Line) -> float:
    """Return the width in inches of the pieces with the spaces between them."""
    widths = [style.text_width(piece.text, piece.size, weight=piece.weight) for piece in line]
    return sum(widths) + _SPACE * (len(line) - 1)


@dataclass(frozen=True)
class Tile:
    """A small picture with lines of text below it.

    Attributes:
        values: RGB (h, w, 3), or numbers (h, w) that are drawn in the colors of `cmap`.
        caption: The lines below. What is wider than the tile is cut.
        cmap: A color map for numbers.
        limits: The numbers at both ends of the color map.
        box: Edges of an area to mark, in pixels: top, left, bottom, right.
    """

    values: NDArray[Any]
    caption: Sequence[Line] = ()
    cmap: Colormap | str | None = None
    limits: tuple[float, float] | None = None
    box: tuple[int, int, int, int] | None = None


class Sheet:
    """A figure in the making. `y` is how far it is filled, in inches from the top."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        """Begin a sheet with the space for its title."""
        self._title, self._subtitle = title, subtitle
        self._figure = Figure(dpi=style.DPI, facecolor="white")
        FigureCanvasAgg(self._figure)
        # In vector formats, keep each tile as a separate image of few pixels instead of one large composite.
        self._figure.suppressComposite = True
        self._axes = self._figure.add_axes((0, 0, 1, 1))
        self._axes.axis("off")
        self.y = style.head_height(subtitle)

    def row(
        self,
        tiles: Sequence[Tile],
        width: float,
        *,
        left: float = style.MARGIN,
        gap: float = GAP,
        center: bool = False,
        space: float = 0.1,
    ) -> None:
        """Draw a row of tiles and move on below it.

        Args:
            tiles: The tiles, from left to right.
            width: Width of each tile. Its height keeps the proportions of its picture.
            left: Where the first tile begins.
            gap: Space between two tiles.
            center: Whether a caption is in the middle below its tile, and as wide as tile and gap.
            space: Space below the row.
        """
        bottom = self.y
        for tile in tiles:
            height = width * tile.values.shape[0] / tile.values.shape[1]
            self._draw(tile, left, width, height)
            for number, line in enumerate(tile.caption):
                top = self.y + height + 0.05 + LINE * number
                if center:
                    self.write(line, left + width / 2, width + gap, top=top, ha="center")
                else:
                    self.write(line, left, width, top=top)
            bottom = max(bottom, self.y + height + LINE * len(tile.caption))
            left += width + gap
        self.y = bottom + space

    def _draw(self, tile: Tile, left: float, width: float, height: float) -> None:
        rows, columns = tile.values.shape[:2]
        low, high = tile.limits or (None, None)
        self._axes.imshow(
            tile.values,
            cmap=tile.cmap,
            vmin=low,
            vmax=high,
            interpolation="none" if max(rows, columns) <= _CRISP_SIDE else "antialiased",
            extent=(left, left + width, self.y + height, self.y),
        )
        self._frame(left, self.y, width, height, style.GRID, 0.6)
        if tile.box is not None:
            scale = width / columns
            top, start, end, stop = (scale * edge for edge in tile.box)
            for color, thick in (("white", 2.2), (style.VERMILLION, 1.0)):  # one stands out on any picture
                self._frame(left + start, self.y + top, stop - start, end - top, color, thick)

    def _frame(self, left: float, top: float, width: float, height: float, color: str, thick: float) -> None:
        frame = Rectangle((left, top), width, height, fill=False, edgecolor=color, linewidth=thick)
        self._axes.add_patch(frame)

    def write(
        self, line: Line | str, left: float, room: float, *, top: float | None = None, ha: str = "left"
    ) -> None:
        """Write the pieces of a line one after another. What is wider than `room` is cut.

        Args:
            line: The line, or the text of one in small muted letters.
            left: Where the line begins or, if `ha` is "center" or "right", has its middle or its end. Only a
                line of one piece can be centered or end there.
            room: The space that it has.
            top: The upper edge, from the top of the sheet. None: `y`.
            ha: Horizontal alignment.
        """
        end = left + room
        for text, color, weight, size in [Piece(line)] if isinstance(line, str) else line:
            shown = style.elide(text, end - left, size, weight=weight)
            look: dict[str, Any] = {"size": size, "color": color, "weight": weight, "ha": ha, "va": "top"}
            style.write(self._axes, left, self.y if top is None else top, shown, **look)
            left += style.text_width(text, size, weight=weight) + _SPACE

    def color_bar(self, start: float, cmap: Colormap | str, limits: tuple[float, float]) -> float:
        """Draw a color bar from `start` at `y`, between the numbers of its ends. Returns where it ends."""
        stop = start + 2.0
        self.write(number(limits[0]), start - GAP, 1.0, ha="right")
        self.write(number(limits[1]), stop + GAP, 1.0)
        # 256 steps, since vector formats do not interpolate between the pixels of an image.
        place = (start, stop, self.y + 0.15, self.y + 0.01)
        self._axes.imshow(np.linspace(*limits, 256)[None], cmap=cmap, interpolation="none", extent=place)
        return stop + GAP + style.text_width(number(limits[1]), style.SMALL_SIZE)

    def legend(
        self, text: str, cmap: Colormap | str | None = None, limits: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        """Write a line that explains the tiles above, beside a color bar if they have a color map."""
        self.y += 0.05
        left = style.MARGIN
        if cmap is not None:
            left += style.text_width(number(limits[0]), style.SMALL_SIZE) + GAP
            left = self.color_bar(left, cmap, limits) + 0.25
        self.write(text, left, style.MARGIN + ROOM - left)
        self.y += 0.25

    def figure(self, *, width: float = style.WIDTH) -> Figure:
        """Return the figure, as high as it is filled."""
        self._figure.set_size_inches(width, self.y + 0.05)
        self._axes.set(xlim=(0, width), ylim=(self.y + 0.05, 0), aspect="auto")
        style.add_title(self._figure, self._title, self._subtitle)
        return self._figure


def columns_for(count: int, most: int) -> int:
    """Return the number of columns, at most `most`, with the fewest rows of the most equal lengths."""
    return math.ceil(count / math.ceil(count / most)) if count else 1


def tile_width(columns: int, widest: float, *, room: float = ROOM, gap: float = GAP) -> float:
    """Return the width of a tile if `columns` of them fill a row of `room` inches, at most `widest`."""
    return min((room + gap) / columns - gap, widest)


def number(value: float) -> str:
    """Format a number with three significant digits, or as an integer from 1,000 on, with a real minus."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("-", "−")


def pixels(image: Tensor) -> NDArray[np.uint8]:
    """Convert a picture, uint8 (1 or 3, H, W), to RGB (H, W, 3)."""
    shown: NDArray[np.uint8] = image.cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()
    return shown
