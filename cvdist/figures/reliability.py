"""Draw a reliability diagram: how often the predictions of a model are correct, by their confidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cvdist.figures import style

_WIDTH, _SIDE, _LOWER = 7.0, 4.2, 1.1
_BAR = "#7FB3D5"  # a lighter `style.BLUE`, on which lines are visible
_LEFT, _BOTTOM, _GAP = 0.95, 0.7, 0.25


class Bin(Protocol):
    """The pictures whose confidence is in (low, high].

    Attributes:
        low: Lower end of the bin, in [0, 1].
        high: Upper end of the bin, in [0, 1].
        total: How many pictures are in the bin.
        correct: How many of them were classified correctly.
        confidence: Their mean confidence, in [0, 1].
        accuracy: Fraction of them that was classified correctly, in [0, 1].
    """

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def total(self) -> int: ...
    @property
    def correct(self) -> int: ...
    @property
    def confidence(self) -> float: ...
    @property
    def accuracy(self) -> float: ...


def reliability_diagram(bins: Sequence[Bin], error: float) -> Figure:
    """Draw the accuracy of each bin and its gap to the bin's mean confidence, with a histogram below.

    After figure 1 of Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599. The bars of
    a calibrated model end at the mean confidence of their bins.

    Args:
        bins: The bins, in order of confidence.
        error: The expected calibration error, in [0, 1].
    """
    total, correct = sum(one.total for one in bins), sum(one.correct for one in bins)
    confidence = sum(one.total * one.confidence for one in bins)
    width = _WIDTH - _LEFT - 0.4
    height = _BOTTOM + _LOWER + _GAP + _SIDE + style.TITLE_HEIGHT + style.SUBTITLE_HEIGHT + 0.15
    figure = style.new_figure(_WIDTH, height)
    lower = style.add_axes(figure, _LEFT, _BOTTOM, width, _LOWER)
    upper = style.add_axes(figure, _LEFT, _BOTTOM + _LOWER + _GAP, width, _SIDE)
    filled = [one for one in bins if one.total]
    upper.plot(
        [0, 1], [0, 1], color=style.INK, linewidth=1.5, linestyle="--", zorder=3, label="perfectly calibrated"
    )
    upper.bar(
        [one.low for one in filled],
        [one.accuracy for one in filled],
        width=[one.high - one.low for one in filled],
        align="edge",
        color=_BAR,
        edgecolor="white",
        label="accuracy",
    )
    # The gap of each bin, from its accuracy to its mean confidence.
    upper.bar(
        [one.low for one in filled],
        [one.confidence - one.accuracy for one in filled],
        width=[one.high - one.low for one in filled],
        bottom=[one.accuracy for one in filled],
        align="edge",
        color="none",
        edgecolor=style.VERMILLION,
        hatch="///",
        linewidth=1,
        label="gap to the mean confidence",
    )
    upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    upper.tick_params(labelbottom=False)
    upper.yaxis.set_major_formatter(FuncFormatter(style.percent_tick))
    upper.legend(loc="upper left", frameon=False, fontsize=style.TEXT_SIZE, labelcolor=style.INK)
    upper.grid(axis="y", color=style.GRID, linewidth=0.8)
    lower.bar(
        [one.low for one in filled],
        [one.total for one in filled],
        width=[one.high - one.low for one in filled],
        align="edge",
        color=style.MUTED,
        edgecolor="white",
    )
    lower.set(xlim=(0, 1), xlabel="confidence: the probability of the predicted class", ylabel="pictures")
    lower.xaxis.set_major_formatter(FuncFormatter(style.percent_tick))
    lower.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    figure.align_ylabels([upper, lower])
    style.add_title(
        figure,
        f"Reliability: expected calibration error {error:.2%}",
        f"{total:,} pictures in {len(bins)} bins; accuracy {correct / max(total, 1):.1%}, mean confidence "
        f"{confidence / max(total, 1):.1%}",
    )
    return figure
