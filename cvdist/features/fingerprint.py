"""The fingerprint of a feature cache: all settings and weights that features depend on, besides the pictures.

Two caches of the same pictures with the same fingerprint hold the same features.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cvdist import models
from cvdist.config import (
    AugmentationConfig,
    BackboneConfig,
    ComputeConfig,
    ExtractionConfig,
    PicturesConfig,
    PreprocessConfig,
)
from cvdist.data.images.decode import decode_settings as decoding

_VIEWS_WITH_AUGMENTATION = 4
# Harmless for photographs of most things. Without any augmentation, all views would be alike.
_USUAL_AUGMENTATION: dict[str, float | str] = {"horizontal_flip": 0.5, "rotation": 10.0}


@dataclass(frozen=True)
class Fingerprint:
    """Everything that the features of a given picture depend on.

    Attributes:
        model: name of the architecture.
        cut: name of the last layer that was run.
        weights: hexadecimal SHA-256 of the frozen layers' tensors.
        decode: version of the decoding.
        size: height and width of the network's input in pixels.
        resize: how pictures become square.
        mean: mean for each channel that pixels were normalized with.
        std: standard deviation for each channel that pixels were normalized with.
        views: number of stored views of each training picture.
        augmentation: settings of the augmentation of all views but the first; None if there is only one view.
        dtype: dtype of the stored features.
        precision: `--precision` of the extraction.
        decoder: `--decoder` of the extraction.
    """

    model: str
    cut: str
    weights: str
    decode: int
    size: int
    resize: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    views: int
    augmentation: dict[str, float | str] | None
    dtype: str
    precision: str
    decoder: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary for JSON. The decoder is left out if it is the default, "cpu"."""
        values = dataclasses.asdict(self)
        if self.decoder == "cpu":
            del values["decoder"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fingerprint:
        """Build a fingerprint from the dictionary that `to_dict` returned, or its JSON."""
        lists = {name: tuple(values[name]) for name in ("mean", "std")}
        return cls(**{**values, **lists})

    def differences(self, asked: Fingerprint, leave_out: Collection[str] = ()) -> list[str]:
        """Return what differs in `asked`, each as `flag: the cache has ..., asked for is ...`."""
        lines = []
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(asked, field.name)
            if mine != theirs and field.name not in leave_out:
                name = _FLAGS.get(field.name, field.name)
                lines.append(f"{name}: the cache has {format_value(mine)}, asked for is {format_value(theirs)}")
        return lines


_FLAGS = {
    "model": "--model",
    "cut": "--features-at and --trainable-stages (last frozen layer)",
    "weights": "--weights (SHA-256 of the frozen layers)",
    "decode": "version of the decoder",
    "size": "--image-size",
    "resize": "--resize",
    "mean": "--weights-preprocessing (mean)",
    "std": "--weights-preprocessing (deviation)",
    "views": "--views",
    "augmentation": "augmentation",
    "dtype": "--features-dtype",
    "precision": "--precision",
    "decoder": "--decoder",
}


def for_extraction(config: PreprocessConfig) -> Fingerprint:
    """Compute the fingerprint of the features that an extraction is asked for. This reads the weights.

    Raises:
        UserError: if the model has no frozen layers, or its weights can't be used.
    """
    augmentation = augmentation_of(config.augmentation)
    views = config.features.views or (_VIEWS_WITH_AUGMENTATION if augmentation else 1)
    return Fingerprint(
        **_inputs(config.data, config.model),
        views=views,
        augmentation=augmentation or _USUAL_AUGMENTATION if views > 1 else None,
        dtype=config.features.dtype,
        precision=config.compute.precision,
        decoder=config.features.decoder,
    )


def for_training(data: PicturesConfig, model: BackboneConfig) -> Fingerprint:
    """Compute the fingerprint of the features that a training asks a cache for.

    Training accepts any views, dtype, precision and decoder of a cache, so these are arbitrary here.

    Raises:
        UserError: as `for_extraction`.
    """
    usual = ExtractionConfig()
    return Fingerprint(
        **_inputs(data, model),
        views=1,
        augmentation=None,
        dtype=usual.dtype,
        precision=ComputeConfig.precision,
        decoder=usual.decoder,
    )


def _inputs(data: PicturesConfig, model: BackboneConfig) -> dict[str, Any]:
    """Return the fields that identify the frozen layers, their weights and their input."""
    frozen = models.build_frozen(model, data.image_size)
    preprocessing = models.preprocessing(model)
    assert preprocessing is not None, "frozen layers have weights"
    return {
        "model": model.name,
        "cut": frozen.cut,
        "weights": digest(frozen.module.state_dict()),
        "decode": int(str(decoding(data)["decode"])),
        "size": data.image_size,
        "resize": data.resize,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
    }


def augmentation_of(config: AugmentationConfig) -> dict[str, float | str] | None:
    """Return the settings of the configured augmentation, other than defaults, or None if there is none."""
    usual = vars(AugmentationConfig())
    return {name: value for name in usual if (value := getattr(config, name)) != usual[name]} or None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Compute the hexadecimal SHA-256 of the names, shapes, dtypes and values of tensors."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def format_value(value: object) -> str:
    """Format a value of a fingerprint for a message."""
    if isinstance(value, dict):
        return " ".join(f"{name} {v if isinstance(v, str) else f'{v:g}'}" for name, v in value.items() if v)
    text = str(value) if value is not None else "none"
    return f"{text[:12]}..." if len(text) == 64 else text
