"""Lists a data set's pictures with class and split, from file and folder names alone."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import torch

from cvdist import storage
from cvdist.config import DataConfig, PicturesConfig
from cvdist.data.images.decode import SUFFIXES
from cvdist.data.split import stratified_split
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.storage import Entry

logger = logging.getLogger(__name__)

_VALID = ("valid", "val", "validation")  # the first is ours, the others are common elsewhere
TRAIN_PART, VALID_PART, NO_PART = 0, 1, -1


@dataclass(frozen=True)
class Listing:
    """The pictures below a folder, sorted by path.

    Attributes:
        classes: names of the classes, sorted.
        table: one row per picture, with the columns path (string, relative to the folder), label (int32), part
            (int8: 0 for training, 1 for validation, -1 if the folder has no splits), size (int64, bytes) and
            modified (int64, nanoseconds since 1970).
    """

    classes: tuple[str, ...]
    table: pa.Table

    def digest(self) -> str:
        """Return a hexadecimal SHA-256 that changes when a picture is added, removed or written again."""
        sha = hashlib.sha256(repr(self.classes).encode())
        for batch in self.table.to_batches(max_chunksize=1 << 16):
            for column in batch.columns:
                sha.update(repr(column.to_pylist()).encode())
        return sha.hexdigest()


def list_pictures(config: PicturesConfig, fewest_classes: int = 2) -> Listing:
    """List the pictures of `--data`, which has one folder per class, either directly or in train/ and valid/.

    Args:
        config: configuration that names the pictures.
        fewest_classes: smallest number of classes that is accepted.

    Raises:
        UserError: if the folder can't be read, or has no usable class folders.
    """
    root = redact(config.uri)
    files, folders, ignored = _look(config.uri)
    top = {path.split("/")[0] for path in folders} | {
        file.path.split("/")[0] for file in files if "/" in file.path
    }
    valid = next((name for name in _VALID if name in top), None)
    if "train" in top and valid:
        parts = {"train": TRAIN_PART, valid: VALID_PART}
    elif "train" in top:
        raise UserError(
            f"--data {root} has a folder train but none named valid: add it, or name {root.rstrip('/')}/train "
            "itself, which is then split by --valid-fraction"
        )
    else:
        parts = {"": NO_PART}
    rows, classes = _sort_in(files, folders, parts, root, ignored, fewest_classes)
    if ignored:
        logger.info(
            "data       %d files are left out: in no class folder, or no pictures by their names, e.g. %s",
            len(ignored),
            ignored[0],
        )
    return Listing(classes, _table(rows, classes))


def list_unlabeled(uri: str) -> pa.Table:
    """List all pictures below `uri`, in any folders, sorted by path.

    Returns:
        A table with the columns path, size and modified of `Listing.table`.

    Raises:
        UserError: if the folder can't be read or has no pictures.
    """
    files, _, ignored = _look(uri)
    if not files:
        others = f", only other files, e.g. {ignored[0]}" if ignored else ""
        raise UserError(f"--data {redact(uri)} has no pictures{others}")
    return unlabeled_table(files)


def unlabeled_table(files: Iterable[Entry]) -> pa.Table:
    """The table of `list_unlabeled` with these pictures."""
    files = sorted(files, key=lambda file: file.path)
    return pa.table(
        {
            "path": pa.array([file.path for file in files], pa.string()),
            "size": pa.array([file.size for file in files], pa.int64()),
            "modified": pa.array([file.modified for file in files], pa.int64()),
        }
    )


def _look(uri: str) -> tuple[list[Entry], set[str], list[str]]:
    """Pictures, folders, and paths of other files; without what is hidden."""
    files: list[Entry] = []
    folders: set[str] = set()
    ignored: list[str] = []
    for entry in storage.list_entries(uri, "--data"):
        if any(part.startswith((".", "__")) for part in entry.path.split("/")):
            continue  # .DS_Store, __MACOSX
        if entry.is_folder:
            folders.add(entry.path)
        elif PurePosixPath(entry.path).suffix.lower() in SUFFIXES:
            files.append(entry)
        else:
            ignored.append(entry.path)
    return files, folders, ignored


def _sort_in(
    files: list[Entry],
    folders: set[str],
    parts: dict[str, int],
    root: str,
    ignored: list[str],
    fewest_classes: int,
) -> tuple[list[tuple[Entry, str, int]], tuple[str, ...]]:
    """Each picture with its class and part, by path; the classes' names."""
    found: dict[str, dict[str, int]] = {part: {} for part in parts}
    depth = 0 if "" in parts else 1
    for folder in folders:
        names = folder.split("/")
        if len(names) == depth + 1 and (depth == 0 or names[0] in parts):
            found[names[0] if depth else ""].setdefault(names[-1], 0)
    rows = []
    for file in sorted(files, key=lambda file: file.path):
        names = file.path.split("/")
        part = names[0] if depth else ""
        if part not in parts or len(names) < depth + 2:
            ignored.append(file.path)
            continue
        name = names[depth]
        found[part][name] = found[part].get(name, 0) + 1
        rows.append((file, name, parts[part]))
    classes = _require_classes(found, root, fewest_classes)
    return rows, classes


def _require_classes(found: dict[str, dict[str, int]], root: str, fewest: int) -> tuple[str, ...]:
    """Check that all splits have the same classes, at least `fewest` of them, and none without pictures.

    Args:
        found: number of pictures by class, for each split.
        root: the folder's name, for messages.
        fewest: smallest number of classes that is accepted.

    Returns:
        The names of the classes, sorted.

    Raises:
        UserError: if the check fails, in one line that names the folder.
    """
    for part, counts in found.items():
        where = f"{root.rstrip('/')}/{part}".rstrip("/")
        if not counts:
            raise UserError(
                f"--data {where} has no class folders: expected {where}/CLASS/*.jpg, a folder for each class"
            )
        empty = sorted(name for name, count in counts.items() if not count)
        if empty:
            raise UserError(f"--data {where}: no pictures in {_some(empty)}: fill or remove what is empty")
    train, *rest = found.values()
    for part, counts in zip(list(found)[1:], rest, strict=True):
        if counts.keys() != train.keys():
            raise UserError(
                f"--data {root}: train and {part} have different classes: only in train: "
                f"{_some(sorted(train.keys() - counts.keys()))}; only in {part}: "
                f"{_some(sorted(counts.keys() - train.keys()))}"
            )
    if len(train) < fewest:
        raise UserError(f"--data {root} has one class, {next(iter(train))}: a classifier needs two or more")
    return tuple(sorted(train))


def _table(rows: list[tuple[Entry, str, int]], classes: tuple[str, ...]) -> pa.Table:
    number = {name: i for i, name in enumerate(classes)}
    return pa.table(
        {
            "path": pa.array([file.path for file, _, _ in rows], pa.string()),
            "label": pa.array([number[name] for _, name, _ in rows], pa.int32()),
            "part": pa.array([part for _, _, part in rows], pa.int8()),
            "size": pa.array([file.size for file, _, _ in rows], pa.int64()),
            "modified": pa.array([file.modified for file, _, _ in rows], pa.int64()),
        }
    )


def split_rows(table: pa.Table, config: DataConfig, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `table` for training and for validation, int64 each, in order.

    Raises:
        UserError: if a class would be missing in one of them.
    """
    part, label = (np.asarray(table.column(name)) for name in ("part", "label"))
    if (part == NO_PART).all():
        rows = stratified_split(
            torch.from_numpy(label.astype(np.int64)), config.valid_fraction, config.split_seed
        )
        train, valid = (tensor.numpy() for tensor in rows)
    else:
        train, valid = (part == TRAIN_PART).nonzero()[0], (part == VALID_PART).nonzero()[0]
    for name, mine in (("training", train), ("validation", valid)):
        missing = sorted(set(range(len(classes))) - set(np.unique(label[mine]).tolist()))
        if missing:
            raise UserError(
                f"--data {redact(config.uri)}: no {name} picture of {_some([classes[i] for i in missing])} "
                "can be decoded"
            )
    return train, valid


def _some(names: Iterable[str]) -> str:
    """Up to five names."""
    listed = list(names)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return (", ".join(listed[:5]) or "none") + more
