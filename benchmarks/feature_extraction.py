"""Extraction of features: against the bare backbone, the book's code, its bytes, and what an update costs.

Our side reads, decodes, computes, compresses and stores. The bare backbone computes on batches in memory, with
the same threads, precision and memory format. The book's code uses float32 in PyTorch's default memory format,
and its own loader. Bytes are measured on real photographs with real weights, only if CVDIST_TEST_DATA is set.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.harness import Comparison, summarize
from benchmarks.photographs import write_folder
from cvdist import config as configs
from cvdist import models, recipes
from cvdist.config import PreprocessConfig
from cvdist.features import build
from cvdist.features.extract import Extractor
from cvdist.resumable_map import Receipt, ResultStore, WorkUnit

PICTURES, BATCH, ROUNDS = 128, 16, 3
BOOK_BATCHES = 2
REAL, ADDED = 200, 2
FLOAT32_BYTES = 512 * 7 * 7 * 4
CPU = torch.device("cpu")


def measure() -> Iterator[Comparison]:
    """Measure pictures per second, bytes per picture, and the seconds of an update."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_folder(root / "pictures", PICTURES)
        vgg = torchvision.models.vgg16()
        weights = root / "weights.pth"
        torch.save({f"features.{n}": t for n, t in vgg.features.state_dict().items()}, weights)
        config = _config(root / "pictures", root / "features", weights, "imagenet")
        rounds = []
        for _ in range(ROUNDS + 1):
            rounds.append(
                (
                    extract_into_empty_folder(config)[1],
                    bare(config, PICTURES),
                    _the_books(vgg, root / "pictures"),
                )
            )
        rounds = rounds[1:]
    yield summarize(
        "extraction / the bare backbone", [(ours, plain) for ours, plain, _ in rounds],
        unit="pictures/s", target=0.90,
    )  # fmt: skip
    yield summarize(
        "extraction / the book's code", [(ours, book) for ours, _, book in rounds], unit="pictures/s", target=4
    )
    bare_limit = sum(plain / book for _, plain, book in rounds) / len(rounds)
    print(f"  the bare backbone itself is {bare_limit:.2f} times the book's code on this processor")
    if data := os.environ.get("CVDIST_TEST_DATA"):
        yield from _real(Path(data))
    else:
        print("  bytes of real photographs are left out: CVDIST_TEST_DATA is not set")


def _config(pictures: Path, features: Path, weights: Path, preprocessing: str) -> PreprocessConfig:
    return configs.replace(
        PreprocessConfig.of(recipes.find("dogs-cats-vgg16-features")),
        data=str(pictures), features=str(features), weights=str(weights), weights_preprocessing=preprocessing,
        shard_size=64,
    )  # fmt: skip


def _extract(config: PreprocessConfig) -> tuple[build.BuiltCache, float]:
    """Extract features, and return the result and the seconds without loading the weights."""
    todo = build.make_plan(config)
    extractor = Extractor(config, todo.fingerprint, CPU)

    def compute(units: Sequence[WorkUnit], store: ResultStore) -> Iterator[Receipt]:
        return map(partial(store.process, extractor), units)

    built = build.build(config, todo, compute)
    return built, built.seconds


def extract_into_empty_folder(config: PreprocessConfig) -> tuple[build.BuiltCache, float]:
    """Extract features into an empty folder, and return the result and the pictures per second."""
    shutil.rmtree(config.features.uri, ignore_errors=True)
    built, seconds = _extract(config)
    return built, built.computed / seconds


@torch.inference_mode()
def bare(config: PreprocessConfig, pictures: int) -> float:
    """Return the pictures per second of the frozen layers alone, on batches in memory."""
    from cvdist.distributed.precision import choose_precision

    frozen = models.build_frozen(config.model, config.data.image_size).module.to(
        memory_format=torch.channels_last
    )
    precision = choose_precision(config.compute.precision, CPU)
    images = torch.randn(BATCH, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    started = time.perf_counter()
    for _ in range(pictures // BATCH):
        with precision.autocast():
            frozen(images)
    return pictures / (time.perf_counter() - started)


@torch.inference_mode()
def _the_books(vgg: torchvision.models.VGG, pictures: Path) -> float:
    transform = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
    folder = datasets.ImageFolder(str(pictures / "train"), transform)
    count, started, found = BOOK_BATCHES * BATCH, time.perf_counter(), []
    for images, _ in DataLoader(folder, batch_size=BATCH):
        found.append(vgg.features(images))
        if len(found) == BOOK_BATCHES:
            break
    return count / (time.perf_counter() - started)


def _real(data: Path) -> Iterator[Comparison]:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        sources = [
            (part, path)
            for part, count in (("train", REAL // 2 - 20), ("valid", 20))
            for name in ("cat", "dog")
            for path in sorted((data / "dogs-vs-cats" / part / name).glob("*.jpg"))[:count]
        ]
        files = 0
        for part, path in sources:
            target = root / "pictures" / part / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            files += path.stat().st_size
        config = _config(
            root / "pictures", root / "features", data / "weights" / "vgg16_features.pth", "vgg-features"
        )
        first, seconds = _extract(config)
        stored = first.manifest.stored_bytes / len(sources)
        yield summarize(
            "bytes a picture: the book's float32 array / stored",
            [(FLOAT32_BYTES, stored)],
            unit="bytes",
            target=10,
        )
        yield summarize(
            "bytes a picture: the JPEG / stored", [(files / len(sources), stored)], unit="bytes", target=1
        )
        more = sorted((data / "dogs-vs-cats" / "train" / "cat").glob("*.jpg"))[-ADDED:]
        for path in more:
            shutil.copyfile(path, root / "pictures" / "train" / "cat" / path.name)
        update, again = _extract(config)
        assert update.computed == ADDED
        yield summarize(
            f"seconds: an update by {100 * ADDED / len(sources):g}% / the whole extraction", [(again, seconds)],
            unit="seconds", target=0.03, at_most=True,
        )  # fmt: skip
