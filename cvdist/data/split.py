"""Stratified splits of data sets that do not come with a validation split."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from cvdist.seeding import generator


def stratified_split(labels: Tensor, valid_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the rows for training and for validation, with each class in about the same proportion.

    Training has at least one row of each class, and validation at least one of each class of two or more.

    Args:
        labels: int64 (N,).
        valid_fraction: share of the pictures to validate on.
        seed: seed of the choice.

    Returns:
        Two sorted int64 tensors that share no row and together hold them all.
    """
    train, valid = [], []
    classes, sizes = (values.tolist() for values in labels.unique(return_counts=True))
    for label, held_back in zip(classes, held_back_counts(sizes, valid_fraction), strict=True):
        rows = (labels == label).nonzero().flatten()
        shuffled = rows[torch.randperm(len(rows), generator=generator("split", seed, label))]
        valid.append(shuffled[:held_back])
        train.append(shuffled[held_back:])
    return torch.cat(train).sort().values, torch.cat(valid).sort().values


def multilabel_split(labels: Tensor, valid_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the rows for training and for validation where a picture may have several classes.

    Pictures are divided by their rarest class as in `stratified_split`; pictures without a class are a class
    of their own here. Then single pictures change sides, so that training has every class, and validation has
    each class of which training can give a picture away without losing a class.

    Args:
        labels: bool (N, classes).
        valid_fraction: share of the pictures to validate on.
        seed: seed of the choice.

    Returns:
        Two sorted int64 tensors that share no row and together hold them all.
    """
    order = labels.sum(0).argsort(stable=True)  # classes from the rarest one on
    rank = order.argsort()
    rows, classes = labels.nonzero(as_tuple=True)
    none = labels.shape[1]
    rarest = torch.full((len(labels),), none).scatter_reduce(0, rows, rank[classes], "amin")
    strata = torch.cat([order, torch.tensor([none])])[rarest]
    train, valid = stratified_split(strata, valid_fraction, seed)
    is_valid = torch.zeros(len(labels), dtype=torch.bool)
    is_valid[valid] = True
    counts = {True: labels[valid].sum(0), False: labels[train].sum(0)}

    def move(row: int, to_valid: bool) -> None:
        is_valid[row] = to_valid
        counts[to_valid] += labels[row].long()
        counts[not to_valid] -= labels[row].long()

    for name in order.tolist():
        if not counts[False][name] and counts[True][name]:
            move(int(labels[:, name].nonzero()[0]), to_valid=False)
    for name in order.tolist():
        if not counts[True][name]:
            mine = labels[:, name].nonzero().flatten()
            spare = ((counts[False] > 1) | ~labels[mine]).all(1)
            if spare.any():
                move(int(mine[spare.nonzero()[0]]), to_valid=True)
    return (~is_valid).nonzero().flatten(), is_valid.nonzero().flatten()


def held_back_counts(sizes: list[int], valid_fraction: float) -> list[int]:
    """Return how many pictures of each class to validate on, by the largest remainder method.

    Each class gets its exact share rounded down or up, but at least 1 and at most all but 1 of its pictures.
    A class of one picture gets none. The classes with the largest remainders are rounded up, until the sum is
    the share of all pictures.
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
