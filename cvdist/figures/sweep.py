"""Draw the results of a sweep: settings and accuracy of the trials, importance of settings, learning curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cvdist import log
from cvdist.figures import style
from cvdist.sweep import space
from cvdist.sweep.importance import Importance
from cvdist.sweep.record import Trial, best_of
from cvdist.sweep.space import Dimension

_WIDTH, _HEIGHT = 9.0, 5.2
_TOP = style.TITLE_HEIGHT + style.SUBTITLE_HEIGHT + 0.5
_ABSENT = -0.12  # height at which a setting is drawn that a trial does not have
# Accuracies that get a tick if there is room for it, in order of precedence.
_TICK_ACCURACIES = (
    0.5,
    0.8,
    0.9,
    0.95,
    0.98,
    0.99,
    0.995,
    0.998,
    0.999,
    0.9995,
    0.9998,
    0.9999,
    0.96,
    0.97,
    0.7,
    0.6,
    0.85,
)
_TICK_GAP = 0.055  # least distance between two labels, as a fraction of the axis' height
_BAR = 0.42  # inches per bar
# If the forest explains less of the variance than this, the order of the settings is mostly chance.
_TRUSTED = 0.2


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
    best = best_of(measured)
    figure = style.new_figure(max(_WIDTH, 1.3 * (len(search) + 1) + 1.5), _HEIGHT)
    lost = len(trials) - len(measured)
    left_out = f"; {lost} without a result left out" if lost else ""
    style.add_title(figure, "Settings and accuracy", f"{len(measured)} trials{left_out}: {_best_trial(best)}")
    width, height = figure.get_size_inches()
    axes = style.add_axes(figure, 0.9, 0.55, width - 2.0, height - 0.55 - _TOP)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlim(0, len(search))
    absent = any(dimension.name not in trial.settings for trial in measured for dimension in search)
    axes.set_ylim(_ABSENT - 0.03 if absent else -0.02, 1.02)
    axes.set_yticks([])
    axes.set_xticks(range(len(search) + 1), [*(dimension.flag for dimension in search), "accuracy"])
    axes.tick_params(axis="x", length=0, pad=10, labelsize=style.LABEL_SIZE)
    if not measured:
        axes.text(0.5, 0.5, "no results", transform=axes.transAxes, size=18, color=style.MUTED, ha="center")
        return figure
    scale = _ErrorScale(measured)
    colors = matplotlib.colormaps["viridis"]
    for trial in sorted(measured, key=lambda trial: (trial is best, trial.score)):
        reached = scale.place_of_best(trial)
        places = [_place(dimension, trial) for dimension in search] + [reached]
        stopped = trial.state != "finished"
        axes.plot(
            range(len(places)),
            places,
            color=style.VALID if trial is best else colors(0.85 * reached),
            linewidth=3.0 if trial is best else 1.3,
            linestyle=(0, (1, 1.2)) if stopped else "-",
            alpha=1.0 if trial is best else 0.8,
            zorder=3 if trial is best else 2,
            clip_on=False,
        )
    for at, dimension in enumerate(search):
        _axis(axes, at, _ticks(dimension), absent=any(dimension.name not in t.settings for t in measured))
    _axis(axes, len(search), scale.ticks(), right=True)
    lines = [
        Line2D([], [], color=style.VALID, linewidth=3, label="best"),
        Line2D([], [], color=style.MUTED, linewidth=1.3, label="finished"),
        Line2D([], [], color=style.MUTED, linewidth=1.3, linestyle=(0, (1, 1.2)), label="stopped early"),
    ]
    _legend(axes, lines)
    return figure


def importance_bars(importance: Importance) -> Figure:
    """Draw the importance of each setting as a bar, with its standard deviation over repeated shuffles."""
    count = len(importance.flags)
    height = 0.75 + _BAR * count + style.TITLE_HEIGHT + style.SUBTITLE_HEIGHT + 0.15
    figure = style.new_figure(_WIDTH, height)
    epochs = f"{importance.epochs} epoch{'s' if importance.epochs > 1 else ''}"
    caveat = "" if importance.explained >= _TRUSTED else ": too little to trust the order"
    style.add_title(
        figure,
        "Which settings matter",
        f"accuracy after {epochs}, {importance.trials} trials; random forest, R² {importance.explained:.2f} on "
        f"trials that it has not seen{caveat}",
    )
    left = 0.45 + max(style.text_width(flag, style.TEXT_SIZE) for flag in importance.flags)
    axes = style.add_axes(figure, left, 0.75, _WIDTH - left - 0.9, _BAR * count)
    places = range(count)
    trusted = importance.explained >= _TRUSTED
    axes.barh(
        places,
        importance.drops,
        xerr=importance.spreads,
        height=0.62,
        color=style.BLUE if trusted else "#9FB8C8",
        error_kw={"ecolor": style.MUTED, "capsize": 3, "linewidth": 1},
    )
    for place, drop, spread in zip(places, importance.drops, importance.spreads, strict=True):
        axes.annotate(
            f"{drop:.2f}",
            (max(drop, 0.0) + spread, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            size=style.TEXT_SIZE,
            color=style.INK,
        )
    axes.set_yticks(places, importance.flags)
    axes.invert_yaxis()
    axes.set_xlim(left=min(0.0, *(d - s for d, s in zip(importance.drops, importance.spreads, strict=True))))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=style.GRID)
    axes.set_xlabel("loss of R² when the setting's values are shuffled")
    return figure


def trial_curves(trials: Sequence[Trial]) -> Figure:
    """Draw the validation accuracy of each trial by epoch. The axis is logarithmic in the error."""
    measured = [trial for trial in trials if trial.best is not None]
    best = best_of(measured)
    figure = style.new_figure(_WIDTH, _HEIGHT)
    style.add_title(figure, "Trials by epoch", _best_trial(best))
    axes = style.add_axes(figure, 0.9, 0.7, _WIDTH - 1.3, _HEIGHT - 0.7 - _TOP)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy")
    axes.grid(color=style.GRID)
    if not measured:
        axes.text(0.5, 0.5, "no results", transform=axes.transAxes, size=18, color=style.MUTED, ha="center")
        return figure
    scale = _ErrorScale(measured, every_epoch=True)
    for trial in sorted(measured, key=lambda trial: (trial is best, trial.state == "finished")):
        finished = trial.state == "finished"
        color = style.VALID if trial is best else (style.BLUE if finished else "#8A8A8A")
        epochs = [one.epoch for one in trial.epochs]
        values = [scale.place(one.correct, one.total) for one in trial.epochs]
        axes.plot(
            epochs,
            values,
            color=color,
            linewidth=3.0 if trial is best else 1.3,
            alpha=1.0 if trial is best else 0.75,
            marker="o",
            markersize=5 if trial is best else 3.5,
            clip_on=False,
            zorder=3 if trial is best else 2,
        )
        if not finished:
            axes.plot(epochs[-1:], values[-1:], color=color, marker="x", markersize=8, markeredgewidth=1.8)
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks(*zip(*scale.ticks(), strict=True))
    last = max(trial.epochs[-1].epoch for trial in measured)
    axes.set_xlim(0.8, last + 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    lines = [
        Line2D([], [], color=style.VALID, linewidth=3, marker="o", label="best"),
        Line2D([], [], color=style.BLUE, linewidth=1.3, marker="o", markersize=4, label="finished"),
        Line2D([], [], color="#8A8A8A", linewidth=1.3, marker="x", markersize=8, label="stopped early"),
    ]
    _legend(axes, lines)
    return figure


class _ErrorScale:
    """Maps accuracies to an axis that is logarithmic in the error: the worst one to 0 and the best one to 1."""

    def __init__(self, trials: Sequence[Trial], *, every_epoch: bool = False) -> None:
        """Span the axis over the best epochs of `trials`, or with `every_epoch` over all their epochs."""
        found = [
            (one.correct, one.total)
            for trial in trials
            for one in (trial.epochs if every_epoch else [trial.best])
            if one is not None
        ]
        self._total = max(total for _, total in found)
        accuracies = [correct / total for correct, total in found]
        self._worst, self._best = min(accuracies), max(accuracies)
        self._low, self._high = self._depth(self._worst), self._depth(self._best)

    def place(self, correct: int, total: int) -> float:
        """Return the place of `correct` of `total` pictures on the axis, in [0, 1]."""
        if self._low == self._high:
            return 0.5
        return (self._depth(correct / total) - self._low) / (self._high - self._low)

    def place_of_best(self, trial: Trial) -> float:
        """Return the place of the best epoch of `trial` on the axis, in [0, 1]."""
        assert trial.best is not None
        return self.place(trial.best.correct, trial.best.total)

    def ticks(self) -> list[tuple[float, str]]:
        """Return places and labels of ticks: both ends, and round accuracies as far as there is room."""
        ends = sorted({self._worst, self._best})
        chosen = [(self.place_of(value), value) for value in ends]
        for value in _TICK_ACCURACIES:
            if self._worst < value < self._best:
                place = self.place_of(value)
                if all(abs(place - other) >= _TICK_GAP for other, _ in chosen):
                    chosen.append((place, value))
        return [(place, _percent(value)) for place, value in sorted(chosen)]

    def place_of(self, accuracy: float) -> float:
        """Return the place of an accuracy in [0, 1] on the axis, in [0, 1]."""
        return self.place(round(accuracy * 10**9), 10**9)

    def _depth(self, accuracy: float) -> float:
        # Half a picture is added to the error, so that an accuracy of 100% has a finite place as well.
        return -math.log(max(1 - accuracy, 0.0) + 0.5 / self._total)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}".rstrip("0").rstrip(".") + "%"


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
    values = [low, high]
    if dimension.logarithmic:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1,) if len(powers) > 3 else (1, 2, 5)
        values += [step * 10.0**power for power in powers for step in steps]
    elif low < high:
        whole = dimension.kind is int
        values += [float(tick) for tick in MaxNLocator(nbins=5, integer=whole).tick_values(low, high)]
    chosen: list[tuple[float, str]] = []
    for value in values:
        if low <= value <= high:
            place = dimension.fraction_of(value)
            if all(abs(place - other) >= _TICK_GAP for other, _ in chosen):
                chosen.append((place, f"{value:g}".replace("e-0", "e-").replace("e+0", "e")))
    return sorted(chosen)


def _axis(
    axes: Axes, at: int, ticks: Sequence[tuple[float, str]], *, right: bool = False, absent: bool = False
) -> None:
    """Draw the vertical axis of one setting, with labels on a white background that covers the lines."""
    axes.plot([at, at], [0, 1], color=style.INK, linewidth=1.2, zorder=4, clip_on=False)
    labels = [*ticks, *([(_ABSENT, "none")] if absent else [])]
    for place, text in labels:
        axes.annotate(
            text,
            (at, place),
            xytext=(7 if right else -7, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            size=style.SMALL_SIZE,
            color=style.INK,
            zorder=5,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            annotation_clip=False,
            parse_math=False,
        )
        axes.plot([at], [place], marker="_", color=style.INK, markersize=6, zorder=4, clip_on=False)


def _legend(axes: Axes, lines: Sequence[Line2D]) -> None:
    axes.legend(
        handles=list(lines),
        loc="lower right",
        bbox_to_anchor=(1.0, 1.02),
        ncols=len(lines),
        frameon=False,
        fontsize=style.TEXT_SIZE,
        borderaxespad=0,
    )


def _best_trial(best: Trial | None) -> str:
    if best is None or best.best is None:
        return "none has finished"
    result = log.percent(best.best.correct, best.best.total)
    return f"best {result} by trial {best.number}, {space.format_settings(best.settings)}"
