"""Every setting of every job, with its one default and its bounds.

Each job has a dataclass of groups with the settings that it uses. A recipe (`cvdist.recipes`) is a function
that returns a `TrainConfig`; the command line and `replace` override single fields by the names of their flags
(`--lr`, `--batch-size`, ...), so a flag is unique over a job's groups.
This package imports neither torch nor ray nor mlflow: reading a command line costs milliseconds.
"""

from cvdist.config.evaluate import (
    EvaluateConfig,
    EvaluationConfig,
)
from cvdist.config.export import (
    ExportConfig,
    ExportFileConfig,
    ExportFormat,
)
from cvdist.config.groups import (
    CUDA_GRAPHS,
    ActorsConfig,
    AugmentationConfig,
    AutoAugment,
    BackboneConfig,
    CheckpointConfig,
    ClusterConfig,
    Compile,
    ComputeConfig,
    DataConfig,
    Device,
    ExtractionConfig,
    ExtractorsConfig,
    FeatureCacheConfig,
    FeaturesAt,
    FeaturesConfig,
    Head,
    HeadSize,
    Launcher,
    LoopConfig,
    MixingConfig,
    ModelConfig,
    ModelPreprocessing,
    OptimizerConfig,
    ParallelConfig,
    PathsConfig,
    PicturesConfig,
    PrecisionName,
    RunConfig,
    RuntimeConfig,
    SelectBy,
    TableConfig,
    TrackingConfig,
    VisualizeConfig,
)
from cvdist.config.inspect import (
    InspectConfig,
    InspectionConfig,
    check_inspect,
)
from cvdist.config.places import (
    cache_folder,
    require_outside,
    storage_root,
)
from cvdist.config.predict import (
    PredictConfig,
    PredictionConfig,
)
from cvdist.config.preprocess import (
    PreprocessConfig,
    check_preprocess,
)
from cvdist.config.probe import (
    NetworksConfig,
    ProbeConfig,
    check_probe,
)
from cvdist.config.replay import (
    JournalConfig,
    ReplayConfig,
)
from cvdist.config.report import (
    PageConfig,
    ReportConfig,
)
from cvdist.config.saved import (
    InferenceConfig,
    LookupConfig,
    SavedModelConfig,
)
from cvdist.config.settings import (
    Flag,
    Setting,
    check_groups,
    check_values,
    dashed,
    fields_of,
    flat,
    from_dict,
    groups_of,
    part_of,
    plain_type,
    replace,
    settings_of,
    to_dict,
)
from cvdist.config.sweep import (
    SweepConfig,
    SweepJobConfig,
    check_sweep,
)
from cvdist.config.train import (
    TrainConfig,
    check,
    check_registration,
    learning_settings,
)
from cvdist.config.visualize import (
    LookConfig,
    VisualizeJobConfig,
)

__all__ = [
    "CUDA_GRAPHS",
    "ActorsConfig",
    "AugmentationConfig",
    "AutoAugment",
    "BackboneConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Compile",
    "ComputeConfig",
    "DataConfig",
    "Device",
    "EvaluateConfig",
    "EvaluationConfig",
    "ExportConfig",
    "ExportFileConfig",
    "ExportFormat",
    "ExtractionConfig",
    "ExtractorsConfig",
    "FeatureCacheConfig",
    "FeaturesAt",
    "FeaturesConfig",
    "Flag",
    "Head",
    "HeadSize",
    "InferenceConfig",
    "InspectConfig",
    "InspectionConfig",
    "JournalConfig",
    "Launcher",
    "LookConfig",
    "LookupConfig",
    "LoopConfig",
    "MixingConfig",
    "ModelConfig",
    "ModelPreprocessing",
    "NetworksConfig",
    "OptimizerConfig",
    "PageConfig",
    "ParallelConfig",
    "PathsConfig",
    "PicturesConfig",
    "PrecisionName",
    "PredictConfig",
    "PredictionConfig",
    "PreprocessConfig",
    "ProbeConfig",
    "ReplayConfig",
    "ReportConfig",
    "RunConfig",
    "RuntimeConfig",
    "SavedModelConfig",
    "SelectBy",
    "Setting",
    "SweepConfig",
    "SweepJobConfig",
    "TableConfig",
    "TrackingConfig",
    "TrainConfig",
    "VisualizeConfig",
    "VisualizeJobConfig",
    "cache_folder",
    "check",
    "check_groups",
    "check_inspect",
    "check_preprocess",
    "check_probe",
    "check_registration",
    "check_sweep",
    "check_values",
    "dashed",
    "fields_of",
    "flat",
    "from_dict",
    "groups_of",
    "learning_settings",
    "part_of",
    "plain_type",
    "replace",
    "require_outside",
    "settings_of",
    "storage_root",
    "to_dict",
]
