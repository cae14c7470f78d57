"""Finds the columns of a table that hold the pictures' paths, labels and splits, and reads them as text."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from cvdist.config import PathsConfig, TableConfig
from cvdist.data.formats import format_by_name
from cvdist.data.forms.found import log_count, role
from cvdist.errors import UserError
from cvdist.log import some

# Usual names of columns, in lower case and without anything but letters.
_PATHS = re.compile("path|(file|image|img)(name|path|id|file)?|fname|picture|photo|id|ur[il]")
_LABELS = re.compile("labels?|(class|category)(name)?|target|breed|species|y")
_SPLITS = re.compile("split|(sub)?set|partition|usage")
_LOOKED_AT = 1000  # values that tell whether a column holds names of files
_ALL = "*"


@dataclass(frozen=True)
class LabelColumns:
    """The columns of a table that hold the labels.

    Attributes:
        names: names of the columns.
        one_a_class: whether each column stands for a class, and its values say whether a picture has the class.
        lists: whether the values of the only column are lists of classes.
    """

    names: list[str]
    one_a_class: bool = False
    lists: bool = False

    def __str__(self) -> str:
        """Name the columns in messages."""
        return f"column{'s' if len(self.names) > 1 else ''} {some(self.names)}"


def path_column(name: str, table: pa.Table, given: PathsConfig) -> str:
    """Find the column that names files; where none or several do, the one with a usual name."""
    if given.path_column:
        return _there(name, table, "--path-column", given.path_column)
    taken = {getattr(given, "split_column", ""), *_given_labels(table, getattr(given, "label_column", ""))}
    columns = [one for one in table.column_names if one not in taken]
    files = [one for one in columns if _names_files(table[one])]
    found = files if len(files) == 1 else _usual(files or columns, _PATHS)
    found = found or (columns if len(columns) == 1 else [])
    return _one(name, table, found, "--path-column", "the pictures' paths")


def _names_files(column: pa.ChunkedArray) -> bool:
    values = column.slice(0, _LOOKED_AT).to_pylist()
    texts = [one.strip() for one in values if isinstance(one, str) and one.strip()]
    return bool(texts) and all(format_by_name(one.replace("\\", "/")) for one in texts)


def label_column(name: str, table: pa.Table, given: TableConfig, taken: set[str]) -> str:
    """Find the column of labels by its usual name; where there is none, the only column that is left."""
    if given.label_column:
        return _there(name, table, "--label-column", given.label_column)
    columns = [one for one in table.column_names if one not in taken]
    found = _usual(columns, _LABELS)
    if not found:
        left = _named_by_people(columns)
        found = left if len(left) == 1 else []
    return _one(name, table, found, "--label-column", "the classes")


def label_columns(name: str, table: pa.Table, given: TableConfig, taken: set[str]) -> LabelColumns:
    """Find the column with the labels, or one for each class.

    `--label-column` may name them, with commas between the names; `*` stands for all other columns.
    """
    named = _given_labels(table, given.label_column)
    left = _named_by_people(one for one in table.column_names if one not in taken)
    if given.label_column == _ALL and not named:
        return LabelColumns(left, one_a_class=True)
    if "," in given.label_column and given.label_column not in table.column_names:
        for one in named:
            _there(name, table, "--label-column", one)
            if named.count(one) > 1 or one in taken:
                what = "the column of paths or splits" if one in taken else "named twice"
                raise UserError(f"--label-column {given.label_column}: {one} is {what}")
        return LabelColumns(named, one_a_class=True)
    if not (given.label_column or _usual(left, _LABELS)) and _are_flags(table.select(left)):
        raise UserError(
            f"--data {name}: columns {some(left)} have 0 and 1: if each is a class, --label-column '*' takes "
            "all, and --label-column A,B those that it names"
        )
    column = label_column(name, table, given, taken)
    kind = table[column].type
    return LabelColumns([column], lists=bool(pa.types.is_list(kind) or pa.types.is_large_list(kind)))


def _given_labels(table: pa.Table, text: str) -> list[str]:
    """Return the columns that `--label-column` names one by one. A name with commas in it may be quoted."""
    if not text or text in table.column_names:
        return [text] if text else []
    return [] if text == _ALL else [one for one in map(str.strip, next(csv.reader([text]))) if one]


def _named_by_people(columns: Iterable[str]) -> list[str]:
    """Return the columns without those of row numbers, which tools write without a name."""
    return [one for one in columns if one.strip() and not one.startswith("Unnamed: ")]


def _are_flags(columns: pa.Table) -> bool:
    """Return whether there are several columns, whose first values are all 0 and 1, or true and false."""
    rows = columns.slice(0, _LOOKED_AT).to_pylist()
    values = {str(one).strip().lower() for row in rows for one in row.values()}
    known = {"0", "1", "0.0", "1.0", "true", "false", "none", ""}
    return columns.num_columns > 1 and values <= known and not values <= {"none", ""}


def split_column(name: str, table: pa.Table, given: TableConfig, paths: str) -> str:
    """Find the column of splits by its usual name; empty if there is none."""
    if given.split_column:
        asked = given.split_column
        return "" if asked == "none" else _there(name, table, "--split-column", asked)
    taken = {paths, *_given_labels(table, given.label_column)}
    found = _usual([one for one in table.column_names if one not in taken], _SPLITS)
    return _one(name, table, found, "--split-column", "the splits") if found else ""


def _usual(columns: Iterable[str], usual: re.Pattern[str]) -> list[str]:
    return [one for one in columns if usual.fullmatch(re.sub(r"[^a-z]", "", one.lower()))]


def _one(name: str, table: pa.Table, found: list[str], flag: str, what: str) -> str:
    if len(found) == 1:
        return found[0]
    columns = ", ".join(table.column_names)
    if found:
        raise UserError(f"--data {name}: {' or '.join(found)} may hold {what}: name one with {flag}")
    raise UserError(f"--data {name} has the columns {columns}: name the one with {what} with {flag}")


def _there(name: str, table: pa.Table, flag: str, column: str) -> str:
    if column not in table.column_names:
        raise UserError(f"{flag} {column}: --data {name} has the columns {', '.join(table.column_names)}")
    return column


def text_of(name: str, table: pa.Table, column: str) -> pa.ChunkedArray:
    """Return a column's values as text without spaces around it, null where there is none.

    Whole numbers are written without a decimal point.
    """
    values = table[column]
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_nested(values.type):
        raise UserError(f"--data {name}: column {column} holds {values.type}, not one value a row")
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
        if pc.all(pc.equal(values, pc.round(values))).as_py():
            values = values.cast(pa.int64())
    given, values = values.cast(pa.string()), pc.utf8_trim_whitespace(values.cast(pa.string()))
    padded = given.filter(pc.not_equal(given, values).fill_null(False))
    quoted = ", ".join(map(repr, padded.unique()[:3].to_pylist()))
    log_count(f"values of column {column} with spaces around them, taken without", len(padded), quoted)
    return pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)


def roles_of(name: str, column: str, values: pa.ChunkedArray) -> pa.Array:
    """Return the splits that a column names.

    Raises:
        UserError: if a value names no split.
    """
    encoded = values.fill_null("").combine_chunks().dictionary_encode()
    there = encoded.dictionary.to_pylist()
    if unknown := [one or "(empty)" for one in there if not role(one)]:
        raise UserError(
            f"--data {name}: column {column} has {some(unknown)}, and splits are train, valid and test: name "
            "another one with --split-column, or none"
        )
    return pa.array([role(one) for one in there], pa.string()).take(encoded.indices)
