"""Pictures that can't be decoded: they are left out and listed, and too many of them end a job."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cvdist.errors import UserError
from cvdist.log import redact

QUARANTINE = "quarantine.csv"
"""Name of the table of bad pictures, in folders and among a run's artifacts."""


@dataclass(frozen=True)
class BadPicture:
    """A picture file that can't be decoded, and the reason."""

    path: str
    reason: str


def require_few_bad(
    bad: Sequence[BadPicture], *, pictures: int, fraction: float, uri: str, listed: Path | None = None
) -> None:
    """Refuse a data set with too many bad pictures.

    Args:
        bad: The bad pictures that have been found.
        pictures: How many pictures there are at `uri`, good or bad.
        fraction: The share of them that may be bad (`--max-bad-fraction`).
        uri: Where the pictures are (`--data`).
        listed: The file that lists all bad pictures, if there is one.

    Raises:
        UserError: If more pictures are bad.
    """
    if len(bad) > fraction * pictures:
        share = f" ({100 * len(bad) / pictures:.2f}%)" if listed else ""
        where = f"All are listed in {listed}: fix" if listed else "Fix"
        raise UserError(
            f"--data {redact(uri)}: {len(bad)} of {pictures} pictures{share} can't be decoded, more than "
            f"--max-bad-fraction {fraction:g} allows, e.g. {bad[0].path} ({bad[0].reason}). {where} or remove "
            "them, or raise the limit"
        )


def quarantine_csv(bad: Sequence[BadPicture]) -> str:
    """Format the bad pictures as CSV with the columns `path` and `reason`."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["path", "reason"])
    writer.writerows((picture.path, picture.reason) for picture in bad)
    return text.getvalue()


def parse_quarantine(text: str) -> list[BadPicture]:
    """Read the table that `quarantine_csv` wrote."""
    return [BadPicture(row["path"], row["reason"]) for row in csv.DictReader(io.StringIO(text, newline=""))]
