"""A ridge probe: the best linear classifier on pooled features, in closed form, as a baseline without epochs.

Least squares with a penalty on the weights (Hoerl and Kennard 1970, Ridge Regression: Biased Estimation for
Nonorthogonal Problems) onto one output a class, 1 for the class of a picture and 0 for the others. The penalty
is the one with the least generalised cross-validation score (Golub, Heath and Wahba 1979, Generalized
Cross-Validation as a Method for Choosing a Good Ridge Parameter), so no validation picture is looked at.

One pass over the training features, each worker over its own part, leaves sums whose size does not depend on
the number of pictures: (d, d) for d inputs, in float64. They are added up over the workers. Then each worker
solves the same equations, and counts on its own part of the validation features.
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

_BATCH = 256
# Penalties that are compared, as multiples of the features' mean squared singular value.
_PENALTIES = torch.logspace(-4, 3, 15, dtype=torch.float64)


def probe(
    loader: Loader, rank: int, world_size: int, device: torch.device, line: log.ProgressLine
) -> RidgeResult | None:
    """Fit on the training features, count on those to validate on; None if the batches are pictures.

    All workers call it. Of augmented views, the pictures as they are serve. `line` shows how far it is.
    """
    if not isinstance(loader, FeatureLoader):
        return None
    started = time.monotonic()

    def part(split: Split) -> Iterable[Batch]:
        done = 0
        for batch in loader.batches_in_order(split, rank, world_size, _BATCH):
            yield batch
            done += len(batch.labels)
            if line.due():
                line.show(f"ridge probe: {done:,} {split} pictures on this worker")
        line.clear()

    sums = Sums.zero(2 * loader.feature_shape[0], len(loader.info.classes), device)
    # Not in inference mode: tensors that a copy of the cache keeps are to be trained from.
    with torch.no_grad():
        for batch in part("train"):
            sums.add(pooled(batch.images), batch.labels)
        fit = solve(sums.over_workers())
        correct = torch.zeros((), dtype=torch.int64, device=device)
        for batch in part("valid"):
            correct += (fit.scores(pooled(batch.images)).argmax(1) == batch.labels).sum()
        right = int(sum_over_workers(correct))
    return RidgeResult(right, loader.info.valid_size, fit.penalty, time.monotonic() - started)


def pooled(features: Tensor) -> Tensor:
    """Mean and maximum of each channel over all positions: (n, C, ...) to float64 (n, 2 C)."""
    flat = features.flatten(2)
    return torch.cat([flat.mean(2), flat.amax(2)], dim=1).double()


@dataclass
class Sums:
    """Over pictures with inputs x (d,) and targets t (classes,): x x', x t', x, t and 1, in float64."""

    squares: Tensor
    products: Tensor
    inputs: Tensor
    targets: Tensor
    count: Tensor

    @classmethod
    def zero(cls, inputs: int, classes: int, device: torch.device) -> Sums:
        """Of no picture."""
        shapes = ((inputs, inputs), (inputs, classes), (inputs,), (classes,), ())
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, inputs: Tensor, labels: Tensor) -> None:
        """Pictures: float64 (n, d) and int64 (n,)."""
        targets = torch.nn.functional.one_hot(labels, len(self.targets)).double()
        self.squares.addmm_(inputs.T, inputs)
        self.products.addmm_(inputs.T, targets)
        self.inputs += inputs.sum(0)
        self.targets += targets.sum(0)
        self.count += len(labels)

    def over_workers(self) -> Sums:
        """The sums of all workers, each of which calls this."""
        mine = [self.squares, self.products, self.inputs, self.targets, self.count]
        total = sum_over_workers(torch.cat([tensor.flatten() for tensor in mine]))
        parts = total.split([tensor.numel() for tensor in mine])
        return Sums(*(part.view(tensor.shape) for part, tensor in zip(parts, mine, strict=True)))


@dataclass(frozen=True)
class Fit:
    """weight: float64 (d, classes); bias: (classes,); penalty: on the squared weights."""

    weight: Tensor
    bias: Tensor
    penalty: float

    def scores(self, inputs: Tensor) -> Tensor:
        """Float64 (n, d) to (n, classes)."""
        return inputs @ self.weight + self.bias


def solve(sums: Sums) -> Fit:
    """The weights of least penalised squared error, at the penalty of least cross-validation score.

    The bias is not penalised: inputs and targets are centred.
    """
    count = sums.count
    mean, base = sums.inputs / count, sums.targets / count
    squares = sums.squares - count * mean.outer(mean)
    products = sums.products - count * mean.outer(base)
    # Of one-hot targets the squares sum up to the count.
    spread = count - count * base.square().sum()
    values, vectors = torch.linalg.eigh(squares)
    values = values.clamp(min=0)
    along = vectors.T @ products  # (d, classes)
    explained = along.square().sum(1)
    penalties = (_PENALTIES.to(values.device) * values.mean()).clamp(min=torch.finfo(values.dtype).tiny)
    shrunk = values / (values + penalties[:, None])  # (penalties, d): eigenvalues of the hat matrix
    # Squared error: what no weights explain, and what the penalty leaves unexplained.
    large = values > values.amax() * torch.finfo(values.dtype).eps * len(values)
    whole = torch.where(large, explained / values.where(large, torch.ones_like(values)), 0)
    error = (spread - whole.sum()).clamp(min=0) + ((1 - shrunk).square() * whole).sum(1)
    free = count - 1 - shrunk.sum(1)
    score = torch.where(free > 0, count * error / free.square(), torch.inf)
    penalty = penalties[score.argmin()]
    weight = vectors @ (along / (values + penalty)[:, None])
    return Fit(weight, base - mean @ weight, float(penalty))
