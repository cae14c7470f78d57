"""Reads pictures that lie in the rows of Parquet files."""

from __future__ import annotations

import json
import threading
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

# Usual names of a column of pictures, the likeliest first.
_NAMES = ("image", "img", "picture", "photo", "image_bytes", "img_bytes", "jpg", "jpeg", "png", "webp", "bytes")
_BATCH_BYTES = 1 << 25  # of a row group that are read at a time
_LEAST_ROWS = 32  # of a batch, however large the pictures are
_BATCHES = 2  # that stay of a row group: pictures are asked for nearly, but not quite, in order
_GROUPS = 2  # row groups that stay
_FILES = 256  # whose metadata stay
_BUFFER = 1 << 22  # bytes of a request


def picture_column(schema: pa.Schema) -> str:
    """Return the path of the column that holds pictures' bytes, such as `image.bytes`; empty without any.

    It is a struct with a field `bytes`, as Hugging Face writes them, or a column of bytes by a usual name.
    """
    structs = [one.name for one in schema if pa.types.is_struct(one.type) and _has_bytes(one.type)]
    plain = [one.name for one in schema if _is_bytes(one.type)]
    for name in [*_NAMES, *structs]:
        if name in structs:
            return f"{name}.bytes"
        if name in plain:
            return name
    return ""


def features_of(schema: pa.Schema) -> dict[str, dict[str, object]]:
    """Return what Hugging Face's metadata say about the columns; empty without such metadata."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {name: one for name, one in found.items() if isinstance(one, dict)}


def batch_rows(metadata: pq.FileMetaData, column: str, group: int) -> int:
    """Return how many pictures are read at a time, so that ordinary ones take a bounded number of bytes."""
    row_group = metadata.row_group(group)
    sizes = [row_group.column(i) for i in range(row_group.num_columns)]
    size = sum(one.total_uncompressed_size for one in sizes if one.path_in_schema == column)
    return max(_LEAST_ROWS, row_group.num_rows * _BATCH_BYTES // max(size, 1))


def open_file(source: pa.NativeFile, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """Open a Parquet file so that a row group is read in pieces, not as a whole."""
    return pq.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False, metadata=metadata)


def bytes_of(pictures: pa.Array) -> pa.Array:
    """Return the bytes of a column of pictures, which may be a field of its structs."""
    return field_of(pictures, "bytes") if pa.types.is_struct(pictures.type) else pictures


def field_of(column: pa.Array, name: str) -> pa.Array | None:
    """Return a field of a column of structs, null where the struct is; None if there is no such field."""
    index = column.type.get_field_index(name) if pa.types.is_struct(column.type) else -1
    return column.flatten()[index] if index >= 0 else None


class PictureRows:
    """Reads pictures by file and row, and keeps what it has read last. Safe to use from several threads."""

    def __init__(self, open_source: Callable[[str], pa.NativeFile]) -> None:
        """Note `open_source`, which opens a file by its path. Nothing is read yet."""
        self._open = open_source
        self._files: OrderedDict[str, tuple[pq.FileMetaData, str, list[int]]] = OrderedDict()
        self._groups: OrderedDict[tuple[str, int], _RowGroup] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, file: str, rows: Sequence[int]) -> list[bytes]:
        """Read the pictures in some rows of a file, quickest in ascending order.

        Raises:
            OSError: if it can't be read, or has no such rows with pictures.
        """
        try:
            metadata, column, ends = self._layout(file)
            found = []
            for row in rows:
                number = bisect_right(ends, row)
                if number == len(ends):
                    raise OSError(f"there is no row {row}")
                start = ends[number - 1] if number else 0
                found.append(self._group(file, metadata, column, number).read(row - start))
            return found
        except pa.ArrowException as error:
            raise OSError(str(error)) from error

    def _layout(self, file: str) -> tuple[pq.FileMetaData, str, list[int]]:
        """Return the metadata of a file, its column with pictures, and the row after each row group's last."""
        with self._lock:
            known = self._files.get(file)
        if known is None:
            opened = open_file(self._open(file))
            column = picture_column(opened.schema_arrow)
            if not column:
                raise OSError("it has no column with pictures")
            counts = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
            known = opened.metadata, column, list(accumulate(counts))
            with self._lock:
                self._files[file] = known
                if len(self._files) > _FILES:
                    self._files.popitem(last=False)
        return known

    def _group(self, file: str, metadata: pq.FileMetaData, column: str, number: int) -> _RowGroup:
        with self._lock:
            group = self._groups.pop((file, number), None) or _RowGroup(
                lambda: open_file(self._open(file), metadata), number, column
            )
            self._groups[file, number] = group
            if len(self._groups) > _GROUPS:
                self._groups.popitem(last=False)
        return group


class _RowGroup:
    """A row group, which is read in batches from its start on. The last few batches are kept."""

    def __init__(self, reopen: Callable[[], pq.ParquetFile], number: int, column: str) -> None:
        self._reopen, self._number, self._column = reopen, number, column
        self._lock = threading.Lock()
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._kept: deque[tuple[int, pa.Array]] = deque(maxlen=_BATCHES)
        self._next = -1  # first row of the next batch; -1: not begun

    def read(self, row: int) -> bytes:
        with self._lock:
            while True:
                for start, pictures in self._kept:
                    if start <= row < start + len(pictures):
                        content = pictures[row - start].as_py()
                        if content is None:
                            raise OSError("the row has no picture")
                        return bytes(content)
                if not 0 <= self._next <= row:
                    self._begin()
                batch = next(self._batches, None)
                if batch is None:
                    raise OSError("the row group ends early")
                self._kept.append((self._next, bytes_of(batch.column(0))))
                self._next += len(batch)

    def _begin(self) -> None:
        file = self._reopen()
        size = batch_rows(file.metadata, self._column, self._number)
        groups, columns = [self._number], [self._column]
        self._batches = file.iter_batches(size, row_groups=groups, columns=columns, use_threads=False)
        self._kept.clear()
        self._next = 0


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _has_bytes(kind: pa.StructType) -> bool:
    return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
