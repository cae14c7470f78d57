"""Digits with several labels each, and runs that learn them, in this process or as one of several workers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cvdist.distributed.ranks import RankInfo
from cvdist.results import Evaluation
from cvdist.tracking.tracker import Tracker
from cvdist.training.logistic import Fit, fit
from cvdist.training.run import Run
from cvdist.training.train import train
from tests.helpers import runs
from tests.helpers.logistic_workers import CPU, INPUTS, made_up, parts
from tests.helpers.runs import few_digits

# The digits that each label is for. 1 has none of them.
LABELS = {"even": (0, 2, 4, 6, 8), "loop": (0, 6, 8, 9), "prime": (2, 3, 5, 7)}


def digits_with_labels() -> AbstractContextManager[None]:
    """The data set `digits` has every fifth digit of each split, with several labels each."""
    return few_digits(_labels, classes=tuple(LABELS), multilabel=True)


def _labels(numbers: Tensor) -> Tensor:
    return torch.stack([torch.isin(numbers, torch.tensor(some)) for some in LABELS.values()], 1)


def make_run(
    folder: Path, tracker: Tracker | None = None, ranks: RankInfo | None = None, **changes: Any
) -> Run:
    """A short run on `digits_with_labels`: 800 digits in 20 steps an epoch."""
    return runs.make_run(folder, tracker, ranks, **{"epochs": 2, "lr": 0.05, **changes})


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
