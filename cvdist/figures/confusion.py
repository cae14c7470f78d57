"""Draw a confusion matrix in which mistakes stand out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from cvdist.figures import style

_WIDTH = 9.0
_MOST_CLASSES_WITH_COUNTS = 20  # with more classes, counts do not fit into the cells
_MOST_CLASSES_WITH_NAMES = 30  # with more classes, names do not fit along the axes
# A cell has to be about 4 pixels wide to be visible: with more rows than this, neighboring classes share one.
_MOST_CELLS = 150
_PAIRS = 16
_TINY_SIZE = 8  # points: the largest that 30 names in a column leave room for
_WIDEST_NAME = 1.3  # inches
_RIGHT_TINT = "#E4E4E4"
_MISTAKES = LinearSegmentedColormap.from_list("mistakes", ["#FDE6D6", "#EE9A5E", style.VERMILLION, "#A84300"])


def confusion_matrix(matrix: Tensor | NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """Draw how often pictures of each class were predicted as each class.

    Only mistakes are colored, by their share of the true class. The diagonal is light gray and does not count
    for the color scale, or it would use up the whole range. With up to 20 classes, each cell shows its count,
    and those on the diagonal also the recall of their class; with more classes, a list beside the matrix names
    the pairs that are confused most often.

    Args:
        matrix: Counts, int64 (C, C). Rows are true classes, columns predicted classes.
        classes: The C class names.

    Raises:
        ValueError: If `matrix` is not of shape (C, C).
    """
    counts = np.asarray(matrix, dtype=np.int64)
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(f"a matrix of shape {counts.shape} for {len(classes)} classes")
    if len(classes) <= _MOST_CLASSES_WITH_COUNTS:
        return _with_counts(counts, classes)
    return _with_pairs(counts, classes)


def most_confused(counts: NDArray[np.int64], limit: int) -> list[tuple[int, int, int]]:
    """Return (count, true class, predicted class) of the at most `limit` most frequent mistakes, in order."""
    mistakes = counts.copy()
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:limit]
    pairs = [divmod(int(place), len(counts)) for place in order]
    return [(int(mistakes[pair]), *pair) for pair in pairs if mistakes[pair]]


def _with_counts(counts: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    names = [style.elide(name, _WIDEST_NAME, style.TEXT_SIZE) for name in classes]
    widest = max(style.text_width(name, style.TEXT_SIZE) for name in names)
    left, right = widest + 0.7, 1.2
    side = min(max(1.1 * len(names), 3.6), 6.2, _WIDTH - left - right)
    turned = 45 if widest > 0.9 * side / len(names) else 0
    bottom = (0.75 * widest if turned else 0.1) + 0.6
    figure = style.new_figure(max(left + side + right, 7.0), bottom + side + _top())
    axes = style.add_axes(figure, left, bottom, side, side)
    rates = _mistake_rates(counts)
    norm = _draw(axes, rates)
    _name_axes(axes, names, style.TEXT_SIZE, turned)
    _write_counts(axes, counts, rates, norm, side / len(names))
    _add_color_bar(figure, norm, rates, (left + side + 0.25, bottom, 0.16, side), "vertical")
    _add_title(figure, counts)
    return figure


def _with_pairs(counts: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    named = len(classes) <= _MOST_CLASSES_WITH_NAMES
    names = [style.elide(name, 1.0, _TINY_SIZE) for name in classes] if named else []
    widest = max((style.text_width(name, _TINY_SIZE) for name in names), default=0.0)
    left, list_width = max(widest, 0.3) + 0.6, 3.3
    side = _WIDTH - left - list_width - 0.45
    turned = 90 if named and widest > 0.9 * side / len(names) else 0
    bottom = (widest if turned else 0.1) + 0.6
    figure = style.new_figure(_WIDTH, bottom + side + _top())
    axes = style.add_axes(figure, left, bottom, side, side)
    rates = _mistake_rates(counts)
    norm = _draw(axes, rates)
    if named:
        _name_axes(axes, names, _TINY_SIZE, turned)
    else:
        _number_axes(axes)
    list_left = _WIDTH - list_width - style.MARGIN
    _add_color_bar(figure, norm, rates, (list_left + 0.1, bottom, list_width - 0.4, 0.13), "horizontal")
    _list_pairs(figure, counts, classes, (list_left, bottom + side), list_width, (side - 0.45) / (_PAIRS + 1))
    _add_title(figure, counts)
    return figure


def _top() -> float:
    return style.TITLE_HEIGHT + style.SUBTITLE_HEIGHT + 0.15


def _add_title(figure: Figure, counts: NDArray[np.int64]) -> None:
    correct, total = int(counts.trace()), int(counts.sum())
    result = f"{correct}/{total} ({correct / total:.2%}) correct" if total else "no samples"
    recall = ", with the class's recall" if len(counts) <= _MOST_CLASSES_WITH_COUNTS else ""
    group = _group(len(counts))
    grouping = f"; each cell: the largest of {group} × {group} classes" if group > 1 else ""
    style.add_title(
        figure,
        f"Confusion matrix: {result}",
        f"gray: correct{recall}; color: mistakes, as a share of their true class{grouping}",
    )


def _mistake_rates(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Divide counts by the sum of their row: float64 (C, C), 0 on the diagonal and in rows without samples."""
    rates = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    np.fill_diagonal(rates, 0.0)
    return rates


def _draw(axes: Axes, rates: NDArray[np.float64]) -> PowerNorm:
    """Draw mistakes in color and the diagonal in gray. Returns the color scale."""
    size, group = len(rates), _group(len(rates))
    # Most rates are small: an exponent below 1 spreads them over more of the color scale.
    norm = PowerNorm(0.7, vmin=0.0, vmax=rates.max() or 1.0)
    cells = _greatest_of_groups(rates, group)
    reach = group * len(cells) - 0.5
    extent = (-0.5, reach, reach, -0.5)
    if group == 1:
        diagonal = np.ma.masked_equal(np.eye(size), 0)
        tint = ListedColormap([_RIGHT_TINT])
        axes.imshow(diagonal, cmap=tint, extent=extent, interpolation="nearest", zorder=0.5)
    else:
        axes.plot([-0.5, size - 0.5], [-0.5, size - 0.5], color="#BBBBBB", linewidth=0.6)
    mistakes = np.ma.masked_equal(cells, 0)
    axes.imshow(mistakes, cmap=_MISTAKES, norm=norm, extent=extent, interpolation="nearest")
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(size - 0.5, -0.5)
    axes.spines[:].set(visible=True, color=style.GRID)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    return norm


def _group(classes: int) -> int:
    """Return how many neighboring classes are drawn as one row, and as one column, of cells."""
    return math.ceil(classes / _MOST_CELLS)


def _greatest_of_groups(rates: NDArray[np.float64], group: int) -> NDArray[np.float64]:
    """Return the maximum of each `group` × `group` block, since a mean could hide a single mistake."""
    rows = math.ceil(len(rates) / group)
    missing = rows * group - len(rates)
    padded = np.pad(rates, ((0, missing), (0, missing)))
    return padded.reshape(rows, group, rows, group).max(axis=(1, 3))


def _name_axes(axes: Axes, names: Sequence[str], size: float, turned: int) -> None:
    """Write the class names along both axes and draw the borders of the cells.

    The names along the horizontal axis are rotated by `turned` degrees.
    """
    places = range(len(names))
    axes.set_xticks(places, names, size=size, parse_math=False, rotation=turned, rotation_mode="anchor")
    for label in axes.get_xticklabels() if turned else ():
        label.set(ha="right", va="center" if turned == 90 else "top")
    axes.set_yticks(places, names, size=size, parse_math=False)
    axes.tick_params(length=0)
    borders = [place - 0.5 for place in places]
    axes.set_xticks(borders, minor=True)
    axes.set_yticks(borders, minor=True)
    axes.tick_params(which="minor", length=0)
    axes.grid(which="minor", color=style.GRID, linewidth=0.8)
    axes.set_axisbelow(False)  # draws the borders over the cells


def _number_axes(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel("predicted class (its number)")
    axes.set_ylabel("true class (its number)")


def _write_counts(
    axes: Axes, counts: NDArray[np.int64], rates: NDArray[np.float64], norm: PowerNorm, cell: float
) -> None:
    """Write the nonzero counts into their cells, and the recall of each class on the diagonal.

    `cell` is the width of a cell in inches.
    """
    size = min(13.0, 72 * cell / 2.9, _size_to_fit(str(counts.max()), 0.84 * cell))
    small = min(0.75 * size, _size_to_fit("100.0%", 0.88 * cell))
    for true, predicted in np.argwhere(rates):
        color = _legible_on(_MISTAKES(norm(rates[true, predicted]))[:3])
        _write(axes, true, predicted, str(counts[true, predicted]), size, color, va="center")
    for place, (correct, total) in enumerate(zip(counts.diagonal(), counts.sum(axis=1), strict=True)):
        _write(axes, place, place, str(correct), size, style.INK, va="bottom")
        _write(axes, place, place, f"{correct / total:.1%}" if total else "–", small, style.MUTED, va="top")


def _size_to_fit(text: str, room: float) -> float:
    """Return the font size, in points, at which `text` is `room` inches wide."""
    return 10 * room / style.text_width(text, 10)


def _write(axes: Axes, row: int, column: int, text: str, size: float, color: str, *, va: str) -> None:
    axes.text(column, row, text, size=size, color=color, ha="center", va=va)


def _legible_on(background: tuple[float, float, float]) -> str:
    """Return the text color, white or dark, with more contrast on `background` (contrast ratio of WCAG 2.2)."""
    ink, paper = _luminance(to_rgb(style.INK)), _luminance(background)
    return "white" if 1.05 / (paper + 0.05) > (paper + 0.05) / (ink + 0.05) else style.INK


def _luminance(color: tuple[float, float, float]) -> float:
    """Return the relative luminance of an sRGB color, as WCAG 2.2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _add_color_bar(
    figure: Figure,
    norm: PowerNorm,
    rates: NDArray[np.float64],
    place: tuple[float, float, float, float],
    orientation: str,
) -> None:
    if not rates.any():
        return
    axes = style.add_axes(figure, *place)
    bar = figure.colorbar(ScalarMappable(norm, _MISTAKES), cax=axes, orientation=orientation)
    bar.locator = MaxNLocator(nbins=4)
    bar.formatter = FuncFormatter(style.percent_tick)
    bar.outline.set_visible(False)
    bar.update_ticks()


def _list_pairs(
    figure: Figure,
    counts: NDArray[np.int64],
    classes: Sequence[str],
    corner: tuple[float, float],
    width: float,
    line_height: float,
) -> None:
    """Write a table of the most frequent mistakes, `width` inches wide. Its upper left corner is `corner`."""
    left, top = corner
    room = (width - 0.55) / 2
    columns = (left + 0.42, left + 0.55, left + 0.55 + room)

    def write(row: float, cells: tuple[str, str, str], colors: tuple[str, str, str], weight: str) -> None:
        figure_width, figure_height = figure.get_size_inches()
        for x, cell, color, ha in zip(columns, cells, colors, ("right", "left", "left"), strict=True):
            figure.text(
                x / figure_width,
                (top - row * line_height) / figure_height,
                style.elide(cell, room - 0.08, style.SMALL_SIZE, weight=weight),
                size=style.SMALL_SIZE,
                color=color,
                weight=weight,
                ha=ha,
                va="top",
                parse_math=False,
            )

    pairs = most_confused(counts, _PAIRS)
    colors = (style.INK, style.GREEN, style.VERMILLION)
    write(0, ("count", "true class", "predicted") if pairs else ("", "no mistakes", ""), colors, "bold")
    for row, (count, true, predicted) in enumerate(pairs, start=1):
        write(row, (str(count), classes[true], classes[predicted]), (style.INK,) * 3, "normal")
