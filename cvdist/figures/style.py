"""One look for all figures: sizes, colours, text that fits, and PNG files that are the same every time.

Everything is set on the figure itself, nothing in matplotlib's global settings, so that a thread that draws
and a thread that does something else with matplotlib don't meet.
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

# Okabe and Ito, "Color Universal Design" (2008): told apart with every common kind of colour vision.
BLUE = "#0072B2"
VERMILLION = "#D55E00"
GREEN = "#009E73"
TRAIN = BLUE
VALID = VERMILLION
INK = "#222222"
MUTED = "#666666"
GRID = "#E2E2E2"

# Points.
TITLE_SIZE = 14
LABEL_SIZE = 11
TEXT_SIZE = 10
SMALL_SIZE = 9

# Inches.
MARGIN = 0.2
TITLE_HEIGHT = 0.5
SUBTITLE_HEIGHT = 0.25


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of `width` × `height` inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def add_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes without a box, at a place given in inches from the lower left corner."""
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
    """Write `title`, and `subtitle` below it, in the upper left corner; cut where they don't fit."""
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
    """Inches that a figure has to be wide to show all of `title`."""
    return text_width(title, TITLE_SIZE, weight="bold") + 2 * MARGIN


def text_width(text: str, size: float, *, weight: str = "normal") -> float:
    """Inches that one line of `text` takes at `size` points."""
    font = FontProperties(size=size, weight=weight)
    pixels, _, _ = RendererAgg(1, 1, DPI).get_text_width_height_descent(text, font, ismath=False)
    return pixels / DPI


def elide(text: str, room: float, size: float, *, weight: str = "normal") -> str:
    """`text` in one line, its end replaced by "…" where it is wider than `room` inches."""
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
    """A tick's label: `0.985` is `98.5%`. With as many digits as the number has, 6 at most."""
    return f"{100 * fraction:.6g}%"


def confidence(probability: float) -> str:
    """`99.7%`. What would be rounded to 100% is shown as `>99.9%`: no model is that sure."""
    return ">99.9%" if probability >= 0.9995 else f"{probability:.1%}"


def save_png(figure: Figure, path: Path | IO[bytes]) -> None:
    """Write `figure`. The same figure gives the same bytes: the file holds no version and no time."""
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


def save_svg(figure: Figure, path: Path | IO[bytes]) -> None:
    """The same as vectors: text as outlines, no time and no random names in the file."""
    # Without a salt of its own, names in the file are random. Nothing but SVG files reads this setting.
    matplotlib.rcParams["svg.hashsalt"] = "cvdist"
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
