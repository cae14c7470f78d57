"""The forms in which people keep labeled pictures, each in one file of this folder.

A form says which pictures there are, with class and split (`Found`), from names, tables and the headers of
archives. `look` chooses the form of a `--data`. A picture's path is relative to `root_of` the data, and says
all that is needed to read it (`cvdist.data.contents`), so nothing but this folder knows about forms.
"""

from __future__ import annotations

import pyarrow as pa

from cvdist import log
from cvdist.config import DataConfig, PicturesConfig, cache_folder
from cvdist.data.contents import PARQUET, TAR, archive_kind
from cvdist.data.forms import archives, folders, parquet, tars
from cvdist.data.forms.folders import unlabeled_table
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
    "root_of_unlabeled",
    "unlabeled_table",
]


def root_of(config: PicturesConfig) -> str:
    """The folder or URI that the paths of the pictures of `--data` are relative to."""
    return root_of_unlabeled(config.uri)


def root_of_unlabeled(uri: str) -> str:
    """The folder or URI that the paths in `look_unlabeled(uri)` are relative to."""
    return archives.root_of(uri) if archives.are_named(uri) else uri


def look(config: PicturesConfig) -> Found:
    """Find the labeled pictures of `--data`.

    Raises:
        UserError: if it can't be read, or may be taken in two ways.
    """
    uri, root = config.uri, root_of(config)
    files = None if archives.are_named(uri) else folders.list_files(uri)
    paths = archives.find(uri) if files is None else _archives_in(files, uri)
    if files is not None and not paths:
        return folders.look(files, uri)
    cache = cache_folder(config.cache if isinstance(config, DataConfig) else "")
    if archives.one_kind(paths, uri) == TAR:
        return tars.look(paths, root, uri, cache, config.max_bad_fraction)
    return parquet.look(paths, root, uri, cache)


def look_unlabeled(uri: str) -> pa.Table:
    """Find all pictures of `--data`, whatever their classes, in any folders.

    Returns:
        The columns path, size and modified (and version) of `Found.table`.

    Raises:
        UserError: if it can't be read or has no pictures.
    """
    files = None if archives.are_named(uri) else folders.list_files(uri)
    paths = archives.find(uri) if files is None else _archives_in(files, uri)
    if files is not None and not paths:
        return folders.look_unlabeled(files, uri)
    form = tars if archives.one_kind(paths, uri) == TAR else parquet
    return form.look_unlabeled(paths, root_of_unlabeled(uri), uri, cache_folder(""))


def _archives_in(files: folders.Files, uri: str) -> list[str]:
    """The tars or Parquet files that a folder is made of; none if it holds pictures.

    Raises:
        UserError: if it holds both.
    """
    found = sorted((path for path in files.ignored if archive_kind(path)), key=log.natural)
    tables = [path for path in found if archive_kind(path) == PARQUET]
    if tables and not parquet.has_pictures(tables[0], uri):
        found = [path for path in found if path not in tables]
    if found and files.pictures:
        raise UserError(
            f"--data {redact(uri)} holds pictures as files, such as {files.pictures[0].path}, and others in "
            f"{found[0]}: keep those of one form there, or name the others"
        )
    compressed = [path for path in files.ignored if archives.is_compressed(path)]
    if compressed and not found and not files.pictures:
        archives.one_kind(compressed, uri)
    return found
