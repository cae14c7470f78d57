"""The settings of one batch prediction."""

from __future__ import annotations

from dataclasses import dataclass, field

from cvdist.config.bounds import Count, CountOrZero
from cvdist.config.groups import ActorsConfig, PathsConfig
from cvdist.config.saved import InferenceConfig, SavedModelConfig


@dataclass(frozen=True)
class PredictionConfig(PathsConfig):
    """Which pictures are classified, and where the results go."""

    data: tuple[str, ...] = ()
    """Pictures: a folder, with any folders below it; files; patterns such as `'scans/**/*.png'`; a list of
    these, one a line, in a `.txt` file or, as `-`, from standard input; or a table that names them (.csv, .tsv,
    .jsonl, .parquet); or tars or Parquet files with pictures inside. Paths or URIs (s3://, gs://, file://).
    The predictions of up to 20 pictures are printed."""
    output: str = ""
    """Folder or URI for the results. The same command again computes only what is missing or has changed.
    Empty, for up to 20 pictures: they are only printed."""
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
