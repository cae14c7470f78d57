"""Draw a reliability diagram: how often the predictions of a model are correct, by their confidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cvdist.figures import style
from cvdist.results import CalibrationBin

_BAR = "#7FB3D5"  # a lighter `style.BLUE`, on which lines are visible


def reliability_diagram(bins: Sequence[CalibrationBin], error: float, *, multilabel: bool = False) -> Figure:
    """Draw the accuracy of each bin and its gap to the bin's mean confidence, with a histogram below.

    After figure 1 of Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599. The bars of
    a calibrated model end at the mean confidence of their bins.

    Args:
        bins: The bins, in order of confidence.
        error: The expected calibration error, in [0, 1].
        multilabel: Whether the bins have the probabilities of all classes of each picture, and how many of the
            pictures have the class.
    """
    counted, share, mean = "pictures", "accuracy", "mean confidence"
    axis = "confidence: the probability of the predicted class"
    if multilabel:
        counted, share, mean = "answers", "share with the label", "mean probability"
        axis = "probability of a label, one answer for each picture and class"
    total, correct = sum(one.total for one in bins), sum(one.correct for one in bins)
    confidence = sum(one.total * one.confidence for one in bins)
    figure = style.new_figure(
        f"Reliability: expected calibration error {error:.2%}",
        f"{total:,} {counted} in {len(bins)} bins; {share} {correct / max(total, 1):.1%}, {mean} "
        f"{confidence / max(total, 1):.1%}",
        width=7.0,
        height=7.2,
    )
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[4.2, 1.1])
    style.plain(upper, grid="y")
    style.plain(lower)
    filled = [one for one in bins if one.total]
    lows, widths = [one.low for one in filled], [one.high - one.low for one in filled]
    accuracies = [one.accuracy for one in filled]
    gaps = [one.confidence - one.accuracy for one in filled]
    upper.plot(
        [0, 1], [0, 1], color=style.INK, linewidth=1.5, linestyle="--", zorder=3, label="perfectly calibrated"
    )
    upper.bar(lows, accuracies, widths, align="edge", color=_BAR, edgecolor="white", label=share)
    # The gap of each bin, from its accuracy to its mean confidence.
    hatched: dict[str, Any] = {"color": "none", "edgecolor": style.VERMILLION, "hatch": "///", "linewidth": 1}
    upper.bar(lows, gaps, widths, accuracies, align="edge", label=f"gap to the {mean}", **hatched)
    upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel=share)
    upper.yaxis.set_major_formatter(FuncFormatter(style.percent_tick))
    upper.legend(loc="upper left", frameon=False, fontsize=style.TEXT_SIZE, labelcolor=style.INK)
    counts = [one.total for one in filled]
    lower.bar(lows, counts, widths, align="edge", color=style.MUTED, edgecolor="white")
    lower.set(xlabel=axis, ylabel=counted)
    lower.xaxis.set_major_formatter(FuncFormatter(style.percent_tick))
    lower.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    figure.align_ylabels([upper, lower])
    return figure
