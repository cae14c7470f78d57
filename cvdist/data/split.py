"""Stratified split of a data set that does not come with a validation split."""

from __future__ import annotations

import torch
from torch import Tensor

from cvdist.errors import UserError
from cvdist.seeding import generator


def stratified_split(labels: Tensor, valid_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of the training part and of the validation part, each class in the same proportion.

    labels: int64 (N,). Returns two sorted int64 tensors that share no row and together hold them all.

    Raises:
        UserError: if a class would be missing in one of the parts.
    """
    train, valid = [], []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        shuffled = rows[torch.randperm(len(rows), generator=generator("split", seed, label))]
        held_back = round(len(rows) * valid_fraction)
        if held_back == 0 or held_back == len(rows):
            raise UserError(
                f"--valid-fraction {valid_fraction} leaves class {label} ({len(rows)} pictures) with none "
                f"in {'validation' if held_back == 0 else 'training'}"
            )
        valid.append(shuffled[:held_back])
        train.append(shuffled[held_back:])
    return torch.cat(train).sort().values, torch.cat(valid).sort().values
