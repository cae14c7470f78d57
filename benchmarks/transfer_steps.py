"""VGG16 with frozen convolutions: through the loop, the bare arithmetic, and the book's code.

The limit is the bare arithmetic: forward pass of the convolutions, and forward pass, backward pass and update
of the classifier, on one batch in memory, in the loop's precision and memory format. The book's code uses
float32 in PyTorch's default memory format, with Pillow in a DataLoader. Batches have 64 photographs of 500x375
pixels; weights are random.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.cost_model import H100
from benchmarks.harness import Comparison, summarize
from benchmarks.photographs import write_folder
from cvdist import config as configs
from cvdist import loaders, recipes
from cvdist.config import TrainConfig
from cvdist.tracking import NoTracker
from cvdist.training.optimizer import build_optimizer, set_learning_rate
from cvdist.training.run import Run
from cvdist.training.train import train_epoch
from tests.helpers.runs import build

BATCH, STEPS, ROUNDS = 64, 2, 3


def measure() -> Iterator[Comparison]:
    """Measure pictures per second; each side runs once in each round."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_folder(root / "pictures", BATCH * STEPS)
        vgg = torchvision.models.vgg16()
        torch.save({f"features.{n}": t for n, t in vgg.features.state_dict().items()}, root / "weights.pth")
        config = configs.replace(
            recipes.find("dogs-cats-vgg16"),
            data=str(root / "pictures"), cache=str(root / "cache"), batch_size=BATCH, epochs=1, tracking="none",
            weights=str(root / "weights.pth"), weights_preprocessing="imagenet", name="bench",
        )  # fmt: skip
        loaders.prepare(config)
        run = _run(config, root)
        book = book_epoch(root / "pictures", BATCH)
        sides = {
            "loop": through_the_loop(run, BATCH * STEPS),
            "limit": _bare(run),
            "book": lambda: BATCH * STEPS / book(),
        }
        rate = _matrix_rate()
        rounds = [{name: run() for name, run in sides.items()} for _ in range(ROUNDS + 1)][1:]
    against_limit = [(r["loop"], r["limit"]) for r in rounds]
    against_book = [(r["loop"], r["book"]) for r in rounds]
    yield summarize("VGG16 frozen: loop / bare arithmetic", against_limit, unit="pictures/s", target=0.90)
    yield summarize("VGG16 frozen: loop / the book's code", against_book, unit="pictures/s", target=4)
    print(f"  this processor multiplies bfloat16 matrices at {rate:,.0f} GFLOP/s: at most "
          f"{rate / H100.forward_gflop:.1f} pictures/s through the convolutions alone")  # fmt: skip


def _run(config: TrainConfig, folder: Path) -> Run:
    return build(configs.replace(config, storage=str(folder), name="none"), NoTracker())


def through_the_loop(run: Run, pictures: int) -> Callable[[], float]:
    """Return a function that trains an epoch of so many pictures, and returns pictures per second."""

    def epoch() -> float:
        run.progress.position = 0
        started = time.perf_counter()
        train_epoch(run, 1)
        return pictures / (time.perf_counter() - started)

    return epoch


def _bare(run: Run) -> Callable[[], float]:
    frozen, head = run.frozen, run.trained
    assert frozen is not None
    optimizer = build_optimizer(head, run.config.optimizer)
    set_learning_rate(optimizer, run.config.optimizer.lr)
    images = torch.randn(BATCH, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 2, (BATCH,))

    def steps() -> float:
        head.train()
        started = time.perf_counter()
        for _ in range(STEPS):
            with run.precision.autocast():
                with torch.no_grad():
                    features = frozen(images)
                scores = head(features)
            F.cross_entropy(scores.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return BATCH * STEPS / (time.perf_counter() - started)

    return steps


def book_epoch(pictures: Path, batch: int) -> Callable[[], float]:
    """Return a function that trains an epoch on a folder by the book's code, and returns seconds."""
    transform = transforms.Compose(
        [
            transforms.Resize((224, 224)),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    photographs = datasets.ImageFolder(str(pictures / "train"), transform)
    batches = DataLoader(photographs, batch_size=batch, shuffle=True, num_workers=2, persistent_workers=True)
    vgg = torchvision.models.vgg16()
    vgg.classifier[6] = nn.Linear(4096, 2)
    vgg.features.requires_grad_(False)
    optimizer = torch.optim.SGD(vgg.classifier.parameters(), lr=0.0001, momentum=0.5)

    def run() -> float:
        vgg.train()
        started = time.perf_counter()
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(vgg(images), labels).backward()
            optimizer.step()
        return time.perf_counter() - started

    return run


def _matrix_rate() -> float:
    """Return the GFLOP/s of a product of large bfloat16 matrices."""
    a, b = (torch.randn(4096, 4096).bfloat16() for _ in range(2))
    a @ b
    started = time.perf_counter()
    for _ in range(5):
        a @ b
    return 5 * 2 * 4096**3 / (time.perf_counter() - started) / 1e9
