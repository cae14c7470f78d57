"""Pictures in Parquet files, with their classes, as Hugging Face writes them: a row for each picture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cvdist import storage
from cvdist.data.contents import Contents, digest_of
from cvdist.data.forms.archives import Archive, by_splits, roles_of, scanned
from cvdist.data.forms.found import Found
from cvdist.data.parquet_rows import batch_rows, features_of, field_of, open_file, picture_column
from cvdist.errors import UserError
from cvdist.log import redact

logger = logging.getLogger(__name__)

# Usual names of a column with classes, the likeliest first.
_LABELS = (
    "label",
    "labels",
    "class",
    "class_name",
    "fine_label",
    "cls",
    "category",
    "target",
    "species",
    "breed",
)


def has_pictures(path: str, root: str) -> bool:
    """Return whether a Parquet file has a column with pictures' bytes, rather than their paths.

    Raises:
        UserError: if it can't be read.
    """
    try:
        with Contents(root).open(path) as source:
            return bool(picture_column(pq.read_schema(source)))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"--data {redact(root)}: {path} can't be read ({storage.reason(error)})") from error


def look(paths: Sequence[str], root: str, uri: str, cache: Path, label_column: str = "") -> Found:
    """Find the labeled pictures of Parquet files.

    Args:
        paths: of the files, below `root`.
        root: folder or URI.
        uri: what the user named, for messages.
        cache: the node's cache folder.
        label_column: with the classes; empty: the one that is marked as such, or has a usual name.

    Raises:
        UserError: if one can't be read, or has no column with pictures or with classes.
    """
    archives, contents = _read(paths, root, uri, cache), Contents(root)
    tables, unlabeled, roles = [], 0, roles_of(paths, uri)
    for archive in archives:
        table = _joined(archive, roles[archive.path])
        label = _labels(contents, archive, label_column, uri).take(table.column("row"))
        unlabeled += label.null_count
        tables.append(table.append_column("label", label).filter(pc.is_valid(label)))
    if unlabeled:
        logger.warning("data       left out: pictures without a label: %s", f"{unlabeled:,}")
    columns = ["path", "size", "modified", "version", "label", "split"]
    return by_splits(pa.concat_tables(tables).select(columns), uri)


def look_unlabeled(paths: Sequence[str], root: str, uri: str, cache: Path) -> pa.Table:
    """Find all pictures of Parquet files; arguments and errors as of `look`.

    Returns:
        The columns path, size, modified and version of `Found.table`.
    """
    tables = [_joined(archive, "") for archive in _read(paths, root, uri, cache)]
    return pa.concat_tables(tables).select(["path", "size", "modified", "version"])


def _read(paths: Sequence[str], root: str, uri: str, cache: Path) -> list[Archive]:
    """Read the files, and say what they lack.

    Raises:
        UserError: if one can't be used.
    """
    archives = scanned(paths, root, uri, cache, _scan)
    if not any(len(archive.pictures) for archive in archives):
        raise UserError(f"--data {redact(uri)} has no pictures: its rows are empty")
    if empty := sum(archive.facts["empty"] for archive in archives):
        logger.warning("data       left out: rows without a picture: %s", f"{empty:,}")
    return archives


def _joined(archive: Archive, role: str) -> pa.Table:
    """The pictures of one file, with paths below the root, and the columns modified, split and row."""
    table, count = archive.pictures, len(archive.pictures)
    path = pc.binary_join_element_wise(archive.path, table.column("path"), "")
    table = table.set_column(0, "path", path).replace_schema_metadata()
    table = table.append_column("modified", pa.array([archive.modified] * count, pa.int64()))
    return table.append_column("split", pa.array([role] * count, pa.string()))


def _scan(source: pa.NativeFile, advance: Callable[[int], None]) -> tuple[pa.Table, dict[str, Any]]:
    """Read the pictures of a file once (`archives.Scan`).

    Raises:
        UserError: if it has none; the message goes on behind its name.
    """
    file = open_file(source)
    column = picture_column(file.schema_arrow)
    if not column:
        raise UserError(f"has no column with pictures, only {_names(file.schema_arrow)}")
    whole, _, within = column.rpartition(".")
    tables, row, empty, done = [], 0, 0, 0
    for number in range(file.num_row_groups):
        size = batch_rows(file.metadata, column, number)
        wanted = [column, f"{whole}.path"] if whole else [column]
        for batch in file.iter_batches(size, row_groups=[number], columns=wanted, use_threads=False):
            pictures = batch.column(0)
            names = field_of(pictures, "path") if whole else None
            values = (field_of(pictures, within) if whole else pictures).cast(pa.large_binary())
            rows = [i for i in range(len(values)) if values[i].is_valid]
            sizes = pc.binary_length(values).drop_null().cast(pa.int64())
            own = names.to_pylist() if names is not None else [None] * len(values)
            tables.append(
                pa.table(
                    {
                        "path": [f"@{row + i}/{(own[i] or '').lstrip('/')}".rstrip("/") for i in rows],
                        "size": sizes,
                        "version": [digest_of(values[i].as_buffer()).hex() for i in rows],
                        "row": pa.array([row + i for i in rows], pa.int64()),
                    },
                    _SCHEMA,
                )
            )
            row, empty = row + len(values), empty + len(values) - len(rows)
            done += pc.sum(sizes).as_py() or 0
            advance(done)
    return pa.concat_tables(tables or [_SCHEMA.empty_table()]), {"empty": empty}


_SCHEMA = pa.schema(
    [("path", pa.string()), ("size", pa.int64()), ("version", pa.string()), ("row", pa.int64())]
)


def _labels(contents: Contents, archive: Archive, column: str, uri: str) -> pa.Array:
    """The class of each row of a file, null where it has none: string (rows).

    Raises:
        UserError: if there is no such column, or its values are no classes.
    """
    where = f"--data {redact(uri)}: {archive.path}"
    try:
        with contents.open(archive.path) as source:
            schema = pq.read_schema(source)
            column = column or _label_column(schema)
            if column not in schema.names:
                named = f"no column {column}" if column else "no column with classes that is known by its name"
                raise UserError(f"{where} has {named}, only {_names(schema)}")
            values = pq.read_table(source, columns=[column]).column(0).combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{where} can't be read ({storage.reason(error)})") from error
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        text = pc.utf8_trim_whitespace(values.cast(pa.string()))
        return pc.if_else(pc.equal(text, ""), None, text)
    if pa.types.is_boolean(values.type):
        return values.cast(pa.string())
    if pa.types.is_floating(values.type):  # as pandas writes whole numbers if some are missing
        whole = pc.all(pc.equal(pc.floor(values), values)).as_py()
        values = values.cast(pa.int64()) if whole else values
    if not pa.types.is_integer(values.type):
        raise UserError(f"{where}: column {column} is of {values.type}, not of numbers or names of classes")
    numbers = values.cast(pa.int64())
    numbers = pc.if_else(pc.less(numbers, 0), None, numbers)  # -1 marks pictures to be classified
    names = features_of(schema).get(column, {}).get("names")
    if not isinstance(names, list):
        return numbers.cast(pa.string())
    if (largest := pc.max(numbers).as_py()) is not None and largest >= len(names):
        raise UserError(f"{where}: column {column} has the class {largest}, and names of {len(names)} classes")
    return pa.array(names, pa.string()).take(numbers)


def _label_column(schema: pa.Schema) -> str:
    """The column of classes: one that is marked as such, or of a usual name; empty without any."""
    marked = [name for name, one in features_of(schema).items() if one.get("_type") == "ClassLabel"]
    if len(marked) == 1:
        return marked[0]
    return next((name for name in _LABELS if name in (marked or schema.names)), "")


def _names(schema: pa.Schema) -> str:
    return ", ".join(f"{one.name} ({one.type})" for one in schema)
