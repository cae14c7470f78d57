"""Every setting of a training job, with its one default.

A recipe (`cvdist.recipes`) is a function that returns a `TrainConfig`; the command line overrides single
fields of it by their flat names (`--lr`, `--batch-size`, ...), so a field name is unique over all groups.
This module imports neither torch nor ray nor mlflow: reading a command line costs milliseconds.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cvdist.errors import UserError

Precision = Literal["auto", "float32", "tf32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
Runtime = Literal["auto", "ray", "torchrun", "inline"]
ModelPreprocessing = Literal["", "imagenet", "vgg-features"]
Head = Literal["vgg", "mlp", "linear"]
Compile = Literal["none", "default", "reduce-overhead", "max-autotune"]
CUDA_GRAPHS: tuple[Compile, ...] = ("reduce-overhead", "max-autotune")  # modes that replay kernels on a GPU


@dataclass(frozen=True)
class DataConfig:
    """What is learned from."""

    dataset: Literal["digits", "mnist", "images"] = "digits"
    """`digits`: 5,000 real MNIST digits that come with a package, no network needed. `mnist`: all 70,000.
    `images`: the folder of pictures in `--data`."""
    data: str = ""
    """Folder of the data set; `mnist` is downloaded into it when absent. For `images` a folder or URI (s3://,
    gs://, file://) of `{train,valid}/CLASS/picture.jpg`, or of `CLASS/picture.jpg`, which is split by
    `--valid-fraction`. Empty: `<storage>/data`."""
    image_size: int = 224
    """Height and width, in pixels, that photographs are resized to."""
    resize: Literal["squash", "crop"] = "squash"
    """`squash`: whole pictures, without regard to their proportions, as in the book. `crop`: the middle of
    them, in proportion, as torchvision's weights were evaluated."""
    max_bad_images: float = 0.001
    """Share of the pictures that may be undecodable. They are left out and listed in `quarantine.csv`."""
    cache: str = ""
    """Folder on each node for its decoded pictures, best on a fast local disk. Empty: $CVDIST_CACHE, else
    ~/.cache/cvdist."""
    cache_share: float = 0.8
    """Share of that disk's free space that decoded pictures may take. If they need more, they are decoded
    anew in each epoch."""
    decode_workers: int = 0
    """Processes on each node that decode pictures. 0: one for each CPU core."""
    valid_fraction: float = 0.2
    """Share held back for validation, stratified by class, where a data set has no split of its own."""
    split_seed: int = 0
    """Seed of that split: apart from `--seed`, so that repeats with other seeds validate on the same data."""
    horizontal_flip: float = 0.0
    """Training only: probability that a picture is mirrored."""
    rotation: float = 0.0
    """Training only: each picture is turned by up to this many degrees to either side."""
    translation: float = 0.0
    """Training only: each picture is moved by up to this fraction of its width and height."""
    random_resized_crop: float = 1.0
    """Training only: a random part of each picture, with at least this share of its area and sides of 3:4 to
    4:3, is enlarged to the whole. 1: no crops."""
    color_jitter: float = 0.0
    """Training only: brightness, contrast and saturation each change by up to this factor."""


@dataclass(frozen=True)
class FeaturesConfig:
    """The feature cache: what the frozen layers make of the pictures, computed once and kept in storage."""

    features: str = ""
    """Folder or URI (s3://, gs://, file://) of the cache: `jobs/preprocess.py` makes it, `jobs/train.py` trains
    from it. Empty: none."""
    views: int = 0
    """How many views of each training picture are stored: the first as it is, the others augmented (mirrored by
    half and turned by up to 10 degrees, if nothing else is named); each epoch draws one of them. 0: to store, 4
    with augmentation, else 1; to train from, as many as the cache has."""
    features_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """What features are stored as."""
    decoder: Literal["cpu", "nvjpeg"] = "cpu"
    """What decodes ordinary JPEGs for an extraction. `nvjpeg`: the GPU, where processors can't keep up
    with it; its pixels differ a little, so that one of them makes and updates a cache."""
    shard_size: int = 128
    """Pictures a shard: the unit of work, of retry and of resume."""
    extractors: int = 0
    """Ray actors that compute features. 0: one a GPU or, without GPUs, one for each --cpus-per-worker cores."""
    replace: bool = False
    """Replace a cache that was made with other weights or settings."""
    local_cache_gb: float = 0.0
    """Gigabytes that a node's copy of the shards may take, in --cache. 0: --cache-share of that disk's free
    space. Less than the whole cache: shards come and go, and are shuffled by window."""
    shuffle_window: int = 16
    """Shards that are shuffled together where the cache does not fit the node."""
    fetch_threads: int = 8
    """Shards that each worker fetches at a time."""
    features_on_device: bool = True
    """Keep the features in GPU memory where they take less than half of what is free there."""
    ridge_probe: bool = True
    """Before training, fit a linear classifier to the features' channel means and maxima in closed form: the
    baseline, for one more pass over the cache."""


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    model: str = "scratch-cnn"
    """Name in the registry (`cvdist.models`)."""
    head: Head = "vgg"
    """What is trained on a pretrained model's convolutions. `vgg`: its own two hidden layers. `mlp`: one hidden
    layer on each channel's mean. `linear`: a linear probe on all positions. One feature cache serves all."""
    hidden_size: int = 0
    """Units of the head's hidden layers. 0: 4,096 for `vgg`, 256 for `mlp`; `linear` has none."""
    dropout: float = 0.5
    """Probability that an activation is dropped in training; the `linear` head has no dropout."""
    weights: str = ""
    """Pretrained weights to go on from: torchvision's name (`IMAGENET1K_V1`; for vgg16 also
    `IMAGENET1K_FEATURES`, convolutions only), or a state dict's file or URI. Empty or `none`: random ones."""
    weights_preprocessing: ModelPreprocessing = ""
    """Normalisation that the file in `--weights` was trained with: that of torchvision's `IMAGENET1K_V1` or of
    its `IMAGENET1K_FEATURES`. torchvision's names bring their own."""
    trainable_blocks: int = 0
    """How many of a pretrained model's convolution blocks are trained, counted from the last; the others stay
    as they are."""
    backbone_lr_scale: float = 1.0
    """Learning rate of those blocks as a multiple of `--lr`."""

    @property
    def has_weights(self) -> bool:
        """Whether pretrained weights are named."""
        return self.weights not in ("", "none")


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights move. The book's values: SGD, lr 0.01, momentum 0.5."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd` (with `--momentum`) or `adamw`."""
    lr: float = 0.01
    """Peak learning rate."""
    momentum: float = 0.5
    """Of SGD."""
    nesterov: bool = False
    """Nesterov's form of SGD's momentum."""
    weight_decay: float = 0.0
    """L2 penalty for `sgd`, decoupled decay for `adamw`; biases and norms are left out."""
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    """What the learning rate does after warm-up."""
    lr_warmup_epochs: float = 0.0
    """Epochs (fractions allowed) in which the learning rate grows linearly to its peak."""
    label_smoothing: float = 0.0
    """Share of each target spread evenly over all classes, in training only."""
    clip_grad_norm: float = 0.0
    """Largest L2 norm of all gradients together. 0: no clipping."""
    model_ema_decay: float = 0.0
    """Decay a step of the weights' exponential moving average, which is then what is validated and logged.
    0: none."""


@dataclass(frozen=True)
class LoopConfig:
    """How long, in which portions and with which arithmetic."""

    epochs: int = 20
    """Passes over the training data."""
    batch_size: int = 32
    """Pictures a step, over all workers together: the learning rate need not change with their number."""
    accumulate_steps: int = 1
    """Each worker computes its share of a batch in this many portions. Saves memory, same gradients."""
    valid_batch_size: int = 1000
    """Pictures a forward pass in validation, on each worker."""
    precision: Precision = "auto"
    """`auto`: bfloat16 autocast where the processor computes it natively, else float32. `tf32`: float32 whose
    products GPUs compute from 19 bits: weights are read as they are, not cast in each step. CPUs: float32."""
    channels_last: bool = True
    """Memory layout NHWC, which convolutions are fastest with."""
    compile: Compile = "none"
    """Run the model through `torch.compile` (needs a C++ compiler on CPUs); `--compile` alone is `default`.
    `reduce-overhead`: replay CUDA graphs, for small heads on GPUs. `max-autotune`: also try out kernels."""
    seed: int = 0
    """Of weights, order, augmentation and dropout."""
    log_every_steps: int = 50
    """Steps between two points of the `step/` metrics."""


@dataclass(frozen=True)
class ParallelConfig:
    """How a step is divided over the workers."""

    parallel: Literal["auto", "data", "head"] = "auto"
    """`data`: each worker has all of the model and a share of the batch; gradients are averaged. `head`: the
    first two linear layers of the classifier are split over the workers, which exchange activations instead.
    `auto`: what a model of both costs says is faster, on the measured link and a few steps."""
    gradient_compression: Literal["none", "bf16", "powersgd"] = "none"
    """What gradients are averaged as. `bf16`: half the bytes. `powersgd`: approximated by matrices of a low
    rank, few bytes; the losses differ."""
    powersgd_rank: int = 4
    """Of those matrices."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What survives a crash, and where."""

    name: str = ""
    """Name of the run. A name that exists is continued from its last checkpoint. Empty: a new name."""
    storage: str = ""
    """Folder or URI (s3://bucket/path) that holds each run's checkpoints and, by default, the MLflow store.
    Empty: $CVDIST_STORAGE, else ./runs."""
    checkpoint_every: int = 0
    """Steps between checkpoints inside an epoch. 0: at each epoch's end only."""
    keep_checkpoints: int = 2
    """How many of the best checkpoints are kept, besides the latest."""
    resume: str = ""
    """Folder or URI of one checkpoint to start a new run from."""
    async_checkpoints: bool = True
    """Write and upload checkpoints while training goes on, from a copy in main memory."""
    checkpoint_timeout: float = 600.0
    """Seconds that a checkpoint may take to be stored: the next one, or the run's end, waits that long."""
    grace_period: float = 25.0
    """Seconds in which a job that gets SIGTERM ends after a last checkpoint (torchrun waits 30, and Kubernetes
    unless told otherwise), and before a preempted node's deadline in which the last checkpoint is begun."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Where it runs."""

    runtime: Runtime = "auto"
    """`auto`: torchrun's environment if started by it, else Ray. `inline`: in this process, one worker."""
    workers: int | str = 2
    """Ray workers, one process each. `2:8`: as many as the cluster has room for at any time, from 2 to 8.
    (torchrun's own --nproc-per-node counts instead, under torchrun.)"""
    resize_interval: float = 60.0
    """Seconds between two looks whether there is room for more workers, where their number is a range."""
    device: Device = "auto"
    """`auto`: GPUs where every worker can have one, else CPUs."""
    cpus_per_worker: int = 1
    """CPU cores that Ray reserves for each worker."""
    max_failures: int = 3
    """How often Ray restarts the workers from the last checkpoint before it gives up."""
    max_preemptions: int = -1
    """The same for nodes that were preempted, which count apart. -1: without end."""
    connect_timeout: float = 10.0
    """Seconds that the cluster at $RAY_ADDRESS may take to answer."""
    resource_timeout: float = 0.0
    """Seconds to wait for the cluster to have the CPUs and GPUs asked for (an autoscaler adds nodes). 0: fail
    at once."""
    start_timeout: float = 300.0
    """Seconds that the worker processes may take to start."""
    prepare_timeout: float = 3600.0
    """Seconds that a node may take to download weights, and to download or decode its data."""
    data_timeout: float = 120.0
    """Seconds that a batch may take to be read and decoded before the worker fails."""
    collective_timeout: float = 300.0
    """Seconds that one worker waits for the others before it fails, until the first step is done."""
    step_timeout: float = 150.0
    """The same from the second step on. Not below --data-timeout: one of the others may wait for its data."""

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers.

        Raises:
            UserError: if `workers` is neither a number nor a range.
        """
        found = re.fullmatch(r"(\d+)(?::(\d+))?", str(self.workers))
        if found is None:
            raise UserError(
                f"--workers is {self.workers}: it takes a number, or the fewest and the most as in 2:8"
            )
        fewest = int(found[1])
        most = int(found[2] or fewest)
        if not 1 <= fewest <= most:
            raise UserError(f"--workers is {self.workers}: it takes 1 or more, the fewest before the most")
        return fewest, most


@dataclass(frozen=True)
class TrackingConfig:
    """Where the results are shown."""

    tracking: Literal["required", "optional", "none"] = "required"
    """`optional`: train without MLflow if it can't be reached at the start. `none`: do not use it at all."""
    tracking_uri: str = ""
    """Of the MLflow store. Empty: $MLFLOW_TRACKING_URI, else sqlite in the storage folder."""
    experiment: str = "cvdist"
    """MLflow experiment."""
    system_metrics: bool = True
    """Log CPU, memory, disk, network and GPU use of every node."""
    log_model: bool = True
    """Log the best model, ready to load and to serve."""
    register: str = ""
    """Register the best model in MLflow under this name."""
    alias: str = "candidate"
    """Alias that the registered version gets, in place of the one that had it."""
    tracking_timeout: float = 10.0
    """Seconds that the MLflow server may take to answer at the start."""
    tracking_patience: float = 120.0
    """Seconds that a finished job waits for an MLflow server that is away. What is left stays in a journal."""


@dataclass(frozen=True)
class VisualizeConfig:
    """What a run shows of what the network has learned; all of it needs `--tracking`."""

    visualize: bool = True
    """Show filters, activations, the most exciting pictures and Grad-CAM among the run's figures."""
    visualize_layers: str = ""
    """Convolutions to look into, separated by commas: names, numbers, `first` to `tenth`, `last` or `all`.
    Empty: the first, the fifth and the last."""
    visualize_every: int = 0
    """Epochs between two pictures of the first layer's filters, where that layer is trained. 0: about five
    pictures over the run."""
    visualize_pictures: int = 128
    """Validation pictures, at most, that are run through the network at the end, for activations, exciting
    pictures and Grad-CAM. 0: none, filters only."""


@dataclass(frozen=True)
class LookConfig:
    """What `jobs/visualize.py` looks at."""

    data: str = ""
    """A picture, or a folder or URI of pictures; of `{train,valid}/CLASS/picture.jpg` the validation part.
    Empty: what the model's run was validated with, where that can be reached."""
    layers: str = ""
    """As `--visualize-layers`: convolutions by name or number, or `first`, `fifth`, `last`, `all`."""
    pictures: int = 1
    """Pictures whose activations are drawn."""
    most_pictures: int = 500
    """Pictures, at most, that are run through the network for exciting pictures and Grad-CAM."""
    channels: Literal["strongest", "mean"] = "strongest"
    """What is shown of filters on many channels: the strongest of them, or their mean."""
    output: str = ""
    """Folder or URI that the figures are written to. Empty: the artifacts of the model's run or, without one,
    the folder `figures`."""
    device: Device = "auto"
    """`auto`: a GPU where there is one."""


@dataclass(frozen=True)
class SavedModelConfig:
    """Which trained model is used: what evaluation, prediction and visualisation have in common."""

    source: str = ""
    """The model: an MLflow run's name or id; a registered model, `models:/NAME/VERSION` or
    `models:/NAME@ALIAS`; a checkpoint's folder or URI, or that of a run's checkpoints, of which the best is
    taken; torchvision's weights, `vgg16:IMAGENET1K_V1`; or a state dict's file or URI, with `--model` and
    `--weights-preprocessing`."""
    model: str = ""
    """Architecture of a state dict's file: a name in the registry, such as `vgg16`."""
    weights_preprocessing: ModelPreprocessing = ""
    """Normalisation that a state dict's file was trained with, as in training."""
    tracking_uri: str = TrackingConfig.tracking_uri
    """Of the MLflow store. Empty: $MLFLOW_TRACKING_URI, else sqlite in the storage folder."""
    experiment: str = TrackingConfig.experiment
    """MLflow experiment that runs are looked for in by their names."""
    storage: str = CheckpointConfig.storage
    """Folder of the runs, which by default holds the MLflow store. Empty: $CVDIST_STORAGE, else ./runs."""
    tracking_timeout: float = TrackingConfig.tracking_timeout
    """Seconds that the MLflow server may take to answer at the start."""


@dataclass(frozen=True)
class VisualizeJobConfig:
    """One visualisation."""

    saved: SavedModelConfig = field(default_factory=SavedModelConfig)
    look: LookConfig = field(default_factory=LookConfig)


@dataclass(frozen=True)
class InferenceConfig:
    """How a trained model is run over pictures."""

    device: Device = RuntimeConfig.device
    """`auto`: a GPU where there is one."""
    precision: Precision = LoopConfig.precision
    """`auto`: as in the model's run where that is known; else bfloat16 autocast where the processor computes
    it natively."""
    channels_last: bool = LoopConfig.channels_last
    """Memory layout NHWC, which convolutions are fastest with."""
    resize: Literal["", "squash", "crop"] = ""
    """How photographs are brought to the model's size, as in training. Empty: as for the model's run."""
    max_bad_images: float = DataConfig.max_bad_images
    """Share of the pictures that may be undecodable. They are left out and listed in `quarantine.csv`."""
    decode_workers: int = DataConfig.decode_workers
    """Processes or threads that decode pictures. 0: one for each CPU core."""
    data_timeout: float = RuntimeConfig.data_timeout
    """Seconds that a batch may take to be read and decoded."""


@dataclass(frozen=True)
class PredictionConfig:
    """Which pictures are classified, by whom, and where the results go."""

    data: str = ""
    """Folder or URI (s3://, gs://, file://) of the pictures, in any folders below it."""
    output: str = ""
    """Folder or URI for the results. The same command again computes only what is missing or has changed."""
    replace: bool = False
    """Replace results of another model, other settings or other pictures."""
    slice_size: int = 512
    """Pictures a file of results, about: the unit of work, of retry and of resume."""
    runtime: Literal["ray", "inline"] = "ray"
    """`inline`: in this process, without Ray."""
    predictors: int = 0
    """Ray actors. 0: one a GPU or, without GPUs, one for each --cpus-per-worker cores."""
    cpus_per_worker: int = RuntimeConfig.cpus_per_worker
    """CPU cores that Ray reserves for each actor."""
    connect_timeout: float = RuntimeConfig.connect_timeout
    """Seconds that the cluster at $RAY_ADDRESS may take to answer."""
    resource_timeout: float = RuntimeConfig.resource_timeout
    """Seconds to wait for the cluster to have the CPUs and GPUs asked for. 0: fail at once."""


@dataclass(frozen=True)
class PredictConfig:
    """One job of `jobs/predict.py`."""

    saved: SavedModelConfig = field(default_factory=SavedModelConfig)
    prediction: PredictionConfig = field(default_factory=PredictionConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)


@dataclass(frozen=True)
class EvaluationConfig:
    """What a trained model is measured on, against what, and where the results go."""

    data: str = ""
    """Folder or URI of pictures, `CLASS/picture.jpg` or `{train,valid}/CLASS/picture.jpg`. Empty: what the
    model's run was trained on."""
    dataset: Literal["", "digits", "mnist", "images"] = ""
    """As in training. Empty: `images` with --data, else that of the model's run."""
    part: Literal["", "valid", "train", "all"] = ""
    """Which of the pictures, split as in training. Empty: those to validate on; all of them in a --data that
    has no such division and is not what the model was trained on."""
    compare: str = ""
    """A second model, named as the first: both see the same pictures."""
    calibration_bins: int = 15
    """Bins of confidence that the calibration error is computed over, of equal width."""
    output: str = ""
    """File or URI that the results are written to, as JSON."""
    tracking: Literal["required", "optional", "none"] = TrackingConfig.tracking
    """`none`: leave out the MLflow run that holds the results. `optional`: if MLflow can't be reached."""
    register: str = ""
    """Register the evaluated model in MLflow under this name."""
    alias: str = "champion"
    """Alias that the registered version gets, in place of the one that had it."""
    cache: str = DataConfig.cache
    """As in training: for pictures that have no division into training and validation."""
    prepare_timeout: float = RuntimeConfig.prepare_timeout
    """Seconds that downloading the data, or decoding it for such a division, may take."""


@dataclass(frozen=True)
class EvaluateConfig:
    """One job of `jobs/evaluate.py`."""

    saved: SavedModelConfig = field(default_factory=SavedModelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)


@dataclass(frozen=True)
class TrainConfig:
    """One training job, whole. `recipe` names the function in `cvdist.recipes` that it began from."""

    recipe: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    visualize: VisualizeConfig = field(default_factory=VisualizeConfig)


@dataclass(frozen=True)
class SweepConfig:
    """Which settings a sweep tries, for how long, and what becomes of the best."""

    trials: int = 20
    """Settings to try. The first ones stay the same when a sweep goes on with more."""
    search: tuple[str, ...] = ()
    """What is searched, as `FLAG=RANGE` without the flag's hyphens: `lr=1e-5:1e-2:log` (from, to, evenly by
    orders of magnitude), `dropout=0:0.7` (evenly), `head=vgg,mlp` (one of these). Empty: learning rate, weight
    decay and dropout around the recipe's, and the head where the model has a choice."""
    sweep_seed: int = 0
    """Which points of the ranges are tried. `--seed`, of the training, is the same for all trials."""
    trial_epochs: int = 0
    """Epochs of a trial that is not stopped. The learning rate follows `--epochs`, to which the best trial is
    trained on. 0: all of `--epochs`."""
    early_stopping: bool = True
    """Stop trials that fall behind (ASHA, Li et al., "A System for Massively Parallel Hyperparameter Tuning",
    2020)."""
    grace_epochs: int = 1
    """Epochs that every trial is trained for, before it may be stopped."""
    reduction_factor: float = 3.0
    """One of so many trials goes on after `--grace-epochs`, and again after this multiple of them, and so
    forth."""
    concurrent_trials: int = 0
    """Trials that run side by side, each with `--cpus-per-worker` cores. 0: as many as there is room for."""
    gpus_per_trial: float = 1.0
    """GPUs of each trial, where there are any. 0.25: four trials share one."""
    train_best: bool = True
    """Train the best trial on, to all of `--epochs`, as a run of its own with figures, a model and a report."""


@dataclass(frozen=True)
class SweepJobConfig:
    """One job of `jobs/sweep.py`: `train` holds what all trials have in common."""

    train: TrainConfig = field(default_factory=TrainConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)


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
    tracking_timeout: float = TrackingConfig.tracking_timeout
    """Seconds that the MLflow server may take to answer at the start."""


GROUPS: dict[str, type] = {
    "data": DataConfig,
    "features": FeaturesConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "loop": LoopConfig,
    "parallel": ParallelConfig,
    "checkpoint": CheckpointConfig,
    "runtime": RuntimeConfig,
    "tracking": TrackingConfig,
    "visualize": VisualizeConfig,
}


def replace(config: TrainConfig, **changes: Any) -> TrainConfig:
    """Copy of `config` with fields changed by their flat names, e.g. `replace(c, lr=0.1, epochs=3)`.

    Raises:
        TypeError: for a name that no group has.
    """
    groups = {}
    for name, cls in GROUPS.items():
        mine = {f.name: changes.pop(f.name) for f in dataclasses.fields(cls) if f.name in changes}
        if mine:
            groups[name] = dataclasses.replace(getattr(config, name), **mine)
    if "recipe" in changes:
        groups["recipe"] = changes.pop("recipe")
    if changes:
        raise TypeError(f"no such fields: {', '.join(changes)}")
    return dataclasses.replace(config, **groups)


def flat(config: TrainConfig) -> Iterator[tuple[str, Any]]:
    """Each field as (`group.name`, value), in the order of their definition."""
    yield "recipe", config.recipe
    for group in GROUPS:
        for name, value in dataclasses.asdict(getattr(config, group)).items():
            yield f"{group}.{name}", value


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain nested dictionary, for JSON and for Ray's `train_loop_config`."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """Inverse of `to_dict`."""
    groups = {name: cls(**values[name]) for name, cls in GROUPS.items()}
    return TrainConfig(recipe=values["recipe"], **groups)


_AT_LEAST = {
    "epochs": 1,
    "batch_size": 1,
    "accumulate_steps": 1,
    "valid_batch_size": 1,
    "log_every_steps": 1,
    "checkpoint_every": 0,
    "keep_checkpoints": 1,
    "powersgd_rank": 1,
    "cpus_per_worker": 1,
    "backbone_lr_scale": 0,
    "hidden_size": 0,
    "max_failures": 0,
    "lr": 0,
    "weight_decay": 0,
    "lr_warmup_epochs": 0,
    "clip_grad_norm": 0,
    "rotation": 0,
    "image_size": 8,
    "decode_workers": 0,
    "views": 0,
    "shard_size": 1,
    "extractors": 0,
    "local_cache_gb": 0,
    "shuffle_window": 1,
    "fetch_threads": 1,
    "prepare_timeout": 1,
    "data_timeout": 1,
    "connect_timeout": 0.1,
    "resource_timeout": 0,
    "start_timeout": 1,
    "collective_timeout": 1,
    "tracking_timeout": 0.1,
    "visualize_every": 0,
    "visualize_pictures": 0,
    "pictures": 0,
    "most_pictures": 1,
    "slice_size": 1,
    "predictors": 0,
    "calibration_bins": 1,
    "step_timeout": 1,
    "resize_interval": 1,
    "checkpoint_timeout": 1,
    "grace_period": 1,
    "max_preemptions": -1,
    "tracking_patience": 0,
    "trials": 1,
    "trial_epochs": 0,
    "grace_epochs": 1,
    "concurrent_trials": 0,
}
# (lowest, highest, whether the highest itself is allowed)
_BETWEEN: dict[str, tuple[float, float, bool]] = {
    "momentum": (0, 1, False),
    "label_smoothing": (0, 1, False),
    "model_ema_decay": (0, 1, False),
    "dropout": (0, 1, False),
    "trainable_blocks": (0, 5, True),
    "horizontal_flip": (0, 1, True),
    "translation": (0, 1, True),
    "color_jitter": (0, 1, True),
    "max_bad_images": (0, 1, True),
    "cache_share": (0, 1, True),
}


def check_registration(name: str, alias: str) -> None:
    """Refuse what MLflow's registry would refuse, before anything is computed.

    Raises:
        UserError: naming the flag.
    """
    if not re.fullmatch(r"[^/:@%'\"\s]{1,250}", name):
        raise UserError(f"--register {name!r}: a name has no slashes, colons, at signs, quotes or spaces")
    if not re.fullmatch(r"[A-Za-z][\w-]{0,99}", alias) or alias == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise UserError(
            f"--alias {alias!r}: an alias is letters, digits, hyphens, underscores; `latest` and `v1` are taken"
        )


def check_groups(settings: Any) -> None:
    """Refuse values that no job can work with; `settings`: a dataclass of groups.

    Raises:
        UserError: one line that names the flag and what it takes.
    """
    for group in dataclasses.asdict(settings).values():
        for name, value in group.items():
            _check_value(name, value)


def _check_value(name: str, value: Any) -> None:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{flag} is {value}: it takes a finite number")
    if name in _AT_LEAST and value < _AT_LEAST[name]:
        raise UserError(f"{flag} is {value}: it takes {_AT_LEAST[name]} or more")
    if name in _BETWEEN:
        low, high, closed = _BETWEEN[name]
        if value < low or value > high or (value == high and not closed):
            bracket = "]" if closed else ")"
            raise UserError(f"{flag} is {value}: it takes a number in [{low}, {high}{bracket}")


def check(config: TrainConfig) -> None:
    """Refuse values that no run can work with, before anything is started.

    Raises:
        UserError: one line that names the flag and what it takes.
    """
    for path, value in flat(config):
        _check_value(path.rpartition(".")[2], value)
    config.runtime.worker_range  # noqa: B018 (raises)
    if not 0 < config.data.valid_fraction < 1:
        raise UserError(f"--valid-fraction is {config.data.valid_fraction}: it takes a number in (0, 1)")
    if not 0 < config.data.random_resized_crop <= 1:
        raise UserError(
            f"--random-resized-crop is {config.data.random_resized_crop}: it takes a number in (0, 1]"
        )
    if config.data.dataset == "images" and not config.data.data and not config.features.features:
        raise UserError(
            "--data is needed: the folder or URI of the pictures, with a folder for each class in it"
        )
    if config.features.features and config.data.dataset != "images":
        raise UserError(f"--features is for folders of pictures, not for --dataset {config.data.dataset}")
    if config.runtime.step_timeout < config.runtime.data_timeout:
        raise UserError(
            f"--step-timeout {config.runtime.step_timeout:g} is below --data-timeout "
            f"{config.runtime.data_timeout:g}: workers would give up on one that waits for its data"
        )
    if config.loop.compile in CUDA_GRAPHS and config.loop.accumulate_steps > 1:
        raise UserError(
            f"--compile {config.loop.compile} replays each forward pass on the same memory, so that gradients "
            "can't be summed over --accumulate-steps: set that to 1, or --compile default"
        )
    if config.optimizer.nesterov and config.optimizer.momentum == 0:
        raise UserError("--nesterov needs a --momentum above 0")
    if config.tracking.register:
        if config.tracking.tracking == "none" or not config.tracking.log_model:
            lacks = "--tracking none" if config.tracking.tracking == "none" else "--no-log-model"
            raise UserError(f"--register needs a model that MLflow has, and {lacks} logs none: leave it out")
        check_registration(config.tracking.register, config.tracking.alias)
    if config.checkpoint.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", config.checkpoint.name):
        raise UserError(
            f"--name {config.checkpoint.name!r}: a name is 1 to 128 letters, digits, dots, hyphens, underscores"
        )


def check_sweep(job: SweepJobConfig) -> None:
    """The same for a sweep, without the settings that it searches.

    Raises:
        UserError: as `check`.
    """
    check(job.train)
    sweep, epochs = job.sweep, job.train.loop.epochs
    for name, value in dataclasses.asdict(sweep).items():
        _check_value(name, value)
    if sweep.trial_epochs > epochs:
        raise UserError(
            f"--trial-epochs {sweep.trial_epochs} is above --epochs {epochs}: a trial is the beginning of a "
            "training of --epochs"
        )
    if sweep.grace_epochs > (most := sweep.trial_epochs or epochs):
        flag = "--trial-epochs" if sweep.trial_epochs else "--epochs"
        raise UserError(f"--grace-epochs {sweep.grace_epochs} is above {flag} {most}: lower it")
    if sweep.reduction_factor < 1.1:
        raise UserError(f"--reduction-factor is {sweep.reduction_factor:g}: it takes 1.1 or more")
    if sweep.gpus_per_trial <= 0:
        raise UserError(f"--gpus-per-trial is {sweep.gpus_per_trial:g}: it takes a number above 0")
    if job.train.runtime.runtime not in ("auto", "ray"):
        raise UserError(f"--runtime {job.train.runtime.runtime}: sweeps run on Ray, leave it out")
    if job.train.checkpoint.resume:
        raise UserError("--resume is for one training: a sweep goes on under its --name")
    if job.train.tracking.register and not sweep.train_best:
        raise UserError("--register takes the best trial trained on: leave out --no-train-best")


def storage_root(config: TrainConfig) -> str:
    """Folder (absolute) or URI under which every run keeps its files.

    A job submitted with `ray job submit --working-dir` runs in a copy of that folder, which Ray deletes
    afterwards; there the default is in the home folder instead.
    """
    root = config.checkpoint.storage or os.environ.get("CVDIST_STORAGE", "")
    if not root:
        in_ray_copy = "_ray_pkg_" in str(Path.cwd())
        root = str(Path.home() / "cvdist-runs") if in_ray_copy else "runs"
    if "://" in root:
        return root.rstrip("/")
    return str(Path(root).expanduser().resolve())


def cache_folder(config: TrainConfig) -> Path:
    """Folder (absolute) for what a node keeps of its data between runs."""
    named = config.data.cache or os.environ.get("CVDIST_CACHE", "")
    return Path(named or "~/.cache/cvdist").expanduser().resolve()
