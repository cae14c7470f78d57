"""The settings of a job that delivers a journal to MLflow."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class JournalConfig:
    """Which journal is delivered."""

    journal: str = ""
    """File or URI of the journal, as the job has named it."""


@dataclass(frozen=True)
class ReplayConfig:
    """The settings of the delivery of a journal (`jobs/replay.py`)."""

    replay: JournalConfig = field(default_factory=JournalConfig)
