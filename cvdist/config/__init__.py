"""Every setting of every job, with its one default and its bounds.

Each job has a dataclass of groups with the settings that it uses. A recipe (`cvdist.recipes`) is a function
that returns a `TrainConfig`; the command line and `replace` override single fields by the names of their flags
(`--lr`, `--batch-size`, ...), so a flag is unique over a job's groups.
This package imports neither torch nor ray nor mlflow: reading a command line costs milliseconds.
"""

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
    FeaturesAt,
    FeaturesConfig,
    Head,
    HeadSize,
    Launcher,
    LoopConfig,
    MixingConfig,
    ModelConfig,
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
)
from cvdist.config.inspect import InspectConfig, check_inspect
from cvdist.config.places import cache_folder, require_outside, storage_root
from cvdist.config.preprocess import PreprocessConfig, check_preprocess
from cvdist.config.probe import NetworksConfig, ProbeConfig, check_probe
from cvdist.config.saved import (
    EvaluateConfig,
    ExportConfig,
    ExportFileConfig,
    ExportFormat,
    InferenceConfig,
    LookConfig,
    LookupConfig,
    PredictConfig,
    PredictionConfig,
    ReplayConfig,
    ReportConfig,
    SavedModelConfig,
    VisualizeJobConfig,
)
from cvdist.config.settings import (
    Setting,
    check_groups,
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
from cvdist.config.sweep import SweepConfig, SweepJobConfig, check_sweep
from cvdist.config.train import TrainConfig, check, check_registration, learning_settings
