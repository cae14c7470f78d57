"""Finds pictures in Parquet files, with their classes, as Hugging Face writes them: a row for each picture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cvdist import storage
from cvdist.config import TableConfig
from cvdist.data.contents import Contents, digest_of
from cvdist.data.forms import columns
from cvdist.data.forms.archives import UNLABELED, Archive, by_splits, roles_of, scanned
from cvdist.data.forms.found import Found
from cvdist.data.parquet_rows import batch_rows, bytes_of, features_of, field_of, open_file, picture_column
from cvdist.errors import UserError
from cvdist.log import redact

logger = logging.getLogger(__name__)


def has_pictures(path: str, root: str) -> bool:
    """Return whether a Parquet file has a column with the bytes of pictures, rather than their paths.

    Raises:
        UserError: if it can't be read.
    """
    try:
        with Contents(root).open(path) as source:
            return bool(picture_column(pq.read_schema(source)))
    except pa.ArrowException:
        return False
    except OSError as error:
        raise UserError(f"--data {redact(root)}: {path} can't be read ({storage.reason(error)})") from error


def look(paths: Sequence[str], root: str, uri: str, cache: Path, label_column: str = "") -> Found:
    """Find the labeled pictures of Parquet files.

    Args:
        paths: paths of the files below `root`.
        root: folder or URI.
        uri: what the user named, for messages.
        cache: the node's cache folder.
        label_column: name of the column with the classes; empty: the one that is marked as such, or has a usual
            name.

    Raises:
        UserError: if one can't be read, or has no column with pictures or with classes.
    """
    archives, contents = _read(paths, root, uri, cache), Contents(root)
    tables, unlabeled, roles = [], 0, roles_of(paths, uri)
    for archive in archives:
        table = archive.as_found(roles[archive.path])
        label = _labels(contents, archive, label_column, uri).take(table.column("row"))
        unlabeled += label.null_count
        tables.append(table.append_column("label", label).filter(pc.is_valid(label)))
    if unlabeled:
        logger.warning("data       left out: pictures without a label: %s", f"{unlabeled:,}")
    table = pa.concat_tables(tables)
    return by_splits(table.select([*UNLABELED, "label", "split"]), uri)


def look_unlabeled(paths: Sequence[str], root: str, uri: str, cache: Path) -> pa.Table:
    """Find all pictures of Parquet files, with the same arguments and errors as `look`.

    Returns:
        The columns path, size, modified and version of `Found.table`.
    """
    archives = _read(paths, root, uri, cache)
    return pa.concat_tables([archive.as_found().select(UNLABELED) for archive in archives])


def _read(paths: Sequence[str], root: str, uri: str, cache: Path) -> list[Archive]:
    """Read the files, and log how many rows have no picture."""
    archives = scanned(paths, root, uri, cache, _scan)
    if not any(len(archive.pictures) for archive in archives):
        raise UserError(f"--data {redact(uri)} has no pictures: its rows are empty")
    if empty := sum(archive.facts["empty"] for archive in archives):
        logger.warning("data       left out: rows without a picture: %s", f"{empty:,}")
    return archives


def _scan(source: pa.NativeFile, advance: Callable[[int], None]) -> tuple[pa.Table, dict[str, Any]]:
    """Read the pictures of a file once (`archives.Scan`)."""
    file = open_file(source)
    column = picture_column(file.schema_arrow)
    if not column:
        raise UserError(f"has no column with pictures, only {', '.join(file.schema_arrow.names)}")
    whole = column.rpartition(".")[0]
    tables, row, empty, done = [], 0, 0, 0
    for number in range(file.num_row_groups):
        size = batch_rows(file.metadata, column, number)
        wanted = [column, f"{whole}.path"] if whole else [column]
        for batch in file.iter_batches(size, row_groups=[number], columns=wanted, use_threads=False):
            pictures = batch.column(0)
            names = field_of(pictures, "path")
            values = bytes_of(pictures).cast(pa.large_binary())
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


def _labels(contents: Contents, archive: Archive, label_column: str, uri: str) -> pa.ChunkedArray:
    """Return the class of each row of a file, string (rows,); null where it has none."""
    where = f"{redact(uri)}: {archive.path}"
    try:
        with contents.open(archive.path) as source:
            schema = pq.read_schema(source)
            column = _label_column(where, schema, label_column)
            table = pq.read_table(source, columns=[column])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"--data {where} can't be read ({storage.reason(error)})") from error
    values = table.column(0)
    if pa.types.is_integer(values.type):  # -1 marks pictures that are to be classified
        values = pc.if_else(pc.less(values, 0), pa.scalar(None, values.type), values)
        names = features_of(schema).get(column, {}).get("names")
        if isinstance(names, list):
            if (largest := pc.max(values).as_py()) is not None and largest >= len(names):
                raise UserError(
                    f"--data {where}: column {column} has class {largest}, and names of {len(names)} classes"
                )
            return pa.chunked_array([pa.array(names, pa.string())]).take(values)
    return columns.text_of(where, pa.table({column: values}), column)


def _label_column(where: str, schema: pa.Schema, given: str) -> str:
    """Return the column of classes: the one that the user names, is marked as such, or has a usual name."""
    marked = [name for name, one in features_of(schema).items() if one.get("_type") == "ClassLabel"]
    if len(marked) == 1 and not given:
        return marked[0]
    plain = [one for one in schema if not pa.types.is_nested(one.type) and not pa.types.is_binary(one.type)]
    lists = [one.name for one in schema if pa.types.is_list(one.type) or pa.types.is_large_list(one.type)]
    if given in lists or (lists and not given and not plain):
        raise UserError(
            f"--data {where}: column {given or lists[0]} holds lists, and several labels a picture are read "
            "from tables: save the pictures as files, and name their paths and labels in a table"
        )
    return columns.label_column(where, pa.schema(plain).empty_table(), TableConfig(label_column=given), set())
