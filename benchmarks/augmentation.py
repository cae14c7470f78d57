"""Augmented batches of photographs: ours, and a loader as torchvision's reference script sets one up.

Both have all cores. Ours reads pixels that were decoded once, and augments whole batches in this process;
torchvision's decodes the JPEGs in each epoch, and augments picture by picture in processes. Training
would use the same cores at the same time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.harness import Comparison, compare
from benchmarks.photographs import write_folder
from cvdist import config as configs
from cvdist import loaders
from cvdist.config import TrainConfig
from cvdist.hardware import usable_cores

COUNT, BATCH = 256, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BILINEAR = v2.InterpolationMode.BILINEAR
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "crop, flip": ({}, 1.2),
    "erase": ({"random_erase": 0.5}, 1.2),
    "mixup": ({"mixup_alpha": 0.2}, 1.2),
    "cutmix": ({"cutmix_alpha": 1.0}, 1.2),
    "ra": ({"auto_augment": "ra"}, 0.9),
    "ta_wide": ({"auto_augment": "ta_wide"}, 0.9),
    "augmix": ({"auto_augment": "augmix"}, 0.9),
    "imagenet": ({"auto_augment": "imagenet"}, 0.9),
}


def measure() -> Iterator[Comparison]:
    """Measure pictures per second over an epoch."""
    torch.set_num_threads(usable_cores())
    with tempfile.TemporaryDirectory() as folder:
        root = write_folder(Path(folder) / "pictures", COUNT)
        for name, (settings, target) in KINDS.items():
            yield compare(
                f"augmentation: {name}: ours / torchvision",
                _ours(root, Path(folder), settings),
                _reference(root / "train", settings),
                unit="pictures/s",
                target=target,
                pairs=3,
            )


def _ours(root: Path, folder: Path, settings: dict[str, Any]) -> Callable[[], float]:
    config = configs.replace(
        TrainConfig(), dataset="images", data=str(root), cache=str(folder / "cache"), batch_size=BATCH,
        horizontal_flip=0.5, random_resized_crop=0.08, **settings,
    )  # fmt: skip
    loaders.prepare(config)
    loader = loaders.open_loader(config, torch.device("cpu"), normalization=(MEAN, STD))
    shuffle = loader.shuffle(1)
    return _rate(lambda: loader.train_batches(loader.epoch_order(BATCH, 0, 1, shuffle), 0, 1))


def reference_transform(settings: dict[str, Any]) -> nn.Module:
    """Return the transform of torchvision's reference script, with its flags of the same names."""
    policies = {"ra": v2.RandAugment, "ta_wide": v2.TrivialAugmentWide, "augmix": v2.AugMix,
                "imagenet": v2.AutoAugment}  # fmt: skip
    steps: list[nn.Module] = [v2.RandomResizedCrop(224, interpolation=BILINEAR, antialias=True)]
    steps.append(v2.RandomHorizontalFlip(0.5))
    if "auto_augment" in settings:
        steps.append(policies[settings["auto_augment"]](interpolation=BILINEAR))
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    if "random_erase" in settings:
        steps.append(v2.RandomErasing(settings["random_erase"]))
    return v2.Compose(steps)


def _reference(root: Path, settings: dict[str, Any]) -> Callable[[], float]:
    mixtures = {"mixup_alpha": v2.MixUp, "cutmix_alpha": v2.CutMix}
    mix = next((kind(alpha=settings[a], num_classes=2) for a, kind in mixtures.items() if a in settings), None)

    def collate(samples: list[tuple[torch.Tensor, int]]) -> Any:
        batch = default_collate(samples)
        return batch if mix is None else mix(*batch)

    pictures = ImageFolder(str(root), reference_transform(settings))
    batches = DataLoader(
        pictures, BATCH, shuffle=True, num_workers=usable_cores(), collate_fn=collate, persistent_workers=True
    )
    return _rate(lambda: batches)


def _rate(epoch: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        count = sum(len(batch[0] if isinstance(batch, (list, tuple)) else batch.images) for batch in epoch())
        return count / (time.perf_counter() - started)

    return run
