"""The common style of all figures: sizes, colors, text that is cut to fit, and reproducible PNG and SVG files.

Everything is set on the figure itself rather than in matplotlib's global settings, so that several threads can
draw at the same time.
"""

from __future__ import annotations

import bisect
from pathlib import Path
from typing import IO, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine

# Pixels per inch. At a width of 8 to 9 inches the text stays legible in MLflow's preview of about 900 pixels.
DPI = 130
WIDTH = 9.0
MARGIN = 0.2

# Colors of Okabe and Ito, "Color Universal Design" (2008), which people with any common kind of color vision
# can tell apart.
BLUE = "#0072B2"
VERMILLION = "#D55E00"
GREEN = "#009E73"
TRAIN = BLUE
VALID = VERMILLION
INK = "#222222"
MUTED = "#666666"
GRID = "#E2E2E2"

# Font sizes in points.
TITLE_SIZE = 14
LABEL_SIZE = 11
TEXT_SIZE = 10
SMALL_SIZE = 9


def new_figure(title: str, subtitle: str = "", *, width: float = WIDTH, height: float) -> Figure:
    """Create a white figure of `width` × `height` inches with a title.

    Axes that are added get the place below the title, by matplotlib's constrained layout.
    """
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    pad = MARGIN / 2  # also below each axes
    rect = (0, pad / height, 1, 1 - (head_height(subtitle) + pad) / height)
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=rect, w_pad=MARGIN, h_pad=pad))
    add_title(figure, title, subtitle)
    return figure


def head_height(subtitle: str) -> float:
    """Return the height in inches of a title, with the space below it."""
    return 0.85 if subtitle else 0.6


def add_title(figure: Figure, title: str, subtitle: str = "") -> None:
    """Write `title`, and `subtitle` below it, in the upper left corner. Text wider than the figure is cut."""
    width, height = figure.get_size_inches()
    lines = [(0.0, title, TITLE_SIZE, "bold", INK), (0.3, subtitle, TEXT_SIZE, "normal", MUTED)]
    for down, text, size, weight, color in lines:
        shown = elide(text, width - 2 * MARGIN, size, weight=weight)
        at = MARGIN / width, 1 - (MARGIN + down) / height
        write(figure, *at, shown, size=size, weight=weight, color=color, va="top")


def write(
    on: Figure | Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float = SMALL_SIZE,
    color: str = MUTED,
    **look: Any,
) -> None:
    """Write `text` as it is, since matplotlib would read a formula between two dollar signs."""
    on.text(x, y, text, size=size, color=color, parse_math=False, **look)


def plain(axes: Axes, *, grid: str = "") -> Axes:
    """Give axes the common look: no box, muted lines, and a grid along the axis `grid`: x, y or both."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(which="both", colors=MUTED, labelcolor=INK, labelsize=TEXT_SIZE)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=INK, size=LABEL_SIZE)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=GRID)  # type: ignore[arg-type]
    return axes


def announce(axes: Axes, text: str, color: str = MUTED) -> None:
    """Write `text` in the middle of axes that have nothing to show."""
    write(axes, 0.5, 0.5, text, size=18, color=color, ha="center", va="center", transform=axes.transAxes)


def nothing_to_show(title: str, text: str, color: str = GREEN) -> Figure:
    """Create a figure that only says why there is nothing to see: in green that nothing is wrong."""
    figure = new_figure(title, height=2.0)
    axes = figure.subplots()
    axes.axis("off")
    announce(axes, text, color)
    return figure


def lay_out(figure: Figure) -> None:
    """Run the constrained layout and end it, since saving a figure that still has it runs it twice more."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


def size_of(axes: Axes, figure: Figure) -> tuple[float, float]:
    """Lay out the figure, and return the width and the height that its axes got, in inches."""
    lay_out(figure)
    axes.apply_aspect()
    box = axes.get_window_extent()
    return box.width / DPI, box.height / DPI


def text_width(text: str, size: float, *, weight: str = "normal") -> float:
    """Return the width in inches of one line of `text` at `size` points."""
    font = FontProperties(size=size, weight=weight)
    pixels, _, _ = RendererAgg(1, 1, DPI).get_text_width_height_descent(text, font, ismath=False)
    return pixels / DPI


def elide(text: str, room: float, size: float, *, weight: str = "normal") -> str:
    """Put `text` on one line, and replace its end by "…" if it is wider than `room` inches."""
    text = " ".join(text.split())
    if text_width(text, size, weight=weight) <= room:
        return text
    cut = range(1, len(text))
    fits = bisect.bisect(cut, room, key=lambda end: text_width(text[:end] + "…", size, weight=weight))
    return text[:fits].rstrip(" ,") + "…"


def percent_tick(fraction: float, _position: int | None = None) -> str:
    """Format a fraction as the label of a tick: 0.985 becomes `98.5%`. At most 6 significant digits."""
    return f"{100 * fraction:.6g}%"


def confidence(probability: float) -> str:
    """Format a probability as `99.7%`.

    One that would be rounded to 100.0% becomes `>99.9%`, as it is not certain.
    """
    return ">99.9%" if probability >= 0.9995 else f"{probability:.1%}"


def save_png(figure: Figure, path: Path | IO[bytes]) -> None:
    """Write a PNG file, without version and date, so that the same figure gives the same bytes."""
    lay_out(figure)
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


def save_svg(figure: Figure, path: Path | IO[bytes]) -> None:
    """Write an SVG file, without version, date and random ids, so that the same figure gives the same bytes."""
    # Without a salt, ids in the file are random. This setting is global, but only the SVG backend reads it.
    matplotlib.rcParams["svg.hashsalt"] = "cvdist"
    lay_out(figure)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
