"""Logistic regression on made-up samples in several processes, which exchange sums by gloo."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cvdist.data.sampler import partition
from cvdist.training.logistic import Fit, Part, fit

CPU = torch.device("cpu")
COUNT, INPUTS, CLASSES = 203, 12, 4


def made_up(
    count: int = COUNT, inputs: int = INPUTS, classes: int = CLASSES, *, seed: int = 0, signal: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return inputs float64 (n, d), far from 0 and of different scales, and labels of all classes."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=random)
    labels[:classes] = torch.arange(classes)
    means = signal * torch.randn(classes, inputs, generator=random, dtype=torch.float64)
    noise = torch.randn(count, inputs, generator=random, dtype=torch.float64)
    scales = torch.logspace(-1, 1, inputs, dtype=torch.float64)
    return (means[labels] + noise) * scales + 5, labels


def parts(x: Tensor, labels: Tensor, rank: int = 0, world_size: int = 1, views: int = 1) -> list[Part]:
    """Return one worker's samples, in parts of 50. Views other than the first have some noise."""
    found = []
    for view in range(views):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(view), dtype=x.dtype)
        seen = x + 0.1 * noise * (view > 0)
        for rows in torch.tensor(partition(len(x), rank, world_size), dtype=torch.int64).split(50):
            found.append(Part(seen[rows], labels[rows], rows, first=view == 0))
    return found


def fitted(rank: int = 0, world_size: int = 1, *, views: int = 2, memory: float = 1e9) -> Fit:
    """Fit this worker's share of the samples."""
    x, labels = made_up()
    mine = parts(x, labels, rank, world_size, views)
    return fit(lambda: mine, labels, CLASSES, INPUTS, rank=rank, device=CPU, memory=memory)


def fitted_separable(rank: int = 0, world_size: int = 1, *, several: bool) -> Fit:
    """Fit this worker's share of samples that a linear classifier tells apart, in float32.

    With `several`, each has the classes of the binary digits of its number.
    """
    x, labels = made_up(signal=10.0)
    if several:
        labels = torch.stack([labels // 2, labels % 2], 1).bool()
    mine = parts(x.float(), labels, rank, world_size)
    classes = 2 if several else CLASSES
    return fit(lambda: mine, labels, classes, INPUTS, rank=rank, device=CPU, memory=1e9)


def work(rank: int, world_size: int, folder: Path) -> tuple[Fit, list[Fit]]:
    """Fit all samples as one of several workers, which meet in `folder`."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    separable = [fitted_separable(rank, world_size, several=several) for several in (False, True)]
    found = fitted(rank, world_size), separable
    dist.destroy_process_group()
    return found
