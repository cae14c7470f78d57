"""Draw loss, accuracy and mean average precision by epoch, two lines in one diagram."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from cvdist import log
from cvdist.figures import style
from cvdist.results import EpochRecord

_LINE_WIDTH = 2.0
# Up to this many epochs, each one has a visible dot. Beyond, a dot is only as wide as the line, so that it is
# visible only where an epoch has no neighbor to draw a line to.
_DOTTED_EPOCHS = 30
# If the greatest loss is at least this many times the least one, the axis is logarithmic: on a linear axis all
# but the first epochs would lie flat at the bottom.
_LOG_SCALE_FROM = 50.0
# The accuracy axis spans at least this much, or a difference of a few samples would fill it.
_LEAST_ACCURACY_SPAN = 0.005
# Least distance between the two labels at the ends of the lines, as a fraction of the axis' height.
_LABEL_GAP = 0.13


def loss_curves(history: Sequence[EpochRecord]) -> Figure:
    """Draw training and validation loss by epoch, and mark the epoch with the least validation loss.

    Among equal losses the first epoch is marked. The loss axis is logarithmic if the losses span a factor of 50
    or more. Losses that are not finite leave gaps in the line.

    Raises:
        ValueError: If `history` is empty.
    """
    train = [_finite(record.train_loss) for record in history]
    valid = [_finite(record.valid_loss) for record in history]
    figure, axes = _draw_lines("Loss by epoch", history, train, valid)
    axes.set_ylabel("loss")
    _scale_losses(axes, [loss for loss in train + valid if not math.isnan(loss)])
    _label_ends(axes, train, valid, _loss)
    measured = [at for at, loss in enumerate(valid) if not math.isnan(loss)]
    if measured:
        best = min(measured, key=lambda at: valid[at])
        epoch = history[best].epoch
        _mark_best(axes, epoch, valid[best], f"least validation loss {_loss(valid[best])} at epoch {epoch}")
    return figure


def accuracy_curves(history: Sequence[EpochRecord]) -> Figure:
    """Draw training and validation accuracy by epoch, and mark the epoch with the best validation accuracy.

    Among equal accuracies the first epoch is marked. Training accuracy is measured on augmented pictures and
    with dropout, while the weights still change, so it can lie below validation accuracy.

    Raises:
        ValueError: If `history` is empty.
    """
    train = [record.train_accuracy for record in history]
    valid = [record.valid_accuracy for record in history]
    figure, axes = _draw_lines("Accuracy by epoch", history, train, valid)
    axes.set_ylabel("accuracy")
    axes.set_ylim(*_accuracy_limits(train + valid))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(style.percent_tick))
    _label_ends(axes, train, valid, lambda accuracy: f"{accuracy:.2%}")
    best = max(history, key=lambda record: record.valid_accuracy)
    text = f"best validation {log.percent(best.valid_correct, best.valid_total)} at epoch {best.epoch}"
    _mark_best(axes, best.epoch, best.valid_accuracy, text)
    return figure


def average_precision_curve(history: Sequence[EpochRecord]) -> Figure:
    """Draw mean average precision and macro F1 of validation by epoch, and mark the best precision.

    Raises:
        ValueError: If `history` is empty.
    """
    f1 = [record.valid_macro_f1 for record in history]
    precision = [record.valid_mean_average_precision or 0.0 for record in history]
    names = ("macro F1", "mAP")
    figure, axes = _draw_lines("Mean average precision by epoch, validation", history, f1, precision, names)
    axes.set_ylabel("mAP and macro F1")
    axes.set_ylim(*_accuracy_limits(f1 + precision))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    _label_ends(axes, f1, precision, lambda value: f"{value:.4f}")
    best = max(range(len(history)), key=lambda at: precision[at])
    epoch = history[best].epoch
    _mark_best(axes, epoch, precision[best], f"best mAP {precision[best]:.4f} at epoch {epoch}")
    return figure


def _draw_lines(
    title: str,
    history: Sequence[EpochRecord],
    train: list[float],
    valid: list[float],
    names: tuple[str, str] = ("train", "valid"),
) -> tuple[Figure, Axes]:
    if not history:
        raise ValueError("the history has no epochs to draw")
    epochs = [record.epoch for record in history]
    figure = style.new_figure(title, width=8.0, height=4.8)
    axes = style.plain(figure.subplots(), grid="both")
    size = 5 if len(epochs) <= _DOTTED_EPOCHS else _LINE_WIDTH
    for name, values, color in ((names[0], train, style.TRAIN), (names[1], valid, style.VALID)):
        # Not clipped: a line along 100% is as wide as elsewhere.
        axes.plot(epochs, values, "o-", label=name, color=color, lw=_LINE_WIDTH, ms=size, clip_on=False)
    axes.set(xlim=(epochs[0] - 0.5, epochs[-1] + 0.5), xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda epoch, _: f"{epoch:.0f}"))
    return figure, axes


def _scale_losses(axes: Axes, losses: list[float]) -> None:
    if not losses:
        axes.set_yticks([])
        style.announce(axes, "no finite loss")
    elif min(losses) > 0 and max(losses) / min(losses) >= _LOG_SCALE_FROM:
        axes.set_ylabel("loss (logarithmic)")
        axes.set_yscale("log")
        # Over many decades, LogLocator with three ticks per decade would drop all ticks and labels.
        steps = (1, 2, 5) if max(losses) / min(losses) < 1e3 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=9))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    else:
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 0.0))


def _accuracy_limits(accuracies: list[float]) -> tuple[float, float]:
    """Return the limits of the accuracy axis: slightly wider than the range of the values, within [0, 1]."""
    low, high = min(accuracies), max(accuracies)
    margin = max(0.06 * (high - low), (_LEAST_ACCURACY_SPAN - (high - low)) / 2)
    return max(low - margin, 0.0), min(high + margin, 1.0)


def _label_ends(axes: Axes, train: list[float], valid: list[float], show: Callable[[float], str]) -> None:
    """Write the name and the last value of each line to the right of the axes, at the height of its end."""
    ends = _last(train), _last(valid)
    heights = _apart(*(_height(axes, end) for end in ends))
    for line, end, height in zip(axes.get_lines(), ends, heights, strict=True):
        at: dict[str, Any] = {"transform": axes.transAxes, "color": line.get_color()}
        name, value = str(line.get_label()), "no value" if math.isnan(end) else show(end)
        style.write(axes, 1.025, height, name, size=style.LABEL_SIZE, weight="bold", va="bottom", **at)
        style.write(axes, 1.025, height, value, size=style.TEXT_SIZE, va="top", **at)


def _last(values: list[float]) -> float:
    """Return the last value that is not NaN, or NaN if there is none."""
    return next((value for value in reversed(values) if not math.isnan(value)), math.nan)


def _height(axes: Axes, value: float) -> float:
    """Return the height of `value` as a fraction of the axis. NaN is placed in the middle."""
    if math.isnan(value):
        return 0.5
    pixels = axes.transData.transform((axes.get_xlim()[0], value))
    return float(axes.transAxes.inverted().transform(pixels)[1])


def _apart(first: float, second: float) -> tuple[float, float]:
    """Move two heights apart until they are `_LABEL_GAP` apart, without leaving the axis."""
    middle = min(max((first + second) / 2, _LABEL_GAP), 1 - _LABEL_GAP)
    if abs(first - second) >= _LABEL_GAP:
        return first, second
    half = _LABEL_GAP / 2
    return (middle + half, middle - half) if first > second else (middle - half, middle + half)


def _mark_best(axes: Axes, epoch: int, value: float, text: str) -> None:
    """Mark a point of the validation line with a ring, and write `text` above the axes, over the ring."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    axes.vlines(epoch, value, high, color=style.MUTED, linewidth=1, linestyle=":", zorder=1)
    axes.set_ylim(low, high)
    axes.plot([epoch], [value], "o", label="best", clip_on=False, ms=11, mfc="none", mec=style.VALID, mew=2)
    across = (epoch - left) / (right - left)
    side = "left" if across < 0.35 else "right" if across > 0.65 else "center"
    look: dict[str, Any] = {"size": style.TEXT_SIZE, "weight": "bold", "color": style.VALID, "ha": side}
    style.write(axes, epoch, 1.03, text, va="bottom", transform=axes.get_xaxis_transform(), **look)


def _finite(value: float) -> float:
    """Return `value` if it is finite, else NaN, which matplotlib draws as a gap."""
    return value if math.isfinite(value) else math.nan


def _loss(value: float) -> str:
    return f"{value:.4g}"
