"""What every form of a data set finds out about its pictures, and the usual names of splits."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa

logger = logging.getLogger(__name__)

TRAIN_PART, VALID_PART, NO_PART = 0, 1, -1
BETWEEN_CLASSES = "\x1f"
"""Stands between the classes of a picture that has several: ASCII's separator, which no name has."""

_WORDS = r"(?P<word>train|training|valid|val|validation|test|testing)"
_SPLIT = re.compile(rf"{_WORDS}([ _.-]?(set|data|images?|imgs?|pictures?|photos?))?", re.IGNORECASE)
SPLIT_IN_NAME = re.compile(rf"(?<![a-z]){_WORDS}(?![a-z])", re.IGNORECASE)  # as in `cats_train`


@dataclass(frozen=True)
class Found:
    """The labeled pictures of a data set.

    Attributes:
        table: one row per picture, in the order in which they are best read, with the columns path (string,
            below the root), label (string), split (string, a key of `parts`), size (int64, bytes), modified
            (int64, nanoseconds since 1970, 0 if unknown), and, from a form that reads the pictures' bytes to
            list them, version (string: their digest in hexadecimal). If multilabel, a label is the picture's
            classes in natural order with `BETWEEN_CLASSES` between them, and empty for none.
        parts: the part of each split, training first: 0 for training, 1 for validation. If the data has no
            splits, the only key is empty or the name of the one split, and its part is -1.
        hint: the end of an error that there is only one class, such as what else may be named.
        multilabel: whether a picture may have several classes, or none.
    """

    table: pa.Table
    parts: Mapping[str, int]
    hint: str = ""
    multilabel: bool = False


def role(name: str) -> str:
    """Return the split that a folder, a column's value or a file names: train, valid or test; empty if none."""
    found = _SPLIT.fullmatch(name)
    return _role_of(found) if found else ""


def role_in(name: str) -> str:
    """Return the split that is part of a longer name, such as `imagenet-train-000017.tar`; empty if none."""
    found = SPLIT_IN_NAME.search(name)
    return _role_of(found) if found else ""


def _role_of(found: re.Match[str]) -> str:
    return {"tr": "train", "va": "valid", "te": "test"}[found["word"][:2].lower()]


def parts_of(splits: Iterable[str]) -> dict[str, int]:
    """Return the part of each split by its role. If there is none for validation, one for tests is used.

    Args:
        splits: roles, such as train, valid and test. Others are left out.

    Returns:
        The parts of the training split and of the one to validate on; of train alone if it is to be split.
    """
    there = set(splits)
    held_back = "valid" if "valid" in there else "test" if "test" in there else ""
    if held_back:
        return {"train": TRAIN_PART, held_back: VALID_PART}
    return {"train": NO_PART}


def log_count(what: str, count: int, example: str = "") -> None:
    """Log the number of rows or pictures of a kind that a user may not expect, unless it is 0."""
    if count:
        logger.info("data       %s: %s%s", what, f"{count:,}", f", e.g. {example}" if example else "")
