"""Labels of pictures, one class or several each, as tables and tensors hold them.

A table of pictures has a column label (int32). Where each picture has one class, this is its number. Where a
picture may have several, a column classes (list of int32) has their numbers, and label numbers the different
lists, so that labels can be compared and sorted as in any other table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

CLASSES = "classes"
NO_CLASS = "no class"


def is_multilabel(table: pa.Table) -> bool:
    """Return whether the pictures of a table may have several classes."""
    return CLASSES in table.column_names


def label_column(table: pa.Table) -> str:
    """Return the name of the column that alone determines the labels of a table's pictures."""
    return CLASSES if is_multilabel(table) else "label"


def labels_of(table: pa.Table, classes: int) -> Tensor:
    """Return the labels of a table's pictures by row: int64 (n,), or bool (n, classes) if multilabel."""
    if not is_multilabel(table):
        return torch.from_numpy(np.array(table.column("label"), dtype=np.int64))
    lists = table.column(CLASSES).combine_chunks()
    rows = np.repeat(np.arange(len(lists)), np.asarray(pc.list_value_length(lists)))
    hot = np.zeros((len(lists), classes), dtype=bool)
    hot[rows, np.asarray(pc.list_flatten(lists))] = True
    return torch.from_numpy(hot)


def targets_of(labels: Tensor) -> Tensor:
    """Return labels as batches have them: int64 (n,) unchanged, bool (n, classes) as float32."""
    return labels.float() if labels.dtype == torch.bool else labels


def class_counts(labels: Tensor, classes: int) -> Tensor:
    """Return the number of pictures of each class, int64 (classes,), from labels as in `labels_of`."""
    return labels.sum(0) if labels.dtype == torch.bool else labels.bincount(minlength=classes)


def label_names(labels: Tensor, classes: Sequence[str]) -> list[str]:
    """Return the name of each picture's class, or the names of its classes, from labels as in `labels_of`."""
    if labels.dtype != torch.bool:
        return [classes[label] for label in labels.tolist()]
    return [", ".join(classes[i] for i in row.nonzero().flatten().tolist()) or NO_CLASS for row in labels]


def named_labels(table: pa.Table, classes: Sequence[str]) -> dict[int, tuple[str, ...]]:
    """Return the names of the classes that each number in the column label stands for."""
    numbers, first = np.unique(np.asarray(table.column("label")), return_index=True)
    if not is_multilabel(table):
        return {number: (classes[number],) for number in numbers.tolist()}
    lists = table.column(CLASSES).take(pa.array(first)).to_pylist()
    return {number: tuple(classes[i] for i in one) for number, one in zip(numbers.tolist(), lists, strict=True)}
