"""What features depend on besides the pictures: two caches with one fingerprint hold the same numbers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cvdist import config as configs
from cvdist import models
from cvdist.config import TrainConfig
from cvdist.data.augment import Augmentation
from cvdist.data.images.decode import settings as decoding

DEFAULT_VIEWS = 4  # of a recipe that augments
# What makes views differ where a recipe does not say it: what photographs of most things may undergo.
_USUAL = {"horizontal_flip": 0.5, "rotation": 10.0}


@dataclass(frozen=True)
class Fingerprint:
    """Everything that the features of a given picture depend on.

    model, cut: architecture, and the last layer that was run; weights: SHA-256 of the frozen layers' tensors;
    decode, size, resize, mean, std: from a file to the network's input; views: stored for each training
    picture; augmentation: of the views but the first, None where there is one; dtype: as stored; precision: as
    `--precision` of the extraction; decoder: as `--decoder`.
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
    augmentation: dict[str, float] | None
    dtype: str
    precision: str
    decoder: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; as older versions wrote it, where they knew all of it."""
        values = dataclasses.asdict(self)
        if self.decoder == "cpu":
            del values["decoder"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fingerprint:
        """Inverse of `to_dict`, also after JSON."""
        lists = {name: tuple(values[name]) for name in ("mean", "std")}
        return cls(**{**values, **lists})

    def differences(self, asked: Fingerprint, leave_out: Collection[str] = ()) -> list[str]:
        """What `asked` has otherwise, each as `flag: the cache has ..., asked for is ...`."""
        lines = []
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(asked, field.name)
            if mine != theirs and field.name not in leave_out:
                name = _FLAGS.get(field.name, field.name)
                lines.append(f"{name}: the cache has {short(mine)}, asked for is {short(theirs)}")
        return lines


_FLAGS = {
    "model": "--model",
    "cut": "--trainable-blocks (last frozen layer)",
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


def of(config: TrainConfig) -> Fingerprint:
    """The fingerprint of what `config` asks an extraction for. Reads the weights.

    Raises:
        UserError: if the model has no frozen layers, or its weights can't be used.
    """
    views = stored_views(config)
    return _of(config, views, _augmentation_of_views(config) if views > 1 else None)


def asked_for_training(config: TrainConfig) -> Fingerprint:
    """The same for a run that trains from a cache, whose views, dtype and precision it takes as they are.

    Raises:
        UserError: as `of`.
    """
    return _of(config, 1, None)


def _of(config: TrainConfig, views: int, augmentation: dict[str, float] | None) -> Fingerprint:
    frozen = models.build_frozen(config.model)
    preprocessing = models.preprocessing(config.model)
    assert preprocessing is not None, "frozen layers have weights"
    return Fingerprint(
        model=config.model.model,
        cut=frozen.cut,
        weights=digest(frozen.module.state_dict()),
        decode=int(str(decoding(config.data)["decode"])),
        size=config.data.image_size,
        resize=config.data.resize,
        mean=preprocessing.mean,
        std=preprocessing.std,
        views=views,
        augmentation=augmentation,
        dtype=config.features.features_dtype,
        precision=config.loop.precision,
        decoder=config.features.decoder,
    )


def stored_views(config: TrainConfig) -> int:
    """How many views of a picture an extraction stores."""
    return config.features.views or (1 if augmentation_of(config) is None else DEFAULT_VIEWS)


def _augmentation_of_views(config: TrainConfig) -> dict[str, float] | None:
    """The configured augmentation; without one the usual, for views that are alike would be of no use."""
    return augmentation_of(config) or augmentation_of(configs.replace(config, **_USUAL))


def augmentation_of(config: TrainConfig) -> dict[str, float] | None:
    """The settings of the configured augmentation, if there is any."""
    augmentation = Augmentation.from_config(config.data, seed=0)
    return None if augmentation is None else dataclasses.asdict(augmentation)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256 of names, shapes, dtypes and values, whatever file they came in."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def short(value: object) -> str:
    """For messages."""
    if isinstance(value, dict):
        return " ".join(f"{name} {number:g}" for name, number in value.items() if number)
    text = str(value) if value is not None else "none"
    return f"{text[:12]}..." if len(text) == 64 else text
