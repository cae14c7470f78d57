"""Batch prediction by the job's own engine against the bare forward of a whole VGG16.

Our side lists, reads, decodes, computes and writes Parquet. The bare forward pass computes on batches in
memory, with the same threads, precision and memory format. If CVDIST_TEST_DATA is set, convolutions and
photographs are real, else synthetic. The classifier is random, which costs the same.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision

from benchmarks.harness import Comparison, compare
from benchmarks.photographs import write_folder
from cvdist.config import ActorsConfig, InferenceConfig, PredictConfig, PredictionConfig, SavedModelConfig
from cvdist.data.images.ahead import BATCH
from cvdist.jobs.predict import predict_planned
from cvdist.prediction import batch
from cvdist.prediction.pictures import find_pictures
from cvdist.prediction.predict import Predictor
from cvdist.saved import SavedModel, open_model

PICTURES, PAIRS = 240, 2
CPU = torch.device("cpu")


def measure() -> Iterator[Comparison]:
    """Measure pictures per second."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        saved = _model(root)
        _pictures(root / "pictures")
        config = PredictConfig(
            prediction=PredictionConfig(data=(str(root / "pictures"),), output=str(root / "output")),
            runtime=ActorsConfig(launcher="inline"),
            inference=InferenceConfig(device="cpu", resize="squash"),
        )
        predictor = Predictor(config.prediction.data[0], config.inference, saved, CPU)
        yield compare(
            "batch prediction / the bare forward",
            lambda: _ours(config, saved, root),
            lambda: _bare(predictor),
            unit="pictures/s",
            target=0.85,
            pairs=PAIRS,
        )


def _model(root: Path) -> SavedModel:
    data = os.environ.get("CVDIST_TEST_DATA")
    path = Path(data or root) / "weights" / "vgg16_features.pth"
    if not data:
        path.parent.mkdir()
        features = torchvision.models.vgg16().features.state_dict()
        torch.save({f"features.{name}": tensor for name, tensor in features.items()}, path)
    return open_model(SavedModelConfig(source=str(path), model="vgg16", weights_preprocessing="vgg-features"))


def _pictures(folder: Path) -> None:
    data = os.environ.get("CVDIST_TEST_DATA")
    if not data:
        write_folder(folder, PICTURES - 4)
        return
    folder.mkdir()
    for path in sorted((Path(data) / "dogs-vs-cats" / "train").rglob("*.jpg"))[:PICTURES]:
        shutil.copyfile(path, folder / path.name)


def _ours(config: PredictConfig, saved: SavedModel, root: Path) -> float:
    """Run a whole prediction, from the listing to the manifest, and return pictures per second."""
    shutil.rmtree(root / "output", ignore_errors=True)
    started = time.perf_counter()
    todo = batch.make_plan(config, saved, find_pictures(config.prediction.data))
    done = predict_planned(config, saved, todo)
    assert done.rows == done.computed == PICTURES
    return PICTURES / (time.perf_counter() - started)


@torch.inference_mode()
def _bare(predictor: Predictor) -> float:
    size = BATCH["cpu"]
    images = torch.randn(size, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    started = time.perf_counter()
    for _ in range(PICTURES // size):
        with predictor.precision.autocast():
            predictor.module(images)
    return PICTURES / (time.perf_counter() - started)
