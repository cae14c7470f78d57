"""The issues that an inspection has found, as a table: one row for each picture and issue."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

LEAK, COPY, LABEL, OUTLIER, BLANK = "leak", "copy", "label", "outlier", "blank"
KINDS = {
    LEAK: "Copies across the splits",
    COPY: "Copies",
    LABEL: "Doubtful labels",
    OUTLIER: "Far from their class",
    BLANK: "Of one color",
    "dark": "Nearly black",
    "bright": "Nearly white",
    "tiny": "Much smaller than the others",
    "aspect": "Much longer than wide, or wider than high",
    "border": "Mostly a border of one color",
}
"""Kinds of issues, in the order in which they are listed, with their titles."""

_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("kind", pa.string()),
        ("score", pa.float64()),
        ("class", pa.string()),
        ("suggested", pa.string()),
        ("twin", pa.string()),
        ("note", pa.string()),
        ("leave_out", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Issue:
    """Something that is wrong with a picture.

    Attributes:
        path: Path of the picture that may be left out.
        kind: One of `KINDS`.
        score: How sure it is. For copies: 1 for equal pixels. For labels: the probability that it is wrong.
        label: The picture's class.
        suggested: Suggested class, or empty.
        twin: Path of the picture that it is a copy of, or empty.
        note: A few words on the issue.
        leave_out: Whether it is so sure that `--exclude` leaves the picture out.
        row: Row of the picture in the inspection.
        twin_row: Row of the twin; -1 if there is none.
    """

    path: str
    kind: str
    score: float
    label: str
    suggested: str = ""
    twin: str = ""
    note: str = ""
    leave_out: bool = False
    row: int = -1
    twin_row: int = -1


def table(issues: Sequence[Issue]) -> pa.Table:
    """Return a table of the issues: path, kind, score, class, suggested, twin, note and leave_out."""
    columns = list(zip(*(astuple(one)[: len(_SCHEMA)] for one in issues), strict=True)) or [()] * len(_SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    return pa.table(arrays, schema=_SCHEMA)


def to_csv(found: pa.Table) -> bytes:
    """Write the table as CSV."""
    content = io.BytesIO()
    pa.csv.write_csv(found, content, pa.csv.WriteOptions(quoting_style="needed"))
    return content.getvalue()


def to_parquet(found: pa.Table) -> bytes:
    """Write the table as Parquet."""
    content = io.BytesIO()
    pa.parquet.write_table(found, content)
    return content.getvalue()
