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
from cvdist import recipes
from cvdist.config import ExtractionConfig, FeaturesConfig, PreprocessConfig, TrainConfig
from cvdist.features import build
from cvdist.features import open as open_cache
from cvdist.features.build import BuiltCache, ExtractionPlan
from cvdist.features.extract import Extractor
from cvdist.features.loader import FeatureLoader
from cvdist.features.plan import WorkUnit
from cvdist.features.receipt import Receipt

CPU = torch.device("cpu")
SIZE = 32


def write_weights(path: Path, seed: int = 0, scale: float = 1.0) -> Path:
    """Random convolutions of a VGG11, as a file. scale: of the first layer's weights."""
    torch.manual_seed(seed)
    state = torchvision.models.vgg11(init_weights=True).features.state_dict()
    state["0.weight"] *= scale
    torch.save({f"features.{name}": tensor for name, tensor in state.items()}, path)
    return path


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


def config(data: Path | str, features: Path | str, weights: Path, cache: Path, **changes: Any) -> CacheConfig:
    """A configuration for tiny pictures."""
    recipe = recipes.find("dogs-cats-vgg16-features")
    return configs.replace(
        CacheConfig(**{**vars(recipe), "features": CacheFeatures(**vars(recipe.features))}),
        **{
            "data": str(data),
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


def computing(chosen: CacheConfig, plan: ExtractionPlan, computed: list[WorkUnit]) -> Any:
    """What `build` calls, in this process; `computed` notes the slices."""

    def compute(left: Sequence[WorkUnit]) -> Iterator[Receipt]:
        extractor = Extractor(extraction(chosen), plan.fingerprint, CPU)
        for work in left:
            receipt = extractor(work)
            computed.append(work)
            yield receipt

    return compute


def extract(chosen: CacheConfig) -> tuple[BuiltCache, list[str]]:
    """Make or update a cache. Returns the paths of the pictures that were computed, too."""
    plan = build.make_plan(extraction(chosen))
    computed: list[WorkUnit] = []
    built = build.build(extraction(chosen), plan, computing(chosen, plan, computed))
    return built, [path for work in computed for path in work.paths]


def loader(chosen: CacheConfig) -> FeatureLoader:
    """Batches from the cache, on the CPU."""
    return open_cache.load(chosen, CPU, workers_on_node=1)
