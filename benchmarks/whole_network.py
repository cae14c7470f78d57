"""MobileNetV2 trained whole: through the loop, and as torchvision's reference script trains it.

Both start from random weights, crop photographs of 500x375 pixels to 224x224, flip them, and take steps of SGD
with momentum at batches of 32. torchvision's computes in float32, as its script does without `--amp`, and reads
with a process for each core. Ours runs once in float32, and once in the precision that a job chooses by itself.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks.augmentation import reference_transform
from benchmarks.harness import Comparison, compare
from benchmarks.photographs import write_folder
from benchmarks.transfer_steps import through_the_loop
from cvdist import config as configs
from cvdist import loaders, models, recipes
from cvdist.hardware import usable_cores
from cvdist.tracking import NoTracker
from tests.helpers.runs import build

BATCH, STEPS = 32, 4


def measure() -> Iterator[Comparison]:
    """Measure pictures per second over an epoch."""
    torch.set_num_threads(usable_cores())
    with tempfile.TemporaryDirectory() as folder:
        root = write_folder(Path(folder) / "pictures", BATCH * STEPS)
        reference = _reference(root / "train")
        for precision, target in (("float32", 1.0), ("auto", 1.0)):
            yield compare(
                f"MobileNetV2 whole, {precision}: ours / torchvision's reference",
                _ours(root, Path(folder), precision),
                reference,
                unit="pictures/s",
                target=target,
                pairs=3,
            )


def _ours(root: Path, folder: Path, precision: str) -> Callable[[], float]:
    config = configs.replace(
        recipes.find("transfer"), model="mobilenet_v2", weights="none", trainable_stages="all",
        data=str(root), cache=str(folder / "cache"), storage=str(folder), name=precision, batch_size=BATCH,
        optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=4e-5, precision=precision,
        horizontal_flip=0.5, random_resized_crop=0.08, epochs=1, tracking="none",
    )  # fmt: skip
    config = models.with_preprocessing(config)
    loaders.prepare(config)
    return through_the_loop(build(config, NoTracker()), BATCH * STEPS)


def _reference(pictures: Path) -> Callable[[], float]:
    batches = DataLoader(
        ImageFolder(str(pictures), reference_transform({})),
        BATCH, shuffle=True, num_workers=usable_cores(), persistent_workers=True,
    )  # fmt: skip
    model = torchvision.models.mobilenet_v2(num_classes=2)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=4e-5)

    def epoch() -> float:
        model.train()
        started = time.perf_counter()
        for images, labels in batches:
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return BATCH * STEPS / (time.perf_counter() - started)

    return epoch
