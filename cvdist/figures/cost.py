"""Draw the accuracy of networks against what a picture costs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cvdist.figures import style

_GAP = 0.09  # inches between a point and its name
_LINE = 0.17  # height of a name in inches
_INTERVAL: dict[str, Any] = {"linewidth": 1.5, "alpha": 0.6, "solid_capstyle": "butt"}
_FRONT: dict[str, Any] = {"linewidth": 1.2, "linestyle": (0, (4, 3))}


@dataclass(frozen=True)
class NetworkCost:
    """A network's accuracy and cost.

    Attributes:
        name: Name of the network.
        correct: How many pictures were classified correctly.
        total: How many pictures were classified.
        interval: The 95% interval of the accuracy.
        gflop: Operations for a picture, in 1e9.
        solved: Whether a logistic regression classified, or else a ridge classifier.
    """

    name: str
    correct: int
    total: int
    interval: tuple[float, float]
    gflop: float
    solved: bool

    @property
    def accuracy(self) -> float:
        """Fraction of correct pictures, in [0, 1]."""
        return self.correct / self.total


def pareto_front(networks: Sequence[NetworkCost]) -> list[NetworkCost]:
    """Return the networks that are more accurate than all that cost no more, the cheapest first."""
    front: list[NetworkCost] = []
    for one in sorted(networks, key=lambda one: (one.gflop, -one.correct)):
        if not front or one.correct > front[-1].correct:
            front.append(one)
    return front


def accuracy_by_cost(networks: Sequence[NetworkCost], title: str, subtitle: str) -> Figure:
    """Draw accuracies with their intervals against operations on a logarithmic axis, and the Pareto front."""
    figure = style.new_figure(title, subtitle, height=5.6)
    axes = style.plain(figure.subplots(), grid="both")
    front = pareto_front(networks)
    costs = [one.gflop for one in networks]
    low, high = min(costs) / 1.8, max(costs) * 1.8
    for one in networks:
        color = style.BLUE if one in front else style.MUTED
        axes.plot([one.gflop] * 2, one.interval, color=color, **_INTERVAL)
        look: dict[str, Any] = {"markerfacecolor": color if one.solved else "white", "markeredgewidth": 1.8}
        axes.plot([one.gflop], [one.accuracy], "o", markersize=8, color=color, zorder=3, **look)
    # Beyond the last network, more operations have brought nothing.
    steps = [(one.gflop, one.accuracy) for one in front] + [(high, front[-1].accuracy)]
    axes.step(*zip(*steps, strict=True), where="post", color=style.BLUE, **_FRONT)
    axes.set(xscale="log", xlim=(low, high))
    axes.set(xlabel="GFLOP a picture (1e9 multiply-adds)", ylabel="validation accuracy")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(style.percent_tick))
    _legend(axes, networks)
    _write_names(figure, axes, networks, steps)
    return figure


def _legend(axes: Axes, networks: Sequence[NetworkCost]) -> None:
    words = {True: "logistic regression", False: "ridge classifier"}
    point: dict[str, Any] = {
        "color": style.BLUE,
        "marker": "o",
        "linestyle": "",
        "markersize": 8,
        "markeredgewidth": 1.8,
    }
    marks = [
        Line2D([], [], markerfacecolor=style.BLUE if solved else "white", label=words[solved], **point)
        for solved in (True, False)
        if any(one.solved == solved for one in networks)
    ]
    marks += [
        Line2D([], [], color=style.BLUE, label="95% interval", **_INTERVAL),
        Line2D([], [], color=style.BLUE, label="Pareto front", **_FRONT),
    ]
    look: dict[str, Any] = {"frameon": False, "fontsize": style.TEXT_SIZE, "labelcolor": style.INK}
    axes.legend(handles=marks, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=len(marks), **look)


def _write_names(
    figure: Figure, axes: Axes, networks: Sequence[NetworkCost], steps: Sequence[tuple[float, float]]
) -> None:
    """Write each name near its point, in the first place where it covers nothing else; figures in inches."""
    style.lay_out(figure)

    def inches(x: float, y: float) -> tuple[float, float]:
        across, up = axes.transData.transform((x, y)) / style.DPI
        return float(across), float(up)

    frame = [side / style.DPI for side in axes.get_window_extent().extents]
    points = [inches(one.gflop, one.accuracy) for one in networks]
    taken = [(x - _GAP, y - _GAP, x + _GAP, y + _GAP) for x, y in points]
    for one in networks:
        taken.append((*inches(one.gflop, one.interval[0]), *inches(one.gflop, one.interval[1])))
    for (x, y), (next_x, next_y) in pairwise(steps):
        taken += [(*inches(x, y), *inches(next_x, y)), (*inches(next_x, y), *inches(next_x, next_y))]
    named: list[tuple[float, float, float, float]] = []
    for (x, y), one in zip(points, networks, strict=True):
        wide = style.text_width(one.name, style.TEXT_SIZE)
        lines = [y + _GAP / 2, y - _GAP / 2 - _LINE, y - _LINE / 2]
        lines += [y + sign * step * _LINE for step in range(1, 12) for sign in (1, -1)]
        places = [(left, line) for line in lines for left in (x + _GAP, x - _GAP - wide)]
        boxes = [(left, line, left + wide, line + _LINE) for left, line in places]
        inside = [
            box
            for box in boxes
            if frame[0] <= box[0] and box[2] <= frame[2] and frame[1] <= box[1] and box[3] <= frame[3]
        ]
        free = [box for box in inside if not any(_overlap(box, other) for other in taken)]
        # A name on a line can be read, a name on a name can't.
        legible = [box for box in inside if not any(_overlap(box, other) for other in named)]
        box = (free or legible or inside or boxes)[0]
        taken.append(box)
        named.append(box)
        at = (box[0] - x) * 72, ((box[1] + box[3]) / 2 - y) * 72
        look: dict[str, Any] = {
            "size": style.TEXT_SIZE,
            "color": style.INK,
            "va": "center",
            "parse_math": False,
        }
        axes.annotate(one.name, (one.gflop, one.accuracy), at, textcoords="offset points", **look)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
