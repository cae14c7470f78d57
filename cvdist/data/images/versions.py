"""Tells whether pictures are the same as before, wherever they were copied to, without decoding them.

A node keeps what it has found out: `<cache>/versions/` holds a table for each `--data`, with the version of
each file by path, size and time of change. So a file is read, or an object asked for, once.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cvdist import log
from cvdist.data import kept
from cvdist.data.contents import Contents, digest_of
from cvdist.data.labels import is_multilabel

logger = logging.getLogger(__name__)

_READERS = 16  # files at a time
_REQUESTS = 64  # objects at a time


def with_versions(listing: pa.Table, root: str, cache: Path) -> pa.Table:
    """Replace the column modified of a listing by version (string), the version of each picture's content.

    For a file it is the digest of its content, for an object its ETag. A copy of an object has another ETag if
    it was cut into other parts or encrypted otherwise. In storage without ETags it is the modification time.

    Args:
        listing: pictures, with the columns path, size and modified; a column version stays as it is.
        root: folder or URI that the paths are relative to.
        cache: the node's cache folder.

    Raises:
        UserError: if a picture can't be read.
    """
    if "version" in listing.column_names:
        return _without_times(listing)
    contents, paths, now = Contents(root), listing.column("path"), time.time_ns()
    local = contents.local

    def look(path: str) -> str:
        return digest_of(contents.read(path)).hex() if local else contents.etag(path)

    times = listing.column("modified")
    if local:  # a file's modification time may be set to an old one
        times = pa.chunked_array([[contents.changed(path) for path in paths.to_pylist()]], pa.int64())
    sizes = listing.column("size")
    keys = pc.binary_join_element_wise(paths, sizes.cast(pa.string()), times.cast(pa.string()), "\n")
    known = kept.load(cache, root)
    versions: list[str | None] = [None] * len(keys)
    if known is not None:
        versions = known.column("version").take(pc.index_in(keys, value_set=known.column("key"))).to_pylist()
    unknown = [row for row, version in enumerate(versions) if version is None]
    with ThreadPoolExecutor(_READERS if local else _REQUESTS) as pool:
        looked = pool.map(look, paths.take(pa.array(unknown, pa.int64())).to_pylist())
        for row, version in zip(unknown, _shown(looked, len(unknown)), strict=True):
            versions[row] = version or f"time {times[row].as_py()}"
    found = pa.array(versions, pa.string())
    if unknown:
        settled = pc.less(times, now - kept.UNSETTLED)
        kept.keep(cache, root, pa.table({"key": keys, "version": found}).filter(settled))
    return _without_times(listing.append_column("version", found))


def _without_times(listing: pa.Table) -> pa.Table:
    if "label" in listing.column_names:
        _warn_of_twins(listing)
    return listing.drop_columns("modified")


def _warn_of_twins(listing: pa.Table) -> None:
    """Log a warning with the pictures that lie in two classes, or have two lists of classes."""
    labels = listing.group_by("version").aggregate([("label", "count_distinct")])
    several = labels.filter(pc.greater(labels.column("label_count_distinct"), 1)).column("version")
    if len(several):
        one = listing.filter(pc.equal(listing.column("version"), several[0]))
        paths = dict(zip(one.column("label").to_pylist(), one.column("path").to_pylist(), strict=True)).values()
        example = " and ".join(paths)
        what = "listed with different classes" if is_multilabel(listing) else "in more than one class"
        logger.warning("data       pictures %s: %d, e.g. %s", what, len(several), example)


def by_content(table: pa.Table) -> pa.Table:
    """Sort pictures by their contents, so that neither names nor the form of the data decide their order.

    Args:
        table: pictures, with the columns digest, part, label and path. The last three order equal pictures.
    """
    return table.sort_by([(name, "ascending") for name in ("digest", "part", "label", "path")])


def digest_of_rows(table: pa.Table, rows: Iterable[np.ndarray], columns: Sequence[str]) -> str:
    """Return a hexadecimal SHA-256 of rows and columns, with values of fixed size or lists of such values."""
    sha = hashlib.sha256()
    for mine in rows:
        for name in columns:
            column = table.column(name).take(pa.array(mine)).combine_chunks()
            for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
                if pa.types.is_list(chunk.type):
                    sha.update(np.asarray(pc.list_value_length(chunk)).tobytes())
                    chunk = np.ascontiguousarray(pc.list_flatten(chunk))
                sha.update(chunk.data if isinstance(chunk, np.ndarray) else chunk.buffers()[1])
        sha.update(b"/")
    return sha.hexdigest()


def digest(listing: pa.Table) -> str:
    """Return a hexadecimal SHA-256 of a whole listing, from the names and contents of its pictures."""
    sha = hashlib.sha256()
    for batch in listing.to_batches(max_chunksize=1 << 16):
        for column in batch.columns:
            sha.update(repr(column.to_pylist()).encode())
    return sha.hexdigest()


def _shown(versions: Iterator[str], count: int) -> Iterator[str]:
    """Yield the same versions, and show a line of progress if they take long."""
    line = log.ProgressLine(logger, enabled=True)
    for i, version in enumerate(versions):
        yield version
        if line.due():
            line.show(f"looking at {i:,}/{count:,} pictures that are new here")
    line.clear()
