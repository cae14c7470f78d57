"""A run's report, made anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cvdist.config.bounds import at_least
from cvdist.config.groups import CheckpointConfig, TrackingConfig


@dataclass(frozen=True)
class ReportConfig:
    """Where a run's report is made from, anew, and where it goes."""

    output: str = ""
    """File that the page is written to. Empty: the artifact `report.html` of the run."""
    storage: str = CheckpointConfig.storage
    """As in training: folder that has the MLflow store, where none is named."""
    tracking_uri: str = TrackingConfig.tracking_uri
    """Of the MLflow store. Empty: $MLFLOW_TRACKING_URI, else sqlite in the storage folder."""
    experiment: str = TrackingConfig.experiment
    """MLflow experiment in which the name is looked up."""
    tracking_timeout: Annotated[float, at_least(0.1)] = TrackingConfig.tracking_timeout
    """Seconds that the MLflow server may take to answer at the start."""
