"""Digits with several labels each, and runs that learn them, in this process or as one of several workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from cvdist import config as configs
from cvdist import recipes
from cvdist.checkpoints.store import CheckpointStore
from cvdist.checkpoints.worker import Worker
from cvdist.config import DataConfig
from cvdist.data import digits
from cvdist.data.dataset import DatasetInfo
from cvdist.data.in_memory import LabeledImages
from cvdist.distributed.ranks import RankInfo
from cvdist.results import Evaluation
from cvdist.tracking import NoTracker
from cvdist.tracking.tracker import Tracker
from cvdist.training.logistic import Fit, fit
from cvdist.training.run import Run
from cvdist.training.setup import build_run
from cvdist.training.train import train
from tests.helpers.logistic_workers import CPU, INPUTS, made_up, parts

# The digits that each label is for. 1 has none of them.
LABELS = {"even": (0, 2, 4, 6, 8), "loop": (0, 6, 8, 9), "prime": (2, 3, 5, 7)}


@contextmanager
def digits_with_labels(every: int = 5) -> Iterator[None]:
    """The data set `digits` has some digits of each split, with several labels each."""
    whole = digits.load

    def load(config: DataConfig) -> tuple[DatasetInfo, LabeledImages, LabeledImages]:
        info, *splits = whole(config)
        train, valid = (
            LabeledImages(split.images[::every].contiguous(), _labels(split.labels[::every]))
            for split in splits
        )
        sizes = {"train_size": len(train.labels), "valid_size": len(valid.labels)}
        info = dataclasses.replace(info, classes=tuple(LABELS), multilabel=True, **sizes)
        return info, train, valid

    with mock.patch.object(digits, "load", load):
        yield


def _labels(numbers: Tensor) -> Tensor:
    return torch.stack([torch.isin(numbers, torch.tensor(some)) for some in LABELS.values()], 1)


def make_run(
    folder: Path, tracker: Tracker | None = None, ranks: RankInfo | None = None, **changes: Any
) -> Run:
    """A short run on `digits_with_labels`: 800 digits in 20 steps an epoch."""
    defaults = {
        "name": "run",
        "storage": str(folder),
        "batch_size": 40,
        "epochs": 2,
        "lr_scheduler": "constant",
    }
    plain = {"lr_warmup_epochs": 0.0, "rotation": 0.0, "translation": 0.0, "log_every_steps": 1, "lr": 0.05}
    config = configs.replace(recipes.find("digits-cnn"), **{**defaults, **plain, **changes})
    store = CheckpointStore.at(str(folder / config.run.name), config.checkpoint.keep)
    return build_run(config, Worker(ranks or RankInfo(), store), tracker or NoTracker())


def trained(
    folder: Path, ranks: RankInfo | None = None, **changes: Any
) -> tuple[dict[str, Tensor], Evaluation, Any]:
    """Train; returns the weights, the evaluation of the best epoch and the records of the epochs."""
    with digits_with_labels():
        run = make_run(folder, ranks=ranks, **changes)
        train(run)
    assert run.best is not None
    return (
        {name: tensor.clone() for name, tensor in run.model.state_dict().items()},
        run.best,
        run.progress.history,
    )


def fitted(rank: int = 0, world_size: int = 1) -> Fit:
    """Fit this worker's share of made-up samples with several labels by logistic regression."""
    x, labels = several_labels()
    mine = parts(x, labels, rank, world_size, views=2)
    weights = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    return fit(lambda: mine, labels, 3, INPUTS, rank=rank, device=CPU, memory=1e9, class_weights=weights)


def several_labels() -> tuple[Tensor, Tensor]:
    """Return inputs float64 (n, d) and labels bool (n, 3)."""
    x, numbers = made_up()
    return x, torch.stack([torch.isin(numbers, torch.tensor(some)) for some in ((0, 1), (1, 2), (3,))], 1)


def work(rank: int, world_size: int, folder: Path, changes: dict[str, Any]) -> tuple[Any, Fit]:
    """Train and fit as one of several workers, which meet in `folder`."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        ranks = RankInfo(rank, world_size, rank, world_size)
        return trained(folder, ranks, **changes), fitted(rank, world_size)
    finally:
        dist.destroy_process_group()
