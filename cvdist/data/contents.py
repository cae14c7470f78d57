"""Reads the bytes of pictures by their paths below the root of a data set (`cvdist.data.forms`).

A path names a file, or says where in a file the picture lies:

    train-000003.tar@1536+20480/cat.12.jpg    20480 bytes of a tar from byte 1536 on, and the member's name
    train-00000-of-00002.parquet@17/cat.jpg   row 17 of a Parquet file, and the picture's own name, if any
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs as arrow

from cvdist import slow_requests, storage
from cvdist.data.parquet_rows import PictureRows
from cvdist.errors import UserError
from cvdist.log import redact

READERS = 16
"""Requests at a time, where pictures are not on a disk of this machine."""
DIGEST_BYTES = 16

_WITHIN = re.compile(
    r"(?P<file>.+?\.(tar@(?P<start>\d+)\+(?P<size>\d+)|parquet@(?P<row>\d+)))(/.*)?", re.IGNORECASE | re.DOTALL
)
_GAP = 1 << 18  # bytes between two members that are read and dropped rather than asked for apart
_PIECE_BYTES, _PIECE_ROWS = 1 << 23, 64  # of neighbors that are read together
_OPEN = 64  # files that stay open

TAR, PARQUET = ".tar", ".parquet"

T = TypeVar("T")
R = TypeVar("R")


def archive_kind(name: str) -> str:
    """Return which kind of archive a file is, by its name: TAR or PARQUET; empty for any other file."""
    return next((one for one in (TAR, PARQUET) if name.lower().endswith(one)), "")


def digest_of(content: bytes | pa.Buffer) -> bytes:
    """Return the first 16 bytes of a file's SHA-256, which identify its content."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


def map_ahead(pool: Executor, function: Callable[[T], R], items: Iterable[T], count: int) -> Iterator[R]:
    """Yield `function(item)` of each item, in order, while `pool` works on the next `count` items."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > count:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def file_of(path: str) -> str:
    """Return the path of the file that a picture is, or of the archive that holds it."""
    return _Piece.of(path).file


@dataclass
class _Piece:
    """The data that one request reads: a file, some bytes of a tar, or some rows of a Parquet file.

    Attributes:
        path: path of the first picture, for messages.
        file: path of the file that holds the pictures.
        members: first byte and size of each picture in a tar.
        rows: rows of the pictures in a Parquet file.
    """

    path: str
    file: str
    members: list[tuple[int, int]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, path: str) -> _Piece:
        """Create the piece that holds one picture."""
        found = _WITHIN.fullmatch(path) if "@" in path else None
        if found is None:
            return cls(path, path)
        file = found["file"].rpartition("@")[0]
        if found["row"]:
            return cls(path, file, rows=[int(found["row"])])
        return cls(path, file, members=[(int(found["start"]), int(found["size"]))])

    def takes(self, other: _Piece) -> bool:
        """Add another piece if it is near in the same file, and return whether it was added."""
        if self.file != other.file:
            return False
        if self.rows and other.rows and len(self.rows) < _PIECE_ROWS:
            self.rows += other.rows
            return True
        if self.members and other.members:
            (first, _), (last, length) = self.members[0], self.members[-1]
            start, size = other.members[0]
            if last + length <= start <= last + length + _GAP and start + size - first <= _PIECE_BYTES:
                self.members += other.members
                return True
        return False


class Contents:
    """Reads pictures' bytes. It is safe to use from several threads.

    Attributes:
        local: whether the root is on a disk of this machine.
        folder: the root's path in its file system.
    """

    def __init__(self, root: str, *, patient: bool = False) -> None:
        """Note the root. Nothing is read yet.

        Args:
            root: folder or URI that paths are relative to.
            patient: retry requests for about a minute if the server is unreachable.

        Raises:
            UserError: if the URI can't be understood.
        """
        self._root = root
        self._filesystem, self.folder = storage.locate(root, "--data", patient=patient)
        self.local = isinstance(self._filesystem, arrow.LocalFileSystem)
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._files: OrderedDict[str, pa.NativeFile] = OrderedDict()
        self._lock = threading.Lock()
        self._rows = PictureRows(self.open)

    def read(self, path: str) -> bytes:
        """Read a picture; an empty path is the root itself.

        Raises:
            UserError: if it can't be read.
        """
        return self._read(_Piece.of(path))[0]

    def open(self, path: str) -> pa.NativeFile:
        """Open a file for several threads to read at any place.

        Raises:
            OSError: if it can't be read.
        """
        return self._filesystem.open_input_file(f"{self.folder}/{path}")

    def changed(self, path: str) -> int:
        """Return when a file last changed, in ns since 1970; 0 if unknown.

        On a disk of this machine it is not the modification time, because programs that unpack archives set
        that to an old one.
        """
        if not self.local:
            return self._filesystem.get_file_info(f"{self.folder}/{path}").mtime_ns or 0
        try:
            return Path(self.folder, path).stat().st_ctime_ns
        except OSError:
            return 0  # reading it will say why

    def etag(self, path: str) -> str:
        """Ask the storage for the ETag of a picture's object, and return it; empty where there are none.

        Raises:
            UserError: if it can't be read.
        """
        with self._reading(path), self.open(path) as file:
            return storage.etag_of(file)

    def read_all(self, paths: Sequence[str], threads: int = READERS) -> Iterator[bytes]:
        """Yield the bytes of several pictures in order. Neighbors in a tar are read by one request.

        Args:
            paths: paths of the pictures.
            threads: number of threads that read ahead; 1: each picture is read when it is asked for.

        Raises:
            UserError: if one can't be read.
        """
        pieces = _pieces(paths)
        found = map(self._read, pieces) if threads == 1 else map_ahead(self._pool, self._read, pieces, threads)
        for contents in found:
            yield from contents

    def _read(self, piece: _Piece) -> list[bytes]:
        with self._reading(piece.path):
            if piece.rows:
                return self._rows.read(piece.file, piece.rows)
            if not piece.members:
                file = f"{self.folder}/{piece.file}" if piece.file else self.folder
                return [storage.read(self._filesystem, file)]
            first, (last, size) = piece.members[0][0], piece.members[-1]
            content = self._range(piece.file, first, last + size - first)
        # The last picture of a tar that was cut may be short. Like a cut file, it can't be decoded.
        return [content[start - first : start - first + size] for start, size in piece.members]

    def _range(self, path: str, start: int, size: int) -> bytes:
        with self._lock:
            file = self._files.pop(path, None)
        file = file or self.open(path)
        with self._lock:
            self._files[path] = file
            if len(self._files) > _OPEN:
                self._files.popitem(last=False)  # closed when the last thread is done with it
        size = max(0, min(size, file.size() - start))
        if self.local or not size:
            return bytes(file.read_at(size, start)) if size else b""
        with slow_requests.measured(f"{self.folder}/{path}", size):
            return bytes(file.read_at(size, start))

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--data {redact(self._root)}: {path} can't be read ({storage.reason(error)})"
            ) from error


def _pieces(paths: Sequence[str]) -> Iterator[_Piece]:
    """Yield the pieces to read, in which pictures that lie side by side are joined."""
    piece: _Piece | None = None
    for path in paths:
        one = _Piece.of(path)
        if piece is None or not piece.takes(one):
            if piece is not None:
                yield piece
            piece = one
    if piece is not None:
        yield piece
