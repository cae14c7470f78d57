"""Draw the accuracy on held-out training pictures by the penalty of logistic regression."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cvdist import log
from cvdist.figures import style
from cvdist.results import LogisticResult


def penalty_curve(fitted: LogisticResult) -> Figure:
    """Draw the accuracy by penalty, and mark the chosen one."""
    path = sorted(fitted.path, key=lambda held: held.penalty)
    chosen = next(held for held in path if held.penalty == fitted.penalty)
    figure = style.new_figure(
        f"Logistic regression: penalty {chosen.penalty:.2g}",
        f"{log.percent(chosen.correct, chosen.total)} of held-out training pictures right with it",
        width=8.0,
        height=4.8,
    )
    axes = style.plain(figure.subplots(), grid="both")
    axes.plot([held.penalty for held in path], [held.accuracy for held in path], "o-", color=style.BLUE, lw=2)
    axes.plot([chosen.penalty], [chosen.accuracy], "o", ms=11, mfc="none", mec=style.VALID, mew=2)
    axes.set(xscale="log", xlabel="L2 penalty", ylabel="accuracy on held-out training pictures")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda penalty, _: f"{penalty:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(style.percent_tick))
    return figure
