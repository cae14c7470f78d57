"""Draw pictures of a data set with their labels, and pictures that models classified wrongly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, uint8

from cvdist.figures import style

_WIDTH = 9.0  # inches of a full row
_GAP = 0.12
_WIDEST_TILE = 2.0
_LINE_HEIGHT = 0.18
_SPACE = 0.04
# Of pictures up to this many pixels wide, each pixel is drawn as a square; larger ones are smoothed.
_CRISP_SIDE = 64
_MOST_COLUMNS = 8
_MOST_COLUMNS_WRONG = 6


class _Piece(NamedTuple):
    """A piece of text in a line of a caption, in one color and weight. Pieces are separated by spaces."""

    text: str
    color: str = style.MUTED
    weight: str = "normal"


_Caption = Sequence[Sequence[_Piece]]  # lines of pieces


def picture_grid(images: Tensor, titles: Sequence[str], *, title: str, columns: int | None = None) -> Figure:
    """Draw pictures in rows, each with its title below it. Titles wider than their pictures are cut.

    Args:
        images: Pictures, uint8 (N, C, H, W), where C is 1 (gray) or 3 (RGB).
        titles: The titles of the N pictures.
        title: Title of the figure.
        columns: Pictures per row. None: 8, or fewer if that makes rows of more equal length.

    Raises:
        ValueError: If the images have another type or shape, or there are more or fewer titles than images.
    """
    captions = [[[_Piece(text, style.INK)]] for text in titles]
    return _grid(images, captions, title, columns or _even_columns(len(titles), _MOST_COLUMNS))


def wrong_grid(
    images: Tensor,
    true: Sequence[str],
    predicted: Sequence[str],
    confidence: Sequence[float],
    *,
    title: str,
    total: int | None = None,
) -> Figure:
    """Draw wrongly classified pictures with their true class, predicted class and confidence.

    Args:
        images: Pictures, uint8 (N, C, H, W), where C is 1 (gray) or 3 (RGB). With N = 0 the figure says that
            there are no mistakes.
        true: Names of the N true classes.
        predicted: Names of the N predicted classes.
        confidence: Probabilities of the N predicted classes, in [0, 1].
        title: Title of the figure.
        total: How many pictures were classified.

    Raises:
        ValueError: If the images have another type or shape, or there are more or fewer captions than images.
    """
    if not true:
        return _nothing_wrong(title, total)
    columns = _even_columns(len(true), _MOST_COLUMNS_WRONG)
    mistakes = list(zip(true, predicted, map(style.confidence, confidence), strict=True))
    for lay_out in (_in_one_line, _in_two_lines, _in_three_lines):
        captions = [lay_out(*mistake) for mistake in mistakes]
        if all(_width(line) <= _tile_width(columns) for caption in captions for line in caption):
            break
    return _grid(images, captions, title, columns)


class PredictionCaption(NamedTuple):
    """The predicted class of a picture, its probability in [0, 1], and whether it is the true class."""

    predicted: str
    confidence: float
    correct: bool


def difference_grid(
    images: Tensor,
    true: Sequence[str],
    first: Sequence[PredictionCaption],
    second: Sequence[PredictionCaption],
    *,
    title: str,
    subtitle: str,
) -> Figure:
    """Draw pictures for which two models, A and B, disagree: the true class and both predictions of each.

    Args:
        images: Pictures, uint8 (N, C, H, W), where C is 1 (gray) or 3 (RGB). With N = 0 the figure says that
            the models agree.
        true: Names of the N true classes.
        first: The N predictions of model A.
        second: The N predictions of model B.
        title: Title of the figure.
        subtitle: Which model is A and which is B.

    Raises:
        ValueError: If the images have another type or shape, or there are more or fewer captions than images.
    """
    if not true:
        return _nothing_to_show(title, "the two models are right on the same pictures")
    captions = [
        [[_Piece(name, style.INK, "bold")], _prediction("A", one), _prediction("B", other)]
        for name, one, other in zip(true, first, second, strict=True)
    ]
    return _grid(images, captions, title, _even_columns(len(true), _MOST_COLUMNS_WRONG), subtitle)


def _prediction(model: str, prediction: PredictionCaption) -> Sequence[_Piece]:
    color = style.GREEN if prediction.correct else style.VERMILLION
    return [
        _Piece(f"{model}:"),
        _Piece(style.confidence(prediction.confidence)),
        _Piece(prediction.predicted, color, "bold"),
    ]


def _in_one_line(true: str, predicted: str, confidence: str) -> _Caption:
    """Lay out a caption as one line: `8 read as 3, 99.7%`."""
    return [[_true(true), _Piece("read as"), _wrong(f"{predicted},"), _Piece(confidence)]]


def _in_two_lines(true: str, predicted: str, confidence: str) -> _Caption:
    """Lay out a caption as two lines, with the confidence on the second."""
    return [[_true(true), _Piece("read as"), _wrong(predicted)], [_Piece(confidence)]]


def _in_three_lines(true: str, predicted: str, confidence: str) -> _Caption:
    """Lay out a caption as three lines, with a whole line for each class name."""
    return [[_true(true)], [_Piece(f"read as ({confidence})")], [_wrong(predicted)]]


def _true(name: str) -> _Piece:
    return _Piece(name, style.GREEN, "bold")


def _wrong(name: str) -> _Piece:
    return _Piece(name, style.VERMILLION, "bold")


def _nothing_wrong(title: str, total: int | None) -> Figure:
    return _nothing_to_show(
        title, "no mistakes" if total is None else f"no mistakes: all {total}/{total} right"
    )


def _nothing_to_show(title: str, text: str) -> Figure:
    figure = style.new_figure(_WIDTH, 2.0)
    style.add_title(figure, title)
    figure.text(0.5, 0.4, text, size=18, color=style.GREEN, ha="center", va="center")
    return figure


def _grid(images: Tensor, captions: Sequence[_Caption], title: str, columns: int, subtitle: str = "") -> Figure:
    """Draw one tile per picture, with the lines of its caption below it."""
    pixels = _pixels(images)
    if len(pixels) != len(captions):
        raise ValueError(f"{len(pixels)} images for {len(captions)} captions")
    rows = math.ceil(len(pixels) / columns)
    width = _tile_width(columns)
    height = width * pixels.shape[1] / pixels.shape[2]
    pitch = height + _LINE_HEIGHT * max((len(caption) for caption in captions), default=0) + 2 * _GAP
    head = style.TITLE_HEIGHT + (style.SUBTITLE_HEIGHT if subtitle else 0) + 0.1
    figure = style.new_figure(
        max(columns * (width + _GAP) - _GAP + 2 * style.MARGIN, min(style.title_width(title), _WIDTH)),
        head + rows * pitch,
    )
    style.add_title(figure, title, subtitle)
    axes = _inches(figure)
    top_of_grid = figure.get_size_inches()[1] - head
    interpolation = "nearest" if max(pixels.shape[1:3]) <= _CRISP_SIDE else "lanczos"
    for number, (picture, caption) in enumerate(zip(pixels, captions, strict=True)):
        row, column = divmod(number, columns)
        left, top = style.MARGIN + column * (width + _GAP), top_of_grid - row * pitch
        axes.imshow(
            picture,
            cmap="gray",
            vmin=0,
            vmax=255,
            interpolation=interpolation,
            extent=(left, left + width, top - height, top),
            aspect="auto",
        )
        for line, pieces in enumerate(caption):
            _write_line(axes, pieces, left, top - height - 0.06 - line * _LINE_HEIGHT, width)
    axes.set(xlim=(0, figure.get_size_inches()[0]), ylim=(0, figure.get_size_inches()[1]))
    return figure


def _pixels(images: Tensor) -> NDArray[np.uint8]:
    """Return gray pictures as (N, H, W), and RGB pictures as (N, H, W, 3)."""
    if images.dtype != uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 (N, 1 or 3, H, W), not {images.dtype} {tuple(images.shape)}")
    pixels: NDArray[np.uint8] = images.cpu().permute(0, 2, 3, 1).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def _inches(figure: Figure) -> Axes:
    """Add invisible axes over the whole figure.

    Once their limits are set to its size, coordinates are inches.
    """
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    return axes


def _even_columns(count: int, most: int) -> int:
    """Return the number of columns, at most `most`, with the fewest rows of the most equal lengths."""
    rows = math.ceil(count / most)
    return math.ceil(count / max(rows, 1)) or 1


def _tile_width(columns: int) -> float:
    return min((_WIDTH - 2 * style.MARGIN + _GAP) / columns - _GAP, _WIDEST_TILE)


def _width(line: Sequence[_Piece]) -> float:
    """Return the width of a caption's line in inches."""
    words = [style.text_width(piece.text, style.SMALL_SIZE, weight=piece.weight) for piece in line]
    return sum(words) + (len(words) - 1) * _SPACE


def _write_line(axes: Axes, line: Sequence[_Piece], left: float, top: float, room: float) -> None:
    """Write the pieces one after another. What is wider than `room` inches is cut."""
    end = left + room
    for piece in line:
        axes.text(
            left,
            top,
            style.elide(piece.text, end - left, style.SMALL_SIZE, weight=piece.weight),
            size=style.SMALL_SIZE,
            color=piece.color,
            weight=piece.weight,
            va="top",
            parse_math=False,
        )
        left += style.text_width(piece.text, style.SMALL_SIZE, weight=piece.weight) + _SPACE
