"""A ridge probe: a linear classifier on pooled features, fitted in closed form, as a baseline before training.

It is least squares with a penalty on the weights (Hoerl and Kennard 1970, "Ridge Regression: Biased Estimation
for Nonorthogonal Problems"), with one output for each class, 1 for a picture's class and 0 for the others. The
penalty is the one with the least generalized cross-validation score (Golub, Heath and Wahba 1979, "Generalized
Cross-Validation as a Method for Choosing a Good Ridge Parameter"), so no validation picture has a say in it.

Each worker passes once over its part of the training features. What remains are sums whose size does not depend
on the number of pictures: (d, d) for d inputs, in float64. They are added up over the workers. Then each worker
solves the same equations, and counts correct predictions on its part of the validation features.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cvdist import log
from cvdist.data.dataset import Batch, Loader, Split
from cvdist.distributed.collectives import sum_over_workers
from cvdist.features.loader import FeatureLoader
from cvdist.results import RidgeResult
from cvdist.training import reporting
from cvdist.training.run import Run

_BATCH = 256
# Penalties that are compared, as multiples of the features' mean squared singular value.
_PENALTIES = torch.logspace(-4, 3, 15, dtype=torch.float64)


def fit_baseline(run: Run) -> None:
    """Fit the probe and log its result, unless the checkpoint has it already. All workers must call this."""
    worker, progress = run.worker, run.progress
    if run.config.features.ridge_probe and progress.ridge is None:
        progress.ridge = probe(run.loader, worker.rank, worker.world_size, worker.device, run.line)
        if progress.ridge is not None:
            reporting.show_baseline(run, progress.ridge)
    if progress.ridge is not None:
        run.tracker.log_metrics(reporting.ridge_metrics(progress.ridge), 0)


def probe(
    loader: Loader, rank: int, world_size: int, device: torch.device, line: log.ProgressLine
) -> RidgeResult | None:
    """Fit a classifier to the training features and count its correct predictions on the validation features.

    All workers must call this. Only the unaugmented view of each picture is used.

    Args:
        loader: The data. If its batches are pictures, the result is None.
        rank: This worker's rank.
        world_size: Number of workers.
        device: Where to compute.
        line: Shows how far the pass over the features has come.
    """
    if not isinstance(loader, FeatureLoader):
        return None
    started = time.monotonic()

    def local_batches(split: Split) -> Iterable[Batch]:
        done = 0
        for batch in loader.batches_in_order(split, rank, world_size, _BATCH):
            yield batch
            done += len(batch.labels)
            if line.due():
                line.show(f"ridge probe: {done:,} {split} pictures on this worker")
        line.clear()

    inputs = pooled(torch.empty(1, *loader.feature_shape)).shape[1]
    sums = Sums.zero(inputs, len(loader.info.classes), device)
    # Not in inference mode, because training can't use the tensors that the loader would keep from it.
    with torch.no_grad():
        for batch in local_batches("train"):
            sums.add(pooled(batch.images), batch.labels)
        fit = solve(sums.over_workers())
        correct = torch.zeros((), dtype=torch.int64, device=device)
        for batch in local_batches("valid"):
            correct += (fit.scores(pooled(batch.images)).argmax(1) == batch.labels).sum()
        right = int(sum_over_workers(correct))
    return RidgeResult(right, loader.info.valid_size, fit.penalty, time.monotonic() - started)


def pooled(features: Tensor) -> Tensor:
    """Return the mean and the maximum of each channel over all positions: (n, C, ...) to float64 (n, 2 C).

    Features without positions, (n, C), are returned as they are.
    """
    if features.ndim == 2:
        return features.double()
    flat = features.flatten(2)
    return torch.cat([flat.mean(2), flat.amax(2)], dim=1).double()


@dataclass
class Sums:
    """Sums over pictures with inputs x (d,) and one-hot targets t (classes,), in float64.

    Attributes:
        squares: Sum of the outer products x x', (d, d).
        products: Sum of the outer products x t', (d, classes).
        inputs: Sum of x, (d,).
        targets: Sum of t, (classes,).
        count: Number of pictures, a scalar.
    """

    squares: Tensor
    products: Tensor
    inputs: Tensor
    targets: Tensor
    count: Tensor

    @classmethod
    def zero(cls, inputs: int, classes: int, device: torch.device) -> Sums:
        """Return the sums over no pictures."""
        shapes = ((inputs, inputs), (inputs, classes), (inputs,), (classes,), ())
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, inputs: Tensor, labels: Tensor) -> None:
        """Add pictures with inputs float64 (n, d) and labels int64 (n,)."""
        targets = torch.nn.functional.one_hot(labels, len(self.targets)).double()
        self.squares.addmm_(inputs.T, inputs)
        self.products.addmm_(inputs.T, targets)
        self.inputs += inputs.sum(0)
        self.targets += targets.sum(0)
        self.count += len(labels)

    def over_workers(self) -> Sums:
        """Return the sums over the pictures of all workers. All of them must call this."""
        mine = [self.squares, self.products, self.inputs, self.targets, self.count]
        total = sum_over_workers(torch.cat([tensor.flatten() for tensor in mine]))
        flat = total.split([tensor.numel() for tensor in mine])
        return Sums(*(values.view(tensor.shape) for values, tensor in zip(flat, mine, strict=True)))


@dataclass(frozen=True)
class Fit:
    """A fitted linear classifier.

    Attributes:
        weight: float64 (d, classes).
        bias: float64 (classes,).
        penalty: The penalty on the squared weights.
    """

    weight: Tensor
    bias: Tensor
    penalty: float

    def scores(self, inputs: Tensor) -> Tensor:
        """Compute scores (n, classes) from inputs (n, d), both float64."""
        return inputs @ self.weight + self.bias


def solve(sums: Sums) -> Fit:
    """Return the classifier with the least penalized squared error, at the penalty with the least score.

    Inputs and targets are centered, so that the bias is not penalized.
    """
    count = sums.count
    mean, base = sums.inputs / count, sums.targets / count
    squares = sums.squares - count * mean.outer(mean)
    products = sums.products - count * mean.outer(base)
    # The squares of one-hot targets sum up to the number of pictures.
    spread = count - count * base.square().sum()
    values, vectors = torch.linalg.eigh(squares)
    values = values.clamp(min=0)
    along = vectors.T @ products  # (d, classes)
    explained = along.square().sum(1)
    penalties = (_PENALTIES.to(values.device) * values.mean()).clamp(min=torch.finfo(values.dtype).tiny)
    shrunk = values / (values + penalties[:, None])  # (penalties, d): eigenvalues of the hat matrix
    # The squared error is what no weights could explain, plus what the penalty leaves unexplained.
    large = values > values.amax() * torch.finfo(values.dtype).eps * len(values)
    whole = torch.where(large, explained / values.where(large, torch.ones_like(values)), 0)
    error = (spread - whole.sum()).clamp(min=0) + ((1 - shrunk).square() * whole).sum(1)
    free = count - 1 - shrunk.sum(1)
    score = torch.where(free > 0, count * error / free.square(), torch.inf)
    penalty = penalties[score.argmin()]
    weight = vectors @ (along / (values + penalty)[:, None])
    return Fit(weight, base - mean @ weight, float(penalty))
