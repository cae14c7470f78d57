"""Draw accuracy and loss on held-out training pictures by the penalty of logistic regression."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cvdist.figures import style
from cvdist.results import LogisticResult, correct_of


def penalty_curve(fitted: LogisticResult) -> Figure:
    """Draw accuracy and loss by penalty, and mark the chosen one, which has the lowest loss."""
    path = sorted(fitted.path, key=lambda held: held.penalty)
    chosen = next(held for held in path if held.penalty == fitted.penalty)
    figure = style.new_figure(
        f"Logistic regression: penalty {chosen.penalty:.2g}",
        f"{correct_of(chosen.correct, chosen.total, several=fitted.multilabel)} of held-out training pictures",
        width=8.0,
        height=6.0,
    )
    rows = figure.subplots(2, 1, sharex=True)
    names = {"accuracy": "exact matches" if fitted.multilabel else "accuracy", "loss": "loss"}
    for axes, name in zip(rows, names, strict=True):
        style.plain(axes, grid="both").set(xscale="log", ylabel=f"held-out {names[name]}")
        values = [getattr(held, name) for held in path]
        axes.plot([held.penalty for held in path], values, "o-", color=style.BLUE, lw=2)
        axes.plot([chosen.penalty], [getattr(chosen, name)], "o", ms=11, mfc="none", mec=style.VALID, mew=2)
    rows[0].yaxis.set_major_formatter(FuncFormatter(style.percent_tick))
    rows[1].xaxis.set_major_formatter(FuncFormatter(lambda penalty, _: f"{penalty:g}"))
    rows[1].set_xlabel("L2 penalty")
    return figure
