"""Finds pictures that are there more than once: with the same bytes, the same pixels, or nearly so.

Neighbors by features are only candidates, for pictures of the same thing may have the same features. A pair
counts if the pictures themselves match, as they are or mirrored, once they are aligned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cvdist.inspection.alignment import correlation
from cvdist.inspection.neighbors import Neighbors

SAME_BYTES, SAME_PIXELS, NEAR, MIRRORED = "same bytes", "same pixels", "nearly the same", "mirrored"
_ALIKE = 0.85  # correlation of details from which on two pictures are one
_BATCH = 128  # pairs that are compared at a time
# Candidates are looked at from the most similar one on, until so many in a row are no copies.
_PATIENCE, _PATIENCE_SHARE = 256, 0.02  # pairs, or as a share of the pictures


@dataclass(frozen=True)
class Pair:
    """Two copies of one picture.

    Attributes:
        first: row of one picture.
        second: row of the other picture.
        how: in which respect they are equal.
        score: how alike they are, 1 for equal pixels.
    """

    first: int
    second: int
    how: str
    score: float


@dataclass(frozen=True)
class Copy:
    """A copy of a picture.

    Attributes:
        row: row of the copy.
        twin: row of the picture to keep.
        how: in which respect they are equal.
        score: how alike they are, 1 for equal pixels.
    """

    row: int
    twin: int
    how: str
    score: float


def same_bytes(digests: Sequence[bytes]) -> list[Pair]:
    """Pair each picture with the first one whose file has the same digest."""
    first: dict[bytes, int] = {}
    found = [(first.setdefault(digest, row), row) for row, digest in enumerate(digests)]
    return [Pair(one, row, SAME_BYTES, 1.0) for one, row in found if one != row]


def candidates(neighbors: Neighbors) -> np.ndarray:
    """Return the pairs of neighbors, int64 (m, 2), each pair once, the most similar first."""
    count, k = neighbors.index.shape
    rows, others = np.repeat(np.arange(count), k), neighbors.index.flatten().numpy()
    similarity = neighbors.similarity.flatten().numpy()
    there = others >= 0
    rows, others, similarity = rows[there], others[there], similarity[there]
    _, where = np.unique(np.minimum(rows, others) * count + np.maximum(rows, others), return_index=True)
    where = where[np.argsort(-similarity[where], kind="stable")]
    return np.sort(np.stack([rows[where], others[where]], 1), axis=1)


def verify(
    pairs: np.ndarray,
    pictures: Callable[[Sequence[int]], Tensor],
    after_batch: Callable[[int, int], None] = lambda looked, found: None,
) -> list[Pair]:
    """Find out which candidates are copies, by looking at the pictures.

    Args:
        pairs: Rows of two pictures each, int64 (m, 2), the likeliest first. After many pairs in a row that are
            no copies, the others are not looked at.
        pictures: Decodes rows to uint8 (n, SIDE, SIDE, 3), with `cvdist.inspection.alignment.SIDE`.
        after_batch: Called with the number of pairs that were looked at, and of the copies among them.
    """
    patience = max(_PATIENCE, int(_PATIENCE_SHARE * len(np.unique(pairs))))
    found: list[Pair] = []
    in_vain = 0
    for start in range(0, len(pairs), _BATCH):
        batch = pairs[start : start + _BATCH]
        rows, places = np.unique(batch, return_inverse=True)
        first, second = pictures(rows.tolist())[torch.from_numpy(places.reshape(batch.shape))].unbind(1)
        copies = compare(batch.tolist(), first, second)
        found += copies
        in_vain = 0 if copies else in_vain + len(batch)
        after_batch(start + len(batch), len(found))
        if in_vain >= patience:
            break
    return found


def compare(pairs: Sequence[Sequence[int]], first: Tensor, second: Tensor) -> list[Pair]:
    """Return the pairs whose pictures, uint8 (n, SIDE, SIDE, 3), match as they are or mirrored."""
    equal = (first == second).flatten(1).all(1).tolist()
    one, other = (pixels.float().mean(3) / 255 for pixels in (first, second))
    plain, mirrored = correlation(one, other).tolist(), correlation(one, other.flip(2)).tolist()
    found = []
    for (a, b), same, straight, turned in zip(pairs, equal, plain, mirrored, strict=True):
        if same:
            found.append(Pair(a, b, SAME_PIXELS, 1.0))
        elif max(straight, turned) >= _ALIKE:
            how = NEAR if straight >= turned else MIRRORED
            found.append(Pair(a, b, how, round(min(max(straight, turned), 1.0), 4)))
    return found


def groups(pairs: Sequence[Pair]) -> list[list[int]]:
    """Return the groups of rows that are copies, directly or by others between them; each group is sorted."""
    parent: dict[int, int] = {}

    def root(row: int) -> int:
        while parent.setdefault(row, row) != row:
            parent[row] = row = parent[parent[row]]
        return row

    for pair in pairs:
        parent[root(pair.second)] = root(pair.first)
    members = defaultdict(list)
    for row in sorted(parent):
        members[root(row)].append(row)
    return list(members.values())


def to_leave_out(pairs: Sequence[Pair], valid: np.ndarray, pixels: np.ndarray) -> list[Copy]:
    """Choose the picture of each group to keep, and list the others.

    A validation picture is kept, so that validation does not change; of several, the one with most pixels.

    Args:
        pairs: Pairs of copies.
        valid: Whether a picture is one to validate on, bool (n,).
        pixels: Number of pixels of each picture, (n,).
    """
    by_row: defaultdict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_row[pair.first].append(pair)
        by_row[pair.second].append(pair)
    copies = []
    for group in groups(pairs):
        keep = min(group, key=lambda row: (not valid[row], -pixels[row], row))
        for row in group:
            if row != keep:
                direct = [one for one in by_row[row] if keep in (one.first, one.second)]
                best = max(direct or by_row[row], key=lambda one: one.score)
                copies.append(Copy(row, keep, best.how, best.score))
    return copies
