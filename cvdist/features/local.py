"""A node's copy of a cache's shards: fetched once, checked, memory-mapped and shared by the node's processes.

`<cache>/features/` holds uncompressed shards, named by their checksum, so that jobs can share them. When the
folder reaches its size limit, the least recently used shards are deleted. A process that has mapped a deleted
shard can still read it.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from torch import Tensor

from cvdist import storage
from cvdist.errors import UserError
from cvdist.features import shard
from cvdist.features.manifest import Manifest, ShardEntry
from cvdist.lock import locked
from cvdist.log import redact
from cvdist.storage import Folder

logger = logging.getLogger(__name__)

_STRIPES = 64  # locks that shards share, by name
_ABANDONED = 3600.0  # seconds after which an unfinished file is nobody's
_SUFFIX, _CHECKED = ".safetensors", ".checked"


class LocalShards:
    """The shards of one cache on this node. It is safe to use from several threads and processes."""

    def __init__(self, folder: Folder, cache: Manifest, root: Path, *, limit: int, timeout: float) -> None:
        """Create the folder of the shards, and delete unfinished files of killed processes.

        Args:
            folder: where the cache is stored.
            cache: manifest of the cache.
            root: the node's cache folder.
            limit: bytes that all shards in the node's folder may take.
            timeout: seconds to wait for another process that fetches the same shard.

        Raises:
            UserError: if the folder can't be used.
        """
        self.cache, self.limit = cache, limit
        self._folder, self._timeout = folder, timeout
        self._root = shards_folder(root)
        try:
            (self._root / "locks").mkdir(parents=True, exist_ok=True)
            self._forget_abandoned()
        except OSError as error:
            raise self._unusable(error) from error

    def open(self, number: int) -> Tensor:
        """Return the memory-mapped features of a shard, (rows, views, ...). Fetches the shard if necessary.

        Raises:
            UserError: if the shard can't be fetched, is damaged, or does not fit on the disk.
        """
        entry = self.cache.shards[number]
        path = self._root / f"{entry.raw_sha256[:32]}{_SUFFIX}"
        stripe = self._root / "locks" / str(int(entry.raw_sha256[:8], 16) % _STRIPES)
        try:
            with locked(stripe, "", self._timeout):
                features = self._open_checked(path, entry)
                return features if features is not None else self._fetch(path, entry)
        except TimeoutError as error:
            raise UserError(f"{error}, waiting for {entry.object} (--data-timeout)") from error
        except OSError as error:
            raise self._unusable(error) from error

    def _open_checked(self, path: Path, entry: ShardEntry) -> Tensor | None:
        """Map the existing copy if its checksum is right, else return None.

        A shard is verified at most once between restarts of the machine; a file beside it records that.
        """
        try:
            mark = _mark(path)
            checked = path.with_suffix(_CHECKED)
            known = checked.read_text() if checked.exists() else ""
            if known != mark:
                if not shard.matches(path, entry):
                    logger.warning("features   %s is damaged on this node and fetched again", path)
                    with self._room_lock():
                        path.unlink(missing_ok=True)
                    return None
                checked.write_text(mark)
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # used now; the time of change stays
            return shard.map_features(path)
        except FileNotFoundError:  # never there, or deleted to make room
            return None

    def _fetch(self, path: Path, entry: ShardEntry) -> Tensor:
        content = self._folder.read(entry.object)
        try:
            raw = shard.unpack(content, entry)
        except shard.DamagedError as error:
            raise UserError(
                f"--features {redact(self._folder.uri)}: {entry.object} is damaged: {error}. Delete it and run "
                "jobs/preprocess.py again, which computes that shard again"
            ) from error
        arriving = self._root / f".{secrets.token_hex(8)}.arriving"
        try:
            with self._room_lock():
                taken = sum(state.st_size for _, state in _copies(self._root))
                self._delete(taken + len(raw) - self.limit)
            try:
                arriving.write_bytes(raw)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                with self._room_lock():  # the disk is fuller than the limit knows
                    self._delete(len(raw))
                arriving.write_bytes(raw)
            # Under the lock, so that nobody makes room of it before it is mapped.
            with self._room_lock():
                arriving.replace(path)
                path.with_suffix(_CHECKED).write_text(_mark(path))
                return shard.map_features(path)
        finally:
            arriving.unlink(missing_ok=True)

    def _room_lock(self) -> AbstractContextManager[None]:
        return locked(self._root / "locks" / "room", "", self._timeout)

    def _delete(self, count: int) -> None:
        """Delete at least `count` bytes of shards, the least recently used first."""
        for path, state in sorted(_copies(self._root), key=lambda copy: copy[1].st_atime_ns):
            if count <= 0:
                return
            path.with_suffix(_CHECKED).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            count -= state.st_size

    def _forget_abandoned(self) -> None:
        for path in self._root.glob(".*.arriving"):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink(missing_ok=True)

    def _unusable(self, error: OSError) -> UserError:
        free = shutil.disk_usage(self._root).free / 1e9 if self._root.exists() else 0.0
        return UserError(
            f"--cache {self._root.parent} can't take the features ({storage.reason(error)}; {free:.1f} GB free)"
            ": name another folder with --cache or CVDIST_CACHE, or make room"
        )


def shards_folder(root: Path) -> Path:
    """Return the folder of the shards inside a node's cache folder."""
    return root / "features"


def shard_budget(root: Path, share: float) -> int:
    """Return how many bytes shards may take: `share` of the sum of free space and what they take already."""
    folder = shards_folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    mine = sum(state.st_size for _, state in _copies(folder))
    return int(share * (shutil.disk_usage(folder).free + mine))


def _copies(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the shards in a folder, skipping those that another process deletes at the same time."""
    for path in folder.glob(f"*{_SUFFIX}"):
        with suppress(FileNotFoundError):
            yield path, path.stat()


def local_index(folder: Folder, cache: Manifest, root: Path, timeout: float) -> bytes:
    """Return the content of a cache's index file, which is fetched once per node.

    The checksum of an index that was fetched by this call is not verified; `build.parse_index` does that.

    Raises:
        UserError: if the index can't be fetched or the cache folder can't be used.
    """
    path = shards_folder(root) / f"{cache.index.sha256[:32]}.index"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # of the lock
        with locked(path.with_suffix(".index-lock"), f"fetch the index of {redact(folder.uri)}", timeout):
            content = path.read_bytes() if path.is_file() else b""
            if hashlib.sha256(content).hexdigest() != cache.index.sha256:
                content = folder.read(cache.index.object)
                storage.write_here(path, content)
            return content
    except (OSError, TimeoutError) as error:
        raise UserError(f"--cache {root} can't be used ({storage.reason(error)}): name another one") from error


def _mark(path: Path) -> str:
    """Return a text that changes when the file is written or the machine is restarted."""
    state = path.stat()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = "unknown"
    return f"{boot} {state.st_size} {state.st_mtime_ns} {state.st_ino}"
