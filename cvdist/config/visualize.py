"""The settings of one visualization of a trained model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cvdist.config.bounds import Count, CountOrZero
from cvdist.config.groups import Device, RuntimeConfig, TableConfig
from cvdist.config.saved import SavedModelConfig


@dataclass(frozen=True)
class LookConfig(TableConfig):
    """Which pictures and layers are visualized, and where the figures are written."""

    data: str = ""
    """A picture, or a folder or URI of pictures, or a table of them, as in training; where they are split, the
    validation part. Empty: what the model's run was validated with, where that can be reached."""
    layers: str = ""
    """As `--visualize-layers`: convolutions by name or number, or `first`, `fifth`, `last`, `all`."""
    pictures: CountOrZero = 1
    """Pictures whose activations are drawn."""
    most_pictures: Count = 500
    """Pictures, at most, that are run through the network for top activations and Grad-CAM."""
    channels: Literal["strongest", "mean"] = "strongest"
    """What is shown of filters on many channels: the strongest of them, or their mean."""
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
