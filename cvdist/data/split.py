"""Stratified split of a data set that does not come with a validation split."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from cvdist.seeding import generator


def stratified_split(labels: Tensor, valid_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of the training part and of the validation part, each class in about the same proportion.

    labels: int64 (N,). Returns two sorted int64 tensors that share no row and together hold them all. Training
    has at least one row of each class, and validation at least one of each class of two or more.
    """
    train, valid = [], []
    classes, sizes = (values.tolist() for values in labels.unique(return_counts=True))
    for label, held_back in zip(classes, held_back_counts(sizes, valid_fraction), strict=True):
        rows = (labels == label).nonzero().flatten()
        shuffled = rows[torch.randperm(len(rows), generator=generator("split", seed, label))]
        valid.append(shuffled[:held_back])
        train.append(shuffled[held_back:])
    return torch.cat(train).sort().values, torch.cat(valid).sort().values


def held_back_counts(sizes: list[int], valid_fraction: float) -> list[int]:
    """How many pictures of each class to validate on, by the largest remainder method.

    Each class gets its exact share rounded down or up, but at least 1 and at most all but 1 of its pictures;
    one of one picture gets none. Those with the largest remainders are rounded up, until the sum is the share
    of all pictures.
    """
    fraction = Fraction(str(valid_fraction))  # as the user wrote it: 0.1 is a tenth

    def bounded(count: int, size: int) -> int:
        return min(max(count, 1), size - 1)

    counts = [bounded(int(fraction * size), size) for size in sizes]
    missing = round(fraction * sum(sizes)) - sum(counts)
    remainders = [(fraction * size) % 1 for size in sizes]
    for i in sorted(range(len(sizes)), key=lambda i: -remainders[i]):
        if missing > 0 and remainders[i] and counts[i] < bounded(int(fraction * sizes[i]) + 1, sizes[i]):
            counts[i] += 1
            missing -= 1
    return counts
