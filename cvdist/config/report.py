"""The settings of a job that makes a run's report again."""

from __future__ import annotations

from dataclasses import dataclass, field

from cvdist.config.saved import LookupConfig


@dataclass(frozen=True)
class PageConfig:
    """Which run's report is made, and where it goes."""

    run: str = ""
    """The run's name or id."""
    output: str = ""
    """File that the page is written to. Empty: the artifact `report.html` of the run."""


@dataclass(frozen=True)
class ReportConfig:
    """The settings of a report (`jobs/report.py`)."""

    page: PageConfig = field(default_factory=PageConfig)
    lookup: LookupConfig = field(default_factory=LookupConfig)
