"""Lists a data set's pictures with class and split, from file and folder names alone."""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import torch

from cvdist import log, storage
from cvdist.config import DataConfig, PicturesConfig
from cvdist.data.images.exclusion import find_excluded
from cvdist.data.images.formats import format_by_name, is_read, unread_formats
from cvdist.data.split import stratified_split
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.storage import Entry

logger = logging.getLogger(__name__)

# What systems and tools leave behind, besides hidden files.
_LITTER = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
_LITTER_FILES = {"thumbs.db", "desktop.ini"}
_WORDS = r"(?P<word>train|training|valid|val|validation|test|testing)"
_SPLIT = re.compile(rf"{_WORDS}([ _.-]?(set|data|images?|imgs?|pictures?|photos?))?", re.IGNORECASE)
_SPLIT_IN_NAME = re.compile(rf"(?<![a-z]){_WORDS}(?![a-z])", re.IGNORECASE)  # as in `cats_train`
_RESULTS = "manifest.json"  # of a feature cache or of predictions
TRAIN_PART, VALID_PART, NO_PART = 0, 1, -1


@dataclass(frozen=True)
class Listing:
    """The pictures below a folder, sorted by path.

    Attributes:
        classes: names of the classes, in natural order (2 before 10).
        table: one row per picture, with the columns path (string, relative to the folder), label (int32), part
            (int8: 0 for training, 1 for validation, -1 if the folder has no splits), size (int64, bytes) and
            modified (int64, nanoseconds since 1970).
    """

    classes: tuple[str, ...]
    table: pa.Table


@dataclass
class _Folder:
    """A folder directly below `--data`: how many pictures lie in it, not deeper, and its folders' names."""

    pictures: int = 0
    folders: set[str] = field(default_factory=set)


def list_pictures(config: PicturesConfig, fewest_classes: int = 2) -> Listing:
    """List the pictures of `--data`, which has one folder per class, either directly or in train/ and valid/.

    Args:
        config: configuration that names the pictures.
        fewest_classes: smallest number of classes that is accepted.

    Raises:
        UserError: if the folder can't be read, or its folders are no classes or may be taken in two ways.
    """
    root = redact(config.uri).rstrip("/")
    files, folders, ignored = _look(config.uri)
    parts = _find_parts([file.path for file in files], folders, root)
    counts: dict[str, dict[str, int]] = {prefix: {} for prefix in parts}
    for folder in folders:
        prefix, names = _place(folder, parts)
        if len(names) == 1:
            counts[prefix].setdefault(names[0], 0)
    rows = []
    for file in sorted(files, key=lambda file: file.path):
        prefix, names = _place(file.path, parts)
        if len(names) < 2:
            ignored.append(file.path)
            continue
        counts[prefix][names[0]] = counts[prefix].get(names[0], 0) + 1
        rows.append((file, names[0], parts[prefix]))
    classes = _require_classes(counts, parts, root, fewest_classes, folders)
    if ignored:
        logger.info(
            "data       %d files are left out: in no class folder, or no pictures by their names, e.g. %s",
            len(ignored),
            ignored[0],
        )
    number = {name: i for i, name in enumerate(classes)}
    return Listing(
        classes,
        pa.table(
            {
                "path": pa.array([file.path for file, _, _ in rows], pa.string()),
                "label": pa.array([number[name] for _, name, _ in rows], pa.int32()),
                "part": pa.array([part for _, _, part in rows], pa.int8()),
                "size": pa.array([file.size for file, _, _ in rows], pa.int64()),
                "modified": pa.array([file.modified for file, _, _ in rows], pa.int64()),
            }
        ),
    )


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


def split_folders(paths: Iterable[str]) -> dict[str, int]:
    """Find the folders that hold the splits of a data set, by usual names such as `Train` or `test_set`.

    Without a folder for validation, one for tests serves.

    Args:
        paths: of the pictures, below the data set's folder.

    Returns:
        The part of each split's folder; empty if there are no splits.
    """
    return _splits_of(_top(paths, ()))


def _splits_of(top: Mapping[str, _Folder]) -> dict[str, int]:
    named = {role: [name for name in sorted(top) if _role(name) == role] for role in ("train", "valid", "test")}
    train, flat = named["train"], any(top[name].pictures for name in named["train"])
    unlabeled = [name for name in named["test"] if not top[name].folders and not flat]
    held_back = named["valid"] or [name for name in named["test"] if name not in unlabeled]
    if not held_back and (flat or len(top) > len(train) + len(unlabeled)):
        return {}  # `train` may be a class: of vehicles
    parts = dict.fromkeys(train, TRAIN_PART if held_back else NO_PART)
    return parts | dict.fromkeys(held_back, VALID_PART) if train else {}


def _role(name: str) -> str:
    """Which split a folder is by its name: train, valid, test or, empty, none."""
    found = _SPLIT.fullmatch(name)
    return {"tr": "train", "va": "valid", "te": "test"}[found["word"][:2].lower()] if found else ""


def _look(uri: str) -> tuple[list[Entry], set[str], list[str]]:
    """Pictures, folders, and paths of other files; without litter and results of this program.

    Raises:
        UserError: if the folder can't be read, or all pictures have formats that are not read here.
    """
    files: list[Entry] = []
    folders: set[str] = set()
    ignored: list[str] = []
    passed_over: set[str] = set()
    manifests: list[str] = []
    unread: list[str] = []
    for entry in storage.list_entries(uri, "--data"):
        *above, name = entry.path.split("/")
        within = [*above, name] if entry.is_folder else above
        litter = next((i for i, part in enumerate(within) if part in _LITTER or part.startswith(".")), None)
        if litter is not None:
            passed_over.add("/".join(within[: litter + 1]))
        elif entry.is_folder:
            folders.add(entry.path)
        elif name.startswith(".") or name.lower() in _LITTER_FILES:
            pass
        elif is_read(name):
            files.append(entry)
        elif format_by_name(name):
            unread.append(name)
        else:
            ignored.append(entry.path)
            if name == _RESULTS:
                manifests.append(entry.path)
    if unread and not files:
        raise UserError(f"--data {redact(uri)} has no pictures that can be read: {unread_formats(unread)}")
    if unread:
        logger.warning("data       left out: %s", unread_formats(unread))
    results = _results_of_jobs(uri, manifests, files, folders)
    if passed_over or results:
        logger.info("data       passed over: %s", _some({*passed_over, *results}))
    return files, folders - results, [path for path in ignored if path.rpartition("/")[0] not in results]


def _results_of_jobs(uri: str, manifests: list[str], files: list[Entry], folders: set[str]) -> set[str]:
    """The folders without pictures that lie beside a manifest of this program, and what is in them."""
    found: set[str] = set()
    filesystem, root = storage.locate(uri, "--data")
    bases = [
        base for base in (path.removesuffix(_RESULTS) for path in manifests) if f"{base}receipts" in folders
    ]
    above = {str(folder) for file in files for folder in PurePosixPath(file.path).parents} if bases else set()
    for base in bases:
        try:
            kind = json.loads(storage.read(filesystem, f"{root}/{base}{_RESULTS}"))["format"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if str(kind).startswith("cvdist-"):
            found |= {folder for folder in folders if f"{folder}/".startswith(base) and folder not in above}
    return found


def _top(paths: Iterable[str], folders: Iterable[str]) -> dict[str, _Folder]:
    """The folders directly below `--data`."""
    top: defaultdict[str, _Folder] = defaultdict(_Folder)
    for path in folders:
        names = path.split("/")
        top[names[0]].folders.update(names[1:2])
    for path in paths:
        name, *below = path.split("/")
        if len(below) == 1:
            top[name].pictures += 1
        elif below:
            top[name].folders.add(below[0])
    return dict(top)


def _find_parts(paths: list[str], folders: set[str], root: str) -> dict[str, int]:
    """The part of each folder that holds classes, by its path; {"": NO_PART} if `--data` itself holds them.

    Raises:
        UserError: if the folders can be taken in two ways.
    """
    top = _top(paths, folders)
    parts = _splits_of(top)
    if not parts:
        _require_classes_at_top(top, root)
        return {"": NO_PART}
    roles = {_role(name): name for name in parts}
    if len(roles) < len(parts):
        raise UserError(f"--data {root} has {' and '.join(parts)}: keep one folder for each split")
    if len(parts) == 1:
        logger.info("data       no folder valid beside %s: --valid-fraction of it is held back", roles["train"])
    elif "test" in roles:
        logger.info("data       no folder valid: validated on %s", roles["test"])
    # Archives are often unpacked into a folder of their own name.
    return {
        f"{name}/{name}" if top[name].folders == {name} and not top[name].pictures else name: part
        for name, part in parts.items()
    }


def _require_classes_at_top(top: Mapping[str, _Folder], root: str) -> None:
    """Check that the folders directly below `--data` may be classes.

    Raises:
        UserError: if they look like splits.
    """
    names = sorted(top, key=log.natural)
    splits = {_role(name): name for name in names if top[name].folders and not top[name].pictures}
    splits.pop("", None)
    if "train" in splits:
        raise UserError(
            f"--data {root} has a folder {splits['train']} but none named valid or test beside it: add it, or "
            f"name {root}/{splits['train']} itself, which is then split by --valid-fraction"
        )
    if splits and all(_role(name) for name in names):
        raise UserError(
            f"--data {root} has {_some(names)} but no folder train: add it, or name {root}/{names[0]} itself"
        )
    alike = len(names) > 1 and not any(one.pictures for one in top.values())
    classes = set.intersection(*(one.folders for one in top.values())) if alike else set()
    rests = [_SPLIT_IN_NAME.sub("", name) for name in names if _SPLIT_IN_NAME.search(name)]
    if len(classes) > 1 or len(set(rests)) < len(rests):
        what = f"each with {_some(classes)} in it" if classes else "which look like splits"
        raise UserError(
            f"--data {root} has the folders {_some(names)}, {what}: if they are splits, name them train and "
            f"valid, or give one of them, such as --data {root}/{names[0]}; if they are classes, move them "
            f"into {root}/train"
        )


def _place(path: str, parts: Mapping[str, int]) -> tuple[str, list[str]]:
    """The prefix among `parts` that `path` lies in, and the names below it; none outside of all prefixes."""
    for prefix in parts:
        if not prefix or path.startswith(f"{prefix}/"):
            return prefix, path[len(prefix) :].lstrip("/").split("/")
    return "", []


def _require_classes(
    counts: Mapping[str, Mapping[str, int]], parts: Mapping[str, int], root: str, fewest: int, folders: set[str]
) -> tuple[str, ...]:
    """Check that there are at least `fewest` classes, none without pictures, and all to be learned.

    Args:
        counts: number of pictures by class, for each folder of `parts`.
        parts: the part of each folder that holds classes.
        root: the folder's name, for messages.
        fewest: smallest number of classes that is accepted.
        folders: paths of all folders.

    Returns:
        The names of the classes, in natural order.

    Raises:
        UserError: if the check fails, in one line that names the folder.
    """
    for prefix, found in counts.items():
        where = f"{root}/{prefix}".rstrip("/")
        if not found:
            raise UserError(
                f"--data {where} has no class folders: expected {where}/CLASS/*.jpg, a folder for each class"
            )
        if empty := [name for name, count in found.items() if not count]:
            raise UserError(f"--data {where}: no pictures in {_some(empty)}: fill or remove what is empty")
    prefix, train = next(iter(counts.items()))
    classes = tuple(sorted(train, key=log.natural))
    for other, found in list(counts.items())[1:]:
        if unknown := [f"{name} ({count})" for name, count in found.items() if name not in train]:
            raise UserError(
                f"--data {root}: {other} has classes that {prefix} has no pictures of: {_some(unknown)}"
            )
        if missing := [f"{name} ({count})" for name, count in train.items() if name not in found]:
            logger.warning("data       classes that %s has no pictures of: %s", other, _some(missing))
    if len(classes) < fewest:
        one = f"{prefix}/{classes[0]}".lstrip("/")
        within = [folder.rpartition("/")[2] for folder in folders if folder.rpartition("/")[0] == one]
        hint = f"; if {_some(within)} are the classes, name {root}/{one}" if len(within) > 1 else ""
        raise UserError(
            f"--data {root} has one class, {classes[0]} ({train[classes[0]]} pictures): a classifier needs two "
            f"or more{hint}"
        )
    single = [name for name in classes if train[name] == 1]
    if parts[prefix] == NO_PART and fewest > 1:
        if len(single) == len(classes):
            raise UserError(f"--data {root} has one picture of each class: none is left to validate on")
        if single:
            logger.warning(
                "data       classes with a single picture, which is in training only: %s", _some(single)
            )
    return classes


def split_rows(table: pa.Table, config: DataConfig, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `table` for training and for validation, int64 each, in order, without those of `--exclude`.

    Leaving pictures out moves no other one to the other side.

    Raises:
        UserError: if a class would be missing in training, or validation would have no picture.
    """
    part, label = (np.asarray(table.column(name)) for name in ("part", "label"))
    if (part == NO_PART).all():
        rows = stratified_split(
            torch.from_numpy(label.astype(np.int64)), config.valid_fraction, config.split_seed
        )
        train, valid = (tensor.numpy() for tensor in rows)
    else:
        train, valid = (part == TRAIN_PART).nonzero()[0], (part == VALID_PART).nonzero()[0]
    kept = find_excluded(table, config).kept
    train, valid = train[kept[train]], valid[kept[valid]]
    learned = set(np.unique(label[train]).tolist())
    missing = [name for i, name in enumerate(classes) if i not in learned]
    if missing or not len(valid):
        what = f"training picture of {_some(missing)}" if missing else "validation picture"
        left = "is left by --exclude" if config.exclude else "can be decoded"
        raise UserError(f"--data {redact(config.uri)}: no {what} {left}")
    return train, valid


def _some(names: Iterable[str]) -> str:
    """Up to five names."""
    listed = sorted(names, key=log.natural)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return (", ".join(listed[:5]) or "none") + more
