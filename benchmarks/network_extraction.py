"""Extraction of pooled features by networks of several kinds, against the bare network in the same precision.

Our side reads, decodes, computes, compresses and stores. The other side computes on random batches in memory,
with the same threads, precision and memory format. MobileNetV2 computes so fast that decoding takes longer: it
is compared with decoding alone plus the bare network, both on all cores, one after the other. All networks have
random weights.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision
from torch import nn

from benchmarks import feature_extraction
from benchmarks.harness import Comparison, summarize
from benchmarks.photographs import write_folder
from cvdist import config as configs
from cvdist import recipes
from cvdist.config import PreprocessConfig
from cvdist.data.images.ahead import DecodeAhead

# Pictures of a round: enough for some seconds.
PICTURES = {"vgg16": 64, "resnet50": 96, "vit_b_16": 64, "convnext_tiny": 96, "mobilenet_v2": 384}
ROUNDS = 3
DECODING_COUNTS = "mobilenet_v2"
FLOAT16_BYTES = 2 * 1280


def measure() -> Iterator[Comparison]:
    """Measure pictures per second for each network, and bytes per picture for MobileNetV2."""
    for name, count in PICTURES.items():
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            write_folder(root / "pictures", count)
            weights = root / "weights.pth"
            torch.save(_network(name).state_dict(), weights)
            config = configs.replace(
                PreprocessConfig.of(recipes.find("transfer-features")),
                model=name, data=str(root / "pictures"), features=str(root / "features"), weights=str(weights),
                weights_preprocessing="imagenet", image_size=224, shard_size=64,
            )  # fmt: skip
            rounds, stored = [], 0.0
            for _ in range(ROUNDS + 1):
                built, ours = feature_extraction.extract_into_empty_folder(config)
                bare = feature_extraction.bare(config, count)
                if name == DECODING_COUNTS:
                    bare = 1 / (1 / bare + 1 / _decode(config))
                    stored = built.manifest.stored_bytes / built.computed
                rounds.append((ours, bare))
        other = "decoding + the bare network" if name == DECODING_COUNTS else "the bare network"
        yield summarize(f"extraction with {name} / {other}", rounds[1:], unit="pictures/s", target=0.90)
        if stored:
            yield summarize(
                "bytes a picture: 1,280 float16 numbers / stored",
                [(FLOAT16_BYTES, stored)],
                unit="bytes",
                target=1,
            )


@torch.no_grad()
def _network(name: str) -> nn.Module:
    """Build a network with random weights, whose batch norms know the statistics of its activations.

    Otherwise activations would shrink from layer to layer, to numbers that take a processor far longer.
    """
    network = torchvision.models.get_model(name).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network(torch.randn(8, 3, 224, 224))
    return network


def _decode(config: PreprocessConfig) -> float:
    """Return the pictures per second of decoding alone, on all cores."""
    paths = sorted(str(path.relative_to(config.data.uri)) for path in Path(config.data.uri).rglob("*.jpg"))
    ahead = DecodeAhead(
        config.data.uri, config.data.image_size, config.data.resize,
        threads=0, timeout=config.runtime.data_timeout, for_gpu=False, processes=False,
    )  # fmt: skip
    started = time.perf_counter()
    decoded = sum(len(part) for _, part in ahead.batches(paths, feature_extraction.BATCH))
    assert decoded == len(paths)
    return decoded / (time.perf_counter() - started)
