"""The settings of one evaluation of a trained model, or of two."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cvdist.config.bounds import Count, Seconds
from cvdist.config.groups import DataConfig, RuntimeConfig, TableConfig, TrackingConfig
from cvdist.config.saved import InferenceConfig, SavedModelConfig


@dataclass(frozen=True)
class EvaluationConfig(TableConfig):
    """What a trained model is measured on, against what, and where the results go."""

    data: str = ""
    """Folder or URI of pictures, `CLASS/picture.jpg` or `{train,valid}/CLASS/picture.jpg`, or a table of them.
    Empty: what the model's run was trained on."""
    dataset: Literal["", "digits", "mnist", "images"] = ""
    """As in training. Empty: `images` with --data, else that of the model's run."""
    part: Literal["", "valid", "train", "all"] = ""
    """Which of the pictures, split as in training. Empty: those to validate on; all of them in a --data that
    has no such division and is not what the model was trained on."""
    compare: str = ""
    """A second model, named as the first: both see the same pictures."""
    calibration_bins: Count = 15
    """Bins of confidence that the calibration error is computed over, of equal width."""
    output: str = ""
    """File or URI that the results are written to, as JSON."""
    tracking: Literal["required", "optional", "none"] = TrackingConfig.mode
    """`none`: leave out the MLflow run that holds the results. `optional`: if MLflow can't be reached."""
    register: str = ""
    """Register the evaluated model in MLflow under this name."""
    alias: str = "champion"
    """Alias that the registered version gets, in place of the one that had it."""
    cache: str = DataConfig.cache
    """As in training: for pictures that have no division into training and validation."""
    prepare_timeout: Seconds = RuntimeConfig.prepare_timeout
    """Seconds that downloading the data, or decoding it for such a division, may take."""


@dataclass(frozen=True)
class EvaluateConfig:
    """The settings of an evaluation (`jobs/evaluate.py`)."""

    saved: SavedModelConfig = field(default_factory=SavedModelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
