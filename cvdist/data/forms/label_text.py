"""Reads the labels of a table's rows as one text each: a class, or several classes in natural order."""

from __future__ import annotations

import logging

import pyarrow as pa
import pyarrow.compute as pc

from cvdist.data.forms.columns import LabelColumns, text_of
from cvdist.data.forms.found import BETWEEN_CLASSES, log_count
from cvdist.errors import UserError
from cvdist.log import natural, some

logger = logging.getLogger(__name__)

_YES, _NO = ("1", "1.0", "true", "t", "yes", "y"), ("0", "0.0", "false", "f", "no", "n", "")
_UNKNOWN = ("-1", "-1.0")
_SEPARATORS = ";|,"  # that are looked for in labels


def classes_in(label: str, *, multilabel: bool) -> list[str]:
    """Return the classes that a label of `Found.table` names."""
    if not multilabel:
        return [label]
    return label.split(BETWEEN_CLASSES) if label else []


def label_for_people(label: str) -> str:
    """Format a label of `Found.table` for people."""
    return label.replace(BETWEEN_CLASSES, " + ") or "no class"


def labels_in(name: str, table: pa.Table, columns: LabelColumns, separator: str) -> pa.ChunkedArray:
    """Read the labels of a table's rows.

    Args:
        name: name of the table, for messages.
        table: the table as it was read.
        columns: the columns that hold the labels.
        separator: text between the classes in a cell; empty: a cell is one class.

    Returns:
        The labels as in `Found.table`; null where a row has none.

    Raises:
        UserError: if values can't be labels, or no row has one.
    """
    where = f"--data {name}: {columns}"
    if separator and (columns.one_a_class or columns.lists):
        held = "each is one class" if columns.one_a_class else "it holds lists of classes already"
        raise UserError(f"{where}: {held}: leave out --label-separator")
    if columns.one_a_class:
        labels = _of_columns(name, table, columns)
    elif columns.lists:
        labels = _of_lists(where, table[columns.names[0]])
    else:
        labels = text_of(name, table, columns.names[0])
        if not separator:
            return labels
        if not pc.any(pc.match_substring(labels, separator)).as_py():
            logger.warning(
                "data       no value of %s has the --label-separator %s: no picture has several classes",
                columns,
                separator,
            )
        labels = _sorted(labels.fill_null(""), separator)
    empty = pc.sum(pc.equal(labels, "")).as_py() or 0
    if empty == len(labels):
        raise UserError(f"{where} names no class in any row: name another one with --label-column")
    log_count(f"rows without a class in {columns}, kept as pictures of no class", empty)
    return labels


def _of_columns(name: str, table: pa.Table, columns: LabelColumns) -> pa.ChunkedArray:
    """Join, for each row, the names of the columns whose values say that the picture has the class."""
    named, unused = [], []
    for column in sorted(columns.names, key=natural):
        values = pc.utf8_lower(text_of(name, table, column).fill_null(""))
        other = values.filter(pc.invert(pc.is_in(values, value_set=pa.array([*_YES, *_NO]))))
        if len(other):
            value = other[0].as_py()
            fix = (
                "-1 often means unknown: write 0 or 1, or leave these rows out"
                if value in _UNKNOWN
                else "if it is no class, name the others with --label-column"
            )
            raise UserError(
                f"--data {name}: column {column} has {value} in {len(other):,} rows, and the column of a class "
                f"has 1 or 0 (true or false, yes or no, empty): {fix}"
            )
        has = pc.is_in(values, value_set=pa.array(_YES))
        if pc.any(has).as_py():
            named.append(pc.if_else(has, BETWEEN_CLASSES + column, ""))
        else:
            unused.append(column)
    if unused:
        logger.warning("data       columns that no row says yes in, which are no classes: %s", some(unused))
    if not named:
        return pa.chunked_array([pa.array([""] * len(table))])
    return pc.utf8_ltrim(pc.binary_join_element_wise(*named, ""), BETWEEN_CLASSES)


def _of_lists(where: str, lists: pa.ChunkedArray) -> pa.ChunkedArray:
    """Join the texts of each list. Whole numbers count as texts, too."""
    kind = lists.type.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)
            or pa.types.is_null(kind)):  # fmt: skip
        raise UserError(f"{where} holds lists of {kind}, not of classes' names")
    texts = (BETWEEN_CLASSES.join(map(str, filter(None, one or ()))) for one in lists.to_pylist())
    return _sorted(pa.chunked_array([pa.array(texts, pa.string())]), BETWEEN_CLASSES)


def _sorted(labels: pa.ChunkedArray, separator: str) -> pa.ChunkedArray:
    """Return the labels with each of their classes once, in natural order and without spaces around it."""
    encoded = labels.combine_chunks().dictionary_encode()
    cells = [{one.strip() for one in f" {label} ".split(separator)} for label in encoded.dictionary.to_pylist()]
    place = {name: i for i, name in enumerate(sorted(set().union(*cells), key=natural))}
    texts = [BETWEEN_CLASSES.join(sorted(names - {""}, key=place.__getitem__)) for names in cells]
    return pa.chunked_array([pa.array(texts, pa.string()).take(encoded.indices)])


def warn_of_several(columns: LabelColumns, counts: dict[str, int]) -> None:
    """Log a warning if labels that are taken as one class each look like several.

    Args:
        columns: the columns that the labels are from.
        counts: number of rows by label.
    """
    for separator in _SEPARATORS:
        joined = {one: [part.strip() for part in one.split(separator)] for one in counts if separator in one}
        most = sum(counts[one] for one in joined) > sum(counts.values()) / 2
        if (most and separator != ",") or any(set(parts) <= counts.keys() for parts in joined.values()):
            logger.warning(
                "data       labels of %s such as %s are one class each: --label-separator '%s' reads "
                "them as several",
                *(columns, next(iter(joined)), separator),
            )
            return
