"""The groups of settings of a training: its data, its model, how the model is trained, and where.

A group that another job needs a part of extends a smaller group, which that job has: an extraction of features
takes `PicturesConfig`, a training `DataConfig`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from cvdist.config.bounds import (
    AnswerSeconds,
    Bounds,
    Count,
    CountOrZero,
    Fraction,
    Pattern,
    Resize,
    Seconds,
    WaitSeconds,
    above,
    at_least,
)
from cvdist.config.settings import Flag
from cvdist.errors import UserError

PrecisionName = Literal["auto", "float32", "tf32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Launcher = Literal["auto", "ray", "torchrun", "inline"]
ModelPreprocessing = Literal["", "imagenet", "vgg-features"]
Head = Literal["vgg", "mlp", "linear"]
FeaturesAt = Literal["", "pooled", "maps"]
Compile = Literal["none", "default", "reduce-overhead", "max-autotune"]
AutoAugment = Literal["none", "ra", "ta_wide", "augmix", "imagenet"]
TrackingMode = Literal["required", "optional", "none"]
SelectBy = Literal["auto", "accuracy", "balanced_accuracy", "macro_f1", "mean_average_precision", "loss"]
_HIDDEN_SIZES: dict[Head, int] = {"vgg": 4096, "mlp": 256, "linear": 0}  # defaults of each head
CUDA_GRAPHS: tuple[Compile, ...] = ("reduce-overhead", "max-autotune")  # modes that replay kernels on a GPU


_WEIGHT = r"[^=]+=(\d+\.?\d*|\.\d+)"  # weight of one class
_WEIGHTS = rf"none|balanced|{_WEIGHT}(,{_WEIGHT})*"


class HeadSize(NamedTuple):
    """A classifier head: its name, and the units in each of its hidden layers, 0 where it has none."""

    name: str
    hidden_size: int

    def __str__(self) -> str:
        return f"{self.name} head" + (f" of {self.hidden_size} hidden units" if self.hidden_size else "")


@dataclass(frozen=True)
class PathsConfig:
    """Where a table in `--data` names its pictures."""

    root: Annotated[str, Flag("data_root")] = ""
    """Folder or URI that relative paths in a table begin at, with its pictures at any depth. Empty: the table's
    own folder."""
    path_column: str = ""
    """Column of a table with the pictures' paths, URIs or ids. Empty: the one that holds names of pictures'
    files, or has a usual name such as `path`, `image` or `id`."""


@dataclass(frozen=True)
class TableConfig(PathsConfig):
    """What the columns of a table in `--data` hold."""

    label_column: str = ""
    """Column of a table with the classes. Empty: the one with a usual name such as `label`, `class` or
    `breed`, or the only one that is left. `cat,dog`: a column for each class, with 1 or 0, of which a picture
    may have several; `*`: all columns but those of paths and splits."""
    label_separator: str = ""
    """Separator, in a table, between the classes of a picture that has several, such as `;` or `|`. Empty: each
    picture has one class."""
    split_column: str = ""
    """Column of a table whose values are `train`, `valid`, `test` or the like. Empty: the one with a usual
    name such as `split`, if there is one. `none`: no column."""


@dataclass(frozen=True)
class PicturesConfig(TableConfig):
    """The pictures that features are computed from."""

    uri: Annotated[str, Flag("data")] = ""
    """Folder or URI (s3://, gs://, file://) of `{train,valid}/CLASS/picture.jpg`, or of `CLASS/picture.jpg`;
    a table of paths and labels: .csv, .tsv, .jsonl or .parquet; or tars or Parquet files with pictures inside,
    as `'train-{000..099}.tar'` (docs/data.md)."""
    image_size: Annotated[int, Bounds(8, or_zero=True)] = 224
    """Height and width, in pixels, that photographs are resized to. 0: the size that `--weights` were evaluated
    at."""
    resize: Resize = "squash"
    """`squash`: whole pictures, without regard to their proportions, as in the book. `crop`: the middle of
    them, in proportion. `crop:256:bilinear`: the middle after the shorter side was resized to 256 pixels, or by
    `bicubic`. `weights`: as `--weights` were evaluated."""
    max_bad_fraction: Fraction = 0.001
    """Share of the pictures that may be undecodable. They are left out and listed in `quarantine.csv`. For a
    table, also the share that may have rows with different labels; these are left out."""
    decode_workers: CountOrZero = 0
    """Processes on each node that decode pictures. 0: one for each CPU core."""


@dataclass(frozen=True)
class DataConfig(PicturesConfig):
    """The data set that a model is trained and validated on."""

    dataset: Literal["digits", "mnist", "images"] = "digits"
    """`digits`: 5,000 real MNIST digits that come with a package, no network needed. `mnist`: all 70,000.
    `images`: the folder of pictures in `--data`."""
    uri: Annotated[str, Flag("data")] = PicturesConfig.uri
    """Folder of the data set; `mnist` is downloaded into it when absent. For `images` a folder or URI (s3://,
    gs://, file://) of `{train,valid}/CLASS/picture.jpg`, or of `CLASS/picture.jpg`, which is split by
    `--valid-fraction`; a table of paths and labels; or tars or Parquet files with pictures inside
    (docs/data.md). Empty: `<storage>/data`."""
    cache: str = ""
    """Folder on each node for its decoded pictures, best on a fast local disk. Empty: $CVDIST_CACHE, else
    ~/.cache/cvdist."""
    cache_fraction: Fraction = 0.8
    """Share of the free space on the disk of `--cache` that decoded pictures may take. If they need more, they
    are decoded again in each epoch."""
    valid_fraction: Annotated[float, Bounds(0, 1, "()")] = 0.2
    """Share held back for validation, where a data set has no split of its own. Stratified: each class keeps a
    picture to learn from, and each of two or more has one to validate on."""
    split_seed: int = 0
    """Seed of the split by `--valid-fraction`, apart from `--seed`: repeats with other seeds validate on the
    same data."""
    exclude: str = ""
    """CSV or Parquet file, or its URI, whose column `path` names pictures below `--data` that are left out of
    training and validation, such as `issues.csv` of `jobs/inspect.py`. Rows with `false` in a column
    `leave_out` do not count. Nothing is deleted."""


@dataclass(frozen=True)
class AugmentationConfig:
    """How training pictures are changed at random."""

    horizontal_flip: Fraction = 0.0
    """Probability that a picture is mirrored."""
    rotation: Annotated[float, at_least(0)] = 0.0
    """Each picture is turned by up to this many degrees to either side."""
    translation: Fraction = 0.0
    """Each picture is moved by up to this fraction of its width and height."""
    random_resized_crop: Annotated[float, Bounds(0, 1, "(]")] = 1.0
    """A random part of each picture, with at least this share of its area, is enlarged to the whole. 1: no
    crops."""
    crop_ratio: Annotated[float, at_least(1)] = 4 / 3
    """Largest ratio of the longer side to the shorter one in the crops of `--random-resized-crop`."""
    color_jitter: Fraction = 0.0
    """Brightness, contrast and saturation each change by up to this factor."""
    auto_augment: AutoAugment = "none"
    """Torchvision's RandAugment (`ra`), TrivialAugmentWide, AugMix, or AutoAugment's policy for ImageNet, as
    its reference script sets them. They are applied picture by picture."""
    random_erase: Fraction = 0.0
    """Probability that a rectangle of a picture, 2% to 33% of it, gets the mean color."""

    def require_crops(self) -> None:
        """Refuse proportions of crops where nothing is cropped.

        Raises:
            UserError: one line that names both flags.
        """
        if self.random_resized_crop == 1 and self.crop_ratio != AugmentationConfig.crop_ratio:
            raise UserError(
                f"--crop-ratio {self.crop_ratio:g} is for random crops, and there are none: set "
                "--random-resized-crop, e.g. to 0.5, or leave it out"
            )


@dataclass(frozen=True)
class MixingConfig(AugmentationConfig):
    """How training pictures are changed at random, and mixed with each other."""

    mixup_alpha: Annotated[float, at_least(0)] = 0.0
    """Blend each training picture and its label with another one of its batch, by a share from Beta(A, A).
    Training accuracy is then that of the label with the larger share. 0: none."""
    cutmix_alpha: Annotated[float, at_least(0)] = 0.0
    """Put a rectangle of another picture of its batch into each training picture, of a size from Beta(A, A),
    and share the label by area. 0: none. With --mixup-alpha, each batch takes one of the two at random."""


@dataclass(frozen=True)
class FeatureCacheConfig:
    """Which feature cache is made or trained from."""

    uri: Annotated[str, Flag("features")] = ""
    """Folder or URI (s3://, gs://, file://) of the cache: `jobs/preprocess.py` makes it, `jobs/train.py` trains
    from it. Empty: none."""
    views: CountOrZero = 0
    """How many views of each training picture are stored: the first as it is, the others augmented (each
    mirrored with probability 0.5 and turned by up to 10 degrees, if nothing else is named); each epoch draws
    one of them. 0: to store, 4 with augmentation, else 1; to train from, as many as the cache has."""


@dataclass(frozen=True)
class FeaturesConfig(FeatureCacheConfig):
    """The feature cache: what the frozen layers make of the pictures, computed once and kept in storage."""

    local_cache_gb: Annotated[float, at_least(0)] = 0.0
    """Gigabytes that a node's copy of the shards may take, in --cache. 0: --cache-fraction of that disk's free
    space. Less than the whole cache: shards come and go, and are shuffled by `--shuffle-window`."""
    shuffle_window: Count = 16
    """Shards that are shuffled together where the cache does not fit the node."""
    fetch_threads: Count = 8
    """Shards that each worker fetches at a time."""
    on_device: Annotated[bool, Flag("features_on_device")] = True
    """Keep the features in GPU memory where they take less than half of what is free there."""
    ridge_probe: bool = True
    """Before training, fit a linear classifier to the features' channel means and maxima in closed form: the
    baseline, for one more pass over the cache."""


@dataclass(frozen=True)
class ExtractionConfig(FeatureCacheConfig):
    """The feature cache: what the frozen layers make of the pictures, computed once and kept in storage."""

    dtype: Annotated[Literal["float16", "bfloat16", "float32"], Flag("features_dtype")] = "float16"
    """Number format that features are stored in."""
    decoder: Literal["cpu", "nvjpeg"] = "cpu"
    """What decodes ordinary JPEGs for an extraction. `nvjpeg`: the GPU, where processors can't keep up
    with it; its pixels differ a little, so that a cache is made and updated by the same decoder."""
    shard_size: Count = 128
    """Pictures per shard, which is the unit of work, of retry and of resume."""
    extractors: CountOrZero = 0
    """Ray actors that compute features. 0: one per GPU or, without GPUs, one for each --cpus-per-worker
    cores."""
    replace: bool = False
    """Replace a cache that was made with other weights or settings."""


@dataclass(frozen=True)
class BackboneConfig:
    """The pretrained network whose frozen layers compute features."""

    name: Annotated[str, Flag("model")] = "scratch-cnn"
    """`scratch-cnn`, `scratch-cnn-photo`, or a classifier of torchvision, such as `mobilenet_v2`, `resnet50` or
    `vit_b_16`."""
    weights: str = ""
    """Pretrained weights to go on from: torchvision's name (`DEFAULT`, `IMAGENET1K_V1`; for vgg16 also
    `IMAGENET1K_FEATURES`, convolutions only), or a state dict's file or URI. `none`: random ones,
    and all stages are trained, from scratch. Empty: for a model that has no pretrained weights."""
    weights_preprocessing: ModelPreprocessing = ""
    """Normalization that the file in `--weights` was trained with: that of torchvision's `IMAGENET1K_V1` or of
    its `IMAGENET1K_FEATURES`. Needed for vgg16 only, which has weights with either."""
    features_at: FeaturesAt = ""
    """What the head reads of a pretrained model. `pooled`: the vector that its last layer reads. `maps`: the
    last maps of its convolutions. Empty: `maps` for `--head vgg`, else `pooled`."""
    trainable_stages: Annotated[int | str, Pattern(r"all|\d+", "all, or 0 or more")] = 0
    """How many of a pretrained model's stages are trained, counted from the last, or `all`; the others stay as
    they are. Stages differ in the size of their maps; in a transformer each block is a stage, and what precedes
    the blocks is one."""

    @property
    def cut(self) -> Literal["pooled", "maps"]:
        """What the head reads, with the default where none is given."""
        return self.features_at or "pooled"

    def trained_of(self, stages: int) -> int:
        """Return how many of a model's `stages` are trained."""
        everything = self.trainable_stages == "all" or self.weights == "none"
        return stages if everything else int(self.trainable_stages)

    @property
    def has_weights(self) -> bool:
        """Whether pretrained weights are named."""
        return self.weights not in ("", "none")


@dataclass(frozen=True)
class ModelConfig(BackboneConfig):
    """The architecture, and where its first weights come from."""

    head: Head = "vgg"
    """What is trained on a pretrained model. `linear`: a new last layer. `mlp`: one hidden layer, of maps on
    each channel's mean. `vgg`: two hidden layers, of maps on 7x7 positions, as VGG has them."""
    hidden_size: CountOrZero = 0
    """Units of the head's hidden layers. 0: 4,096 for `vgg`, 256 for `mlp`; `linear` has none."""
    dropout: Annotated[float, Bounds(0, 1, "[)")] = 0.5
    """Probability that an activation is dropped in training; the `linear` head has no dropout."""

    @property
    def head_size(self) -> HeadSize:
        """The head, with its own hidden size where none is given."""
        return HeadSize(self.head, self.hidden_size or _HIDDEN_SIZES[self.head])

    @property
    def cut(self) -> Literal["pooled", "maps"]:
        """What the head reads, with the head's default where none is given."""
        return self.features_at or ("maps" if self.head == "vgg" else "pooled")


@dataclass(frozen=True)
class OptimizerConfig:
    """How the optimizer changes the weights. The book's values: SGD, lr 0.01, momentum 0.5."""

    name: Annotated[Literal["sgd", "adamw"], Flag("optimizer")] = "sgd"
    """`sgd` (with `--momentum`) or `adamw`."""
    lr: Annotated[float, at_least(0)] = 0.01
    """Peak learning rate."""
    momentum: Annotated[float, Bounds(0, 1, "[)")] = 0.5
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's form of SGD's momentum."""
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """L2 penalty for `sgd`, decoupled decay for `adamw`, of matrices and kernels."""
    norm_weight_decay: Annotated[float, at_least(0)] = 0.0
    """Like `--weight-decay`, for the weights and biases of norms."""
    bias_weight_decay: Annotated[float, at_least(0)] = 0.0
    """Like `--weight-decay`, for all other biases and vectors."""
    lr_scheduler: Literal["constant", "cosine", "step", "exponential", "polynomial"] = "constant"
    """What the learning rate does after warm-up. `cosine` and `polynomial` end at 0. `step`: it is multiplied
    by `--lr-gamma` every `--lr-step-size` epochs. `exponential`: by `--lr-gamma` in each epoch, bit by bit."""
    lr_step_size: Count = 30
    """Epochs between two steps of `--lr-scheduler step`."""
    lr_gamma: Annotated[float, above(0)] = 0.1
    """Factor of `--lr-scheduler step` and `exponential`."""
    lr_power: Annotated[float, above(0)] = 1.0
    """Power of `--lr-scheduler polynomial`. 1: a straight line."""
    lr_warmup_epochs: Annotated[float, at_least(0)] = 0.0
    """Epochs (fractions allowed) in which the learning rate grows linearly to its peak."""
    backbone_lr_scale: Annotated[float, at_least(0)] = 1.0
    """Learning rate of a pretrained model's trained stages as a multiple of `--lr`."""
    layer_decay: Annotated[float, Bounds(0, 1, "(]")] = 1.0
    """Factor by which the learning rate of each trained stage is below that of the next one, or of the head."""
    freeze_epochs: CountOrZero = 0
    """Number of first epochs in which the stages that `--trainable-stages` names stay as they are."""


@dataclass(frozen=True)
class ComputeConfig:
    """The arithmetic and the memory layout that networks are computed with."""

    precision: PrecisionName = "auto"
    """`auto`: bfloat16 autocast where the processor computes it natively, else float32. `tf32`: float32 whose
    products GPUs compute from 19 bits: weights are read as they are, not cast in each step. CPUs: float32.
    `float16`: autocast, with scaled gradients; `auto` trains so on GPUs without bfloat16."""
    channels_last: bool = True
    """Memory layout NHWC, which convolutions are fastest with."""


@dataclass(frozen=True)
class LoopConfig(ComputeConfig):
    """How long a model is trained, in which portions and with which arithmetic."""

    fit: Literal["epochs", "logistic"] = "epochs"
    """How the trained layers get their weights. `epochs`: by steps of the optimizer. `logistic`: a linear head
    on cached features is solved to its optimum as a logistic regression, whose L2 penalty is chosen on held-out
    training pictures. It has no use for epochs, batches, the optimizer and label smoothing."""
    epochs: Count = 20
    """Passes over the training data."""
    batch_size: Count = 32
    """Pictures per step, over all workers together: the learning rate need not change with the number of
    workers."""
    sync_bn: bool = False
    """Batch norms that are trained use the mean and variance of all workers' pictures, as one worker would.
    With --accumulate-steps, each portion has its own."""
    grad_checkpointing: bool = False
    """Keep only the input of each trained stage, and compute the stage again in the backward pass: less memory,
    about a third more time, the same gradients."""
    accumulate_steps: Count = 1
    """Each worker computes its share of a batch in this many portions. Saves memory, same gradients."""
    class_weights: Annotated[str, Pattern(_WEIGHTS, "none, balanced, or such as cat=1,dog=3.5")] = "none"
    """Weights of the classes in the training loss, and in `--fit logistic`. `balanced`: inversely proportional
    to the number of pictures. `cat=1,dog=3.5`: as listed, and 1 for all others. Where a picture may have
    several classes, the weight of having a class against not having it; `balanced`: both weigh as much."""
    balanced_sampling: bool = False
    """Draw the pictures of an epoch with replacement, so that each class is drawn about equally often."""
    select_by: SelectBy = "auto"
    """Which value, measured on validation pictures, decides which checkpoint is the best. `auto`: `accuracy`,
    or `mean_average_precision` where a picture may have several classes. `balanced_accuracy`: the mean of the
    classes' recalls. `macro_f1`: the mean of their F1 scores."""
    patience: CountOrZero = 0
    """End the training after this many epochs in a row without a better value of `--select-by`. 0: never."""
    min_delta: Annotated[float, at_least(0)] = 0.0
    """By how much the value of `--select-by` has to get better to count for `--patience`. An accuracy of 1% is
    0.01."""
    valid_batch_size: Count = 1000
    """Pictures per forward pass in validation, on each worker."""
    compile: Compile = "none"
    """Run the model through `torch.compile` (needs a C++ compiler on CPUs); `--compile` alone is `default`.
    `reduce-overhead`: replay CUDA graphs, for small heads on GPUs. `max-autotune`: also try out kernels."""
    deterministic: bool = False
    """Only operations that give the same bits each time, on GPUs; some are slower. CPUs need no such choice."""
    log_every_steps: Count = 50
    """Steps between two points of the `step/` metrics."""
    label_smoothing: Annotated[float, Bounds(0, 1, "[)")] = 0.0
    """Share of each target that is spread evenly over all classes, in training only."""
    clip_grad_norm: Annotated[float, at_least(0)] = 0.0
    """Largest L2 norm of all gradients together. 0: no clipping."""
    model_ema_decay: Annotated[float, Bounds(0, 1, "[)")] = 0.0
    """Decay per step of the weights' exponential moving average. The average is then validated and logged.
    0: none."""


@dataclass(frozen=True)
class ParallelConfig:
    """How a step is divided over the workers."""

    mode: Annotated[Literal["auto", "data", "head"], Flag("parallel")] = "auto"
    """`data`: each worker has all of the model and a share of the batch; gradients are averaged. `head`: the
    first two linear layers of the classifier are split over the workers, which exchange activations instead.
    `auto`: the one that is faster by a cost model, from the measured link and a few steps."""
    gradient_compression: Literal["none", "bf16", "powersgd"] = "none"
    """Format that gradients are averaged in. `bf16`: half the bytes. `powersgd`: approximated by matrices of a
    low rank, few bytes; the losses differ."""
    powersgd_rank: Count = 4
    """Rank of the matrices of `--gradient-compression powersgd`."""


@dataclass(frozen=True)
class RunConfig:
    """What a run is called, where it keeps its files, and what its random numbers come from."""

    name: str = ""
    """Name of the run. A name that exists is continued from its last checkpoint. Empty: a new name."""
    storage: str = ""
    """Folder or URI (s3://bucket/path) that holds each run's checkpoints and, by default, the MLflow store.
    Empty: $CVDIST_STORAGE, else ./runs."""
    seed: int = 0
    """Seed of first weights, order of pictures, augmentation and dropout."""


@dataclass(frozen=True)
class CheckpointConfig:
    """How often checkpoints are saved and how long that may take, which are kept, and where a run begins."""

    every: Annotated[CountOrZero, Flag("checkpoint_every")] = 0
    """Steps between checkpoints inside an epoch. 0: at each epoch's end only."""
    keep: Annotated[Count, Flag("keep_checkpoints")] = 2
    """How many of the best checkpoints are kept, besides the latest."""
    resume: str = ""
    """Folder or URI of one checkpoint to start a new run from."""
    asynchronous: Annotated[bool, Flag("async_checkpoints")] = True
    """Write and upload checkpoints while training goes on, from a copy in main memory."""
    timeout: Annotated[Seconds, Flag("checkpoint_timeout")] = 600.0
    """Seconds that a checkpoint may take to be stored: the next one, or the run's end, waits that long."""
    grace_period: Seconds = 25.0
    """Seconds in which a job that gets SIGTERM saves a last checkpoint and ends (torchrun waits 30, and
    Kubernetes unless told otherwise). Also how long before a preempted node's deadline that checkpoint is
    begun."""


@dataclass(frozen=True)
class ClusterConfig:
    """The Ray cluster, and what each process takes of it."""

    cpus_per_worker: Count = 1
    """CPU cores that Ray reserves for each worker."""
    connect_timeout: AnswerSeconds = 10.0
    """Seconds that the cluster at $RAY_ADDRESS may take to answer."""
    resource_timeout: WaitSeconds = 0.0
    """Seconds to wait for the cluster to have the CPUs and GPUs asked for (an autoscaler adds nodes). 0: fail
    at once."""


@dataclass(frozen=True)
class RuntimeConfig(ClusterConfig):
    """The processes that train: how many, on what, and how long they wait for each other."""

    launcher: Annotated[Launcher, Flag("runtime")] = "auto"
    """`auto`: torchrun's environment if started by it, else Ray. `inline`: in this process, one worker."""
    num_workers: Annotated[int | str, Flag("num_workers", alias="workers")] = 2
    """Ray workers, one process each. `2:8`: as many as the cluster has room for at any time, from 2 to 8.
    (torchrun's own --nproc-per-node counts instead, under torchrun.)"""
    resize_interval: Seconds = 60.0
    """Seconds between checks for room for more workers, where `--num-workers` is a range."""
    device: Device = "auto"
    """`auto`: GPUs where every worker can have one, else CPUs."""
    max_failures: CountOrZero = 3
    """How often Ray restarts the workers from the last checkpoint before it gives up."""
    max_preemptions: Annotated[int, at_least(-1)] = -1
    """How often Ray restarts the workers because nodes were preempted, apart from `--max-failures`. -1: without
    end."""
    start_timeout: Seconds = 300.0
    """Seconds that the worker processes may take to start."""
    prepare_timeout: Seconds = 3600.0
    """Seconds that a node may take to download weights, and to download or decode its data."""
    data_timeout: Seconds = 120.0
    """Seconds that a batch may take to be read and decoded before the worker fails."""
    collective_timeout: Seconds = 300.0
    """Seconds that one worker waits for the others before it fails, until the first step is done."""
    step_timeout: Seconds = 150.0
    """Seconds that one worker waits for the others from the second step on. Not below --data-timeout: one of
    the others may be waiting for its data."""

    @property
    def worker_range(self) -> tuple[int, int]:
        """The fewest and the most workers.

        Raises:
            UserError: if `num_workers` is neither a number nor a range.
        """
        found = re.fullmatch(r"(\d+)(?::(\d+))?", str(self.num_workers))
        if found is None:
            raise UserError(
                f"--num-workers is {self.num_workers}: it takes a number, or the fewest and the most as in 2:8"
            )
        fewest = int(found[1])
        most = int(found[2] or fewest)
        if not 1 <= fewest <= most:
            raise UserError(
                f"--num-workers is {self.num_workers}: it takes 1 or more, the fewest before the most"
            )
        return fewest, most


@dataclass(frozen=True)
class ActorsConfig(ClusterConfig):
    """Where a job that has no training loop runs."""

    launcher: Annotated[Literal["ray", "inline"], Flag("runtime")] = "ray"
    """`inline`: in this process, without Ray."""


@dataclass(frozen=True)
class ExtractorsConfig(ActorsConfig):
    """The actors that compute features."""

    device: Device = RuntimeConfig.device
    """`auto`: GPUs where every actor can have one, else CPUs."""
    data_timeout: Seconds = RuntimeConfig.data_timeout
    """Seconds that a batch may take to be read and decoded before the extraction fails."""

    @property
    def device_here(self) -> Device:
        """What this process computes on: beside a cluster, it need not have the device of the actors."""
        return self.device if self.launcher == "inline" else "auto"


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics, figures and models are recorded, and which of them."""

    mode: Annotated[TrackingMode, Flag("tracking")] = "required"
    """`optional`: train without MLflow if it can't be reached at the start. `none`: do not use it at all."""
    uri: Annotated[str, Flag("tracking_uri")] = ""
    """Address of the MLflow store. Empty: $MLFLOW_TRACKING_URI, else sqlite in the storage folder."""
    experiment: str = "cvdist"
    """Name of the MLflow experiment."""
    system_metrics: bool = True
    """Log CPU, memory, disk, network and GPU use of every node."""
    log_model: bool = True
    """Log the best model, ready to load and to serve."""
    register: str = ""
    """Register the best model in MLflow under this name."""
    alias: str = "candidate"
    """Alias that the registered version gets; the version that had it loses it."""
    timeout: Annotated[AnswerSeconds, Flag("tracking_timeout")] = 10.0
    """Seconds that the MLflow server may take to answer at the start."""
    drain_timeout: Annotated[WaitSeconds, Flag("tracking_drain_timeout")] = 120.0
    """Seconds that a finished job waits for an MLflow server that is away. What is left stays in a journal."""


@dataclass(frozen=True)
class VisualizeConfig:
    """Which figures a run makes of what the network has learned; all of them need `--tracking`."""

    enabled: Annotated[bool, Flag("visualize")] = True
    """Show filters, activations, top activations and Grad-CAM among the run's figures."""
    layers: Annotated[str, Flag("visualize_layers")] = ""
    """Convolutions to look into, separated by commas: names, numbers, `first` to `tenth`, `last` or `all`.
    Empty: the first, the fifth and the last."""
    every: Annotated[CountOrZero, Flag("visualize_every")] = 0
    """Epochs between two pictures of the first layer's filters, where that layer is trained. 0: about five
    pictures over the run."""
    pictures: Annotated[CountOrZero, Flag("visualize_pictures")] = 128
    """Validation pictures, at most, that are run through the network at the end, for activations, top
    activations and Grad-CAM. 0: none, filters only."""
