"""Draw the accuracy on held-out training pictures by the penalty of logistic regression."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cvdist import log
from cvdist.figures import style
from cvdist.results import LogisticResult


def penalty_curve(fitted: LogisticResult) -> Figure:
    """Draw the accuracy by penalty, and mark the chosen one."""
    figure = Figure(figsize=(7.0, 4.2), dpi=style.DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=style.TEXT_SIZE, colors=style.MUTED, labelcolor=style.INK)
    axes.grid(color=style.GRID)
    path = sorted(fitted.path, key=lambda held: held.penalty)
    accuracies = [held.accuracy for held in path]
    axes.plot([held.penalty for held in path], accuracies, color=style.BLUE, marker="o", linewidth=2)
    chosen = next(held for held in path if held.penalty == fitted.penalty)
    axes.plot(
        *([chosen.penalty], [chosen.accuracy]), marker="o", markersize=11, markerfacecolor="none",
        markeredgecolor=style.VALID, markeredgewidth=2, linestyle="none",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("L2 penalty", size=style.LABEL_SIZE)
    axes.set_ylabel("accuracy on held-out training pictures", size=style.LABEL_SIZE)
    axes.yaxis.set_major_formatter(FuncFormatter(style.percent_tick))
    right = log.percent(chosen.correct, chosen.total)
    axes.set_title(f"Chosen: penalty {chosen.penalty:.2g}, {right}", size=style.TITLE_SIZE, loc="left")
    return figure
