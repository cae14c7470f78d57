"""Draw the results of a sweep: settings and accuracy of the trials, importance of settings, learning curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import Locator, LogLocator, MaxNLocator

from cvdist import log
from cvdist.figures import style
from cvdist.sweep import space
from cvdist.sweep.importance import Importance
from cvdist.sweep.record import Trial, TrialEpoch, best_of
from cvdist.sweep.space import Dimension

_HEIGHT = 5.2
_ABSENT = -0.12  # height at which a setting is drawn that a trial does not have
# Accuracies that get a tick if there is room for it, in order of precedence.
_ACCURACIES = (
    *(0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999),
    *(0.96, 0.97, 0.7, 0.6, 0.85),
)
_TICK_GAP = 0.055  # least distance between two labels, as a fraction of the axis' height
# If the forest explains less of the variance than this, the order of the settings is mostly chance.
_TRUSTED = 0.2
_STOPPED = "#8A8A8A"
_DOTTED = (0, (1, 1.2))


def parallel_coordinates(search: Sequence[Dimension], trials: Sequence[Trial]) -> Figure:
    """Draw each trial as a line through its settings to its accuracy.

    The method is that of Inselberg 1985, "The plane with parallel coordinates". The best trial is orange;
    trials that were stopped early are dotted. The axis of accuracies is logarithmic in the error, so that 98%
    and 99% are as far apart as 80% and 90%.

    Args:
        search: The searched settings, one axis each.
        trials: All trials. Those without a result are not drawn, and the subtitle counts them.
    """
    measured = [trial for trial in trials if trial.best is not None]
    best, lost = best_of(measured), len(trials) - len(measured)
    left_out = f"; {lost} without a result left out" if lost else ""
    subtitle = f"{len(measured)} trials{left_out}: {_best_trial(best)}"
    width = max(style.WIDTH, 1.3 * (len(search) + 1) + 1.5)
    figure = style.new_figure("Settings and accuracy", subtitle, width=width, height=_HEIGHT)
    axes = style.plain(figure.subplots())
    axes.spines[:].set_visible(False)
    absent = {d.name for d in search if any(d.name not in trial.settings for trial in measured)}
    axes.set(xlim=(0, len(search)), ylim=(_ABSENT - 0.03 if absent else -0.02, 1.02), yticks=[])
    axes.set_xticks(range(len(search) + 1), [*(dimension.flag for dimension in search), "accuracy"])
    axes.tick_params(axis="x", length=0, pad=10, labelsize=style.LABEL_SIZE)
    if not measured:
        style.announce(axes, "no results")
        return figure
    scale = _ErrorScale([trial.best for trial in measured if trial.best is not None])
    colors = matplotlib.colormaps["viridis"]
    for trial in sorted(measured, key=lambda trial: (trial is best, trial.score)):
        reached = scale.place(max(one.correct / one.total for one in trial.epochs))
        places = [_place(dimension, trial) for dimension in search] + [reached]
        look = _look(trial is best, colors(0.85 * reached))
        axes.plot(places, linestyle="-" if trial.state == "finished" else _DOTTED, **look)
    for at, dimension in enumerate(search):
        _axis(axes, at, _ticks(dimension) + ([(_ABSENT, "none")] if dimension.name in absent else []))
    _axis(axes, len(search), scale.ticks(), right=True)
    finished, stopped = {"color": style.MUTED}, {"color": style.MUTED, "linestyle": _DOTTED}
    _legend(axes, {"linewidth": 3}, finished, stopped)
    return figure


def importance_bars(importance: Importance) -> Figure:
    """Draw the importance of each setting as a bar, with its standard deviation over repeated shuffles."""
    epochs = f"{importance.epochs} epoch{'s' if importance.epochs > 1 else ''}"
    trusted = importance.explained >= _TRUSTED
    caveat = "" if trusted else ": too little to trust the order"
    figure = style.new_figure(
        "Which settings matter",
        f"accuracy after {epochs}, {importance.trials} trials; random forest, R² {importance.explained:.2f} on "
        f"trials that it has not seen{caveat}",
        height=1.65 + 0.42 * len(importance.flags),
    )
    axes = style.plain(figure.subplots(), grid="x")
    axes.barh(
        importance.flags,
        importance.drops,
        xerr=importance.spreads,
        height=0.62,
        color=style.BLUE if trusted else "#9FB8C8",
        error_kw={"ecolor": style.MUTED, "capsize": 3, "linewidth": 1},
    )
    for place, (drop, spread) in enumerate(zip(importance.drops, importance.spreads, strict=True)):
        end = max(drop + spread, 0.0), place  # of the bar and its spread; of a negative one, where it begins
        look: dict[str, Any] = {"size": style.TEXT_SIZE, "color": style.INK, "annotation_clip": False}
        axes.annotate(f"{drop:z.2f}", end, (5, 0), textcoords="offset points", va="center", **look)
    axes.invert_yaxis()
    lowest = (drop - spread for drop, spread in zip(importance.drops, importance.spreads, strict=True))
    axes.set_xlim(left=min(0.0, *lowest))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("loss of R² when the setting's values are shuffled")
    return figure


def trial_curves(trials: Sequence[Trial]) -> Figure:
    """Draw the validation accuracy of each trial by epoch. The axis is logarithmic in the error."""
    measured = [trial for trial in trials if trial.best is not None]
    best = best_of(measured)
    figure = style.new_figure("Trials by epoch", _best_trial(best), height=_HEIGHT)
    axes = style.plain(figure.subplots(), grid="both")
    axes.set(xlabel="epoch", ylabel="validation accuracy")
    if not measured:
        style.announce(axes, "no results")
        return figure
    scale = _ErrorScale([one for trial in measured for one in trial.epochs])
    for trial in sorted(measured, key=lambda trial: (trial is best, trial.state == "finished")):
        finished = trial.state == "finished"
        look = _look(trial is best, style.BLUE if finished else _STOPPED)
        epochs = [one.epoch for one in trial.epochs]
        values = [scale.place(one.correct / one.total) for one in trial.epochs]
        axes.plot(epochs, values, marker="o", markersize=5 if trial is best else 3.5, **look)
        if not finished:
            axes.plot(epochs[-1], values[-1], "x", color=look["color"], markersize=8, markeredgewidth=1.8)
    last = max(trial.epochs[-1].epoch for trial in measured)
    axes.set(xlim=(0.8, last + 0.2), ylim=(-0.02, 1.02))
    axes.set_yticks(*zip(*scale.ticks(), strict=True))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    usual = {"color": style.BLUE, "marker": "o", "markersize": 4}
    stopped = {"color": _STOPPED, "marker": "x", "markersize": 8}
    _legend(axes, {"linewidth": 3, "marker": "o"}, usual, stopped)
    return figure


def _look(best: bool, color: Any) -> dict[str, Any]:
    """Return how the line of a trial is drawn: `color`, unless it is the best one."""
    if best:
        return {"color": style.VALID, "linewidth": 3.0, "zorder": 3, "clip_on": False}
    return {"color": color, "linewidth": 1.3, "alpha": 0.8, "zorder": 2, "clip_on": False}


class _ErrorScale:
    """Maps accuracies to an axis that is logarithmic in the error: the worst one to 0 and the best one to 1."""

    def __init__(self, epochs: Sequence[TrialEpoch]) -> None:
        """Span the axis over the accuracies of `epochs`."""
        accuracies = [one.correct / one.total for one in epochs]
        self._total = max(one.total for one in epochs)
        self._worst, self._best = min(accuracies), max(accuracies)

    def place(self, accuracy: float) -> float:
        """Return the place of an accuracy in [0, 1] on the axis, in [0, 1]."""
        low, depth, high = map(self._depth, (self._worst, accuracy, self._best))
        return 0.5 if low == high else (depth - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Return places and labels of ticks: both ends, and round accuracies as far as there is room."""
        values = [self._worst, self._best, *(one for one in _ACCURACIES if self._worst < one < self._best)]
        labels = (f"{100 * value:.2f}".rstrip("0").rstrip(".") + "%" for value in values)
        return _with_room(zip(map(self.place, values), labels, strict=True))

    def _depth(self, accuracy: float) -> float:
        # Half a picture is added to the error, so that an accuracy of 100% has a finite place as well.
        return -math.log(max(1 - accuracy, 0.0) + 0.5 / self._total)


def _with_room(ticks: Iterable[tuple[float, str]]) -> list[tuple[float, str]]:
    """Leave out ticks, places and labels, that are too close to an earlier one."""
    chosen: list[tuple[float, str]] = []
    for place, label in ticks:
        if all(abs(place - other) >= _TICK_GAP for other, _ in chosen):
            chosen.append((place, label))
    return chosen


def _place(dimension: Dimension, trial: Trial) -> float:
    """Return the height at which the line of `trial` crosses the axis of `dimension`.

    Trials with the same choice are spread a little, so that their lines can be told apart.
    """
    if dimension.name not in trial.settings:
        return _ABSENT
    place = dimension.fraction_of(trial.settings[dimension.name])
    if dimension.choices:
        place += ((trial.number * 0.618034) % 1 - 0.5) * 0.5 / len(dimension.choices)
    return place


def _ticks(dimension: Dimension) -> list[tuple[float, str]]:
    """Return places and labels of ticks: both ends, and round values as far as there is room."""
    if dimension.choices:
        return [(dimension.fraction_of(choice), space.format_value(choice)) for choice in dimension.choices]
    low, high = dimension.low, dimension.high
    locator: Locator = MaxNLocator(nbins=5, integer=dimension.kind is int)
    if dimension.logarithmic:
        locator = LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0))
    values = [low, high, *map(float, locator.tick_values(low, high))]
    labels = ((value, f"{value:g}".replace("e-0", "e-").replace("e+0", "e")) for value in values)
    return _with_room((dimension.fraction_of(value), label) for value, label in labels if low <= value <= high)


def _axis(axes: Axes, at: int, ticks: Sequence[tuple[float, str]], *, right: bool = False) -> None:
    """Draw the vertical axis of one setting, with labels on a white background that covers the lines."""
    axes.plot([at, at], [0, 1], color=style.INK, linewidth=1.2, zorder=4, clip_on=False)
    white = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    look: dict[str, Any] = {"size": style.SMALL_SIZE, "color": style.INK, "zorder": 5, "bbox": white}
    shift, look["ha"] = (7, "left") if right else (-7, "right")
    for place, text in ticks:
        label = axes.annotate(text, (at, place), (shift, 0), textcoords="offset points", va="center", **look)
        label.set(annotation_clip=False, parse_math=False)
        axes.plot(at, place, marker="_", color=style.INK, markersize=6, zorder=4, clip_on=False)


def _legend(axes: Axes, best: dict[str, Any], finished: dict[str, Any], stopped: dict[str, Any]) -> None:
    """Explain above the axes how the lines of trials are drawn."""
    lines = [
        Line2D([], [], color=style.VALID, label="best", **best),
        Line2D([], [], linewidth=1.3, label="finished", **finished),
        Line2D([], [], linewidth=1.3, label="stopped early", **stopped),
    ]
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.02), "borderaxespad": 0}
    axes.legend(handles=lines, ncols=3, frameon=False, fontsize=style.TEXT_SIZE, **place)


def _best_trial(best: Trial | None) -> str:
    if best is None or best.best is None:
        return "none has finished"
    result = log.percent(best.best.correct, best.best.total)
    return f"best {result} by trial {best.number}, {space.format_settings(best.settings)}"
