"""Compares a listing with the index of a cache, to find the pictures that an extraction has to compute.

A shard never changes. A picture that was removed or changed leaves the index, and a new or changed picture goes
into a new shard. So an update costs only as much as it adds, wherever the pictures are in the listing. Labels
are in the index alone: a picture with another label keeps its features.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cvdist.data.contents import DIGEST_BYTES, Contents, digest_of
from cvdist.data.images.listing import Listing
from cvdist.data.labels import named_labels

_LEAST_ALIVE = 0.5  # share of a shard's rows; if fewer are used, they are computed again, in a new shard

_DIGEST = re.compile(f"[0-9a-f]{{{2 * DIGEST_BYTES}}}")


@dataclass(frozen=True)
class Changes:
    """The differences between a listing and an index. Rows are int64.

    Attributes:
        kept: rows of the listing whose features are there.
        index_rows: rows of the same pictures in the index.
        relabeled: rows of `kept` whose label is another one.
        added: rows of the listing that are new.
        changed: rows of the listing whose content has changed.
        lost: rows of the listing whose shard is gone or mostly unused.
        removed: paths of pictures that are no longer listed.
    """

    kept: np.ndarray
    index_rows: np.ndarray
    added: np.ndarray
    changed: np.ndarray
    removed: list[str]
    relabeled: np.ndarray
    lost: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def to_compute(self) -> np.ndarray:
        """Rows of the listing whose features have to be computed, int64 (n,), sorted."""
        return np.sort(np.concatenate([self.added, self.changed, self.lost]))

    @property
    def differs(self) -> bool:
        """Whether the listing differs from the index."""
        return bool(len(self.added) or len(self.changed) or len(self.relabeled) or self.removed)

    def describe(self, listing: pa.Table) -> str:
        """Describe the differences, such as `3 added, e.g. cat/1.jpg; 1 removed, e.g. cat/2.jpg`."""
        paths = listing.column("path")
        rows = {
            "added": self.added,
            "changed": self.changed,
            "with another label": self.relabeled,
            "in shards that are gone": self.lost,
        }
        found = [
            (len(which), what, paths[int(which[0])].as_py() if len(which) else "")
            for what, which in rows.items()
        ]
        found.append((len(self.removed), "removed", self.removed[0] if self.removed else ""))
        return "; ".join(f"{count:,} {what}, e.g. {path}" for count, what, path in found if count)


def with_labels_as_in(listing: Listing, known: pa.Table, classes: Sequence[str]) -> pa.Table:
    """Return an index with its labels numbered as in a listing; -1: a label that no picture there has.

    Args:
        listing: the pictures as they are now.
        known: the index.
        classes: names of the classes in the index.
    """
    now = {names: number for number, names in named_labels(listing.table, listing.classes).items()}
    then = named_labels(known, classes)
    old, place = np.unique(np.asarray(known.column("label")), return_inverse=True)
    new = np.array([now.get(then[number], -1) for number in old.tolist()], dtype=np.int32)
    return known.set_column(known.column_names.index("label"), "label", pa.array(new[place]))


def find_changes(listing: pa.Table, known: pa.Table, root: str) -> Changes:
    """Find the differences between a listing and an index that was written earlier.

    A file with the same version is the same. Where only the version differs, the contents decide, because
    objects have another version than the files that they were copied from.

    Args:
        listing: the pictures as they are now, with versions.
        known: the index, with its labels numbered as in the listing (`with_labels_as_in`).
        root: what the paths in the listing are relative to.

    Raises:
        UserError: if a picture can't be read.
    """
    where = pc.index_in(listing.column("path"), value_set=known.column("path"))
    found = np.array(pc.fill_null(where, -1).combine_chunks(), dtype=np.int64)
    paths = listing.column("path")
    gone = np.asarray(pc.is_null(pc.index_in(known.column("path"), value_set=paths)).combine_chunks())
    _find_moved(listing, known, root, found, gone.nonzero()[0])
    there = (found >= 0).nonzero()[0]
    same = np.ones(len(there), dtype=bool)
    for name in ("part", "size"):
        mine, theirs = (np.asarray(table.column(name)) for table in (listing, known))
        same &= mine[there] == theirs[found[there]]
    mine, theirs = (np.asarray(table.column("version")) for table in (listing, known))
    before = known.column("digest")
    moved = gone[found[there]]
    doubtful = (same & ~moved & (mine[there] != theirs[found[there]])).nonzero()[0]
    now = _digests(root, [paths[int(row)].as_py() for row in there[doubtful]])
    for position, digest in zip(doubtful, now, strict=True):
        same[position] = digest == before[int(found[there[position]])].as_py()
    gone[found[there[moved]]] = False
    kept, index_rows = there[same], found[there[same]]
    label, before_label = (np.asarray(table.column("label")) for table in (listing, known))
    return Changes(
        kept=kept,
        index_rows=index_rows,
        relabeled=kept[label[kept] != before_label[index_rows]],
        added=(found < 0).nonzero()[0],
        changed=there[~same],
        removed=known.column("path").filter(pa.array(gone)).to_pylist(),
    )


def _find_moved(listing: pa.Table, known: pa.Table, root: str, found: np.ndarray, gone: np.ndarray) -> None:
    """Find pictures that now have another path, or lie in another form of the data, by their contents.

    Args:
        listing: as in `find_changes`.
        known: as in `find_changes`.
        root: as in `find_changes`.
        found: int64, the row of each listed picture in `known`, or -1. Rows that are found are written to it.
        gone: int64, the rows of `known` whose paths are not listed.
    """
    fields = ("part", "size")
    lost: defaultdict[tuple[int, ...], dict[bytes, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, one in zip(gone.tolist(), known.take(pa.array(gone)).to_pylist(), strict=True):
        lost[tuple(one[name] for name in fields)][one["digest"]].append(row)
    new, label = (found < 0).nonzero()[0], np.asarray(known.column("label"))
    rows = zip(new.tolist(), listing.take(pa.array(new)).to_pylist(), strict=True) if lost else ()
    candidates = [(row, one) for row, one in rows if tuple(one[name] for name in fields) in lost]
    # A picture's version is its digest, unless it is an object with an ETag.
    unread = [one["path"] for _, one in candidates if not _DIGEST.fullmatch(one["version"])]
    read = _digests(root, unread)
    for row, one in candidates:
        digest = bytes.fromhex(one["version"]) if _DIGEST.fullmatch(one["version"]) else next(read)
        if there := lost[tuple(one[name] for name in fields)].get(digest):
            alike = (i for i, old in enumerate(there) if label[old] == one["label"])
            found[row] = there.pop(next(alike, -1))  # of several copies, the one with this label


def _digests(root: str, paths: Sequence[str]) -> Iterator[bytes]:
    return map(digest_of, Contents(root).read_all(paths))


def without_sparse_shards(changes: Changes, known: pa.Table, shard_rows: Sequence[int]) -> Changes:
    """Mark kept pictures as lost if their shard is missing or mostly unused.

    Args:
        changes: differences between listing and index.
        known: the index.
        shard_rows: number of rows of each shard, 0 for a missing one.
    """
    shard = np.asarray(known.column("shard"))[changes.index_rows]
    alive = np.bincount(shard[shard >= 0], minlength=len(shard_rows))
    enough = (alive >= _LEAST_ALIVE * np.array(shard_rows, dtype=np.int64)) & (np.array(shard_rows) > 0)
    keep = np.array([number < 0 or enough[number] for number in shard], dtype=bool)
    return replace(
        changes, kept=changes.kept[keep], index_rows=changes.index_rows[keep], lost=changes.kept[~keep]
    )
