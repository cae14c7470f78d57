"""Builds the content of an inspection's page, with thumbnails of what was found."""

from __future__ import annotations

from torch import Tensor

from cvdist import log
from cvdist.inspection.findings import Findings
from cvdist.inspection.issues import COPY, KINDS, LABEL, LEAK, OUTLIER, Issue
from cvdist.inspection.pictures import InspectedPictures, Originals
from cvdist.report_html.inspection import Finding, InspectionPage, Section, Thumbnail, thumbnail

_SHOWN = 60  # of each kind: more would make the page larger than 10 MB

_INTRODUCTIONS = {
    LEAK: "Training pictures that are among the validation pictures as well, so that validation measures what "
    "was learned by heart. Leave out the left one of each pair.",
    COPY: "Pictures that are there more than once. Leave out the left one of each pair.",
    LABEL: "Pictures that all others take for another class, the surest first: by a ridge classifier of all "
    "pictures but the one that is judged.",
    OUTLIER: "Pictures whose nearest neighbors in their class are farther away than is usual there.",
}


def page_of(
    pictures: InspectedPictures, findings: Findings, originals: Originals, name: str, subject: str, command: str
) -> InspectionPage:
    """Describe what was found, and decode the pictures to show.

    Args:
        pictures: The pictures.
        findings: What was found.
        originals: Decodes pictures.
        name: Title of the page.
        subject: Data and features in a few words.
        command: The command that made the page.
    """
    by_kind = {kind: findings.of(kind) for kind in KINDS}
    shown = {kind: found[:_SHOWN] for kind, found in by_kind.items() if found}
    rows = sorted({row for found in shown.values() for one in found for row in (one.row, one.twin_row)} - {-1})
    thumbnails = {
        row: _thumbnail(pictures, row, pixels) for row, pixels in zip(rows, originals(rows), strict=True)
    }
    sections = tuple(
        Section(
            KINDS[kind],
            _INTRODUCTIONS.get(kind, ""),
            tuple(Finding(thumbnails[one.row], text_of(one), thumbnails.get(one.twin_row)) for one in found),
            len(by_kind[kind]),
        )
        for kind, found in shown.items()
    )
    tiles = {
        "pictures": f"{len(pictures):,}",
        "copies across the splits": f"{len(by_kind[LEAK]):,}",
        "more copies": f"{len(by_kind[COPY]):,}",
        "doubtful labels": f"{len(by_kind[LABEL]):,}",
        "of them wrong, by estimate": f"{findings.wrong_labels:.1f}",
        "odd pictures": f"{sum(len(by_kind[kind]) for kind in KINDS) - len(findings.of(LEAK, COPY, LABEL)):,}",
    }
    return InspectionPage(name, subject, tiles, tuple(sentences(pictures, findings)), command, sections)


def sentences(pictures: InspectedPictures, findings: Findings) -> list[str]:
    """Return sentences on what was found out about the set as a whole."""
    lines = []
    right, leaked = findings.right, findings.leaked
    if leaked.any():
        lines.append(
            f"{log.percent(int(right.sum()), len(right))} of the validation pictures are right by a ridge "
            f"classifier; without the {int(leaked.sum())} that training has copies of, "
            f"{log.percent(int(right[~leaked].sum()), int((~leaked).sum()))}"
        )
    for one in findings.shortcuts:
        more = "higher" if one.higher else "lower"
        lines.append(
            f"{one.measure} alone tells {pictures.classes[one.label]} from the other classes: it is {more} "
            f"there (area under the curve {one.area:.2f})"
        )
    return [*lines, *findings.usual]


def text_of(issue: Issue) -> str:
    """Return what is wrong with a picture, in a few words."""
    if issue.kind == LABEL:
        chance = f"{100 * issue.score:.0f}%" if issue.score >= 0.01 else "below 1%"
        return f"{issue.suggested} rather than {issue.label}? Probability {chance}"
    if issue.kind in (LEAK, COPY):
        return issue.note if issue.score == 1 else f"{issue.note}, correlation {issue.score:.3f}"
    return issue.note


def _thumbnail(pictures: InspectedPictures, row: int, pixels: Tensor) -> Thumbnail:
    width, height = (float(pictures.measures[name][row]) for name in ("width", "height"))
    split = "validation" if pictures.valid[row] else "training"
    return thumbnail(pixels, width, height, pictures.paths[row], pictures.class_of(row), split)
