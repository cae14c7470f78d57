"""The bytes of pictures, by their paths below the root of a data set (`cvdist.data.forms`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pyarrow import fs as arrow

from cvdist import storage
from cvdist.errors import UserError
from cvdist.log import redact

_READERS = 16  # files at a time

T = TypeVar("T")


class Contents:
    """Reads pictures' bytes. It is safe to use from several threads.

    Attributes:
        local: whether the root is on a disk of this machine.
        folder: the root's path in its file system.
    """

    def __init__(self, root: str, *, patient: bool = False) -> None:
        """Nothing is read yet.

        Args:
            root: folder or URI that paths are relative to.
            patient: retry requests for about a minute if the server is unreachable.

        Raises:
            UserError: if the URI can't be understood.
        """
        self._root = root
        self._filesystem, self.folder = storage.locate(root, "--data", patient=patient)
        self.local = isinstance(self._filesystem, arrow.LocalFileSystem)

    def read(self, path: str) -> bytes:
        """Read a picture; an empty path is the root itself.

        Raises:
            UserError: if it can't be read.
        """
        return self._tried(path, lambda file: storage.read(self._filesystem, file))

    def etag(self, path: str) -> str:
        """Return the ETag of the object that a picture is, empty where the storage has none.

        Raises:
            UserError: if it can't be read.
        """
        return self._tried(path, lambda file: storage.etag(self._filesystem, file))

    def read_all(self, paths: Sequence[str], threads: int = _READERS) -> Iterator[bytes]:
        """Yield the bytes of several pictures in order, while the next ones are read.

        Raises:
            UserError: if one can't be read.
        """
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(self.read, paths)

    def _tried(self, path: str, work: Callable[[str], T]) -> T:
        try:
            return work(f"{self.folder}/{path}" if path else self.folder)
        except OSError as error:
            raise UserError(
                f"--data {redact(self._root)}: {path} can't be read ({storage.reason(error)})"
            ) from error
