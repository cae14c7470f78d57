"""Draw pictures of a data set with their labels, and pictures that models classified wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from torch import Tensor, uint8

from cvdist.figures import style, tiles
from cvdist.figures.tiles import Line, Piece

_GAP = 0.12
_WIDEST_TILE = 2.0
_MOST_COLUMNS = 8
_MOST_COLUMNS_WRONG = 6
_MOST_LABELS = 5  # lines below a picture


def picture_grid(images: Tensor, titles: Sequence[str], *, title: str, columns: int | None = None) -> Figure:
    """Draw pictures in rows, each with its title below it. Lines wider than their pictures are cut.

    Args:
        images: Pictures, uint8 (N, C, H, W), where C is 1 (gray) or 3 (RGB).
        titles: The titles of the N pictures, of one line or more.
        title: Title of the figure.
        columns: Pictures per row. None: 8, or fewer if that makes rows of more equal length.

    Raises:
        ValueError: If the images have another type or shape, or there are more or fewer titles than images.
    """
    captions = [[[Piece(line, style.INK)] for line in text.split("\n")] for text in titles]
    return _grid(images, captions, title, columns or tiles.columns_for(len(titles), _MOST_COLUMNS))


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
        text = "no mistakes" if total is None else f"no mistakes: all {total}/{total} right"
        return style.nothing_to_show(title, text)
    columns = tiles.columns_for(len(true), _MOST_COLUMNS_WRONG)
    room = tiles.tile_width(columns, _WIDEST_TILE, gap=_GAP)
    mistakes = list(zip(true, predicted, map(style.confidence, confidence), strict=True))
    # In one line, in two lines, or each name in a line of its own: the first that all captions fit into.
    for lines in (1, 2, 3):
        captions = [_mistake(*mistake, lines) for mistake in mistakes]
        if all(tiles.line_width(line) <= room for caption in captions for line in caption):
            break
    return _grid(images, captions, title, columns)


def wrong_labels_grid(
    images: Tensor,
    missed: Sequence[Sequence[str]],
    wrong: Sequence[Sequence[str]],
    *,
    title: str,
    total: int,
) -> Figure:
    """Draw pictures whose labels are not all right, with the labels that were missed and those not there.

    Args:
        images: Pictures, uint8 (N, C, H, W), where C is 1 (gray) or 3 (RGB). With N = 0 the figure says that
            there are no mistakes.
        missed: For each picture, its labels that were not predicted.
        wrong: For each picture, the predicted labels that it does not have.
        title: Title of the figure.
        total: How many pictures were classified.

    Raises:
        ValueError: If the images have another type or shape, or there are more or fewer captions than images.
    """
    if not missed:
        return style.nothing_to_show(title, f"no mistakes: all {total}/{total} right")
    captions = []
    for lost, extra in zip(missed, wrong, strict=True):
        lines = [[Piece("missed:"), Piece(name, style.GREEN, "bold")] for name in lost]
        lines += [[Piece("not there:"), Piece(name, style.VERMILLION, "bold")] for name in extra]
        if len(lines) > _MOST_LABELS:
            lines[_MOST_LABELS - 1 :] = [[Piece(f"and {len(lines) - _MOST_LABELS + 1} more")]]
        captions.append(lines)
    return _grid(images, captions, title, tiles.columns_for(len(missed), _MOST_COLUMNS_WRONG))


class PredictionCaption(NamedTuple):
    """The predicted class of a picture, its probability in [0, 1], and whether it is the true class.

    Of several labels all of them, and the geometric mean of the probabilities of what is true of each class.
    """

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
        return style.nothing_to_show(title, "the two models are right on the same pictures")
    captions = [
        [[Piece(name, style.INK, "bold")], _prediction("A", one), _prediction("B", other)]
        for name, one, other in zip(true, first, second, strict=True)
    ]
    return _grid(images, captions, title, tiles.columns_for(len(true), _MOST_COLUMNS_WRONG), subtitle)


def _prediction(model: str, prediction: PredictionCaption) -> Line:
    color = style.GREEN if prediction.correct else style.VERMILLION
    confidence = style.confidence(prediction.confidence)
    return [Piece(f"{model}:"), Piece(confidence), Piece(prediction.predicted, color, "bold")]


def _mistake(true: str, predicted: str, confidence: str, lines: int) -> list[Line]:
    """Describe a mistake in one line, such as `8 read as 3, 99.7%`, or in two or three lines."""
    was = Piece(true, style.GREEN, "bold")
    read = Piece(predicted if lines > 1 else f"{predicted},", style.VERMILLION, "bold")
    if lines == 3:
        return [[was], [Piece(f"read as ({confidence})")], [read]]
    sentence = [was, Piece("read as"), read]
    return [[*sentence, Piece(confidence)]] if lines == 1 else [sentence, [Piece(confidence)]]


def _grid(
    images: Tensor, captions: Sequence[Sequence[Line]], title: str, columns: int, subtitle: str = ""
) -> Figure:
    """Draw one tile per picture, with the lines of its caption below it."""
    if images.dtype != uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 (N, 1 or 3, H, W), not {images.dtype} {tuple(images.shape)}")
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images for {len(captions)} captions")
    width = tiles.tile_width(columns, _WIDEST_TILE, gap=_GAP)
    sheet = tiles.Sheet(title, subtitle)
    pairs = [tiles.Tile(tiles.pixels(image), text) for image, text in zip(images, captions, strict=True)]
    for start in range(0, len(pairs), columns):
        sheet.row(pairs[start : start + columns], width, gap=_GAP, space=0.2)
    title_width = style.text_width(title, style.TITLE_SIZE, weight="bold") + 2 * style.MARGIN
    used = columns * (width + _GAP) - _GAP + 2 * style.MARGIN
    return sheet.figure(width=max(used, min(title_width, style.WIDTH)))
