"""The checkpoints of one run, in a folder or a bucket.

Each checkpoint is a folder below the run's. Its `checkpoint.json` arrives last, whole, and under the attempt's
fence, and is deleted first: a listing of these files is the list of complete checkpoints, and there is no index
that could disagree with it. So a checkpoint that was stored a moment before its writer was killed is found, and
one whose writer was killed in mid-upload is not. What such a writer has left is deleted by a later attempt.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pyarrow import fs as arrow

from cvdist import slow_requests, storage
from cvdist.checkpoints.fence import Fence, attempt_of
from cvdist.checkpoints.format import META, STATE, parse_meta, progress_of
from cvdist.checkpoints.shards import PREFIX
from cvdist.config import CheckpointConfig
from cvdist.errors import Superseded, UserError
from cvdist.storage import Folder

logger = logging.getLogger(__name__)

_ARRIVING = ".arriving-"  # begins the name of the folder in which a local checkpoint's files are written
_POLL_SECONDS = 0.2  # between two looks for another worker's file


@dataclass(frozen=True)
class StoredCheckpoint:
    """A complete checkpoint.

    Attributes:
        name: Name of its folder.
        score: Score of the epoch that it ends, higher is better; `UNSCORED` within an epoch, -inf if damaged.
        at: Number of samples trained on so far, over all epochs; -1 if it is damaged.
    """

    name: str
    score: float
    at: int

    @property
    def age(self) -> tuple[tuple[int, int], int]:
        """Key that sorts from oldest to newest: by attempt, then by progress; damaged ones come first."""
        return (attempt_of(self.name) if self.at >= 0 else (0, 0)), self.at


class CheckpointStore:
    """Adds, lists, opens and deletes the checkpoints of one run."""

    def __init__(self, folder: Folder, keep: int = 1, fence: Fence | None = None) -> None:
        """Use the run in `folder`, which need not exist yet.

        Args:
            folder: Folder of the run.
            keep: How many of the best checkpoints are kept, besides the latest.
            fence: Fence of the attempt that adds checkpoints. Without one, anybody may add.
        """
        self.folder, self.keep, self.fence = folder, keep, fence
        self._local = isinstance(folder.filesystem, arrow.LocalFileSystem)
        self._known: dict[str, StoredCheckpoint] = {}  # complete ones do not change

    @classmethod
    def at(cls, uri: str, keep: int = 1) -> CheckpointStore:
        """Open the store of the run at `uri`, without a fence.

        Raises:
            UserError: If the URI can't be understood.
        """
        return cls(Folder.open(uri, "--storage", patient=True), keep)

    @property
    def suffix(self) -> str:
        """End of the names of this attempt's checkpoints, so that attempts never share a name."""
        return self.fence.suffix if self.fence is not None else ""

    def uri(self, name: str) -> str:
        """Return the path or URI of a checkpoint's folder."""
        return f"{self.folder.uri.rstrip('/')}/{name}"

    def list(self) -> Sequence[StoredCheckpoint]:
        """List all complete checkpoints, the newest first, damaged ones last.

        Raises:
            UserError: If the storage can't be read.
        """
        return self._complete(self.folder.sizes())

    def best(self) -> StoredCheckpoint | None:
        """Return the checkpoint with the highest score, the newest of equal ones; None if there is none.

        Raises:
            UserError: If the storage can't be read.
        """
        return max(self.list(), key=lambda one: one.score, default=None)

    @contextmanager
    def open(self, name: str) -> Iterator[Path]:
        """Yield a checkpoint as a local folder, which lacks files if the checkpoint is gone.

        Raises:
            UserError: If the storage can't be read.
        """
        path = f"{self.folder.root}/{name}"
        if self._local:
            yield Path(path)
            return
        with TemporaryDirectory(prefix="cvdist-copy-") as copy:
            try:
                arrow.copy_files(path, copy, source_filesystem=self.folder.filesystem)
            except OSError as error:
                # Perhaps it is being deleted: then this file was the first to go.
                if self.folder.size(f"{name}/{META}") is not None:
                    raise UserError(f"{self.uri(name)} can't be read: {storage.reason(error)}") from error
            yield Path(copy)

    def add(
        self,
        name: str,
        score: float,
        at: int,
        fill: Callable[[Path], None],
        shards: Sequence[str] = (),
        timeout: float = CheckpointConfig.timeout,
    ) -> None:
        """Store a checkpoint, then delete those that are no longer to be kept.

        Args:
            name: Name of the checkpoint, without this attempt's suffix.
            score: As in `StoredCheckpoint`.
            at: As in `StoredCheckpoint`.
            fill: Writes the files, `checkpoint.json` among them, into an empty local folder.
            shards: Files that other workers store with `add_shard`, which the checkpoint needs to be complete.
            timeout: Seconds to wait for them.

        Raises:
            UserError: If the storage can't take it, or a shard does not come.
            Superseded: If a newer attempt has begun.
        """
        name += self.suffix
        try:
            with self._filled(name, fill) as files:
                self._wait_for(name, shards, timeout)
                gone = self._not_kept_beside(StoredCheckpoint(name, score, at))
                with self.fence.held() if self.fence is not None else nullcontext():
                    self._put(files[META], f"{name}/{META}")
                    for other in gone:
                        self._delete(other)
        except Exception as error:
            self._delete(name)
            if isinstance(error, Superseded) or not isinstance(error, OSError | UserError):
                raise
            if isinstance(error, OSError) and self.fence is not None:
                self.fence.require_newest()  # a newer attempt may have deleted the files
            raise self._not_written(name, error) from error

    def add_shard(self, name: str, fill: Callable[[Path], None]) -> None:
        """Store one worker's files of a checkpoint that another worker adds.

        Args:
            name: Name of the checkpoint, with the suffix of that worker's attempt.
            fill: Writes the files into an empty local folder.

        Raises:
            UserError: If the storage can't take them.
        """
        try:
            with self._filled(name, fill):
                pass
        except OSError as error:
            raise self._not_written(name, error) from error

    def delete_all(self) -> None:
        """Delete all checkpoints; one that can't be deleted stays.

        Raises:
            UserError: If the storage can't be read.
        """
        for one in self.list():
            self._delete(one.name)

    def _complete(self, files: dict[str, int]) -> Sequence[StoredCheckpoint]:
        names = [file.removesuffix(f"/{META}") for file in files if file.endswith(f"/{META}")]
        found = {name: self._known.get(name) or self._describe(name) for name in names if "/" not in name}
        self._known = {name: one for name, one in found.items() if one is not None}
        return sorted(self._known.values(), key=lambda one: one.age, reverse=True)

    def _describe(self, name: str) -> StoredCheckpoint | None:
        content = self.folder.find(f"{name}/{META}")
        if content is None:
            return None  # deleted since it was listed
        try:
            return StoredCheckpoint(name, *progress_of(parse_meta(content, f"{name} of this run")))
        except UserError as error:
            logger.warning("%s", str(error).replace("name another one", "trying the one before"))
            return StoredCheckpoint(name, float("-inf"), -1)

    @contextmanager
    def _filled(self, name: str, fill: Callable[[Path], None]) -> Iterator[dict[str, Path]]:
        """Store what `fill` writes, except for `checkpoint.json`, and yield all files by their names."""
        target = Path(self.folder.root, name) if self._local else None
        if target is not None:
            target.mkdir(parents=True, exist_ok=True)
        # On the same disk as a local target: files are then moved to their place.
        with TemporaryDirectory(prefix=_ARRIVING, dir=target) as private:
            fill(Path(private))
            files = {file.name: file for file in Path(private).iterdir()}
            # Files that describe others come after them.
            for file in sorted(files, key=lambda file: file.endswith(".json")):
                if file != META:
                    self._put(files[file], f"{name}/{file}")
            yield files

    def _put(self, file: Path, name: str) -> None:
        """Move or upload a local file, which appears whole or not at all."""
        path = f"{self.folder.root}/{name}"
        if self._local:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())  # or a crash of the machine could leave the name without the content
            file.replace(path)
            return
        with slow_requests.measured(path, file.stat().st_size):
            arrow.copy_files(
                str(file),
                path,
                source_filesystem=arrow.LocalFileSystem(),
                destination_filesystem=self.folder.filesystem,
            )

    def _wait_for(self, name: str, shards: Sequence[str], timeout: float) -> None:
        paths = [f"{self.folder.root}/{name}/{shard}" for shard in shards]
        deadline = time.monotonic() + timeout
        while paths:
            found = self.folder.filesystem.get_file_info(paths)
            missing = [info for info in found if info.type != arrow.FileType.File]
            if not missing:
                return
            if time.monotonic() > deadline:
                raise UserError(
                    f"{missing[0].base_name} has not come from its worker within {timeout:g} s "
                    "(--checkpoint-timeout): is its way to the storage slow or cut?"
                )
            time.sleep(_POLL_SECONDS)

    def _not_kept_beside(self, newest: StoredCheckpoint) -> set[str]:
        """Return the names of checkpoints that `newest` replaces, and of incomplete ones of killed writers."""
        files = self.folder.sizes()
        self._known[newest.name] = newest
        complete = self._complete({**files, f"{newest.name}/{META}": 0})
        best = sorted(complete, key=lambda one: (one.score, one.age))[-self.keep :]
        gone = {one.name for one in complete if one not in (newest, *best)}
        if self.fence is not None:
            begun = {name for name, _, file in (path.partition("/") for path in files) if _is_data(file)}
            begun -= {one.name for one in complete}
            gone |= {name for name in begun if attempt_of(name) < self.fence.attempt}
        return gone

    def _delete(self, name: str) -> None:
        path = f"{self.folder.root}/{name}"
        self._known.pop(name, None)
        try:
            # The file that makes it a checkpoint goes first, so that nobody finds half of one.
            if self.folder.size(f"{name}/{META}") is not None:
                self.folder.delete(f"{name}/{META}")
            self.folder.filesystem.delete_dir(path)
        except (OSError, UserError) as error:
            logger.debug("the checkpoint %s was not deleted: %s", self.uri(name), error)

    def _not_written(self, name: str, error: OSError | UserError) -> UserError:
        why = storage.reason(error) if isinstance(error, OSError) else str(error)
        return UserError(
            f"the checkpoint {self.uri(name)} could not be written: {why}", transient=storage.may_recover(error)
        )


def _is_data(file: str) -> bool:
    """Return whether a file of this name is part of a checkpoint, but not its `checkpoint.json`."""
    return file == STATE or file.startswith((PREFIX, _ARRIVING))
