"""Training steps of the book's CNN: through the loop, on one fixed batch (the limit), and the book's way.

All sides use one process, one thread, batches of 32, float32 and SGD. They differ in where batches come from
and in what is logged. The book uses a DataLoader that transforms one picture at a time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.harness import Comparison, summarize
from cvdist import config as configs
from cvdist import recipes
from cvdist.config import TrainConfig
from cvdist.tracking import NoTracker
from cvdist.training.optimizer import build_optimizer, set_learning_rate
from cvdist.training.run import Run
from cvdist.training.train import train_epoch
from tests.helpers.runs import build

PAIRS = 15
STEPS = 125  # 4,000 digits in batches of 32


def measure() -> Iterator[Comparison]:
    """Measure steps per second; each side runs once in each round."""
    torch.set_num_threads(1)
    config = configs.replace(
        recipes.find("mnist-cnn"), dataset="digits", name="bench", epochs=1, tracking="none"
    )
    with tempfile.TemporaryDirectory() as folder:
        sides = {"loop": _through_the_loop(config, Path(folder)), "limit": _fixed_batch(config, Path(folder))}
        sides["book"] = _the_books_way(config, Path(folder))
        rounds = [{name: run() for name, run in sides.items()} for _ in range(PAIRS + 1)][1:]
    unit = "steps/s"
    against_limit = [(r["loop"], r["limit"]) for r in rounds]
    against_book = [(r["loop"], r["book"]) for r in rounds]
    yield summarize("steps: loop / fixed batch in memory", against_limit, unit=unit, target=0.95)
    yield summarize("steps: loop / the book's DataLoader", against_book, unit=unit, target=1.4)


def _run(config: TrainConfig, folder: Path) -> Run:
    return build(configs.replace(config, storage=str(folder), name="none"), NoTracker())


def _through_the_loop(config: TrainConfig, folder: Path) -> Callable[[], float]:
    run = _run(config, folder)

    def epoch() -> float:
        run.progress.position = 0
        started = time.perf_counter()
        train_epoch(run, 1)
        return STEPS / (time.perf_counter() - started)

    return epoch


def _bare(config: TrainConfig, folder: Path) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Return a training step with the same model, optimizer and loss, and nothing else."""
    model = _run(config, folder).model.train()
    optimizer = build_optimizer(model, config.optimizer)
    set_learning_rate(optimizer, config.optimizer.lr)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _fixed_batch(config: TrainConfig, folder: Path) -> Callable[[], float]:
    step = _bare(config, folder)
    images, labels = torch.randn(32, 1, 28, 28), torch.randint(0, 10, (32,))

    def run() -> float:
        started = time.perf_counter()
        for _ in range(STEPS):
            step(images, labels)
        return STEPS / (time.perf_counter() - started)

    return run


class _Pictures(Dataset[tuple[torch.Tensor, int]]):
    """Works like torchvision's MNIST: each access creates a Pillow image and transforms it."""

    def __init__(self, images: np.ndarray, labels: list[int]) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def _the_books_way(config: TrainConfig, folder: Path) -> Callable[[], float]:
    loader = _run(config, folder).loader
    images, names = loader.pictures("train", range(loader.info.train_size))
    pictures = _Pictures(images[:, 0].numpy(), [int(name) for name in names])
    batches = DataLoader(pictures, batch_size=32, shuffle=True)
    step = _bare(config, folder)

    def run() -> float:
        started = time.perf_counter()
        for pixels, labels in batches:
            step(pixels, labels)
        return STEPS / (time.perf_counter() - started)

    return run
