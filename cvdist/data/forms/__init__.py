"""The forms in which people keep labeled pictures, each in one file of this folder.

A form says which pictures there are, with class and split (`Found`), from names, tables and the headers of
archives. `look` chooses the form of a `--data`. A picture's path is relative to `root_of` the data, and says
all that is needed to read it (`cvdist.data.contents`), so nothing but this folder knows about forms.
"""

from __future__ import annotations

import pyarrow as pa

from cvdist.config import PathsConfig, PicturesConfig
from cvdist.data.forms import files, folders, table
from cvdist.data.forms.files import unlabeled_table
from cvdist.data.forms.found import NO_PART, TRAIN_PART, VALID_PART, Found

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
    """The folder or URI that the paths of the pictures of `--data` are relative to."""
    return table.root_of(config.uri, config.root) if table.is_table(config.uri) else config.uri


def look(config: PicturesConfig) -> Found:
    """Find the labeled pictures of `--data`.

    Raises:
        UserError: if it can't be read, or may be taken in two ways.
    """
    if table.is_table(config.uri):
        return table.look(config)
    table.require_unused(config.uri, config)
    return folders.look(config.uri)


def look_unlabeled(uri: str, given: PathsConfig | None = None) -> pa.Table:
    """Find all pictures of `--data`, whatever their classes, in any folders.

    Args:
        uri: of the data.
        given: how a table is read, where it isn't found out.

    Returns:
        The columns path, size and modified (and version) of `Found.table`.

    Raises:
        UserError: if it can't be read or has no pictures.
    """
    given = given or PathsConfig()
    if table.is_table(uri):
        return table.look_unlabeled(uri, given)
    table.require_unused(uri, given)
    return files.look_unlabeled(uri)
