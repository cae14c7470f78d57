"""One batch prediction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from cvdist.config.bounds import at_least
from cvdist.config.groups import RuntimeConfig
from cvdist.config.saved import InferenceConfig, SavedModelConfig


@dataclass(frozen=True)
class PredictionConfig:
    """Which pictures are classified, by whom, and where the results go."""

    data: str = ""
    """Folder or URI (s3://, gs://, file://) of the pictures, in any folders below it."""
    output: str = ""
    """Folder or URI for the results. The same command again computes only what is missing or has changed."""
    replace: bool = False
    """Replace results of another model, other settings or other pictures."""
    slice_size: Annotated[int, at_least(1)] = 512
    """Pictures a file of results, about: the unit of work, of retry and of resume."""
    runtime: Literal["ray", "inline"] = "ray"
    """`inline`: in this process, without Ray."""
    predictors: Annotated[int, at_least(0)] = 0
    """Ray actors. 0: one a GPU or, without GPUs, one for each --cpus-per-worker cores."""
    cpus_per_worker: Annotated[int, at_least(1)] = RuntimeConfig.cpus_per_worker
    """CPU cores that Ray reserves for each actor."""
    connect_timeout: Annotated[float, at_least(0.1)] = RuntimeConfig.connect_timeout
    """Seconds that the cluster at $RAY_ADDRESS may take to answer."""
    resource_timeout: Annotated[float, at_least(0)] = RuntimeConfig.resource_timeout
    """Seconds to wait for the cluster to have the CPUs and GPUs asked for. 0: fail at once."""


@dataclass(frozen=True)
class PredictConfig:
    """One job of `jobs/predict.py`."""

    saved: SavedModelConfig = field(default_factory=SavedModelConfig)
    prediction: PredictionConfig = field(default_factory=PredictionConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
