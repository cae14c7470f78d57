"""Draw the weights of a convolution layer, one small picture per filter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from cvdist.figures import style, tiles

Channels = Literal["strongest", "mean"]

_MOST_FILTERS = 64  # one tile each
_MOST_COLUMNS = 16
_WIDEST_TILE = 0.95
_GAP = 0.06
_NEAR_ZERO = 0.01  # as a fraction of the largest magnitude
_MANY, _SHARE_SHOWN = 1000, 0.99
# Layers with many input channels: how many filters are drawn, and how many input channels of each.
_DEEP_FILTERS, _DEEP_INPUTS = 16, 8


@dataclass(frozen=True)
class Statistics:
    """Statistics of a layer's weights.

    Attributes:
        mean: Mean of all weights.
        deviation: Standard deviation of all weights.
        lowest: The least weight.
        highest: The greatest weight.
        near_zero: Fraction of the weights whose magnitude is below 1% of the largest magnitude.
    """

    mean: float
    deviation: float
    lowest: float
    highest: float
    near_zero: float

    @classmethod
    def of(cls, weight: Tensor) -> Statistics:
        """Compute the statistics of all elements of `weight`."""
        values = weight.double()
        small = values.abs() < _NEAR_ZERO * values.abs().max()
        return cls(
            values.mean().item(),
            values.std(correction=0).item(),
            values.min().item(),
            values.max().item(),
            small.double().mean().item(),
        )

    def __str__(self) -> str:
        mean, deviation, low, high = map(tiles.number, (self.mean, self.deviation, self.lowest, self.highest))
        return (
            f"mean {mean}, deviation {deviation}, from {low} to {high}, "
            f"{self.near_zero:.1%} near zero (below 1% of the largest)"
        )


def filter_grid(
    weight: Tensor,
    name: str,
    *,
    channels: Channels = "strongest",
    when: str = "",
    scale: float | None = None,
) -> Figure:
    """Draw the filters of one convolution on one color scale, with zero in its middle.

    Filters on RGB pictures are drawn in color, and zero is gray. Filters on one channel are drawn in diverging
    colors, and zero is white. Of filters on many channels, either the strongest input channels or the mean over
    all input channels is drawn.

    Args:
        weight: Weights of the layer, float (outputs, inputs, h, w).
        name: Name of the layer.
        channels: How filters on more than three channels are drawn. "strongest": the filters with the greatest
            L2 norm, and of each of them the input channels with the greatest L2 norm. "mean": the mean of each
            filter over its input channels.
        when: When the layer had these weights, for the title, such as "after epoch 3". May be empty.
        scale: Magnitude at which the color scale ends. None: `scale_of` the weights that are drawn.
    """
    weight = weight.detach().float().cpu()
    title = f"{name}: {_shape(weight)}{f', {when}' if when else ''}"
    subtitle = str(Statistics.of(weight))
    if weight.shape[1] in (1, 3):
        return _grid(weight, title, subtitle, scale, "")
    if channels == "mean":
        return _grid(weight.mean(1, keepdim=True), title, subtitle, scale, f"mean of {weight.shape[1]} inputs")
    return _deep(weight, title, subtitle, scale)


def before_and_after(before: Tensor, after: Tensor, name: str, *, when: str = "") -> Figure:
    """Draw the filters that training changed most: before training, after it, and the difference.

    Of a filter on more than three channels, its strongest input channel is drawn. The weights before and after
    training share one color scale; the difference has another one.

    Args:
        before: Weights before training, float (outputs, inputs, h, w).
        after: Weights after training, in the same shape.
        name: Name of the layer.
        when: When the layer had the weights `after`, for the title, such as "after epoch 20".
    """
    before, after = (weight.detach().float().cpu() for weight in (before, after))
    change = after - before
    picked, labels = _most_changed(before, after)
    was, now, moved = (_picked(weight, picked) for weight in (before, after, change))
    count = len(picked)
    columns = tiles.columns_for(count, _MOST_COLUMNS)
    rows = -(-count // columns)
    label_width = 0.85
    width = min((tiles.ROOM - label_width) / columns - _GAP, _WIDEST_TILE)
    height = width * was.shape[2] / was.shape[3]
    group = 3 * (height + _GAP) + tiles.LINE + 0.15
    size = (change.norm() / before.norm().clamp(min=1e-12)).item()
    title = f"{name}: before training and {when or 'after it'}"
    shown = f"the {count} of {len(after)} filters that changed most" if count < len(after) else "all filters"
    figure, axes = tiles.sheet(
        title,
        f"{shown}; the change is {size:.3g} times as large as the layer was before (L2 norm)",
        rows * group + tiles.LEGEND - 0.15,
    )
    scale = scale_of(torch.cat([was, now]))
    moved_scale = scale_of(moved)
    for number in range(count):
        row, column = divmod(number, columns)
        top = figure.get_size_inches()[1] - tiles.TOP - row * group
        left = style.MARGIN + label_width + column * (width + _GAP)
        for line, (kernels, limit) in enumerate(((was, scale), (now, scale), (moved, moved_scale))):
            at = top - line * (height + _GAP)
            _draw(axes, kernels[number], limit, left, at, width, height)
            if column == 0:
                word = ("before", "after", "difference")[line]
                tiles.write(axes, word, style.MARGIN, at - height / 2 + 0.07, label_width - 0.05)
        tiles.write(
            axes, labels[number], left + width / 2, top - 3 * (height + _GAP), width + _GAP, ha="center",
            color=style.MUTED,
        )  # fmt: skip
    _legends(axes, after.shape[1], scale, moved_scale)
    return figure


def colors(kernel: NDArray[Any], scale: float) -> NDArray[Any]:
    """Map a kernel (3, h, w) to RGB (h, w, 3) in [0, 1]: `-scale` becomes 0, zero 0.5, and `scale` 1."""
    return np.clip(tiles.ZERO + np.moveaxis(kernel, 0, -1) / (2 * scale), 0, 1)


def strongest_first(weight: Tensor) -> Tensor:
    """Sort the filters of `weight` (outputs, ...) by their L2 norm, greatest first.

    Returns:
        The numbers of the filters, int64 (outputs,). Among equal norms the lower number comes first.
    """
    return weight.flatten(1).norm(dim=1).argsort(descending=True, stable=True)


def _grid(weight: Tensor, title: str, subtitle: str, scale: float | None, what: str) -> Figure:
    """Draw one tile per filter, with the number of the filter below it."""
    order = strongest_first(weight)[:_MOST_FILTERS].sort().values
    columns = tiles.columns_for(len(order), _MOST_COLUMNS)
    rows = -(-len(order) // columns)
    width = min(tiles.ROOM / columns - _GAP, _WIDEST_TILE)
    height = width * weight.shape[2] / weight.shape[3]
    pitch = height + tiles.LINE + 0.1
    figure, axes = tiles.sheet(title, subtitle, rows * pitch + tiles.LEGEND)
    limit = scale or scale_of(weight[order])
    top = figure.get_size_inches()[1] - tiles.TOP
    for place, number in enumerate(order.tolist()):
        row, column = divmod(place, columns)
        left, upper = style.MARGIN + column * (width + _GAP), top - row * pitch
        _draw(axes, weight[number], limit, left, upper, width, height)
        middle = left + width / 2
        tiles.write(
            axes, str(number), middle, upper - height - 0.04, width + _GAP, ha="center", color=style.MUTED
        )
    if len(order) < len(weight):
        what = f"{len(order)} of {len(weight)} filters, the strongest{f'; {what}' if what else ''}"
    if weight.shape[1] == 3:
        reach = tiles.number(limit)
        words = f"filters on red, green and blue: gray is zero; the colors end at −{reach} and {reach}"
        tiles.note(axes, f"{what}; {words}" if what else words)
    else:
        tiles.legend(axes, tiles.DIVERGING, (-limit, limit), what or "weight")
    return figure


def _deep(weight: Tensor, title: str, subtitle: str, scale: float | None) -> Figure:
    """Draw two columns of filters, each as a row of tiles for its strongest input channels."""
    order = strongest_first(weight)[:_DEEP_FILTERS].tolist()
    inputs = min(_DEEP_INPUTS, weight.shape[1])
    blocks = 2 if len(order) > 1 else 1
    rows = -(-len(order) // blocks)
    label_width, block = 0.72, tiles.ROOM / 2
    width = (block - label_width - 0.15) / _DEEP_INPUTS - _GAP
    height = width * weight.shape[2] / weight.shape[3]
    pitch = height + tiles.LINE + 0.12
    figure, axes = tiles.sheet(title, subtitle, rows * pitch + tiles.LEGEND)
    strongest = {number: strongest_first(weight[number])[:inputs].tolist() for number in order}
    limit = scale or scale_of(torch.cat([weight[number, channels] for number, channels in strongest.items()]))
    top = figure.get_size_inches()[1] - tiles.TOP
    for place, number in enumerate(order):
        column, row = divmod(place, rows)
        left, upper = style.MARGIN + column * block, top - row * pitch
        tiles.write(axes, f"filter {number}", left, upper - height / 2 + 0.07, label_width, weight="bold")
        for slot, channel in enumerate(strongest[number]):
            x = left + label_width + slot * (width + _GAP)
            _draw(axes, weight[number, channel][None], limit, x, upper, width, height)
            tiles.write(
                axes, str(channel), x + width / 2, upper - height - 0.04, width + _GAP, ha="center",
                color=style.MUTED,
            )  # fmt: skip
    shown = (
        f"the {len(order)} strongest of {len(weight)} filters" if len(order) < len(weight) else "all filters"
    )
    tiles.legend(
        axes,
        tiles.DIVERGING,
        (-limit, limit),
        f"{shown}; of each the {inputs} strongest of {weight.shape[1]} inputs, by number",
    )
    return figure


def _draw(
    axes: Axes, kernel: Tensor, scale: float, left: float, top: float, width: float, height: float
) -> None:
    """Draw one tile of a kernel (1 or 3, h, w)."""
    values = kernel.numpy()
    if len(values) == 3:
        tiles.draw(axes, colors(values, scale), left, top, width, height)
    else:
        tiles.draw(axes, values[0], left, top, width, height, cmap=tiles.DIVERGING, limits=(-scale, scale))


def _legends(axes: Axes, inputs: int, scale: float, moved_scale: float) -> None:
    reach, moved = tiles.number(scale), tiles.number(moved_scale)
    kind = "gray is zero" if inputs == 3 else "white is zero, blue below, orange above"
    which = f"; of each filter the strongest of {inputs} inputs" if inputs not in (1, 3) else ""
    tiles.note(axes, f"{kind}; the colors end at ±{reach}, those of the difference at ±{moved}{which}")


def _most_changed(before: Tensor, after: Tensor) -> tuple[list[tuple[int, int | None]], list[str]]:
    """Choose the filters that training changed most.

    Returns:
        Pairs of a filter and the input channel of it that is drawn (None: all of its one or three channels),
        and a caption for each pair.
    """
    most = 2 * _MOST_COLUMNS
    filters = strongest_first(after - before)[:most].sort().values.tolist()
    if after.shape[1] in (1, 3):
        return [(number, None) for number in filters], [str(number) for number in filters]
    picked = [(number, int(strongest_first(after[number])[0])) for number in filters]
    if (
        len(str(after.shape[0])) + len(str(after.shape[1])) > 5
    ):  # there is no room for both numbers below a tile
        return list(picked), [str(number) for number, _ in picked]
    return list(picked), [f"{number}←{channel}" for number, channel in picked]


def _picked(weight: Tensor, picked: list[tuple[int, int | None]]) -> Tensor:
    """Select the kernels of n pairs of a filter and an input channel, (n, 1 or 3, h, w)."""
    return torch.stack([weight[f] if c is None else weight[f, c][None] for f, c in picked])


def scale_of(weight: Tensor) -> float:
    """Return the magnitude at which the color scale ends.

    That is the largest magnitude or, for 1000 weights and more, the 99th percentile of the magnitudes: with the
    largest one, a single outlier would leave all other weights pale.
    """
    magnitudes = weight.abs().flatten()
    if len(magnitudes) < _MANY:
        return magnitudes.max().item() or 1.0
    return magnitudes.kthvalue(math.ceil(_SHARE_SHOWN * len(magnitudes))).values.item() or 1.0


def _shape(weight: Tensor) -> str:
    outputs, *kernel = weight.shape
    return f"{outputs} filter{'s' if outputs > 1 else ''} of {'×'.join(map(str, kernel))}"
