"""Finds the pictures that an extraction has to compute, and divides them into work units, one per shard.

A shard never changes. A picture that was removed or changed leaves the index, and a new or changed picture goes
into a new shard. So an update costs only as much as it adds, wherever the pictures are in the listing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cvdist import storage
from cvdist.data.images.listing import VALID_PART
from cvdist.errors import UserError
from cvdist.features import index
from cvdist.features.fingerprint import Fingerprint
from cvdist.log import redact

_READERS = 16  # files at a time
_LEAST_ALIVE = 0.5  # of a shard's rows; with fewer, those are computed again and the shard is dropped

Digests = Callable[[Sequence[str]], Iterable[bytes]]
"""The digest of each picture's file, by paths below `--data`, in order."""


@dataclass(frozen=True)
class WorkUnit:
    """The pictures of one shard: the unit of work, of retry and of resumption.

    Attributes:
        key: hash of the pictures' identity and of everything that their features depend on.
        views: number of views to compute.
        paths: paths of the pictures.
        labels: labels of the pictures.
    """

    key: str
    views: int
    paths: tuple[str, ...]
    labels: tuple[int, ...]

    def to_dict(self) -> dict[str, object]:
        """Convert to a dictionary, to be sent to another process."""
        return {
            "key": self.key,
            "views": self.views,
            "paths": list(self.paths),
            "labels": list(self.labels),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WorkUnit:
        """Build a work unit from the dictionary that `to_dict` returned, or from its copy by Arrow."""
        labels = tuple(int(label) for label in values["labels"])
        return cls(str(values["key"]), int(values["views"]), tuple(map(str, values["paths"])), labels)


@dataclass(frozen=True)
class Changes:
    """How a listing differs from an index.

    kept: int64 rows of the listing whose features are there; of: int64, the same pictures in the index;
    added, changed: int64 rows of the listing; lost: the same, of pictures whose shard is gone or mostly dead;
    removed: paths.
    """

    kept: np.ndarray
    of: np.ndarray
    added: np.ndarray
    changed: np.ndarray
    removed: list[str]
    lost: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def to_compute(self) -> np.ndarray:
        """Rows of the listing whose features have to be computed, int64 (n,), sorted."""
        return np.sort(np.concatenate([self.added, self.changed, self.lost]))

    @property
    def any(self) -> bool:
        """Whether the listing differs from the index."""
        return bool(len(self.added) or len(self.changed) or self.removed)

    def describe(self, listing: pa.Table) -> str:
        """Describe the differences, such as `3 added, e.g. cat/1.jpg; 1 removed, e.g. cat/2.jpg`."""
        paths = listing.column("path")
        rows = {"added": self.added, "changed": self.changed, "in shards that are gone": self.lost}
        found = [
            (len(which), what, paths[int(which[0])].as_py() if len(which) else "")
            for what, which in rows.items()
        ]
        found.append((len(self.removed), "removed", self.removed[0] if self.removed else ""))
        return "; ".join(f"{count:,} {what}, e.g. {path}" for count, what, path in found if count)


def find_changes(listing: pa.Table, known: pa.Table, digests: Digests) -> Changes:
    """What has become of the pictures since `known` was written; both tables as in `cvdist.features.index`.

    A file with the same size and time is the same; where only its time differs, its contents decide.
    """
    where = pc.index_in(listing.column("path"), value_set=known.column("path"))
    found = np.asarray(pc.fill_null(where, -1).combine_chunks(), dtype=np.int64)
    there = (found >= 0).nonzero()[0]
    same = np.ones(len(there), dtype=bool)
    for name in ("label", "part", "size"):
        mine, theirs = (np.asarray(table.column(name)) for table in (listing, known))
        same &= mine[there] == theirs[found[there]]
    mine, theirs = (np.asarray(table.column("modified")) for table in (listing, known))
    doubtful = (same & (mine[there] != theirs[found[there]])).nonzero()[0]
    paths = listing.column("path")
    now = digests([paths[int(row)].as_py() for row in there[doubtful]])
    before = known.column("digest")
    for position, digest in zip(doubtful, now, strict=True):
        same[position] = digest == before[int(found[there[position]])].as_py()
    gone = pc.is_null(pc.index_in(known.column("path"), value_set=paths))
    return Changes(
        kept=there[same],
        of=found[there[same]],
        added=(found < 0).nonzero()[0],
        changed=there[~same],
        removed=known.column("path").filter(gone).to_pylist(),
    )


def digests_of(uri: str) -> Digests:
    """Return a function that reads files below `uri`, several at a time, and computes their digests.

    That function raises UserError if a file can't be read.
    """

    def digests(paths: Sequence[str]) -> Iterator[bytes]:
        filesystem, root = storage.locate(uri, "--data")

        def one(path: str) -> bytes:
            try:
                return index.digest_of(storage.read(filesystem, f"{root}/{path}"))
            except OSError as error:
                raise UserError(
                    f"--data {redact(uri)}: {path} can't be read ({storage.reason(error)})"
                ) from error

        with ThreadPoolExecutor(_READERS) as pool:
            yield from pool.map(one, paths)

    return digests


def without_sparse_shards(changes: Changes, known: pa.Table, shard_rows: Sequence[int]) -> Changes:
    """Mark kept pictures as lost if their shard is missing or mostly unused.

    Args:
        changes: differences between listing and index.
        known: the index.
        shard_rows: number of rows of each shard, 0 for a missing one.
    """
    shard = np.asarray(known.column("shard"))[changes.of]
    alive = np.bincount(shard[shard >= 0], minlength=len(shard_rows))
    enough = (alive >= _LEAST_ALIVE * np.array(shard_rows, dtype=np.int64)) & (np.array(shard_rows) > 0)
    keep = np.array([number < 0 or enough[number] for number in shard], dtype=bool)
    lost = changes.kept[~keep]
    return Changes(changes.kept[keep], changes.of[keep], changes.added, changes.changed, changes.removed, lost)


def work_units(
    listing: pa.Table, rows: np.ndarray, fingerprint: Fingerprint, shard_size: int
) -> list[WorkUnit]:
    """`rows` of the listing, in its order, cut into shards; those to validate on apart: they need one view."""
    part = np.asarray(listing.column("part"))[rows]
    cut = []
    for mine, views in ((rows[part != VALID_PART], fingerprint.views), (rows[part == VALID_PART], 1)):
        for start in range(0, len(mine), shard_size):
            table = listing.select(index.LISTED).take(pa.array(mine[start : start + shard_size]))
            columns = table.to_pydict()
            identity = {"fingerprint": fingerprint.to_dict(), "views": views, "pictures": columns}
            key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
            cut.append(WorkUnit(key, views, tuple(columns["path"]), tuple(columns["label"])))
    return cut
