"""The settings of jobs that use runs and trained models: which of them, and what is done with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cvdist.config.bounds import AnswerSeconds, Count, CountOrZero, Fraction, ResizeOrEmpty, Seconds
from cvdist.config.groups import (
    ActorsConfig,
    ComputeConfig,
    DataConfig,
    Device,
    ModelPreprocessing,
    PathsConfig,
    PicturesConfig,
    PrecisionName,
    RunConfig,
    RuntimeConfig,
    TableConfig,
    TrackingConfig,
    TrackingMode,
)

ExportFormat = Literal["onnx", "pt2", "safetensors"]


@dataclass(frozen=True)
class LookupConfig:
    """Where runs are searched by their names."""

    tracking_uri: str = TrackingConfig.uri
    """Address of the MLflow store. Empty: $MLFLOW_TRACKING_URI, else sqlite in the storage folder."""
    experiment: str = TrackingConfig.experiment
    """Name of the MLflow experiment in which runs are looked for by their names."""
    storage: str = RunConfig.storage
    """Folder of the runs, which by default holds the MLflow store. Empty: $CVDIST_STORAGE, else ./runs."""
    tracking_timeout: AnswerSeconds = TrackingConfig.timeout
    """Seconds that the MLflow server may take to answer at the start."""

    def tracking(self, mode: TrackingMode) -> TrackingConfig:
        """Return the settings by which results are logged to the same store."""
        return TrackingConfig(
            mode=mode, uri=self.tracking_uri, experiment=self.experiment, timeout=self.tracking_timeout
        )


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
    """Normalization that a state dict's file was trained with; same values as in training."""


@dataclass(frozen=True)
class InferenceConfig:
    """How a trained model is run over pictures."""

    device: Device = RuntimeConfig.device
    """`auto`: a GPU where there is one."""
    precision: PrecisionName = ComputeConfig.precision
    """`auto`: the precision of the model's run where that is known; else bfloat16 autocast where the processor
    computes it natively."""
    channels_last: bool = ComputeConfig.channels_last
    """Memory layout NHWC, which convolutions are fastest with."""
    resize: ResizeOrEmpty = ""
    """How photographs are brought to the model's size; same values as in training. Empty: as in the model's
    run."""
    max_bad_fraction: Fraction = PicturesConfig.max_bad_fraction
    """Share of the pictures that may be undecodable. They are left out and listed in `quarantine.csv`."""
    decode_workers: CountOrZero = PicturesConfig.decode_workers
    """Processes or threads that decode pictures. 0: one for each CPU core."""
    data_timeout: Seconds = RuntimeConfig.data_timeout
    """Seconds that a batch may take to be read and decoded."""


@dataclass(frozen=True)
class EvaluationConfig(TableConfig):
    """What a trained model is measured on, against what, and where the results go."""

    data: str = ""
    """Folder or URI of pictures, `CLASS/picture.jpg` or `{train,valid}/CLASS/picture.jpg`, or a table of them.
    Empty: what the model's run was trained on."""
    dataset: Literal["", "digits", "mnist", "images"] = ""
    """Data set; same values as in training. Empty: `images` with --data, else that of the model's run."""
    part: Literal["", "valid", "train", "all"] = ""
    """Which of the pictures, split as in training. Empty: those to validate on; all of them if --data has no
    such division and is not what the model was trained on."""
    compare: str = ""
    """A second model, named as the first: both see the same pictures."""
    calibration_bins: Count = 15
    """Bins of confidence that the calibration error is computed over, of equal width."""
    output: str = ""
    """File or URI that the results are written to, as JSON."""
    tracking: TrackingMode = TrackingConfig.mode
    """`none`: make no MLflow run that holds the results. `optional`: make none if MLflow can't be reached."""
    register: str = ""
    """Register the evaluated model in MLflow under this name."""
    alias: str = "champion"
    """Alias that the registered version gets; the version that had it loses it."""
    cache: str = DataConfig.cache
    """Folder on each node for decoded pictures, as in training. Used if the pictures have no division into
    training and validation."""
    prepare_timeout: Seconds = RuntimeConfig.prepare_timeout
    """Seconds that it may take to download the data, or to decode pictures that have no division into training
    and validation."""


@dataclass(frozen=True)
class EvaluateConfig:
    """The settings of an evaluation (`jobs/evaluate.py`)."""

    saved: SavedModelConfig = field(default_factory=SavedModelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)


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
    """About how many pictures a file of results has: the unit of work, of retry and of resume."""
    predictors: CountOrZero = 0
    """Ray actors that predict. 0: one per GPU or, without GPUs, one for each --cpus-per-worker cores."""


@dataclass(frozen=True)
class PredictConfig:
    """The settings of a prediction (`jobs/predict.py`)."""

    saved: SavedModelConfig = field(default_factory=SavedModelConfig)
    prediction: PredictionConfig = field(default_factory=PredictionConfig)
    runtime: ActorsConfig = field(default_factory=ActorsConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)


@dataclass(frozen=True)
class LookConfig(TableConfig):
    """Which pictures and layers are visualized, and where the figures are written."""

    data: str = ""
    """A picture, or a folder or URI of pictures, or a table of them, as in training; where they are split, the
    validation part. Empty: what the model's run was validated with, where that can be reached."""
    layers: str = ""
    """Convolutions to look into, separated by commas: names, numbers, `first` to `tenth`, `last` or `all`.
    Empty: the first, the fifth and the last."""
    pictures: CountOrZero = 1
    """Pictures whose activations are drawn."""
    most_pictures: Count = 500
    """Pictures, at most, that are run through the network for top activations and Grad-CAM."""
    channels: Literal["strongest", "mean"] = "strongest"
    """What is shown of filters on many channels: the strongest channels, or the mean of all."""
    output: str = ""
    """Folder or URI that the figures are written to. Empty: the artifacts of the model's run or, without one,
    the folder `figures`."""
    device: Device = RuntimeConfig.device
    """`auto`: a GPU where there is one."""


@dataclass(frozen=True)
class VisualizeJobConfig:
    """The settings of a visualization (`jobs/visualize.py`)."""

    saved: SavedModelConfig = field(default_factory=SavedModelConfig)
    look: LookConfig = field(default_factory=LookConfig)


@dataclass(frozen=True)
class ExportFileConfig(TableConfig):
    """Which file is written, and the pictures that it is checked with."""

    format: Literal["", "onnx", "pt2", "safetensors"] = ""
    """`onnx`: the network for ONNX Runtime and the like. `pt2`: the network as PyTorch's exported program. Both
    take pixels and give probabilities. `safetensors`: the weights alone, with a JSON beside them.
    Empty: by the ending of --output."""
    output: str = ""
    """File or URI that the model is written to, when it has been found to predict what the model predicts."""
    data: str = ""
    """A picture, or a folder or URI of pictures, or a table of them, as in training: the model and the file
    predict a few of them. Empty: those that the model's run was validated with, where they can be reached, else
    made-up ones."""


@dataclass(frozen=True)
class ExportConfig:
    """The settings of an export (`jobs/export.py`)."""

    saved: SavedModelConfig = field(default_factory=SavedModelConfig)
    export: ExportFileConfig = field(default_factory=ExportFileConfig)


@dataclass(frozen=True)
class PageConfig:
    """Which run's report is made, and where it goes."""

    run: str = ""
    """The run's name or id."""
    output: str = ""
    """File or URI that the page is written to. Empty: the artifact `report.html` of the run."""


@dataclass(frozen=True)
class ReportConfig:
    """The settings of a report (`jobs/report.py`)."""

    page: PageConfig = field(default_factory=PageConfig)
    lookup: LookupConfig = field(default_factory=LookupConfig)


@dataclass(frozen=True)
class JournalConfig:
    """Which journal is delivered."""

    journal: str = ""
    """File or URI of the journal, as the job has named it."""


@dataclass(frozen=True)
class ReplayConfig:
    """The settings of the delivery of a journal (`jobs/replay.py`)."""

    replay: JournalConfig = field(default_factory=JournalConfig)
