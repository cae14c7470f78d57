"""Draw the weights of a convolution layer, one small picture per filter."""

from __future__ import annotations

import math
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor

from cvdist.figures import style, tiles
from cvdist.figures.tiles import Piece, Sheet, Tile

Channels = Literal["strongest", "mean"]

_MOST_FILTERS = 64  # one tile each
_MOST_COLUMNS = 16
_WIDEST_TILE = 0.95
_NEAR_ZERO = 0.01  # as a fraction of the largest magnitude
_MANY, _SHARE_SHOWN = 1000, 0.99
# Layers with many input channels: how many filters are drawn, and how many input channels of each.
_DEEP_FILTERS, _DEEP_INPUTS = 16, 8


def statistics(weight: Tensor) -> str:
    """Describe weights by their mean, standard deviation and range, and how many are almost zero."""
    values = weight.double()
    small = (values.abs() < _NEAR_ZERO * values.abs().max()).double().mean().item()
    found = (values.mean(), values.std(correction=0), values.min(), values.max())
    mean, deviation, low, high = (tiles.number(value.item()) for value in found)
    zero = f"{small:.1%} near zero (below {_NEAR_ZERO:.0%} of the largest)"
    return f"mean {mean}, deviation {deviation}, from {low} to {high}, {zero}"


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
    outputs, inputs, *kernel = weight.shape
    shape = f"{outputs} filter{'s' if outputs > 1 else ''} of {'×'.join(map(str, (inputs, *kernel)))}"
    sheet = Sheet(f"{name}: {shape}{f', {when}' if when else ''}", statistics(weight))
    if inputs in (1, 3):
        _draw_filters(sheet, weight, scale)
    elif channels == "mean":
        _draw_filters(sheet, weight.mean(1, keepdim=True), scale, f"mean of {inputs} inputs")
    else:
        _draw_inputs(sheet, weight, scale)
    return sheet.figure()


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
    size = ((after - before).norm() / before.norm().clamp(min=1e-12)).item()
    filters = strongest_first(after - before)[: 2 * _MOST_COLUMNS].sort().values
    labels = [str(number) for number in filters.tolist()]
    count, (outputs, inputs) = len(filters), after.shape[:2]
    was, now = before[filters], after[filters]
    if inputs not in (1, 3):
        channels = now.flatten(2).norm(dim=2).argmax(dim=1)
        was, now = (weight[torch.arange(count), channels, None] for weight in (was, now))
        if len(str(outputs)) + len(str(inputs)) <= 5:  # else both numbers don't fit below a tile
            labels = [f"{label}←{channel}" for label, channel in zip(labels, channels.tolist(), strict=True)]
    shown = f"the {count} of {outputs} filters that changed most" if count < outputs else "all filters"
    sheet = Sheet(
        f"{name}: before training and {when or 'after it'}",
        f"{shown}; the change is {size:.3g} times as large as the layer was before (L2 norm)",
    )
    scale, moved = scale_of(torch.cat([was, now])), scale_of(now - was)
    columns, left = tiles.columns_for(count, _MOST_COLUMNS), style.MARGIN + 0.85
    width = tiles.tile_width(columns, _WIDEST_TILE, room=tiles.ROOM - 0.85)
    for start in range(0, count, columns):
        part = slice(start, start + columns)
        for words, kernels, limit in (
            ("before", was, scale),
            ("after", now, scale),
            ("difference", now - was, moved),
        ):
            last = words == "difference"
            captions = labels[part] if last else [""] * columns
            drawn = [tile(one, limit, text) for one, text in zip(kernels[part], captions, strict=False)]
            middle = sheet.y + width * kernels.shape[2] / kernels.shape[3] / 2 - 0.07
            sheet.write([Piece(words, style.INK)], style.MARGIN, 0.8, top=middle)
            sheet.row(drawn, width, left=left, center=True, space=0.15 if last else tiles.GAP)
    kind = "gray is zero" if inputs == 3 else "white is zero, blue below, orange above"
    which = "" if inputs in (1, 3) else f"; the strongest of each filter's {inputs} inputs"
    colors = f"colors end at ±{tiles.number(scale)}, in the difference at ±{tiles.number(moved)}"
    sheet.legend(f"{kind}; {colors}{which}")
    return sheet.figure()


def tile(kernel: Tensor, scale: float, caption: str = "") -> Tile:
    """Make a tile of a kernel, float (1 or 3, h, w).

    On three channels it is drawn in color: `-scale` becomes 0, zero 0.5, and `scale` 1.
    """
    lines = [[Piece(caption)]] if caption else []
    if len(kernel) == 3:
        return Tile((0.5 + kernel / (2 * scale)).clamp(0, 1).permute(1, 2, 0).numpy(), lines)
    return Tile(kernel[0].numpy(), lines, tiles.DIVERGING, (-scale, scale))


def strongest_first(weight: Tensor) -> Tensor:
    """Sort the filters of `weight` (outputs, ...) by their L2 norm, greatest first.

    Returns:
        The numbers of the filters, int64 (outputs,). Among equal norms the lower number comes first.
    """
    return weight.flatten(1).norm(dim=1).argsort(descending=True, stable=True)


def scale_of(weight: Tensor) -> float:
    """Return the magnitude at which the color scale ends.

    That is the largest magnitude or, for 1000 weights and more, the 99th percentile of the magnitudes: with the
    largest one, a single outlier would leave all other weights pale.
    """
    magnitudes = weight.abs().flatten()
    if len(magnitudes) < _MANY:
        return magnitudes.max().item() or 1.0
    return magnitudes.kthvalue(math.ceil(_SHARE_SHOWN * len(magnitudes))).values.item() or 1.0


def _draw_filters(sheet: Sheet, weight: Tensor, scale: float | None, what: str = "") -> None:
    """Draw one tile per filter, with the number of the filter below it."""
    order = strongest_first(weight)[:_MOST_FILTERS].sort().values
    limit = scale or scale_of(weight[order])
    columns = tiles.columns_for(len(order), _MOST_COLUMNS)
    width = tiles.tile_width(columns, _WIDEST_TILE)
    for numbers in order.split(columns):
        sheet.row([tile(weight[n], limit, str(n)) for n in numbers.tolist()], width, center=True)
    if len(order) < len(weight):
        what = f"{len(order)} of {len(weight)} filters, the strongest{f'; {what}' if what else ''}"
    if weight.shape[1] == 3:
        words = f"filters on red, green and blue: gray is zero; the colors end at ±{tiles.number(limit)}"
        sheet.legend(f"{what}; {words}" if what else words)
    else:
        sheet.legend(what or "weight", tiles.DIVERGING, (-limit, limit))


def _draw_inputs(sheet: Sheet, weight: Tensor, scale: float | None) -> None:
    """Draw two columns of filters, each as a row of tiles for its strongest input channels."""
    order = strongest_first(weight)[:_DEEP_FILTERS]
    chosen = [(n, strongest_first(weight[n])[:_DEEP_INPUTS].tolist()) for n in order.tolist()]
    limit = scale or scale_of(torch.cat([weight[number, inputs] for number, inputs in chosen]))
    longest = style.text_width(f"filter {len(weight) - 1}", style.SMALL_SIZE, weight="bold")
    block, label = tiles.ROOM / 2, max(0.72, longest + 0.06)
    width = tiles.tile_width(_DEEP_INPUTS, _WIDEST_TILE, room=block - label - 0.2)
    rows = math.ceil(len(chosen) / 2)
    for row in range(rows):
        top = sheet.y
        for column, (number, inputs) in enumerate(chosen[row::rows]):
            sheet.y, left = top, style.MARGIN + column * block
            middle = top + width * weight.shape[2] / weight.shape[3] / 2 - 0.07
            sheet.write([Piece(f"filter {number}", style.INK, "bold")], left, label, top=middle)
            drawn = [tile(weight[number, channel, None], limit, str(channel)) for channel in inputs]
            sheet.row(drawn, width, left=left + label, center=True, space=0.12)
    count = len(chosen)
    shown = f"the {count} strongest of {len(weight)} filters" if count < len(weight) else "all filters"
    which = f"of each the {len(chosen[0][1])} strongest of {weight.shape[1]} inputs, by number"
    sheet.legend(f"{shown}; {which}", tiles.DIVERGING, (-limit, limit))
