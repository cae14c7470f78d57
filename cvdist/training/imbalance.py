"""Handles classes that have more pictures than others: counts and weighs them, and warns about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cvdist.config import LoopConfig
from cvdist.data.labels import class_counts
from cvdist.data.sampler import EpochOrder
from cvdist.errors import UserError, did_you_mean

_IMBALANCED = 10  # times as many pictures in the largest class as in the smallest
_LISTED = 8  # classes that are counted one by one


def class_weights(settings: LoopConfig, classes: Sequence[str], labels: Tensor) -> Tensor | None:
    """Return the weight of each class in the training loss, float64 (classes,).

    Their mean over an epoch is 1. Where pictures may have several classes, it is what having the class weighs
    against not having it (`pos_weight` of `BCEWithLogitsLoss`). `balanced` is then the number of pictures
    without the class, divided by that of those with it.

    Args:
        settings: Names the weights (`--class-weights`).
        classes: Names of the classes.
        labels: The labels of all training pictures, as `Loader.labels` returns them.

    Returns:
        None if all classes weigh the same.

    Raises:
        UserError: If the settings name a class that there is not, or a weight that is not above 0.
    """
    if settings.class_weights == "none":
        return None
    weights = torch.ones(len(classes), dtype=torch.float64)
    counts, several = class_counts(labels, len(classes)), labels.ndim == 2
    if settings.class_weights == "balanced" and several:
        without = len(labels) - counts
        weights = (without.double() / counts).where((counts > 0) & (without > 0), weights)
    elif settings.class_weights == "balanced":
        weights = 1 / counts.clamp(min=1).double()
    else:
        for pair in settings.class_weights.split(","):
            name, _, weight = pair.rpartition("=")
            if name not in classes:
                hint = did_you_mean(name, classes, f"there are {', '.join(classes[:_LISTED])}")
                raise UserError(f"--class-weights names a class {name!r}, which the data does not have: {hint}")
            if not float(weight) > 0:
                raise UserError(f"--class-weights {pair}: a weight is a number above 0")
            weights[list(classes).index(name)] = float(weight)
    if several:
        return weights
    drawn = (counts > 0).double() if settings.balanced_sampling else counts.double()
    return weights * drawn.sum() / (weights * drawn).sum()


def batch_weights(weights: Tensor | None, labels: Tensor, order: EpochOrder, position: int) -> Iterator[float]:
    """Yield the sum of the samples' weights in each global batch, which every worker can compute by itself.

    Mixtures leave it as it is: what a sample does not keep of its weight belongs to its partner.

    Args:
        weights: The weight of each class; None if each is 1.
        labels: The labels of all training samples, int64 (n,) unless no weights are given.
        order: The epoch's order.
        position: Samples of the epoch that are done.
    """
    for local in order.local_batches(0, 1, position):
        yield float(local.global_size if weights is None else weights[labels[local.indices]].sum())


def describe(classes: Sequence[str], labels: Tensor) -> str:
    """Return how many training pictures the classes have, in one line."""
    line = _counts(classes, class_counts(labels, len(classes)))
    if labels.ndim == 1:
        return line
    each = labels.sum(1)
    return f"{line}; {each.double().mean():.2f} a picture, {int((each == 0).sum()):,} pictures with none"


def _counts(classes: Sequence[str], counts: Tensor) -> str:
    named = sorted(zip(counts.tolist(), classes, strict=True), key=lambda one: -one[0])
    if len(named) <= _LISTED:
        return ", ".join(f"{name} {count:,}" for count, name in named)
    (most, largest), (least, smallest) = named[0], named[-1]
    if most == least:
        return f"{len(named):,} classes of {most:,} pictures each"
    return f"{len(named):,} classes, from {largest} with {most:,} pictures to {smallest} with {least:,}"


def warning(settings: LoopConfig, classes: Sequence[str], labels: Tensor) -> str:
    """Return advice for when a class has ten times the pictures of another; empty if it is not needed."""
    counts = class_counts(labels, len(classes))
    most, least = int(counts.argmax()), int(counts.argmin())
    done = settings.class_weights != "none" or settings.balanced_sampling
    if done or counts[most] < _IMBALANCED * counts[least]:
        return ""
    line = f"{classes[most]} has {int(counts[most]):,} pictures, {classes[least]} {int(counts[least]):,}"
    if labels.ndim == 2:
        return f"{line}: --class-weights balanced gives the pictures that have a rare class more weight"
    return (
        f"{line}, so accuracy says little of the rare ones: --class-weights balanced or --balanced-sampling "
        "give them more weight, and --select-by balanced_accuracy counts all classes alike"
    )
