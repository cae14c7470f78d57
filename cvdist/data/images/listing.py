"""Lists the pictures of `--data`, in whatever form they are kept, with their classes' numbers and splits."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cvdist import log
from cvdist.config import DataConfig, PicturesConfig
from cvdist.data import forms
from cvdist.data.forms.found import NO_PART, TRAIN_PART, VALID_PART
from cvdist.data.forms.label_text import classes_in
from cvdist.data.images.exclusion import kept_rows
from cvdist.data.labels import CLASSES, class_counts, is_multilabel, labels_of
from cvdist.data.split import multilabel_split, stratified_split
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
            If a picture may have several classes, also the column classes (`cvdist.data.labels`).
    """

    classes: tuple[str, ...]
    table: pa.Table


def list_pictures(config: PicturesConfig, fewest_classes: int = 2) -> Listing:
    """List the labeled pictures of `--data`.

    Args:
        config: configuration that names the pictures.
        fewest_classes: smallest number of classes that is accepted.

    Raises:
        UserError: if the data can't be read, or its classes can't be learned or can be understood in two ways.
    """
    found = forms.look(config)
    label, split = (found.table.column(name) for name in ("label", "split"))
    counts: dict[str, Counter[str]] = {name: Counter() for name in found.parts}
    for row in found.table.group_by(["split", "label"]).aggregate([([], "count_all")]).to_pylist():
        named = classes_in(row["label"], multilabel=found.multilabel)
        counts[row["split"]].update(dict.fromkeys(named, row["count_all"]))
    classes = _require_classes(counts, found, redact(config.uri).rstrip("/"), fewest_classes)
    part = pa.array(list(found.parts.values()), pa.int8()).take(
        pc.index_in(split, value_set=pa.array(list(found.parts), pa.string())).combine_chunks()
    )
    table = found.table.drop_columns(["label", "split"])
    if not found.multilabel:
        number = pc.index_in(label, value_set=pa.array(classes, pa.string()))
        return Listing(classes, table.add_column(1, "label", number).add_column(2, "part", part))
    encoded, position = label.combine_chunks().dictionary_encode(), {name: i for i, name in enumerate(classes)}
    lists = [
        [position[name] for name in classes_in(text, multilabel=True)]
        for text in encoded.dictionary.to_pylist()
    ]
    order = sorted(range(len(lists)), key=lists.__getitem__)
    number = pa.array(np.argsort(order), pa.int32()).take(encoded.indices)
    several = pa.array(lists, pa.list_(pa.int32())).take(encoded.indices)
    table = table.add_column(1, "label", number).add_column(2, "part", part)
    return Listing(classes, table.append_column(CLASSES, several))


@contextmanager
def without_notes() -> Iterator[None]:
    """Log nothing about pictures that are left out or changed by listing, because they were listed before."""
    loggers = (logger, logging.getLogger(forms.__name__))
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one in loggers:
            one.setLevel(logging.NOTSET)


def require_one_class(config: PicturesConfig, job: str) -> None:
    """List the labeled pictures of `--data`, and refuse those that may have several classes.

    Args:
        config: configuration that names the pictures.
        job: name of the job that takes pictures with one class each, for the message.

    Raises:
        UserError: as `list_pictures`, or if they may have several classes.
    """
    if is_multilabel(list_pictures(config).table):
        raise UserError(
            f"--data {redact(config.uri)} may have several classes a picture, and {job} takes pictures with "
            "one each: name a column of one class with --label-column"
        )


def _require_classes(
    counts: Mapping[str, Mapping[str, int]], found: forms.Found, root: str, fewest: int
) -> tuple[str, ...]:
    """Check that there are at least `fewest` classes, and that all of them can be learned.

    Args:
        counts: number of pictures by class, for each split.
        found: the pictures that were found.
        root: the data's name, for messages.
        fewest: smallest number of classes that is accepted.

    Returns:
        The names of the classes, in natural order.
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
    """Return the rows of `table` for training and for validation, int64, in order, without `--exclude`'s.

    Excluding pictures does not move any other picture between training and validation.

    Raises:
        UserError: if a class would be missing in training, or validation would have no picture.
    """
    part, labels = np.asarray(table.column("part")), labels_of(table, len(classes))
    if (part == NO_PART).all():
        split = multilabel_split if is_multilabel(table) else stratified_split
        train, valid = (rows.numpy() for rows in split(labels, config.valid_fraction, config.split_seed))
    else:
        train, valid = (part == TRAIN_PART).nonzero()[0], (part == VALID_PART).nonzero()[0]
    kept = kept_rows(table, config)
    train, valid = train[kept[train]], valid[kept[valid]]
    learned = class_counts(labels[train], len(classes)).tolist()
    missing = [name for name, count in zip(classes, learned, strict=True) if not count]
    if missing or not len(valid):
        what = f"training picture of {some(missing)}" if missing else "validation picture"
        left = "is left by --exclude" if config.exclude else "can be decoded"
        raise UserError(f"--data {redact(config.uri)}: no {what} {left}")
    return train, valid
