"""A run's checkpoints in a folder or a bucket: those of a run that one process trains, and what lies there."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pyarrow import fs as arrow

from cvdist import storage
from cvdist.checkpoints.fence import Fence
from cvdist.checkpoints.format import META, parse_meta, progress_of
from cvdist.errors import UserError
from cvdist.storage import Folder

logger = logging.getLogger(__name__)

_INDEX = "index.json"


class CompleteCheckpoint(NamedTuple):
    """A checkpoint of which all files are there. at: samples trained on until then."""

    name: str
    score: float
    at: int


def complete_checkpoints(folder: Folder) -> list[CompleteCheckpoint]:
    """What lies in a run's folder, whether or not anything lists it, the oldest first.

    Raises:
        UserError: if it can't be read.
    """
    found = []
    for file in folder.sizes():
        name, _, rest = file.partition("/")
        if rest != META or name.startswith("."):
            continue
        content = folder.find(file) or b""
        try:
            found.append(CompleteCheckpoint(name, *progress_of(parse_meta(content, name))))
        except (UserError, KeyError, TypeError) as error:
            logger.debug("the checkpoint %s is passed over: %s", name, error)
    return sorted(found, key=lambda one: one.at)


class StoredCheckpoints:
    """The best checkpoint and the latest; `index.json` lists the complete ones, oldest first."""

    def __init__(self, folder: Folder, fence: Fence | None = None) -> None:
        """`folder`: of the run; fence: of the attempt that may add to them."""
        self.folder, self.fence = folder, fence

    def newest(self) -> list[str]:
        """Names of the checkpoints, the newest first."""
        return [name for name, _ in reversed(self._entries())]

    def best(self) -> str | None:
        """Name of the one with the highest score."""
        return max(self._entries(), key=lambda entry: entry[1], default=(None, 0.0))[0]

    def uri(self, name: str) -> str:
        """Where a checkpoint is."""
        return f"{self.folder.uri.rstrip('/')}/{name}"

    @contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        """A checkpoint as a local folder, while the context lasts.

        Raises:
            UserError: if it can't be read.
        """
        with storage.local_copy(self.uri(name)) as folder:
            yield folder

    def add(self, name: str, score: float, fill: Callable[[Path], None]) -> None:
        """Let `fill` write a checkpoint, list it, then delete what is no longer to be kept.

        Raises:
            UserError: if the storage can't take it.
            Superseded: if a newer attempt has begun.
        """
        ensure_current: Callable[[], None] = lambda: None  # noqa: E731
        if self.fence is not None:
            name, ensure_current = name + self.fence.suffix, self.fence.require_newest
        try:
            storage.publish(
                self.folder.filesystem,
                f"{self.folder.root}/{name}",
                fill,
                last=META,
                ensure_current=ensure_current,
            )
        except OSError as error:
            raise UserError(
                f"the checkpoint {self.uri(name)} could not be stored: {storage.reason(error)}"
            ) from error
        entries = [entry for entry in self._entries() if entry[0] != name] + [(name, score)]
        kept = {max(entries, key=lambda entry: entry[1])[0], name}
        ensure_current()
        self.folder.write(_INDEX, json.dumps([entry for entry in entries if entry[0] in kept]).encode())
        for gone, _ in entries:
            if gone not in kept:
                self._delete(gone)

    def delete_all(self) -> None:
        """Forget all of them; what can't be deleted stays."""
        names = self.newest()
        if names:
            self.folder.write(_INDEX, b"[]")
        for name in names:
            self._delete(name)

    def _entries(self) -> list[tuple[str, float]]:
        content = self.folder.find(_INDEX)
        return [(str(name), float(score)) for name, score in json.loads(content or b"[]")]

    def _delete(self, name: str) -> None:
        path = f"{self.folder.root}/{name}"
        try:
            if isinstance(self.folder.filesystem, arrow.LocalFileSystem):
                self.folder.filesystem.delete_dir(path)
                return
            # The file that makes it a checkpoint first.
            inside = Folder(self.uri(name), self.folder.filesystem, path, self.folder.flag)
            for file in sorted(inside.sizes(), key=lambda file: file != META):
                inside.delete(file)
        except (OSError, UserError) as error:
            logger.debug("the checkpoint %s was not deleted: %s", self.uri(name), error)
