"""The settings of one inspection of a labeled set of pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from cvdist.config.bounds import Count
from cvdist.config.groups import (
    BackboneConfig,
    ComputeConfig,
    ExtractionConfig,
    ExtractorsConfig,
    TrackingConfig,
    TrackingMode,
)
from cvdist.config.places import folder_for, storage_root
from cvdist.config.probe import LabeledPicturesConfig, require_pictures
from cvdist.config.saved import LookupConfig
from cvdist.config.settings import Flag, check_groups


@dataclass(frozen=True)
class InspectionConfig:
    """What is listed, and where the results go."""

    first: Count = 100
    """How many doubtful labels are listed at most, those that are likeliest wrong first."""
    output: str = ""
    """Folder or URI that `issues.csv`, `issues.parquet` and `inspection.html` are written to. Empty: a folder
    for `--data` in `<storage>/inspections`."""
    tracking: TrackingMode = TrackingConfig.mode
    """`none`: make no MLflow run that holds the results. `optional`: make none if MLflow can't be reached."""


@dataclass(frozen=True)
class InspectedFeaturesConfig(ExtractionConfig):
    """The feature cache of the pictures."""

    uri: Annotated[str, Flag("features")] = ""
    """Folder or URI (s3://, gs://, file://) of a feature cache of any network, which is used as it is. If there
    is none, it is made. Empty: a folder for `--data` in `<storage>/features`."""


@dataclass(frozen=True)
class SmallBackboneConfig(BackboneConfig):
    """The network that a cache is made with where there is none."""

    name: Annotated[str, Flag("model")] = "mobilenet_v2"
    """A classifier of torchvision or timm: a small one is enough to find copies and wrong labels."""
    weights: str = "DEFAULT"
    """Pretrained weights as in training: torchvision's name, or a state dict's file or URI."""


@dataclass(frozen=True)
class InspectConfig:
    """One job of `jobs/inspect.py`."""

    inspection: InspectionConfig = field(default_factory=InspectionConfig)
    data: LabeledPicturesConfig = field(default_factory=LabeledPicturesConfig)
    features: InspectedFeaturesConfig = field(default_factory=InspectedFeaturesConfig)
    model: SmallBackboneConfig = field(default_factory=SmallBackboneConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    runtime: ExtractorsConfig = field(default_factory=ExtractorsConfig)
    lookup: LookupConfig = field(default_factory=LookupConfig)

    @property
    def cache(self) -> str:
        """The folder or URI of the feature cache: by default where `probe` keeps that of this network."""
        usual = f"{folder_for(self.data.uri, 'features', self.lookup.storage)}/{self.model.name}"
        return self.features.uri.rstrip("/") or usual

    @property
    def output(self) -> str:
        """The folder or URI that the results are written to."""
        usual = folder_for(self.data.uri, "inspections", self.lookup.storage)
        return self.inspection.output.rstrip("/") or usual


def check_inspect(config: InspectConfig) -> None:
    """Refuse settings that no inspection can work with, before anything is started.

    Raises:
        UserError: one line that names the flag and what it takes.
    """
    check_groups(config)
    storage = storage_root(config.lookup.storage)
    require_pictures(config.data, storage=storage, features=config.cache, output=config.output)
