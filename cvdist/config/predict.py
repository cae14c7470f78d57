"""The settings of one batch prediction."""

from __future__ import annotations

from dataclasses import dataclass, field

from cvdist.config.bounds import Count, CountOrZero
from cvdist.config.groups import ActorsConfig
from cvdist.config.saved import InferenceConfig, SavedModelConfig


@dataclass(frozen=True)
class PredictionConfig:
    """Which pictures are classified, and where the results go."""

    data: str = ""
    """Folder or URI (s3://, gs://, file://) of the pictures, in any folders below it."""
    output: str = ""
    """Folder or URI for the results. The same command again computes only what is missing or has changed."""
    replace: bool = False
    """Replace results of another model, other settings or other pictures."""
    slice_size: Count = 512
    """Pictures a file of results, about: the unit of work, of retry and of resume."""
    predictors: CountOrZero = 0
    """Ray actors. 0: one a GPU or, without GPUs, one for each --cpus-per-worker cores."""


@dataclass(frozen=True)
class PredictConfig:
    """The settings of a prediction (`jobs/predict.py`)."""

    saved: SavedModelConfig = field(default_factory=SavedModelConfig)
    prediction: PredictionConfig = field(default_factory=PredictionConfig)
    runtime: ActorsConfig = field(default_factory=ActorsConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
