"""Small caches of real features for tests: VGG11 on tiny pictures, without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision

from cvdist import config as configs
from cvdist import recipes
from cvdist.config import TrainConfig
from cvdist.features import build
from cvdist.features import open as open_cache
from cvdist.features.build import Built, Plan
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


def config(data: Path | str, features: Path | str, weights: Path, cache: Path, **changes: Any) -> TrainConfig:
    """A configuration for tiny pictures."""
    return configs.replace(
        recipes.find("dogs-cats-vgg16-features"),
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


def computing(chosen: TrainConfig, plan: Plan, computed: list[WorkUnit]) -> Any:
    """What `build` calls, in this process; `computed` notes the slices."""

    def compute(left: Sequence[WorkUnit]) -> Iterator[Receipt]:
        extractor = Extractor(chosen, plan.fingerprint, CPU)
        for work in left:
            receipt = extractor(work)
            computed.append(work)
            yield receipt

    return compute


def extract(chosen: TrainConfig) -> tuple[Built, list[str]]:
    """Make or update a cache. Returns the paths of the pictures that were computed, too."""
    plan = build.make_plan(chosen)
    computed: list[WorkUnit] = []
    built = build.build(chosen, plan, computing(chosen, plan, computed))
    return built, [path for work in computed for path in work.paths]


def loader(chosen: TrainConfig) -> FeatureLoader:
    """Batches from the cache, on the CPU."""
    return open_cache.load(chosen, CPU, workers_on_node=1)
