"""The common style of all figures: sizes, colors, text that is cut to fit, and reproducible PNG and SVG files.

Everything is set on the figure itself rather than in matplotlib's global settings, so that several threads can
draw at the same time.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

# Pixels per inch. At a width of 8 to 9 inches the text stays legible in MLflow's preview of about 900 pixels.
DPI = 130

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

# Lengths in inches.
MARGIN = 0.2
TITLE_HEIGHT = 0.5
SUBTITLE_HEIGHT = 0.25


def new_figure(width: float, height: float) -> Figure:
    """Create an empty white figure of `width` × `height` inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def add_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes without a box.

    The place and the size are in inches, from the lower left corner of the figure.
    """
    whole_width, whole_height = figure.get_size_inches()
    place = (left / whole_width, bottom / whole_height, width / whole_width, height / whole_height)
    axes = figure.add_axes(place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(which="both", colors=MUTED, labelcolor=INK, labelsize=TEXT_SIZE)
    axes.xaxis.label.set(color=INK, size=LABEL_SIZE)
    axes.yaxis.label.set(color=INK, size=LABEL_SIZE)
    axes.set_axisbelow(True)
    return axes


def add_title(figure: Figure, title: str, subtitle: str = "") -> None:
    """Write `title`, and `subtitle` below it, in the upper left corner. Text wider than the figure is cut."""
    width, height = figure.get_size_inches()
    room = width - 2 * MARGIN
    lines = [(title, TITLE_SIZE, "bold", INK), (subtitle, TEXT_SIZE, "normal", MUTED)]
    top = height - MARGIN
    for text, size, weight, color in lines:
        figure.text(
            MARGIN / width,
            top / height,
            elide(text, room, size, weight=weight),
            size=size,
            weight=weight,
            color=color,
            va="top",
            parse_math=False,
        )
        top -= TITLE_HEIGHT - MARGIN


def title_width(title: str) -> float:
    """Return the width in inches that a figure needs to show the whole `title`."""
    return text_width(title, TITLE_SIZE, weight="bold") + 2 * MARGIN


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
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if text_width(text[:middle] + "…", size, weight=weight) <= room:
            fits = middle
        else:
            too_long = middle
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
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


def save_svg(figure: Figure, path: Path | IO[bytes]) -> None:
    """Write an SVG file, without version, date and random ids, so that the same figure gives the same bytes."""
    # Without a salt, ids in the file are random. This setting is global, but only the SVG backend reads it.
    matplotlib.rcParams["svg.hashsalt"] = "cvdist"
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
