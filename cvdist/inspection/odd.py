"""Finds odd pictures: far from their class, or unlike the others in size, brightness or borders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from cvdist.inspection.issues import KINDS
from cvdist.inspection.neighbors import Neighbors

_FAR = 3.0  # deviations from the usual distance
_FEW = 0.05  # share of all pictures from which on something is usual and not odd
_TELLS = 0.9  # area under the curve from which on a measure alone tells a class from the others
_LEAST = 10  # pictures of a class


@dataclass(frozen=True)
class Oddity:
    """Something that is odd about some pictures.

    Attributes:
        kind: name of what is odd.
        rows: rows of the pictures.
        scores: how odd each picture is.
        notes: what is odd about each picture, in words.
    """

    kind: str
    rows: list[int]
    scores: list[float]
    notes: list[str]

    def of_rows(self, rows: Sequence[int]) -> Oddity:
        """Return a copy with other row numbers: row i becomes `rows[i]`."""
        return replace(self, rows=[rows[row] for row in self.rows])


@dataclass(frozen=True)
class Shortcut:
    """A measure that alone tells a class from the others; `area`: area under the curve, 0.5 for chance."""

    measure: str
    label: int
    area: float
    higher: bool


def far_from_class(own: Neighbors, labels: Tensor) -> Oddity:
    """Find pictures that are farther than usual from the k-th nearest one of their class.

    The nearest one does not count, because a few strange pictures may be like each other. k is the number of
    known neighbors or, in small classes, half of the class's pictures.

    Args:
        own: Neighbors of the same class.
        labels: int64 (n,).
    """
    similarity, classes = own.similarity.double().numpy(), labels.numpy()
    deviations = np.zeros(len(classes))
    for label in np.unique(classes):
        rows = np.flatnonzero(classes == label)
        if len(rows) < _LEAST:
            continue
        distance = 1 - similarity[rows, min(similarity.shape[1], len(rows) // 2) - 1]
        median = np.median(distance)
        spread = 1.4826 * np.median(np.abs(distance - median))  # of a normal distribution, its deviation
        deviations[rows] = (distance - median) / max(spread, 1e-6)
    return _oddity(
        "outlier",
        deviations > _FAR,
        deviations,
        lambda row: f"{deviations[row]:.1f} deviations from the median",
    )


def measured(measures: Mapping[str, np.ndarray]) -> tuple[list[Oddity], list[str]]:
    """Find pictures that are odd in one of their measures.

    Args:
        measures: float (n,) for each of `cvdist.data.images.measures.MEASURES`.

    Returns:
        Odd pictures by kind, and one line for each kind that is usual because so many pictures have it.
    """
    width, height = measures["width"], measures["height"]
    bright, contrast, border = (measures[name] for name in ("brightness", "contrast", "border"))
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    aspect = longer / np.maximum(shorter, 1)
    blank = contrast < 0.02

    def size(row: int) -> str:
        return f"{width[row]:.0f} x {height[row]:.0f} pixels"

    kinds = [
        ("blank", blank, 1 - contrast, lambda row: f"contrast {contrast[row]:.3f}"),
        ("dark", (bright < 0.06) & ~blank, 1 - bright, lambda row: f"brightness {bright[row]:.2f}"),
        ("bright", (bright > 0.96) & ~blank, bright, lambda row: f"brightness {bright[row]:.2f}"),
        ("tiny", shorter < np.median(shorter) / 4, 1 / np.maximum(shorter, 1), size),
        ("aspect", aspect > max(3.0, 2 * float(np.median(aspect))), aspect, size),
        ("border", (border > 0.4) & ~blank, border, lambda row: f"{100 * border[row]:.0f}% of it is border"),
    ]
    found, usual = [], []
    for kind, which, scores, note in kinds:
        if which.mean() > _FEW:
            words = KINDS[kind][:1].lower() + KINDS[kind][1:]
            usual.append(f"{100 * which.mean():.0f}% of the pictures are {words}: usual here, and not listed")
        elif which.any():
            found.append(_oddity(kind, which, scores, note))
    return found, usual


def shortcuts(measures: Mapping[str, np.ndarray], labels: np.ndarray, classes: int) -> list[Shortcut]:
    """Find measures that alone tell a class from all others, the clearest first."""
    from scipy.stats import rankdata  # takes a second to import

    aspect = measures["width"] / np.maximum(measures["height"], 1)
    found = []
    for name, values in [*measures.items(), ("aspect", aspect)]:
        ranks = rankdata(values)
        for label in range(classes):
            mine = labels == label
            count, others = int(mine.sum()), int((~mine).sum())
            if min(count, others) < _LEAST:
                continue
            area = (ranks[mine].sum() - count * (count + 1) / 2) / (count * others)
            if max(area, 1 - area) >= _TELLS:
                found.append(Shortcut(name, label, float(max(area, 1 - area)), bool(area > 0.5)))
    return sorted(found, key=lambda one: -one.area)


def _oddity(kind: str, which: np.ndarray, scores: np.ndarray, note: Callable[[int], str]) -> Oddity:
    rows = sorted(np.flatnonzero(which).tolist(), key=lambda row: -scores[row])
    return Oddity(kind, rows, [round(float(scores[row]), 4) for row in rows], [note(row) for row in rows])
