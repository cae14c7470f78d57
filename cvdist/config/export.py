"""The settings of a job that writes a trained model for other programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cvdist.config.groups import TableConfig
from cvdist.config.saved import SavedModelConfig

ExportFormat = Literal["onnx", "pt2", "safetensors"]


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
