"""Small caches of real features for tests: VGG11 on tiny pictures, without Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision

from cvdist import config as configs
from cvdist import loaders, recipes
from cvdist.config import ExtractionConfig, FeaturesConfig, PreprocessConfig, TrainConfig
from cvdist.data.dataset import Batch
from cvdist.features import build, manifest
from cvdist.features import open as open_cache
from cvdist.features.build import BuiltCache, ExtractionPlan
from cvdist.features.extract import Extractor
from cvdist.features.loader import FeatureLoader
from cvdist.features.manifest import Manifest
from cvdist.resumable_map import Receipt, ResultStore, WorkUnit
from cvdist.storage import Folder
from tests.helpers import pictures as made_up
from tests.helpers.jobs import user_error

CPU = torch.device("cpu")
SIZE = 32


@dataclass(frozen=True)
class CacheFeatures(FeaturesConfig, ExtractionConfig):
    """What a cache is made with and what it is trained from with."""


@dataclass(frozen=True)
class CacheConfig(TrainConfig):
    """Settings of an extraction and of a training from it, for tests of both."""

    features: CacheFeatures = field(default_factory=CacheFeatures)


def extraction(chosen: CacheConfig) -> PreprocessConfig:
    """The settings of the extraction."""
    features = configs.part_of(ExtractionConfig, chosen.features)
    return dataclasses.replace(PreprocessConfig.of(chosen), features=features)


def write_weights(path: Path, seed: int = 0, scale: float = 1.0) -> Path:
    """Random convolutions of a VGG11, as a file. scale: of the first layer's weights."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        shapes = torchvision.models.vgg11().features.state_dict()
    state = {f"features.{name}": torch.zeros(tensor.shape) for name, tensor in shapes.items()}
    for weight in state.values():
        if weight.ndim == 4:
            torch.nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
    state["features.0.weight"] *= scale
    torch.save(state, path)
    return path


def config(
    pictures: Path | str, features: Path | str, weights: Path, cache: Path, **changes: Any
) -> CacheConfig:
    """A configuration for tiny pictures."""
    recipe = recipes.find("dogs-cats-vgg16-features")
    return configs.replace(
        CacheConfig(**{**vars(recipe), "features": CacheFeatures(**vars(recipe.features))}),
        **{
            "data": str(pictures),
            "features": str(features),
            "weights": str(weights),
            "cache": str(cache),
            "weights_preprocessing": "imagenet",
            "model": "vgg11",
            "image_size": SIZE,
            "shard_size": 4,
            "precision": "float32",
            "tracking": "none",
            "name": "test",
            "batch_size": 4,
            "epochs": 1,
            **changes,
        },
    )


def flags(pictures: Path | str, features: Path | str, weights: Path | str) -> tuple[Path | str, ...]:
    """The same as arguments of a job."""
    return (
        *("dogs-cats-vgg16-features", "--data", pictures, "--features", features, "--model", "vgg11"),
        *("--weights", weights, "--weights-preprocessing", "imagenet", "--image-size", str(SIZE)),
    )


def two_colors(root: Path) -> CacheConfig:
    """Make a cache of two classes that differ in their colors, and settings to train a linear head."""
    made_up.write(root / "pictures", {"train/a": 9, "train/b": 8, "valid/a": 4, "valid/b": 3})
    chosen = config(
        *(root / "pictures", root / "features", write_weights(root / "weights.pth"), root / "cache"),
        head="linear",
        lr=0.0001,
        storage=str(root),
        runtime="inline",
        visualize=False,
        system_metrics=False,
        log_model=False,
    )
    extract(chosen)
    return chosen


def computing(chosen: CacheConfig, plan: ExtractionPlan, computed: list[WorkUnit]) -> Any:
    """What `build` calls, in this process; `computed` notes the work units."""

    def compute(units: Sequence[WorkUnit], store: ResultStore) -> Iterator[Receipt]:
        extractor = Extractor(extraction(chosen), plan.fingerprint, CPU)
        for unit in units:
            receipt = store.process(extractor, unit)
            computed.append(unit)
            yield receipt

    return compute


def extract(chosen: CacheConfig) -> tuple[BuiltCache, list[str]]:
    """Make or update a cache. Returns the paths of the pictures that were computed, too."""
    plan = build.make_plan(extraction(chosen))
    computed: list[WorkUnit] = []
    built = build.build(extraction(chosen), plan, computing(chosen, plan, computed))
    return built, [path for unit in computed for path in unit.paths]


def manifest_of(chosen: TrainConfig) -> Manifest:
    """The manifest of a cache that is there."""
    return manifest.read(Folder.open(chosen.features.uri, "--features"))


def loader(chosen: CacheConfig) -> FeatureLoader:
    """Batches from the cache, on the CPU."""
    return open_cache.load(chosen, CPU, workers_on_node=1)


def opened(chosen: TrainConfig, **changes: Any) -> Any:
    """The loader of a configuration with `changes`, as a job opens it."""
    chosen = configs.replace(chosen, **changes)
    loaders.prepare(chosen)
    return loaders.open_loader(chosen, CPU)


def epoch(
    loader: FeatureLoader,
    batch_size: int = 4,
    *,
    number: int = 1,
    rank: int = 0,
    world: int = 1,
    shuffle: Any = None,
    position: int = 0,
) -> list[Batch]:
    """An epoch's batches of one worker."""
    order = loader.epoch_order(batch_size, 0, number, shuffle or loader.shuffle(world))
    return list(loader.train_batches(order, rank, world, position))


def refusal(chosen: TrainConfig, **changes: Any) -> str:
    """The line with which a job that trains from the cache refuses it."""
    text = user_error(loaders.prepare, configs.replace(chosen, **changes))
    assert "--features" in text
    return text
