"""The settings of one comparison of pretrained networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from cvdist.config.bounds import Bounds, CountOrZero, Resize
from cvdist.config.groups import (
    AugmentationConfig,
    ComputeConfig,
    DataConfig,
    ExtractionConfig,
    ExtractorsConfig,
    ModelPreprocessing,
    TrackingConfig,
    TrackingMode,
)
from cvdist.config.places import cache_folder, folder_for, require_outside, storage_root
from cvdist.config.saved import LookupConfig
from cvdist.config.settings import Flag, check_groups
from cvdist.errors import UserError


@dataclass(frozen=True)
class NetworksConfig:
    """The networks that are compared."""

    names: Annotated[str, Flag("models")] = ""
    """Pretrained networks as `--model` takes them, separated by commas: `mobilenet_v2,resnet50,vit_b_16`.
    `NAME:WEIGHTS` for one whose weights are not in `--weights-dir`, with WEIGHTS as `--weights` takes them."""
    weights_dir: str = ""
    """Folder or URI with the networks' files of weights, named by the networks: `resnet50.pth`,
    `resnet50-11ad3fa6.pth`. Empty: torchvision's or timm's own weights, which are downloaded."""
    weights_preprocessing: ModelPreprocessing = ""
    """Normalization that a file of weights for vgg16 was trained with; same values as in training. For
    no other network."""
    finalists: CountOrZero = 3
    """How many networks, those with the best leave-one-out accuracy, get a logistic regression as well."""
    tracking: TrackingMode = TrackingConfig.mode
    """`none`: make no MLflow run that holds the results. `optional`: make none if MLflow can't be reached."""


@dataclass(frozen=True)
class CachesConfig(ExtractionConfig):
    """The feature caches: what each network makes of the pictures, computed once and kept in storage."""

    uri: Annotated[str, Flag("features")] = ""
    """Folder or URI (s3://, gs://, file://) with a folder for the cache of each network. Caches that are there
    are used. Empty: a folder for `--data` in `<storage>/features`."""


@dataclass(frozen=True)
class LabeledPicturesConfig(DataConfig):
    """The labeled pictures. `--image-size` and `--resize` count where features are computed."""

    dataset: Literal["digits", "mnist", "images"] = "images"
    """`images`, whatever else there is."""
    uri: Annotated[str, Flag("data")] = ""
    """Folder or URI (s3://, gs://, file://) of `{train,valid}/CLASS/picture.jpg`, or of `CLASS/picture.jpg`,
    which is split by `--valid-fraction`; or a table of paths and labels."""
    image_size: Annotated[int, Bounds(8, or_zero=True)] = 0
    """Height and width, in pixels, that photographs are resized to. 0: as each network's weights were
    evaluated."""
    resize: Resize = "weights"
    """`weights`: as each network's weights were evaluated. Otherwise as in training."""


@dataclass(frozen=True)
class ProbeConfig:
    """One job of `jobs/probe.py`."""

    networks: NetworksConfig = field(default_factory=NetworksConfig)
    data: LabeledPicturesConfig = field(default_factory=LabeledPicturesConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    features: CachesConfig = field(default_factory=CachesConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    runtime: ExtractorsConfig = field(default_factory=ExtractorsConfig)
    lookup: LookupConfig = field(default_factory=LookupConfig)

    @property
    def caches(self) -> str:
        """The folder or URI with the caches, by default one for the pictures of `--data`."""
        return self.features.uri.rstrip("/") or folder_for(self.data.uri, "features", self.lookup.storage)


def check_probe(config: ProbeConfig) -> None:
    """Refuse settings that no comparison can work with, before anything is started.

    Raises:
        UserError: one line that names the flag and what it takes.
    """
    check_groups(config)
    require_pictures(config.data, storage=storage_root(config.lookup.storage), features=config.caches)
    if not config.networks.names.strip(" ,"):
        raise UserError(
            "--models is needed: networks separated by commas, such as mobilenet_v2,resnet50,vit_b_16"
        )


def require_pictures(data: DataConfig, **places: str) -> None:
    """Refuse a job without pictures, and one that would write among them.

    Args:
        data: names the pictures.
        **places: what else is written, as for `require_outside`.

    Raises:
        UserError: one line that names the flag.
    """
    if not data.uri:
        raise UserError(
            "--data is needed: the folder or URI of the pictures, with a folder for each class in it"
        )
    require_outside(data.root or data.uri, cache=str(cache_folder(data.cache)), **places)
