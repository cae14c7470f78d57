"""Draw a confusion matrix in which mistakes stand out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from cvdist.figures import style

_MOST_CLASSES_WITH_COUNTS = 20  # with more classes, counts do not fit into the cells
_MOST_CLASSES_WITH_NAMES = 30  # with more classes, names do not fit along the axes
# A cell has to be about 4 pixels wide to be visible: with more rows than this, neighboring classes share one.
_MOST_CELLS = 150
_PAIRS = 16
_TINY_SIZE = 8  # points: the largest that 30 names in a column leave room for
_WIDEST_NAME = 1.3  # inches
_RIGHT_TINT = "#E4E4E4"
# From here on in the color scale, white text has more contrast than dark text (contrast ratio of WCAG 2.2).
_WHITE_FROM = 0.692
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
    side = min(max(1.1 * len(names), 3.6), 6.2, style.WIDTH - widest - 1.9)
    turned = 45 if widest > 0.9 * side / len(names) else 0
    width, height = max(side + widest + 1.9, 7.0), side + (0.75 * widest if turned else 0.1) + 1.55
    figure = style.new_figure(*_titles(counts), width=width, height=height)
    axes = style.plain(figure.subplots(subplot_kw={"box_aspect": 1, "anchor": "NW"}))
    rates = _mistake_rates(counts)
    norm = _draw(axes, rates)
    _name_axes(axes, names, style.TEXT_SIZE, turned)
    _add_color_bar(axes.inset_axes((1.04, 0, 0.03, 1)), norm, rates, "vertical")
    _write_counts(axes, counts, rates, norm, style.size_of(axes, figure)[0] / len(names))
    return figure


def _with_pairs(counts: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    named = len(classes) <= _MOST_CLASSES_WITH_NAMES
    names = [style.elide(name, 1.0, _TINY_SIZE) for name in classes] if named else []
    widest = max((style.text_width(name, _TINY_SIZE) for name in names), default=0.3)
    side = style.WIDTH - widest - 4.45
    turned = 90 if named and widest > 0.9 * side / len(names) else 0
    figure = style.new_figure(*_titles(counts), height=side + (widest if turned else 0.1) + 1.6)
    axes, table = figure.subplots(1, 2, width_ratios=[side, 3.2])
    rates = _mistake_rates(counts)
    norm = _draw(style.plain(axes), rates)
    if named:
        _name_axes(axes, names, _TINY_SIZE, turned)
    else:
        for axis, which in ((axes.xaxis, "predicted"), (axes.yaxis, "true")):
            axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axis.set_label_text(f"{which} class (its number)")
    table.axis("off")
    _add_color_bar(table.inset_axes((0.02, 0, 0.9, 0.03)), norm, rates, "horizontal")
    _list_pairs(table, counts, classes, style.size_of(table, figure)[0])
    return figure


def _titles(counts: NDArray[np.int64]) -> tuple[str, str]:
    correct, total = int(counts.trace()), int(counts.sum())
    result = f"{correct}/{total} ({correct / total:.2%}) correct" if total else "no samples"
    recall = ", with the class's recall" if len(counts) <= _MOST_CLASSES_WITH_COUNTS else ""
    group = _group(len(counts))
    grouping = f"; each cell: the largest of {group} × {group} classes" if group > 1 else ""
    explained = f"gray: correct{recall}; color: mistakes, as a share of their true class{grouping}"
    return f"Confusion matrix: {result}", explained


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
    # The maximum of each block of classes, since a mean could hide a single mistake.
    cells = F.max_pool2d(torch.from_numpy(rates)[None], group, ceil_mode=True)[0].numpy()
    reach = group * len(cells) - 0.5
    extent = (-0.5, reach, reach, -0.5)
    if group == 1:
        diagonal = np.ma.masked_equal(np.eye(size), 0)
        tint = ListedColormap([_RIGHT_TINT])
        axes.imshow(diagonal, cmap=tint, extent=extent, aspect="auto", interpolation="nearest", zorder=0.5)
    else:
        axes.plot([-0.5, size - 0.5], [-0.5, size - 0.5], color="#BBBBBB", linewidth=0.6)
    mistakes = np.ma.masked_equal(cells, 0)
    axes.imshow(mistakes, cmap=_MISTAKES, norm=norm, extent=extent, aspect="auto", interpolation="nearest")
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(size - 0.5, -0.5)
    axes.spines[:].set(visible=True, color=style.GRID)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    return norm


def _group(classes: int) -> int:
    """Return how many neighboring classes are drawn as one row, and as one column, of cells."""
    return math.ceil(classes / _MOST_CELLS)


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
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([place - 0.5 for place in places], minor=True)
    axes.tick_params(which="minor", length=0)
    axes.grid(which="minor", color=style.GRID, linewidth=0.8)
    axes.set_axisbelow(False)  # draws the borders over the cells


def _write_counts(
    axes: Axes, counts: NDArray[np.int64], rates: NDArray[np.float64], norm: PowerNorm, cell: float
) -> None:
    """Write the nonzero counts into their cells, and the recall of each class on the diagonal.

    `cell` is the width of a cell in inches.
    """

    def fitting(text: str, room: float) -> float:
        return 10 * room / style.text_width(text, 10)

    size = min(13.0, 72 * cell / 2.9, fitting(str(counts.max()), 0.84 * cell))
    small = min(0.75 * size, fitting("100.0%", 0.88 * cell))
    for true, predicted in np.argwhere(rates):
        color = "white" if norm(rates[true, predicted]) > _WHITE_FROM else style.INK
        text = str(counts[true, predicted])
        axes.text(predicted, true, text, size=size, color=color, ha="center", va="center")
    for at, (correct, total) in enumerate(zip(counts.diagonal(), counts.sum(axis=1), strict=True)):
        recall = f"{correct / total:.1%}" if total else "–"
        axes.text(at, at, str(correct), size=size, color=style.INK, ha="center", va="bottom")
        axes.text(at, at, recall, size=small, color=style.MUTED, ha="center", va="top")


def _add_color_bar(axes: Axes, norm: PowerNorm, rates: NDArray[np.float64], orientation: str) -> None:
    if not rates.any():
        axes.remove()
        return
    style.plain(axes)
    ticks, form = MaxNLocator(nbins=4), FuncFormatter(style.percent_tick)
    mappable = ScalarMappable(norm, _MISTAKES)
    axes.figure.colorbar(mappable, cax=axes, orientation=orientation, ticks=ticks, format=form, drawedges=False)
    axes.spines["outline"].set_visible(False)


def _list_pairs(axes: Axes, counts: NDArray[np.int64], classes: Sequence[str], width: float) -> None:
    """Write a table of the most frequent mistakes into axes that are `width` inches wide."""
    room = (width - 0.38) / 2
    pairs = most_confused(counts, _PAIRS)
    lines = [(str(count), classes[true], classes[predicted]) for count, true, predicted in pairs]
    heads = [("count", "true class", "predicted") if pairs else ("", "no mistakes", "")]
    for row, cells in enumerate(heads + lines):
        weight = "normal" if row else "bold"
        colors = (style.INK,) * 3 if row else (style.INK, style.GREEN, style.VERMILLION)
        columns = zip((0.25, 0.38, 0.38 + room), ("right", "left", "left"), cells, colors, strict=True)
        for x, ha, text, color in columns:
            look: dict[str, Any] = {"color": color, "weight": weight, "ha": ha, "va": "top"}
            shown = style.elide(text, room - 0.08, style.SMALL_SIZE, weight=weight)
            y = 1 - 0.92 * row / (_PAIRS + 1)
            style.write(axes, x / width, y, shown, transform=axes.transAxes, **look)
