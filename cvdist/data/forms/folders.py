"""Pictures in folders, one for each class, also within folders for the splits: found by names alone."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from cvdist import log, storage
from cvdist.data.formats import format_by_name, is_read, unread_formats
from cvdist.data.forms.found import NO_PART, SPLIT_IN_NAME, TRAIN_PART, VALID_PART, Found, role
from cvdist.errors import UserError
from cvdist.log import redact, some
from cvdist.storage import Entry

logger = logging.getLogger(__name__)

# What systems and tools leave behind, besides hidden files.
_LITTER = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
_LITTER_FILES = {"thumbs.db", "desktop.ini"}
_RESULTS = "manifest.json"  # of a feature cache or of predictions


@dataclass
class _Folder:
    """A folder directly below `--data`: how many pictures lie in it, not deeper, and its folders' names."""

    pictures: int = 0
    folders: set[str] = field(default_factory=set)


def look(files: Files, uri: str) -> Found:
    """Find the pictures below a folder that has one folder per class, either directly or in train/ and valid/.

    Raises:
        UserError: if its folders are no classes or may be taken in two ways.
    """
    if files.ignored:
        logger.info(
            "data       %d files are no pictures by their names, e.g. %s", len(files.ignored), files.ignored[0]
        )
    return by_folders(unlabeled_table(files.pictures), files.folders, redact(uri).rstrip("/"))


def by_folders(pictures: pa.Table, folders: set[str], root: str) -> Found:
    """Find the class and the split of each picture by the folders in its path.

    Args:
        pictures: with a column path; pictures in no class folder are left out, and other columns stay.
        folders: all that there are, with those in which no picture lies.
        root: what the user named, for messages.

    Raises:
        UserError: if the folders are no classes or may be taken in two ways.
    """
    paths = pictures.column("path").to_pylist()
    parts = _find_parts(paths, folders, root)
    there: dict[str, dict[str, bool]] = {prefix: {} for prefix in parts}
    for folder in folders:
        prefix, names = _place(folder, parts)
        if len(names) == 1:
            there[prefix].setdefault(names[0], False)
    placed: list[tuple[str | None, str]] = []
    outside = []
    for path in paths:
        prefix, names = _place(path, parts)
        if len(names) < 2:
            outside.append(path)
            placed.append((None, ""))
            continue
        there[prefix][names[0]] = True
        placed.append((names[0], prefix))
    _require_filled(there, root)
    if outside:
        logger.info(
            "data       %d pictures are left out: in no class folder, e.g. %s", len(outside), outside[0]
        )
    label = pa.array([name for name, _ in placed], pa.string())
    table = pictures.append_column("label", label)
    table = table.append_column("split", pa.array([prefix for _, prefix in placed], pa.string()))
    return Found(table.filter(pc.is_valid(label)), parts, _hint(there, folders, root))


def _require_filled(there: Mapping[str, Mapping[str, bool]], root: str) -> None:
    """Check that each split has classes, and that none of them is empty.

    Raises:
        UserError: if not, in one line that names the folder.
    """
    for prefix, found in there.items():
        where = f"{root}/{prefix}".rstrip("/")
        if not found:
            raise UserError(
                f"--data {where} has no class folders: expected {where}/CLASS/*.jpg, a folder for each class"
            )
        if empty := [name for name, filled in found.items() if not filled]:
            raise UserError(f"--data {where}: no pictures in {some(empty)}: fill or remove what is empty")


def _hint(there: Mapping[str, Mapping[str, bool]], folders: set[str], root: str) -> str:
    """What may have been meant where a folder has but one class, which has folders itself."""
    prefix, classes = next(iter(there.items()))
    if len(classes) > 1:
        return ""
    one = f"{prefix}/{next(iter(classes))}".lstrip("/")
    within = [folder.rpartition("/")[2] for folder in folders if folder.rpartition("/")[0] == one]
    return f"; if {some(within)} are the classes, name {root}/{one}" if len(within) > 1 else ""


def look_unlabeled(files: Files, uri: str) -> pa.Table:
    """All pictures below a folder, in any folders, sorted by path.

    Returns:
        A table with the columns path, size and modified of `Found.table`.

    Raises:
        UserError: if there are none.
    """
    if not files.pictures:
        others = f", only other files, e.g. {files.ignored[0]}" if files.ignored else ""
        raise UserError(f"--data {redact(uri)} has no pictures{others}")
    return unlabeled_table(files.pictures)


def unlabeled_table(files: Iterable[Entry]) -> pa.Table:
    """The table of `look_unlabeled` with these pictures."""
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
    named = {one: [name for name in sorted(top) if role(name) == one] for one in ("train", "valid", "test")}
    train, flat = named["train"], any(top[name].pictures for name in named["train"])
    unlabeled = [name for name in named["test"] if not top[name].folders and not flat]
    held_back = named["valid"] or [name for name in named["test"] if name not in unlabeled]
    if not held_back and (flat or len(top) > len(train) + len(unlabeled)):
        return {}  # `train` may be a class: of vehicles
    parts = dict.fromkeys(train, TRAIN_PART if held_back else NO_PART)
    return parts | dict.fromkeys(held_back, VALID_PART) if train else {}


@dataclass(frozen=True)
class Files:
    """What is below a folder, without litter and results of this program.

    Attributes:
        pictures: files with names of pictures.
        folders: paths.
        ignored: paths of other files.
    """

    pictures: list[Entry]
    folders: set[str]
    ignored: list[str]


def is_litter(path: str) -> bool:
    """Return whether a file is what systems and tools leave behind, or hidden, or lies in such a folder."""
    *above, name = path.split("/")
    return _litter_of(above) is not None or name.startswith(".") or name.lower() in _LITTER_FILES


def _litter_of(folders: list[str]) -> int | None:
    return next((i for i, one in enumerate(folders) if one in _LITTER or one.startswith(".")), None)


def list_files(uri: str) -> Files:
    """List what is below a folder.

    Raises:
        UserError: if the folder can't be read, or all pictures have formats that are not read here.
    """
    files: list[Entry] = []
    folders: set[str] = set()
    ignored: list[str] = []
    passed_over: set[str] = set()
    manifests: list[str] = []
    unread = Counter[str]()
    for entry in storage.list_entries(uri, "--data"):
        *above, name = entry.path.split("/")
        within = [*above, name] if entry.is_folder else above
        litter = _litter_of(within)
        if litter is not None:
            passed_over.add("/".join(within[: litter + 1]))
        elif entry.is_folder:
            folders.add(entry.path)
        elif name.startswith(".") or name.lower() in _LITTER_FILES:
            pass
        elif is_read(name):
            files.append(entry)
        elif format_by_name(name):
            unread[format_by_name(name)] += 1
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
        logger.info("data       passed over: %s", some({*passed_over, *results}))
    ignored = [path for path in ignored if path.rpartition("/")[0] not in results]
    return Files(files, folders - results, ignored)


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
    """Check that the folders directly below `--data` may be classes.

    Raises:
        UserError: if they look like splits.
    """
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


def _place(path: str, parts: Mapping[str, int]) -> tuple[str, list[str]]:
    """The prefix among `parts` that `path` lies in, and the names below it; none outside of all prefixes."""
    for prefix in parts:
        if not prefix or path.startswith(f"{prefix}/"):
            return prefix, path[len(prefix) :].lstrip("/").split("/")
    return "", []
