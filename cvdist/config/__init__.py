"""Every setting of every job, with its one default and its bounds.

A recipe (`cvdist.recipes`) is a function that returns a `TrainConfig`; the command line overrides single
fields of it by their flat names (`--lr`, `--batch-size`, ...), so a field name is unique over a job's groups.
This package imports neither torch nor ray nor mlflow: reading a command line costs milliseconds.
"""

from cvdist.config.bounds import check_groups
from cvdist.config.evaluate import (
    EvaluateConfig,
    EvaluationConfig,
)
from cvdist.config.groups import (
    CUDA_GRAPHS,
    CheckpointConfig,
    Compile,
    DataConfig,
    Device,
    FeaturesConfig,
    Head,
    HeadSize,
    LoopConfig,
    ModelConfig,
    ModelPreprocessing,
    OptimizerConfig,
    ParallelConfig,
    PrecisionName,
    Runtime,
    RuntimeConfig,
    TrackingConfig,
    VisualizeConfig,
)
from cvdist.config.places import (
    cache_folder,
    storage_root,
)
from cvdist.config.predict import (
    PredictConfig,
    PredictionConfig,
)
from cvdist.config.report import ReportConfig
from cvdist.config.saved import (
    InferenceConfig,
    SavedModelConfig,
)
from cvdist.config.sweep import (
    SweepConfig,
    SweepJobConfig,
    check_sweep,
)
from cvdist.config.train import (
    GROUPS,
    TrainConfig,
    check,
    check_registration,
    flat,
    from_dict,
    replace,
    to_dict,
)
from cvdist.config.visualize import (
    LookConfig,
    VisualizeJobConfig,
)

__all__ = [
    "CUDA_GRAPHS",
    "GROUPS",
    "CheckpointConfig",
    "Compile",
    "DataConfig",
    "Device",
    "EvaluateConfig",
    "EvaluationConfig",
    "FeaturesConfig",
    "Head",
    "HeadSize",
    "InferenceConfig",
    "LookConfig",
    "LoopConfig",
    "ModelConfig",
    "ModelPreprocessing",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionName",
    "PredictConfig",
    "PredictionConfig",
    "ReportConfig",
    "Runtime",
    "RuntimeConfig",
    "SavedModelConfig",
    "SweepConfig",
    "SweepJobConfig",
    "TrackingConfig",
    "TrainConfig",
    "VisualizeConfig",
    "VisualizeJobConfig",
    "cache_folder",
    "check",
    "check_groups",
    "check_registration",
    "check_sweep",
    "flat",
    "from_dict",
    "replace",
    "storage_root",
    "to_dict",
]
