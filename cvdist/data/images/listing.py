"""The pictures of `--data`, in whichever form they are kept, with the number of their class and their split."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cvdist import log
from cvdist.config import DataConfig, PicturesConfig
from cvdist.data import forms
from cvdist.data.forms.found import NO_PART, TRAIN_PART, VALID_PART
from cvdist.data.images.exclusion import find_excluded
from cvdist.data.split import stratified_split
from cvdist.errors import UserError
from cvdist.log import redact, some

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """The pictures of a data set.

    Attributes:
        classes: names of the classes, in natural order (2 before 10).
        table: one row per picture, with the columns path (string, below `forms.root_of` the data), label
            (int32), part (int8: 0 for training, 1 for validation, -1 if the data has no splits), size (int64,
            bytes), modified (int64, nanoseconds since 1970) and, in some forms, version, as in `forms.Found`.
    """

    classes: tuple[str, ...]
    table: pa.Table


def list_pictures(config: PicturesConfig, fewest_classes: int = 2) -> Listing:
    """List the labeled pictures of `--data`.

    Args:
        config: configuration that names the pictures.
        fewest_classes: smallest number of classes that is accepted.

    Raises:
        UserError: if the data can't be read, or its classes can't be learned or may be taken in two ways.
    """
    found = forms.look(config)
    label, split = (found.table.column(name) for name in ("label", "split"))
    counts: dict[str, dict[str, int]] = {name: {} for name in found.parts}
    for row in found.table.group_by(["split", "label"]).aggregate([([], "count_all")]).to_pylist():
        counts[row["split"]][row["label"]] = row["count_all"]
    classes = _require_classes(counts, found, redact(config.uri).rstrip("/"), fewest_classes)
    number = pc.index_in(label, value_set=pa.array(classes, pa.string()))
    part = pa.array(list(found.parts.values()), pa.int8()).take(
        pc.index_in(split, value_set=pa.array(list(found.parts), pa.string())).combine_chunks()
    )
    table = found.table.drop_columns(["label", "split"])
    table = table.add_column(1, "label", number).add_column(2, "part", part)
    return Listing(classes, table)


def _require_classes(
    counts: Mapping[str, Mapping[str, int]], found: forms.Found, root: str, fewest: int
) -> tuple[str, ...]:
    """Check that there are at least `fewest` classes, and all to be learned.

    Args:
        counts: number of pictures by class, for each split.
        found: what the form says.
        root: the data's name, for messages.
        fewest: smallest number of classes that is accepted.

    Returns:
        The names of the classes, in natural order.

    Raises:
        UserError: if the check fails, in one line that names the data.
    """
    name, train = next(iter(counts.items()))
    classes = tuple(sorted(train, key=log.natural))
    for other, there in list(counts.items())[1:]:
        if unknown := [f"{label} ({count})" for label, count in there.items() if label not in train]:
            raise UserError(
                f"--data {root}: {other} has classes that {name} has no pictures of: {some(unknown)}"
            )
        if missing := [f"{label} ({count})" for label, count in train.items() if label not in there]:
            logger.warning("data       classes that %s has no pictures of: %s", other, some(missing))
    if len(classes) < fewest:
        one = f"one class, {classes[0]} ({train[classes[0]]} pictures)" if classes else "no classes"
        raise UserError(f"--data {root} has {one}: a classifier needs two or more{found.hint}")
    single = [label for label in classes if train[label] == 1]
    if found.parts[name] == NO_PART and fewest > 1:
        if len(single) == len(classes):
            raise UserError(f"--data {root} has one picture of each class: none is left to validate on")
        if single:
            logger.warning(
                "data       classes with a single picture, which is in training only: %s", some(single)
            )
    return classes


def split_rows(table: pa.Table, config: DataConfig, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `table` for training and for validation, int64 each, in order, without those of `--exclude`.

    Leaving pictures out moves no other one to the other side.

    Raises:
        UserError: if a class would be missing in training, or validation would have no picture.
    """
    part, label = (np.asarray(table.column(name)) for name in ("part", "label"))
    if (part == NO_PART).all():
        rows = stratified_split(
            torch.from_numpy(label.astype(np.int64)), config.valid_fraction, config.split_seed
        )
        train, valid = (tensor.numpy() for tensor in rows)
    else:
        train, valid = (part == TRAIN_PART).nonzero()[0], (part == VALID_PART).nonzero()[0]
    kept = find_excluded(table, config).kept
    train, valid = train[kept[train]], valid[kept[valid]]
    learned = set(np.unique(label[train]).tolist())
    missing = [name for i, name in enumerate(classes) if i not in learned]
    if missing or not len(valid):
        what = f"training picture of {some(missing)}" if missing else "validation picture"
        left = "is left by --exclude" if config.exclude else "can be decoded"
        raise UserError(f"--data {redact(config.uri)}: no {what} {left}")
    return train, valid
