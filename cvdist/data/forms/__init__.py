"""The forms in which people keep labeled pictures, each in one file of this folder.

A form finds the pictures with their classes and splits (`Found`), from names, tables and the headers of
archives. `look` chooses the form of a `--data`. A picture's path is relative to `root_of` the data, and says
all that is needed to read it (`cvdist.data.contents`), so nothing but this folder knows about forms.
"""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa

from cvdist import log
from cvdist.config import DataConfig, PathsConfig, PicturesConfig, cache_folder
from cvdist.data.contents import PARQUET, TAR, archive_kind
from cvdist.data.forms import archives, files, folders, parquet, table, tars
from cvdist.data.forms.files import Files, list_files, unlabeled_table
from cvdist.data.forms.found import NO_PART, TRAIN_PART, VALID_PART, Found
from cvdist.errors import UserError
from cvdist.log import redact

__all__ = [
    "NO_PART",
    "TRAIN_PART",
    "VALID_PART",
    "Found",
    "look",
    "look_unlabeled",
    "root_of",
    "unlabeled_table",
]


def root_of(config: PicturesConfig) -> str:
    """Return the folder or URI to which the paths of the pictures of `--data` are relative."""
    if archives.are_named(config.uri):
        return config.root or archives.root_of(config.uri)
    return table.root_of(config.uri, config.root) if table.is_table(config.uri) else config.uri


def look(config: PicturesConfig) -> Found:
    """Find the labeled pictures of `--data`.

    Raises:
        UserError: if it can't be read, or can be understood in two ways.
    """
    uri, cache = config.uri, cache_folder(config.cache if isinstance(config, DataConfig) else "")
    there = _what_is_there(uri)
    if there is None:
        return table.look(config)
    if isinstance(there, list) and archives.one_kind(there, uri) == PARQUET:
        table.require_unused(uri, replace(config, label_column=""))
        return parquet.look(there, root_of(config), uri, cache, config.label_column)
    table.require_unused(uri, config)
    if isinstance(there, list):
        return tars.look(there, root_of(config), uri, cache, config.max_bad_fraction)
    return folders.look(there, uri)


def look_unlabeled(uri: str, given: PathsConfig | None = None) -> pa.Table:
    """Find all pictures of `--data`, whatever their classes, in any folders.

    Args:
        uri: path or URI of the data.
        given: settings that say how to read a table; None: found out from the table.

    Returns:
        The columns path, size and modified (and version) of `Found.table`.

    Raises:
        UserError: if it can't be read or has no pictures.
    """
    there, given = _what_is_there(uri), given or PathsConfig()
    if there is None:
        return table.look_unlabeled(uri, given)
    table.require_unused(uri, given)
    if isinstance(there, Files):
        return files.look_unlabeled(there, uri)
    look_into = tars.look_unlabeled if archives.one_kind(there, uri) == TAR else parquet.look_unlabeled
    return look_into(there, root_of(PicturesConfig(uri=uri)), uri, cache_folder(""))


def _what_is_there(uri: str) -> list[str] | Files | None:
    """Return the archives that `--data` names or holds, or the files of its folder; None if it is a table."""
    if archives.are_named(uri):
        found = archives.find(uri)
        if len(found) > 1 or archive_kind(found[0]) != PARQUET:
            return found
        return found if parquet.has_pictures(found[0], archives.root_of(uri)) else None
    if table.is_table(uri):
        return None
    there = list_files(uri)
    found = sorted((path for path in there.archives if archive_kind(path)), key=log.natural)
    named = [path for path in found if archive_kind(path) == PARQUET]
    if named and not parquet.has_pictures(named[0], uri):  # tables, or something else
        found = [path for path in found if path not in named]
    if not len(there.pictures):
        return found or [path for path in there.archives if not archive_kind(path)] or there
    if found:
        raise UserError(
            f"--data {redact(uri)} holds pictures as files, such as {there.pictures['path'][0]}, and others in "
            f"{found[0]}: keep those of one form there, or name the others"
        )
    return there
