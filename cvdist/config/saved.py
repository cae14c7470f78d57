"""The settings of jobs that use trained models: which model, and how it is run over pictures."""

from __future__ import annotations

from dataclasses import dataclass

from cvdist.config.bounds import AnswerSeconds, CountOrZero, Fraction, ResizeOrEmpty, Seconds
from cvdist.config.groups import (
    ComputeConfig,
    Device,
    ModelPreprocessing,
    PicturesConfig,
    PrecisionName,
    RunConfig,
    RuntimeConfig,
    TrackingConfig,
)


@dataclass(frozen=True)
class LookupConfig:
    """Where runs are searched by their names."""

    tracking_uri: str = TrackingConfig.uri
    """Of the MLflow store. Empty: $MLFLOW_TRACKING_URI, else sqlite in the storage folder."""
    experiment: str = TrackingConfig.experiment
    """MLflow experiment that runs are looked for in by their names."""
    storage: str = RunConfig.storage
    """Folder of the runs, which by default holds the MLflow store. Empty: $CVDIST_STORAGE, else ./runs."""
    tracking_timeout: AnswerSeconds = TrackingConfig.timeout
    """Seconds that the MLflow server may take to answer at the start."""


@dataclass(frozen=True)
class SavedModelConfig(LookupConfig):
    """Which trained model is used: what evaluation, prediction and visualization have in common."""

    source: str = ""
    """The model: an MLflow run's name or id; a registered model, `models:/NAME/VERSION` or
    `models:/NAME@ALIAS`; a checkpoint's folder or URI, or that of a run's checkpoints, of which the best is
    taken; torchvision's weights, `vgg16:IMAGENET1K_V1`; or a state dict's file or URI, with `--model` and
    `--weights-preprocessing`."""
    model: str = ""
    """Architecture of a state dict's file: a name in the registry, such as `vgg16`."""
    weights_preprocessing: ModelPreprocessing = ""
    """Normalization that a state dict's file was trained with, as in training."""


@dataclass(frozen=True)
class InferenceConfig:
    """How a trained model is run over pictures."""

    device: Device = RuntimeConfig.device
    """`auto`: a GPU where there is one."""
    precision: PrecisionName = ComputeConfig.precision
    """`auto`: as in the model's run where that is known; else bfloat16 autocast where the processor computes
    it natively."""
    channels_last: bool = ComputeConfig.channels_last
    """Memory layout NHWC, which convolutions are fastest with."""
    resize: ResizeOrEmpty = ""
    """How photographs are brought to the model's size, as in training. Empty: as for the model's run."""
    max_bad_fraction: Fraction = PicturesConfig.max_bad_fraction
    """Share of the pictures that may be undecodable. They are left out and listed in `quarantine.csv`."""
    decode_workers: CountOrZero = PicturesConfig.decode_workers
    """Processes or threads that decode pictures. 0: one for each CPU core."""
    data_timeout: Seconds = RuntimeConfig.data_timeout
    """Seconds that a batch may take to be read and decoded."""
