"""Draw the accuracy of networks against what a picture costs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cvdist.figures import style

_GAP = 0.09  # inches between a point and its name
_LINE = 0.17  # height of a name in inches


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
    for one in networks:
        color = style.BLUE if one in front else style.MUTED
        axes.plot([one.gflop] * 2, one.interval, color=color, linewidth=1.5, alpha=0.6, solid_capstyle="butt")
        look: dict[str, Any] = {"markerfacecolor": color if one.solved else "white", "markeredgewidth": 1.8}
        axes.plot([one.gflop], [one.accuracy], "o", markersize=8, color=color, zorder=3, **look)
    axes.step(
        [one.gflop for one in front],
        [one.accuracy for one in front],
        where="post",
        color=style.BLUE,
        linewidth=1.2,
        linestyle=(0, (4, 3)),
    )
    costs = [one.gflop for one in networks]
    axes.set(xscale="log", xlim=(min(costs) / 1.8, max(costs) * 1.8))
    axes.set(xlabel="GFLOP a picture (1e9 multiply-adds)", ylabel="validation accuracy")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(style.percent_tick))
    _legend(axes, networks)
    _write_names(figure, axes, networks)
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
        Line2D([], [], color=style.BLUE, linewidth=1.5, alpha=0.6, label="95% interval"),
        Line2D([], [], color=style.BLUE, linewidth=1.2, linestyle=(0, (4, 3)), label="Pareto front"),
    ]
    look: dict[str, Any] = {"frameon": False, "fontsize": style.TEXT_SIZE, "labelcolor": style.INK}
    axes.legend(handles=marks, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=len(marks), **look)


def _write_names(figure: Figure, axes: Axes, networks: Sequence[NetworkCost]) -> None:
    """Write each name beside its point, on the first side where it covers no other name or point."""
    style.lay_out(figure)
    box = axes.get_window_extent()
    points = [axes.transData.transform((one.gflop, one.accuracy)) / style.DPI for one in networks]
    taken = [(x - 0.06, y - 0.06, x + 0.06, y + 0.06) for x, y in points]
    for (x, y), one in zip(points, networks, strict=True):
        wide = style.text_width(one.name, style.TEXT_SIZE)
        right, left = x + _GAP, x - _GAP - wide
        lines = [0.0, *(sign * step * _LINE for step in range(1, 8) for sign in (1, -1))]
        places = [(corner, y - _LINE / 2 + line) for line in lines for corner in (right, left)]
        free = [
            place
            for place in places
            if box.x0 / style.DPI <= place[0] <= box.x1 / style.DPI - wide
            and box.y0 / style.DPI <= place[1] <= box.y1 / style.DPI - _LINE
            and not any(_overlap((*place, place[0] + wide, place[1] + _LINE), other) for other in taken)
        ]
        at = (free or places)[0]
        taken.append((*at, at[0] + wide, at[1] + _LINE))
        where: dict[str, Any] = {
            "xy": (one.gflop, one.accuracy),
            "xytext": ((at[0] - x) * 72, (at[1] + _LINE / 2 - y) * 72),
        }
        look: dict[str, Any] = {
            "size": style.TEXT_SIZE,
            "color": style.INK,
            "va": "center",
            "parse_math": False,
        }
        axes.annotate(one.name, textcoords="offset points", **where, **look)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
