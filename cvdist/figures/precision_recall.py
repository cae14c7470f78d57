"""Draw precision by recall for each class, where a picture may have several classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from cvdist import multilabel
from cvdist.figures import style

_MOST = 12  # classes that are drawn
_COLUMNS = 4
_PANEL = 2.05  # inches, width and height


def precision_recall(curves: Tensor, average_precision: Tensor, classes: Sequence[str]) -> Figure:
    """Draw the curve of each class, the class with the lowest average precision first.

    Of more than 12 classes, it draws the 6 with the lowest and the 6 with the highest one.

    Args:
        curves: Precision at a recall of 0, 0.01, ... 1, float (C, 101), from `multilabel.precision_at_recall`.
        average_precision: Average precision of each class, float (C,); NaN for a class without pictures, which
            is not drawn.
        classes: The C class names.
    """
    values = average_precision.tolist()
    order = sorted((i for i, value in enumerate(values) if not math.isnan(value)), key=values.__getitem__)
    title = f"Precision by recall: mean average precision {multilabel.mean(average_precision):.4f}"
    half = _MOST // 2
    drawn = order if len(order) <= _MOST else order[:half] + order[-half:]
    which = (
        f"{len(order)} classes"
        if drawn == order
        else f"the {half} lowest and the {half} highest of {len(order)}"
    )
    if not drawn:
        return style.nothing_to_show(title, "no class has a picture", style.MUTED)
    without = len(values) - len(order)
    subtitle = f"{which}, by average precision (AP)" + f"; {without} without pictures" * bool(without)
    columns = min(_COLUMNS, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = style.new_figure(
        title,
        subtitle,
        width=max(columns * _PANEL + 0.6, 6.6),
        height=rows * _PANEL + style.head_height(subtitle) + 0.3,
    )
    panels: list[Axes] = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for number, axes in enumerate(panels):
        if number >= len(drawn):
            axes.set_visible(False)
            continue
        one = drawn[number]
        _curve(axes, curves[one].tolist(), classes[one], values[one])
        axes.tick_params(labelbottom=number + columns >= len(drawn))
        if number % columns == 0:
            axes.set_ylabel("precision")
        if number + columns >= len(drawn):
            axes.set_xlabel("recall")
    return figure


def _curve(axes: Axes, curve: Sequence[float], name: str, value: float) -> None:
    style.plain(axes, grid="both").set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(style.percent_tick))
    recall = np.linspace(0, 1, len(curve))
    axes.fill_between(recall, curve, step="pre", color=style.BLUE, alpha=0.15, linewidth=0)
    axes.step(recall, curve, where="pre", color=style.BLUE, lw=2, clip_on=False)
    shown = style.elide(name, _PANEL - 1.2, style.TEXT_SIZE, weight="bold")
    look: dict[str, Any] = {"transform": axes.transAxes, "va": "bottom", "size": style.TEXT_SIZE}
    style.write(axes, 0, 1.03, shown, weight="bold", color=style.INK, **look)
    style.write(axes, 1, 1.03, f"{value:.3f}", ha="right", **look)
