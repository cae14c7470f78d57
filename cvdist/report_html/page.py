"""Render a report as one HTML file.

The file loads nothing from elsewhere and can be read without scripts. The same content gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
import statistics
from collections.abc import Iterable, Sequence

import cvdist
from cvdist import log
from cvdist.report_html import figures
from cvdist.report_html.content import DataSummary, ModelSummary, Report
from cvdist.report_html.embed import EmbeddedFigure, embed
from cvdist.report_html.figures import Caption
from cvdist.report_html.markup import Markup, element, join
from cvdist.report_html.style import CSS
from cvdist.results import EpochRecord

MAX_BYTES = 10_000_000
_MOST_EPOCHS = 300
_MOST_ROWS = 100
_MOST_CLASSES = 30
# MLflow shows the page in a sandboxed frame in which links do not work, not even those within the page.
_SCROLL = """
document.addEventListener("click", (event) => {
  const link = location.protocol === "blob:" && event.target.closest("nav a");
  if (link) document.getElementById(link.hash.slice(1)).scrollIntoView();
});
"""
_SCROLL_SHA256 = base64.b64encode(hashlib.sha256(_SCROLL.encode()).digest()).decode("ascii")
# The browser loads nothing and runs no other script than the one above, whatever the page contains.
_POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_SCROLL_SHA256}'"


def render(report: Report) -> str:
    """Render the page, at most 10 MB in UTF-8. Figures are shrunk or left out if they do not fit."""
    bare = _page(report, [], ["-" * 300] * (len(report.pictures) + 1))
    by_importance = sorted(
        report.pictures, key=lambda picture: (figures.importance(picture.path), picture.path)
    )
    # Each figure also adds a caption, an alt text and tags.
    markup = 2000 * len(by_importance)
    embedded, lines = embed(by_importance, MAX_BYTES - len(bare.encode()) - markup)
    return _page(report, embedded, lines)


def _page(report: Report, embedded: Sequence[EmbeddedFigure], lines: Sequence[str]) -> str:
    best = report.best
    score = f"{100 * best.valid_accuracy:.2f}% · " if best else ""
    sections = [section for section in _sections(report, embedded, [*report.left_out, *lines]) if section]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{score}{report.name}"),
        element("style", Markup(CSS)),
    )
    body = element(
        "body",
        element(
            "main", _header(report, [title for title, _ in sections]), *(content for _, content in sections)
        ),
        element("footer", _footer(report)),
        element("script", Markup(_SCROLL)),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _sections(
    report: Report, embedded: Sequence[EmbeddedFigure], left_out: Sequence[str]
) -> Iterable[tuple[str, Markup]]:
    """Yield title and content of each section that has something to show."""
    shown = _figures(embedded)
    yield from _titled("What was trained", _trained(report))
    for title, content in shown.items():
        if title != figures.OTHER:
            yield from _titled(title, content)
    if report.epochs:
        yield from _titled("Epochs", _epochs(report))
        yield from _titled("Time", _time(report))
    if report.settings:
        yield from _titled("Configuration", _configuration(report))
    if report.quarantine:
        yield from _titled("Quarantine", _quarantine(report.quarantine))
    if figures.OTHER in shown:
        yield from _titled(figures.OTHER, shown[figures.OTHER])
    if report.address or report.versions:
        yield from _titled("Where it ran", _pairs([*report.address, *report.versions]))
    if left_out:
        introduction = element("p", "The run's artifacts have these in full:")
        yield from _titled("Not shown", join([introduction, _list(left_out)]))


def _titled(title: str, content: Markup) -> Iterable[tuple[str, Markup]]:
    yield title, element("section", element("h2", title), content, id=_anchor(title))


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z]+", "-", title.lower())


# --------------------------------------------------------------------------------------------------- the top


def _header(report: Report, titles: Sequence[str]) -> Markup:
    best = report.best
    links = [element("li", element("a", title, href=f"#{_anchor(title)}")) for title in titles]
    return element(
        "header",
        element("h1", report.name),
        element("p", " · ".join(filter(None, [_what(report), report.started])), class_="muted"),
        _warning(report.status),
        *(_score(report, best) if best else [element("p", "No epoch has been finished.", class_="warning")]),
        element("pre", element("code", report.command)) if report.command else None,
        element("nav", element("ul", *links), aria_label="Sections"),
    )


def _what(report: Report) -> str:
    model, data = report.model, report.data
    return f"{model.name} on {data.name}" if model and data else model.name if model else ""


def _warning(status: str) -> Markup | None:
    text = {
        "failed": "This run failed: what is shown is what it had reached.",
        "killed": "This run was stopped before its end: what is shown is what it had reached.",
        "running": "This run had not ended when this report was made.",
    }.get(status)
    return element("p", text, class_="warning") if text else None


def _score(report: Report, best: EpochRecord) -> list[Markup]:
    last = report.epochs[-1]
    tiles = [
        ("validation pictures right", f"{best.valid_correct}/{best.valid_total}"),
        ("best epoch", f"{best.epoch} of {last.epoch}"),
        ("validation loss there", f"{best.valid_loss:.4f}"),
        ("of training", log.duration(_total_seconds(report))),
        ("samples a second (median)", f"{_median_speed(report):,.0f}"),
    ]
    if report.ridge:
        tiles.insert(1, ("by a ridge probe, without an epoch", f"{report.ridge.correct}/{report.ridge.total}"))
    return [
        element("p", f"{100 * best.valid_accuracy:.2f}%", class_="score"),
        element(
            "p", "validation accuracy of the best epoch, whose weights are the run's model", class_="muted"
        ),
        element("div", *(_tile(*tile) for tile in tiles), class_="tiles"),
    ]


def _tile(label: str, value: str) -> Markup:
    return element("div", element("b", value), element("span", label), class_="tile")


# ----------------------------------------------------------------------------------------- what was trained


def _trained(report: Report) -> Markup:
    rows = [*_data(report.data), *_model(report.model)]
    if report.workers:
        on = f" on {report.hardware}" if report.hardware else ""
        rows.append(("Workers", f"{report.workers}{on}"))
    rows += [("Precision", report.precision), ("Recipe", report.recipe)]
    if report.ridge:
        probe = f"ridge probe on the features: {report.ridge}, penalty {report.ridge.penalty:.3g}"
        rows.append(("Baseline", probe))
    return _pairs(rows)


def _data(data: DataSummary | None) -> list[tuple[str, str]]:
    if data is None:
        return []
    source = "" if data.source == data.name else data.source
    sizes = f"{data.train_size:,} for training, {data.valid_size:,} for validation"
    return [
        ("Data", " · ".join(filter(None, [data.name, source]))),
        ("Pictures", sizes if data.train_size else ""),
        ("A picture", f"{data.shape} (channels, height, width)" if data.shape else ""),
        ("Classes", f"{len(data.classes)}: {_some(data.classes)}" if data.classes else ""),
        ("SHA-256 of the data", data.sha256),
    ]


def _model(model: ModelSummary | None) -> list[tuple[str, str]]:
    if model is None:
        return []
    counts = f"{model.trained:,} trained" + (f", {model.frozen:,} frozen" if model.frozen else "")
    return [
        ("Model", model.name),
        ("Parameters", counts if model.trained else ""),
        ("Pretrained weights", model.weights),
        ("SHA-256 of the weights", model.weights_sha256),
        ("Normalization", model.normalization),
    ]


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_CLASSES
    return ", ".join(names[:_MOST_CLASSES]) + (f" and {more} more" if more > 0 else "")


# --------------------------------------------------------------------------------------------------- figures


def _figures(embedded: Sequence[EmbeddedFigure]) -> dict[str, Markup]:
    """Return the content of each section that has figures, by its title."""
    by_path = {one.path: one for one in embedded}
    order = figures.order_figures(by_path)
    shown = {}
    for section, group in itertools.groupby(order, key=lambda pair: pair[1].section):
        drawn = [_figure(by_path[path], caption) for path, caption in group]
        introduction = figures.SECTIONS[section]
        content = element("div", *drawn, class_="pair") if section == figures.CURVES else join(drawn)
        shown[section] = join([element("p", introduction) if introduction else None, content])
    return shown


def _figure(picture: EmbeddedFigure, caption: Caption) -> Markup:
    return element(
        "figure",
        element("h3", caption.title) if caption.title else None,
        # A tap enlarges the figure to its full size, by a checkbox and CSS rather than by a script.
        element(
            "label",
            element("input", type="checkbox", aria_label="Full size"),
            element(
                "img",
                src=picture.uri,
                alt=caption.alt,
                width=picture.width or None,
                height=picture.height or None,
            ),
            class_="zoom",
        ),
        element("figcaption", caption.text) if caption.text else None,
    )


# ------------------------------------------------------------------------------------------- epochs and time


def _epochs(report: Report) -> Markup:
    best = report.best
    shown = _thinned(report.epochs, best)
    head = ("epoch", "training loss", "training accuracy", "validation loss", "validation accuracy",
            "learning rate", "seconds", "samples/s", "memory, MB")  # fmt: skip
    rows = [_epoch_row(record, is_best=record == best) for record in shown]
    note = None
    if len(shown) < len(report.epochs):
        note = element(
            "p", f"{len(shown)} of {len(report.epochs)} epochs, the best one and the last among them."
        )
    return join([note, _table(head, rows, "numbers", "Results of each epoch")])


def _thinned(epochs: Sequence[EpochRecord], best: EpochRecord | None) -> list[EpochRecord]:
    every = -(-len(epochs) // _MOST_EPOCHS)
    return [
        record
        for number, record in enumerate(epochs)
        if number % every == 0 or record == best or number == len(epochs) - 1
    ]


def _epoch_row(record: EpochRecord, *, is_best: bool) -> Markup:
    cells = (
        f"{record.epoch} (best)" if is_best else f"{record.epoch}",
        f"{record.train_loss:.4f}",
        log.percent(record.train_correct, record.train_total),
        f"{record.valid_loss:.4f}",
        log.percent(record.valid_correct, record.valid_total),
        f"{record.learning_rate:.3g}",
        f"{record.seconds:,.1f}",
        f"{record.samples_per_second:,.0f}",
        f"{record.peak_memory / 2**20:,.0f}",
    )
    return element("tr", *(element("td", cell) for cell in cells), class_="marked" if is_best else None)


def _time(report: Report) -> Markup:
    seconds = [record.seconds for record in report.epochs]
    first = report.first_step_seconds
    return _pairs(
        [
            ("To the first step", f"{first:,.1f} s from the job's start" if first else ""),
            ("An epoch", f"{statistics.median(seconds):,.1f} s (median; {min(seconds):,.1f} to "
                         f"{max(seconds):,.1f}), validation included"),
            ("Speed", f"{_median_speed(report):,.0f} training samples/s (median of the epochs)"),
            ("All epochs", log.duration(_total_seconds(report))),
        ]
    )  # fmt: skip


def _total_seconds(report: Report) -> float:
    return sum(record.seconds for record in report.epochs)


def _median_speed(report: Report) -> float:
    return statistics.median(record.samples_per_second for record in report.epochs)


# ----------------------------------------------------------------------------------------------- the details


def _configuration(report: Report) -> Markup:
    known = any(setting.recipe_value is not None for setting in report.settings)
    changed = [setting for setting in report.settings if setting.changed]
    if not known:
        comparison: Markup = element("p", "The recipe is not known, so the settings can't be compared with it.")
    elif changed:
        lines = [
            f"{one.name}: {_value(one.value)} (recipe: {_value(one.recipe_value or '')})" for one in changed
        ]
        comparison = join([element("p", f"Differs from the recipe {report.recipe}:"), _list(lines)])
    else:
        comparison = element("p", f"All as in the recipe {report.recipe}.")
    groups = []
    for group, settings in itertools.groupby(report.settings, key=lambda setting: setting.group):
        rows = [
            element(
                "tr",
                element("td", _breakable(setting.name)),
                element("td", _value(setting.value), " (changed)" if setting.changed else None),
                class_="marked" if setting.changed else None,
            )
            for setting in settings
        ]
        groups.append(element("section", element("h3", group), element("table", *rows, class_="words")))
    if report.facts:
        rows = [
            element("tr", element("td", _breakable(name)), element("td", _value(value)))
            for name, value in report.facts
        ]
        groups.append(
            element("section", element("h3", "found at the start"), element("table", *rows, class_="words"))
        )
    return join([comparison, element("div", *groups, class_="settings")])


def _breakable(name: str) -> Markup:
    """Allow line breaks between the words of a name, for narrow screens."""
    return join(re.split(r"(?<=[_.])", name), element("wbr"))


def _value(value: str) -> str:
    return value if value else "(empty)"


def _quarantine(bad: Sequence[tuple[str, str]]) -> Markup:
    rows = [element("tr", *(element("td", cell) for cell in row)) for row in bad[:_MOST_ROWS]]
    more = len(bad) - _MOST_ROWS
    what = "picture that can't be decoded was" if len(bad) == 1 else "pictures that can't be decoded were"
    return join(
        [
            element("p", f"{len(bad):,} {what} left out."),
            _table(("picture", "reason"), rows, "words", "Pictures that were left out"),
            element("p", f"{more:,} more are in quarantine.csv.") if more > 0 else None,
        ]
    )


def _footer(report: Report) -> Markup:
    return element("p", f"cvdist {cvdist.__version__}, from the MLflow run {report.name}.")


def _pairs(rows: Iterable[tuple[str, str]]) -> Markup:
    """Build a list of names and values. Rows without a value are left out."""
    return element(
        "dl", *(part for name, value in rows if value for part in (element("dt", name), element("dd", value)))
    )


def _list(lines: Iterable[str]) -> Markup:
    return element("ul", *(element("li", line) for line in lines))


def _table(head: Sequence[str], rows: Iterable[Markup], kind: str, label: str) -> Markup:
    titles = element("thead", element("tr", *(element("th", title, scope="col") for title in head)))
    table = element("table", titles, element("tbody", *rows), class_=kind)
    # A table that is wider than the screen scrolls on its own, by keyboard as well.
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=label)
