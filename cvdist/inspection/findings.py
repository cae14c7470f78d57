"""Finds everything that may be wrong with the pictures of a feature cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cvdist.inspection import copies, labels, neighbors, odd
from cvdist.inspection.issues import BLANK, COPY, KINDS, LABEL, LEAK, OUTLIER, Issue
from cvdist.inspection.odd import Shortcut
from cvdist.inspection.pictures import InspectedPictures
from cvdist.training import ridge

_NEIGHBORS = 8


@dataclass(frozen=True)
class Findings:
    """The findings of an inspection.

    Attributes:
        issues: What may be wrong, by kind in the order of `KINDS`, the surest first.
        right: Which validation pictures a ridge classifier of the training pictures classifies correctly, bool
            (n,).
        leaked: Which validation pictures have a copy among those for training, bool (n,).
        left_out_correct: Number of pictures that a classifier of all others classifies as they are labeled.
        wrong_rate: Estimated share of all labels that are wrong.
        usual: What many pictures have in common, one line each.
        shortcuts: Measures that alone tell a class.
    """

    issues: tuple[Issue, ...]
    right: np.ndarray
    leaked: np.ndarray
    left_out_correct: int
    wrong_rate: float
    usual: tuple[str, ...]
    shortcuts: tuple[Shortcut, ...]

    def of(self, *kinds: str) -> list[Issue]:
        """Return the issues of some kinds."""
        return [issue for issue in self.issues if issue.kind in kinds]

    @property
    def wrong_labels(self) -> float:
        """Estimated number of listed labels that are wrong."""
        return sum(issue.score for issue in self.of(LABEL))


def find(
    pictures: InspectedPictures,
    originals: Callable[[Sequence[int]], Tensor],
    first: int,
    device: torch.device,
    progress: Callable[[str], None],
) -> Findings:
    """Look for copies, wrong labels and odd pictures.

    Args:
        pictures: The pictures with their features.
        originals: Decodes candidates for copies, such as `Originals` of `cvdist.inspection.alignment.SIDE`.
        first: How many likely wrong labels are listed at most.
        device: Where neighbors are computed.
        progress: Called now and then with what is being done.
    """
    same = copies.same_bytes(pictures.digests)
    # Copies of one file would be each other's neighbors, and hide others.
    repeated = {pair.second for pair in same}
    distinct = torch.tensor([row for row in range(len(pictures)) if row not in repeated])
    features = pictures.features[distinct] if repeated else pictures.features
    anywhere, own = neighbors.nearest(
        features.to(device),
        pictures.labels[distinct],
        _NEIGHBORS,
        after_block=lambda done, of: progress(f"neighbors: {100 * done // of}%"),
    )
    candidates = distinct.numpy()[copies.candidates(anywhere)]
    same += copies.verify(
        candidates, originals, lambda looked, found: progress(f"copies: {found} of {looked:,} pairs compared")
    )
    twins = copies.to_leave_out(same, pictures.valid, pictures.pixels)
    checked = labels.check_labels(pictures.features, pictures.labels, len(pictures.classes), progress)
    wrong = _wrong_labels(pictures, checked, first)
    listed = {issue.row for issue in wrong}
    oddities, usual = odd.measured(pictures.measures)
    far = odd.far_from_class(own, pictures.labels[distinct])
    found = [*_copies(pictures, twins), *wrong]
    found += [
        Issue(
            path=pictures.paths[row],
            kind=one.kind,
            score=score,
            label=pictures.class_of(row),
            note=note,
            leave_out=one.kind == BLANK,
            row=row,
        )
        for one in (far.of_rows(distinct.tolist()), *oddities)
        for row, score, note in zip(one.rows, one.scores, one.notes, strict=True)
        if one.kind != OUTLIER or row not in listed
    ]
    order = list(KINDS)
    return Findings(
        issues=tuple(sorted(found, key=lambda issue: order.index(issue.kind))),
        right=_validated(pictures),
        leaked=_leaked(pictures, same),
        left_out_correct=checked.correct,
        wrong_rate=checked.rate,
        usual=tuple(usual),
        shortcuts=tuple(odd.shortcuts(pictures.measures, pictures.labels.numpy(), len(pictures.classes))),
    )


def _copies(pictures: InspectedPictures, twins: list[copies.Copy]) -> list[Issue]:
    found = []
    for one in sorted(twins, key=lambda one: (-one.score, one.row)):
        label, other = pictures.class_of(one.row), pictures.class_of(one.twin)
        kind = LEAK if pictures.valid[one.twin] and not pictures.valid[one.row] else COPY
        found.append(
            Issue(
                path=pictures.paths[one.row],
                kind=kind,
                score=one.score,
                label=label,
                suggested=other if other != label else "",
                twin=pictures.paths[one.twin],
                note=one.how if other == label else f"{one.how}, in two classes",
                leave_out=True,
                row=one.row,
                twin_row=one.twin,
            )
        )
    return found


def _wrong_labels(pictures: InspectedPictures, checked: labels.CheckedLabels, first: int) -> list[Issue]:
    rows = checked.otherwise.nonzero().flatten()
    order = checked.log_odds[rows].argsort(descending=True, stable=True)
    wrong = checked.wrong
    return [
        Issue(
            path=pictures.paths[row],
            kind=LABEL,
            score=round(float(wrong[row]), 4),
            label=pictures.class_of(row),
            suggested=pictures.classes[int(checked.suggested[row])],
            leave_out=bool(wrong[row] > 0.5),
            row=row,
        )
        for row in rows[order][:first].tolist()
    ]


def _validated(pictures: InspectedPictures) -> np.ndarray:
    """Return which validation pictures a ridge classifier of the training pictures classifies correctly."""
    valid = torch.from_numpy(pictures.valid)
    fit = ridge.solve(labels.sums_of(pictures.features, pictures.labels, len(pictures.classes), ~valid))
    predicted: list[Tensor] = [
        fit.scores(pictures.features[part].double()).argmax(1)
        for part in valid.nonzero().flatten().split(neighbors.BLOCK)
    ]
    return (torch.cat(predicted) == pictures.labels[valid]).numpy()


def _leaked(pictures: InspectedPictures, same: list[copies.Pair]) -> np.ndarray:
    """Return which validation pictures have a copy among those for training."""
    leaked = np.zeros(len(pictures), dtype=bool)
    for group in copies.groups(same):
        sides = pictures.valid[group]
        leaked[group] = sides & (not sides.all())
    return leaked[pictures.valid]
