"""Finds pictures in folders, one for each class, perhaps within folders for the splits, by names alone."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from cvdist import log
from cvdist.data.forms.files import Files, parents_of
from cvdist.data.forms.found import NO_PART, SPLIT_IN_NAME, TRAIN_PART, VALID_PART, Found, log_count, role
from cvdist.errors import UserError
from cvdist.log import redact, some

logger = logging.getLogger(__name__)


@dataclass
class _Folder:
    """A folder directly below `--data`: the number of pictures directly in it, and its folders' names."""

    pictures: int = 0
    folders: set[str] = field(default_factory=set)


def look(files: Files, uri: str) -> Found:
    """Find the pictures below a folder that has one folder per class, either directly or in train/ and valid/.

    Raises:
        UserError: if its folders are no classes or can be understood in two ways.
    """
    root = redact(uri).rstrip("/")
    log_count("files that are no pictures by their names", files.others, files.example)
    return by_folders(files.pictures, files.folders, root, _table_hint(files.tables, root))


def by_folders(pictures: pa.Table, folders: set[str], root: str, hint: str = "") -> Found:
    """Find the class and the split of each picture by the folders in its path.

    Args:
        pictures: table with a column path; pictures in no class folder are left out, other columns stay.
        folders: all folders, also those in which no picture lies.
        root: what the user named, for messages.
        hint: the end of an error that there are no folders for classes, or only one.

    Raises:
        UserError: if the folders are no classes or can be understood in two ways.
    """
    counts = _counts(pictures["path"])
    parts = _find_parts(counts, folders, root)
    there: dict[str, dict[str, bool]] = {prefix: {} for prefix in parts}
    for folder in folders:
        prefix, names = _place(folder, parts)
        if len(names) == 1:
            there[prefix].setdefault(names[0], False)
    for prefix, names in (_place(folder, parts) for folder in counts):
        if names:
            there[prefix][names[0]] = True
    _require_filled(there, root, hint)
    return Found(_with_classes(pictures, parts), parts, _hint(there, folders, root) or hint)


def _with_classes(pictures: pa.Table, parts: Mapping[str, int]) -> pa.Table:
    """Return the pictures that lie in folders of classes, with the columns label and split."""
    parents = parents_of(pictures["path"])
    places = [_place(folder, parts) for folder in parents.dictionary.to_pylist()]
    label = pa.array([names[0] if names else None for _, names in places], pa.string()).take(parents.indices)
    split = pa.array([prefix for prefix, _ in places], pa.string()).take(parents.indices)
    if label.null_count:
        example = pictures["path"].filter(pc.is_null(label))[0].as_py()
        log_count("pictures in no class folder, left out", label.null_count, example)
    table = pictures.append_column("label", label).append_column("split", split)
    return table.filter(pc.is_valid(label)) if label.null_count else table


def _require_filled(there: Mapping[str, Mapping[str, bool]], root: str, hint: str) -> None:
    """Check that each split has classes, and that none of them is empty."""
    for prefix, found in there.items():
        where = f"{root}/{prefix}".rstrip("/")
        if not found:
            raise UserError(
                f"--data {where} has no class folders: expected {where}/CLASS/*.jpg, a folder for each "
                f"class{hint}"
            )
        if empty := [name for name, filled in found.items() if not filled]:
            raise UserError(f"--data {where}: no pictures in {some(empty)}: fill or remove what is empty")


def _table_hint(tables: list[str], root: str) -> str:
    """Return a hint that a table may have been meant; empty unless one lies beside the pictures."""
    first = sorted(tables, key=lambda path: (path.count("/"), path))[:3]
    return f"; if {' or '.join(first)} names the classes, give --data {root}/{first[0]}" if first else ""


def _hint(there: Mapping[str, Mapping[str, bool]], folders: set[str], root: str) -> str:
    """Return a hint on what may have been meant where there is only one class, which has folders itself."""
    prefix, classes = next(iter(there.items()))
    if len(classes) > 1:
        return ""
    one = f"{prefix}/{next(iter(classes))}".lstrip("/")
    within = [folder.rpartition("/")[2] for folder in folders if folder.rpartition("/")[0] == one]
    return f"; if {some(within)} are the classes, name {root}/{one}" if len(within) > 1 else ""


def split_folders(paths: pa.ChunkedArray) -> dict[str, int]:
    """Find the folders that hold the splits of a data set, by usual names such as `Train` or `test_set`.

    If there is no folder for validation, one for tests is used.

    Args:
        paths: paths of the pictures below the data set's folder.

    Returns:
        The part (0: training, 1: validation) of each split's folder; empty if there are no splits.
    """
    return _splits_of(_top(_counts(paths), ()))


def _counts(paths: pa.ChunkedArray) -> Counter[str]:
    """Count the files that lie directly in each folder."""
    found = parents_of(paths).value_counts()
    return Counter(dict(zip(found.field(0).to_pylist(), found.field(1).to_pylist(), strict=True)))


def _splits_of(top: Mapping[str, _Folder]) -> dict[str, int]:
    named = {one: [name for name in sorted(top) if role(name) == one] for one in ("train", "valid", "test")}
    train, flat = named["train"], any(top[name].pictures for name in named["train"])
    unlabeled = [name for name in named["test"] if not top[name].folders and not flat]
    held_back = named["valid"] or [name for name in named["test"] if name not in unlabeled]
    if not held_back and (flat or len(top) > len(train) + len(unlabeled)):
        return {}  # `train` may be a class: of vehicles
    parts = dict.fromkeys(train, TRAIN_PART if held_back else NO_PART)
    return parts | dict.fromkeys(held_back, VALID_PART) if train else {}


def _top(counts: Mapping[str, int], folders: Iterable[str]) -> dict[str, _Folder]:
    """Return the folders directly below `--data`; `counts`: number of pictures in each folder."""
    top: defaultdict[str, _Folder] = defaultdict(_Folder)
    for path in (*folders, *counts):
        if path:
            name, *below = path.split("/")
            top[name].folders.update(below[:1])
            if not below:
                top[name].pictures = counts.get(path, 0)
    return dict(top)


def _find_parts(counts: Mapping[str, int], folders: set[str], root: str) -> dict[str, int]:
    """Return the part of each folder of classes by its path; {"": NO_PART} if `--data` itself holds them."""
    top = _top(counts, folders)
    parts = _splits_of(top)
    if not parts:
        _require_classes_at_top(top, root)
        return {"": NO_PART}
    roles = {role(name): name for name in parts}
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
    """Check that the folders directly below `--data` may be classes."""
    names = sorted(top, key=log.natural)
    splits = {role(name): name for name in names if top[name].folders and not top[name].pictures}
    splits.pop("", None)
    if "train" in splits:
        raise UserError(
            f"--data {root} has a folder {splits['train']} but none named valid or test beside it: add it, or "
            f"name {root}/{splits['train']} itself, which is then split by --valid-fraction"
        )
    if splits and all(role(name) for name in names):
        raise UserError(
            f"--data {root} has {some(names)} but no folder train: add it, or name {root}/{names[0]} itself"
        )
    alike = len(names) > 1 and not any(one.pictures for one in top.values())
    classes = set.intersection(*(one.folders for one in top.values())) if alike else set()
    rests = [SPLIT_IN_NAME.sub("", name) for name in names if SPLIT_IN_NAME.search(name)]
    if len(classes) > 1 or len(set(rests)) < len(rests):
        what = f"each with {some(classes)} in it" if classes else "which look like splits"
        raise UserError(
            f"--data {root} has the folders {some(names)}, {what}: if they are splits, name them train and "
            f"valid, or give one of them, such as --data {root}/{names[0]}; if they are classes, move them "
            f"into {root}/train"
        )


def _place(folder: str, parts: Mapping[str, int]) -> tuple[str, list[str]]:
    """Return the folder of `parts` that `folder` lies below, and the names below it; no names if none."""
    for prefix in parts:
        if folder and (not prefix or folder.startswith(f"{prefix}/")):
            return prefix, folder[len(prefix) :].lstrip("/").split("/")
    return "", []
