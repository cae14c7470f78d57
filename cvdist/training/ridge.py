"""A ridge classifier: a linear classifier on pooled features, fitted in closed form.

It is least squares with a penalty on the weights (Hoerl and Kennard 1970, "Ridge Regression: Biased Estimation
for Nonorthogonal Problems"), with one output for each class, 1 for a picture's class and 0 for the others. No
validation picture has a say in the penalty. A run's baseline takes the penalty with the least generalized
cross-validation score (Golub, Heath and Wahba 1979, "Generalized Cross-Validation as a Method for Choosing a
Good Ridge Parameter"), which needs nothing but sums. Where networks are compared, it is the penalty with which
most training pictures are classified correctly while each of them is left out (Allen 1974, "The Relationship
Between Variable Selection and Data Augmentation and a Method for Prediction"): one pass over the features more.

Each worker passes over its part of the training features. What remains are sums whose size does not depend on
the number of pictures: (d, d) for d inputs, in float64. They are added up over the workers. Then each worker
solves the same equations, and counts correct predictions on its part of the validation features.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cvdist import log, multilabel
from cvdist.data.dataset import Batch, Loader, Split
from cvdist.distributed.collectives import from_rank_zero, sum_over_workers
from cvdist.features.loader import FeatureLoader
from cvdist.results import RidgeResult
from cvdist.training import reporting
from cvdist.training.run import Run

logger = logging.getLogger(__name__)

_BATCH = 256
# Penalties that are compared, as multiples of the features' mean squared singular value.
_PENALTIES = torch.logspace(-4, 3, 15, dtype=torch.float64)


def fit_baseline(run: Run) -> None:
    """Fit the probe and log its result, unless the checkpoint has it already. All workers must call this."""
    worker, progress = run.worker, run.progress
    if run.config.features.ridge_probe and progress.ridge is None:
        progress.ridge = probe(run.loader, worker.rank, worker.world_size, worker.device, run.line)
        if progress.ridge is not None and run.main:
            logger.info("baseline   ridge probe %s", progress.ridge)
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
    # Not in inference mode, because training can't use the tensors that the loader would keep from it.
    with torch.no_grad():
        fit = solve(add_up(loader, rank, world_size, device, line))
        if loader.info.multilabel:
            return _score(fit, loader, rank, world_size, device, line, started)
        right = classify(fit, loader, rank, world_size, line)
    correct = int(sum_over_workers(right.sum().to(device)))
    return RidgeResult(correct, loader.info.valid_size, fit.penalty, time.monotonic() - started)


def add_up(
    loader: FeatureLoader, rank: int, world_size: int, device: torch.device, line: log.ProgressLine
) -> Sums:
    """Return the sums over the training features of all workers. All of them must call this."""
    size = pooled(torch.empty(1, *loader.feature_shape)).shape[1]
    sums = Sums.zero(size, len(loader.info.classes), device)
    for inputs, batch in _batches(loader, "train", rank, world_size, line):
        sums.add(inputs, batch.labels)
    return sums.over_workers()


def _score(
    fit: Fit,
    loader: FeatureLoader,
    rank: int,
    world_size: int,
    device: torch.device,
    line: log.ProgressLine,
    started: float,
) -> RidgeResult:
    """Return the mean average precision on the validation pictures, each of which may have several classes."""
    truth = loader.labels("valid")
    scores = torch.zeros(truth.shape, dtype=torch.float64, device=device)
    for inputs, batch in _batches(loader, "valid", rank, world_size, line):
        scores[batch.indices.to(device)] = fit.scores(inputs)
    found = sum_over_workers(scores).cpu()  # each row is of one worker, and 0 on the others

    def measure() -> RidgeResult:
        precision = multilabel.mean(multilabel.average_precision(found, truth))
        exact = multilabel.count(found, truth).exact
        return RidgeResult(exact, len(truth), fit.penalty, time.monotonic() - started, precision)

    return from_rank_zero(measure)


def classify(fit: Fit, loader: FeatureLoader, rank: int, world_size: int, line: log.ProgressLine) -> Tensor:
    """Return which validation pictures are classified correctly, bool (n,) by row, on the CPU.

    Those of other workers are False.
    """
    right = torch.zeros(loader.info.valid_size, dtype=torch.bool)
    for inputs, batch in _batches(loader, "valid", rank, world_size, line):
        right[batch.indices] = (fit.scores(inputs).argmax(1) == batch.labels).cpu()
    return right


def leave_one_out(
    sums: Sums, loader: FeatureLoader, rank: int, world_size: int, line: log.ProgressLine
) -> tuple[Fit, LeftOut]:
    """Fit a classifier with the penalty with which most training pictures are right when they are left out.

    All workers must call this.

    Args:
        sums: The sums over the training features of all workers.
        loader: The features.
        rank: This worker's rank.
        world_size: Number of workers.
        line: Shows how far the pass over the features has come.
    """
    equations = Equations.of(sums)
    parts = ((inputs, batch.labels) for inputs, batch in _batches(loader, "train", rank, world_size, line))
    left_out = equations.leave_one_out(parts)
    return equations.fit(left_out.penalty), left_out


def _batches(
    loader: FeatureLoader, split: Split, rank: int, world_size: int, line: log.ProgressLine
) -> Iterator[tuple[Tensor, Batch]]:
    """Yield the inputs float64 (n, d) of this worker's part of a split, with the batches that they are from."""
    done = 0
    for batch in loader.batches_in_order(split, rank, world_size, _BATCH):
        yield pooled(batch.images), batch
        done += len(batch.labels)
        if line.due():
            line.show(f"ridge: {done:,} {split} pictures on this worker")
    line.clear()


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
    """Sums over pictures with inputs x (d,) and targets t (classes,), 1 for a picture's classes, in float64.

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
        """Add pictures with inputs float64 (n, d) and labels as in `Batch.labels`."""
        one_class = labels.ndim == 1
        targets = (torch.nn.functional.one_hot(labels, len(self.targets)) if one_class else labels).double()
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


@dataclass(frozen=True)
class LeftOut:
    """The result of a penalty on training pictures, each classified by what is learned from all others.

    Attributes:
        penalty: The penalty on the squared weights.
        correct: How many pictures are classified correctly.
        total: How many pictures there are.
        error: Sum of the squared distances of scores and targets.
    """

    penalty: float
    correct: int
    total: int
    error: float


@dataclass(frozen=True)
class Equations:
    """The equations that the weights solve, prepared for any penalty. Inputs and targets are centered.

    So the bias is not penalized. All tensors are float64.

    Attributes:
        count: Number of pictures, a scalar.
        mean: Mean input, (d,).
        base: Mean target, (classes,).
        values: Eigenvalues of the centered inputs' squares, (d,).
        vectors: Their eigenvectors, (d, d).
        along: Products of inputs and targets along the eigenvectors, (d, classes).
        penalties: Penalties to choose from.
    """

    count: Tensor
    mean: Tensor
    base: Tensor
    values: Tensor
    vectors: Tensor
    along: Tensor
    penalties: Tensor

    @classmethod
    def of(cls, sums: Sums) -> Equations:
        """Prepare the equations of these pictures."""
        count = sums.count
        mean, base = sums.inputs / count, sums.targets / count
        values, vectors = torch.linalg.eigh(sums.squares - count * mean.outer(mean))
        values = values.clamp(min=0)
        kind = torch.finfo(values.dtype)
        # What rounding leaves of inputs that are all alike.
        noise = (kind.eps * sums.squares.diagonal().mean()).clamp(min=kind.tiny)
        penalties = torch.maximum(_PENALTIES.to(values.device) * values.mean(), noise)
        along = vectors.T @ (sums.products - count * mean.outer(base))
        return cls(count, mean, base, values, vectors, along, penalties)

    def fit(self, penalty: float | Tensor) -> Fit:
        """Return the classifier with the least penalized squared error."""
        weight = self.vectors @ (self.along / (self.values + penalty)[:, None])
        return Fit(weight, self.base - self.mean @ weight, float(penalty))

    def generalized_scores(self) -> Tensor:
        """Return the generalized cross-validation score of each penalty."""
        values, kind = self.values, torch.finfo(self.values.dtype)
        # Targets are 0 or 1, so their squares have the same sum as they.
        spread = self.count * (self.base - self.base.square()).sum()
        explained = self.along.square().sum(1)
        shrunk = values / (values + self.penalties[:, None])  # (penalties, d): eigenvalues of the hat matrix
        # The squared error is the part that no weights can explain, plus the part that the penalty leaves.
        large = values > values.amax() * kind.eps * len(values)
        whole = torch.where(large, explained / values.where(large, torch.ones_like(values)), 0)
        error = (spread - whole.sum()).clamp(min=0) + ((1 - shrunk).square() * whole).sum(1)
        free = self.count - 1 - shrunk.sum(1)
        return torch.where(free > 0, self.count * error / free.square(), torch.inf)

    def leave_one_out(self, parts: Iterable[tuple[Tensor, Tensor]]) -> LeftOut:
        """Return the penalty with which most pictures are classified correctly while each of them is left out.

        Among equals, it is the one with the least squared error. Nothing is fitted again: leaving a picture out
        divides its error by one minus its leverage, exactly. All workers must call this.

        Args:
            parts: Inputs float64 (n, d) and labels int64 (n,) of this worker's part of the pictures.
        """
        sums = torch.zeros(2, len(self.penalties), dtype=torch.float64, device=self.penalties.device)
        for inputs, labels in parts:
            targets = torch.nn.functional.one_hot(labels, len(self.base)).double()
            for number, scores in enumerate(self.left_out_scores(inputs, labels, self.penalties)):
                sums[0, number] += (scores.argmax(1) == labels).sum()
                sums[1, number] += (targets - scores).square().sum()
        right, error = sum_over_workers(sums).tolist()
        best = min(range(len(right)), key=lambda number: (-right[number], error[number]))
        return LeftOut(float(self.penalties[best]), int(right[best]), int(self.count), error[best])

    def left_out_scores(self, inputs: Tensor, labels: Tensor, penalties: Tensor) -> Iterator[Tensor]:
        """Yield, for each penalty, the scores (n, classes) of pictures by what is learned from all others.

        Args:
            inputs: float64 (n, d), of pictures that the sums are of.
            labels: Their labels, int64 (n,).
            penalties: float64 (p,).
        """
        inverse = 1 / (self.values + penalties[:, None])  # (p, d)
        least = torch.finfo(inverse.dtype).eps
        targets = torch.nn.functional.one_hot(labels, len(self.base)).double()
        rotated = (inputs - self.mean) @ self.vectors
        leverage = 1 / self.count + rotated.square() @ inverse.T  # (n, p)
        for number, mine in enumerate(inverse):
            errors = targets - torch.addmm(self.base, rotated * mine, self.along)
            yield targets - errors / (1 - leverage[:, number]).clamp(min=least)[:, None]


def solve(sums: Sums) -> Fit:
    """Return the classifier with the least penalized squared error, at the penalty with the least score."""
    equations = Equations.of(sums)
    return equations.fit(equations.penalties[equations.generalized_scores().argmin()])
