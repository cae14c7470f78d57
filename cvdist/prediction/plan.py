"""Divides the sorted listing of a prediction job into work units, one per result file.

The boundaries depend on hashes of the paths, so adding or removing a picture changes only its own work unit and
not all that follow (content-defined chunking: Muthitacharoen, Chen and Mazieres 2001, "A Low-bandwidth Network
File System").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa


@dataclass(frozen=True)
class WorkUnit:
    """The pictures of one result file: the unit of work, of retry and of resumption.

    Attributes:
        key: hash of the pictures' identity and of everything that their predictions depend on.
        paths: paths of the pictures.
    """

    key: str
    paths: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Convert to a dictionary, to be sent to another process."""
        return {"key": self.key, "paths": list(self.paths)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WorkUnit:
        """Build a work unit from the dictionary that `to_dict` returned, or from its copy by Arrow."""
        return cls(str(values["key"]), tuple(map(str, values["paths"])))


def work_units(listing: pa.Table, identity: Mapping[str, object], size: int) -> list[WorkUnit]:
    """`listing` (see `list_unsorted`) cut into slices of about `size`, at most twice as many, pictures."""
    cut = []
    paths = listing.column("path").to_pylist()
    for start, stop in _cuts(paths, size):
        pictures = listing.slice(start, stop - start).to_pydict()
        text = json.dumps({"identity": identity, "pictures": pictures}, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        cut.append(WorkUnit(key, tuple(paths[start:stop])))
    return cut


def _cuts(paths: list[str], size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each slice: after at least half of `size`, where a hash of the next path says so."""
    start, half = 0, max(1, size // 2)
    for i, path in enumerate(paths):
        long_enough = i - start >= half
        if i - start >= 2 * size or (long_enough and _hash(path) % half == 0):
            yield start, i
            start = i
    yield start, len(paths)


def _hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest())
