"""Tables that a node keeps of what it has found out about pictures, in `<cache>/versions/`."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pyarrow as pa
from pyarrow import feather

from cvdist import storage

logger = logging.getLogger(__name__)

UNSETTLED = 2_000_000_000
"""Nanoseconds in which a file may change again without another time: what is as new is not kept."""

_STATE = b"state"


def load(cache: Path, uri: str, state: str = "") -> pa.Table | None:
    """Return the table that was kept last for a file or folder, or None if there is none of this state.

    Args:
        cache: the node's cache folder.
        uri: path or URI of the file or folder.
        state: text that changes when the file or folder changes.
    """
    try:
        table = feather.read_table(_path(cache, uri))
    except (OSError, pa.ArrowException):
        return None
    return table if (table.schema.metadata or {}).get(_STATE, b"").decode() == state else None


def keep(cache: Path, uri: str, table: pa.Table, state: str = "") -> None:
    """Keep a table for `load`, which takes the same arguments. A cache that can't be written keeps nothing."""
    path, content = _path(cache, uri), pa.BufferOutputStream()
    metadata = {**(table.schema.metadata or {}), _STATE: state.encode()}
    feather.write_feather(table.replace_schema_metadata(metadata), content)
    try:
        storage.write_here(path, content.getvalue().to_pybytes())
    except OSError as error:
        logger.debug("versions of pictures can't be kept in %s: %s", path.parent, storage.reason(error))


def _path(cache: Path, uri: str) -> Path:
    return cache / "versions" / f"{hashlib.sha256(storage.absolute(uri).encode()).hexdigest()[:32]}.arrow"
