"""The forms in which people keep labeled pictures, each in one file of this folder.

A form says which pictures there are, with class and split (`Found`), from names, tables and the headers of
archives. `look` chooses the form of a `--data`. A picture's path is relative to `root_of` the data, and says
all that is needed to read it (`cvdist.data.contents`), so nothing but this folder knows about forms.
"""

from __future__ import annotations

import pyarrow as pa

from cvdist.config import PicturesConfig
from cvdist.data.forms import folders
from cvdist.data.forms.folders import unlabeled_table
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
    return config.uri


def look(config: PicturesConfig) -> Found:
    """Find the labeled pictures of `--data`.

    Raises:
        UserError: if it can't be read, or may be taken in two ways.
    """
    return folders.look(config.uri)


def look_unlabeled(uri: str) -> pa.Table:
    """Find all pictures of `--data`, whatever their classes, in any folders.

    Returns:
        The columns path, size and modified (and version) of `Found.table`.

    Raises:
        UserError: if it can't be read or has no pictures.
    """
    return folders.look_unlabeled(uri)
