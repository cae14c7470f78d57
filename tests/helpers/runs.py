"""Short runs on some of the digits, in this process, which may be killed at any step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from cvdist import config as configs
from cvdist import recipes
from cvdist.checkpoints.store import CheckpointStore
from cvdist.checkpoints.worker import Worker
from cvdist.config import DataConfig
from cvdist.data import digits
from cvdist.data.dataset import DatasetInfo
from cvdist.data.in_memory import LabeledImages
from cvdist.distributed.ranks import RankInfo
from cvdist.tracking import NoTracker
from cvdist.tracking.tracker import Tracker
from cvdist.training.run import Run
from cvdist.training.setup import build_run
from cvdist.training.train import train


@contextmanager
def few_digits(
    labels_of: Callable[[torch.Tensor], torch.Tensor] = torch.clone, **described: Any
) -> Iterator[None]:
    """The data set `digits` has every fifth digit of each split.

    Args:
        labels_of: Makes the labels from the numbers.
        described: What `DatasetInfo` says otherwise.
    """
    whole = digits.load

    def load(config: DataConfig) -> tuple[DatasetInfo, LabeledImages, LabeledImages]:
        info, *splits = whole(config)
        train, valid = (
            LabeledImages(split.images[::5].contiguous(), labels_of(split.labels[::5])) for split in splits
        )
        train_size, valid_size = len(train.labels), len(valid.labels)
        info = dataclasses.replace(info, train_size=train_size, valid_size=valid_size, **described)
        return info, train, valid

    with mock.patch.object(digits, "load", load):
        yield


class Recorder(NoTracker):
    """Keeps the metrics of steps and of epochs, each with its number."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, float]]] = []
        self.epochs: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, values: Any, step: int) -> None:
        if "start/first_step_seconds" not in values:
            (self.steps if "step/loss" in values else self.epochs).append((step, dict(values)))

    def losses(self) -> list[float]:
        """Of each step."""
        return [values["step/loss"] for _, values in self.steps]


def make_run(
    folder: Path, tracker: Tracker | None = None, ranks: RankInfo | None = None, **changes: Any
) -> Run:
    """A run on `few_digits`: 800 of them in 20 steps an epoch."""
    defaults = {
        "name": "run", "storage": str(folder), "batch_size": 40, "epochs": 1, "lr_scheduler": "constant",
        "lr_warmup_epochs": 0.0, "rotation": 0.0, "translation": 0.0, "log_every_steps": 1,
    }  # fmt: skip
    config = configs.replace(recipes.find("digits-cnn"), **{**defaults, **changes})
    return build(config, tracker or Recorder(), ranks)


def build(config: configs.TrainConfig, tracker: Tracker, ranks: RankInfo | None = None) -> Run:
    """What a job builds, with its checkpoints in the run's folder."""
    store = CheckpointStore.at(f"{config.run.storage}/{config.run.name}", config.checkpoint.keep)
    return build_run(config, Worker(ranks or RankInfo(), store), tracker)


def after_steps(run: Run, number: int, action: Callable[[], object]) -> None:
    """Let `action` happen once, when the run has taken `number` steps more."""
    poll, taken = run.worker.poll_stop_request, []

    def polled() -> Any:
        taken.append(1)
        if len(taken) == number:
            action()
        return poll()

    run.worker.poll_stop_request = polled  # type: ignore[method-assign]


def train_and_kill(run: Run, number: int) -> None:
    """Train until the run has taken `number` steps."""

    class Killed(Exception):
        pass

    def kill() -> None:
        raise Killed

    after_steps(run, number, kill)
    with pytest.raises(Killed):
        train(run)
    run.worker.wait_for_uploads()


def assert_same_weights(one: Run, other: Run) -> None:
    """To the last bit."""
    weights = other.model.state_dict()
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
