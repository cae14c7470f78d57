"""Render a report as one HTML file, from the templates beside this file.

The file loads nothing from elsewhere and can be read without scripts. The same content gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
import statistics
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

import cvdist
from cvdist import log
from cvdist.report_html import figures
from cvdist.report_html.content import Report
from cvdist.report_html.embed import EmbeddedFigure, embed
from cvdist.results import EpochRecord

MAX_BYTES = 10_000_000
_MOST_EPOCHS = 300


def render(report: Report) -> str:
    """Render the page, at most 10 MB in UTF-8. Figures are shrunk or left out if they do not fit."""
    bare = _page(report, [], ["-" * 300] * (len(report.pictures) + 1))
    by_importance = sorted(report.pictures, key=lambda picture: figures.importance(picture.path))
    # Each figure also adds a caption, an alt text and tags.
    markup = 2000 * len(by_importance)
    embedded, lines = embed(by_importance, MAX_BYTES - len(bare.encode()) - markup)
    return _page(report, embedded, lines)


def _page(report: Report, embedded: Sequence[EmbeddedFigure], lines: Sequence[str]) -> str:
    by_path = {one.path: one for one in embedded}
    shown: dict[str, list[tuple[EmbeddedFigure, figures.Caption]]] = {}
    for path, caption in figures.order_figures(by_path):
        shown.setdefault(caption.section, []).append((by_path[path], caption))
    page = environment().get_template("report.html.j2").render(
        report=report,
        rows=_thinned(report.epochs, report.best),
        other_figures=shown.pop(figures.OTHER, ()),
        known_figures=shown,
        introductions=figures.introductions(multilabel=report.multilabel),
        left_out=[*report.left_out, *lines],
        most_rows=100,
        duration=log.duration,
        percent=log.percent,
        version=cvdist.__version__,
    )  # fmt: skip
    return printable(page)


def environment() -> Environment:
    """Create the Jinja environment with the templates of all pages."""
    found = Environment(
        loader=PackageLoader("cvdist.report_html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    found.filters["median"] = statistics.median
    found.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return found


def printable(page: str) -> str:
    """Replace what can't be shown: control characters, and bytes of file names that are not UTF-8."""
    return re.sub(r"[^\n\t -~]", lambda found: _printable(found[0]), page)


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _thinned(epochs: Sequence[EpochRecord], best: EpochRecord | None) -> list[EpochRecord]:
    every = -(-len(epochs) // _MOST_EPOCHS)
    return [
        record
        for number, record in enumerate(epochs)
        if number % every == 0 or record == best or number == len(epochs) - 1
    ]
