"""Finds the tars and Parquet files that `--data` names, which hold many pictures each, and reads each once."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as arrow

from cvdist import log, storage
from cvdist.data import kept
from cvdist.data.contents import Contents, archive_kind
from cvdist.data.forms.files import ARCHIVES, list_files
from cvdist.data.forms.found import NO_PART, Found, parts_of, role_in
from cvdist.errors import UserError
from cvdist.hardware import usable_cores
from cvdist.log import redact, some

logger = logging.getLogger(__name__)

_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_SIGN = re.compile(rf"[*?]|{_BRACES.pattern}")
_MOST_NAMES = 1_000_000  # of a pattern with braces
_REQUESTS = 32  # at a time
_READERS = 8  # archives that are read side by side where they are not on a disk here
_FORMAT = 1  # version of what is kept about an archive
_FACTS = b"facts"
_PROGRESS_SECONDS = 0.2
REPACK = "unpack it, or pack it again without compression"
"""What to do about a compressed tar."""


def are_named(uri: str) -> bool:
    """Return whether `uri` names tars or Parquet files, a single one or a pattern, rather than a folder."""
    return _is_one(storage.split(uri)[1])


def _is_one(name: str) -> bool:
    return bool(re.search(ARCHIVES, name))


def root_of(uri: str) -> str:
    """Return the folder of the archives that `uri` names: all before the special characters of a pattern."""
    head, above, _, tail = _cut(uri)
    return f"{head}{above or ('' if head else '/')}{tail}"


def find(uri: str) -> list[str]:
    """Find the archives that a name or a pattern with `*`, `?`, `{000..099}` and `{train,val}` means.

    Returns:
        Their paths below `root_of`, in natural order.

    Raises:
        UserError: if one that is named, alone or in a range, is missing or can't be read.
    """
    root, names = root_of(uri), expand(_cut(uri)[2])
    filesystem, top = storage.locate(root, "--data")
    top = top.rstrip("/")

    def look(name: str) -> list[str]:
        if "*" in name or "?" in name:
            there = list(storage.match(filesystem, top, name.split("/"), _is_one))
        else:
            info = filesystem.get_file_info(f"{top}/{name}")
            there = [(info.path, storage.state_of(info))] if info.type != arrow.FileType.NotFound else []
        found = [path.removeprefix(f"{top}/") for path, state in there if state is not None]
        for folder in (path.removeprefix(f"{top}/") for path, state in there if state is None):
            # as Spark writes `pictures.parquet/part-00000.parquet`
            found += [f"{folder}/{path}" for path in list_files(storage.joined(root, folder)).archives]
        return found

    try:
        with ThreadPoolExecutor(_REQUESTS) as pool:
            found = list(pool.map(look, names))
    except OSError as error:
        raise UserError(f"--data {redact(uri)} can't be read ({storage.reason(error)})") from error
    missing = [name for name, paths in zip(names, found, strict=True) if not paths]
    if len(missing) == len(names):
        raise UserError(f"--data {redact(uri)} can't be read (there is no such file)")
    if missing:
        raise UserError(
            f"--data {redact(uri)}: {len(missing):,} of {len(names):,} files are missing: {some(missing)}"
        )
    return sorted({path for paths in found for path in paths}, key=log.natural)


def expand(text: str) -> list[str]:
    """Return the names that a pattern with braces stands for, such as `{08..10}` and `{train,val}` in bash.

    Raises:
        UserError: if there are too many.
    """
    pieces, count = [], 1
    for i, piece in enumerate(_BRACES.split(text)):
        pieces.append(_alternatives(piece) if i % 2 else [piece])
        count *= len(pieces[-1])
        if count > _MOST_NAMES:
            raise UserError(f"--data {redact(text)} means more than {_MOST_NAMES:,} names")
    return ["".join(one) for one in product(*pieces)]


def _alternatives(inside: str) -> Sequence[str]:
    found = _RANGE.fullmatch(inside)
    if found is None:
        return inside.split(",")
    first, last = (int(found[i]) for i in (1, 2))
    step = abs(int(found[3] or 1)) or 1
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    padded = any(re.match("-?0[0-9]", found[i]) for i in (1, 2))
    width = max(len(found[1]), len(found[2])) if padded else 0
    return [f"{number:0{width}}" for number in numbers[: _MOST_NAMES + 1]]


def _cut(uri: str) -> tuple[str, str, str, str]:
    """Cut a URI into its place, the folder of the archives, their names or pattern there, and its options."""
    head, path, tail = storage.split(uri)
    sign = _SIGN.search(path)
    above = path[: sign.start() if sign else len(path)].rpartition("/")[0]
    return head, above, path[len(above) :].lstrip("/"), tail


def one_kind(paths: Sequence[str], uri: str) -> str:
    """Return which kind of archive all of some files are, TAR or PARQUET.

    Raises:
        UserError: if they are of several kinds, or compressed.
    """
    if compressed := [path for path in paths if not archive_kind(path)]:
        raise UserError(
            f"--data {redact(uri)}: {compressed[0]} is compressed, which can't be read in parts: {REPACK}"
        )
    kinds = {archive_kind(path): path for path in paths}
    if len(kinds) > 1:
        raise UserError(
            f"--data {redact(uri)} holds {' and '.join(sorted(kinds.values()))}: name those of one kind"
        )
    return next(iter(kinds))


@dataclass(frozen=True)
class Archive:
    """The content of a tar or a Parquet file.

    Attributes:
        path: path of the file below the root.
        pictures: one row each, with the columns path (what follows the file's path), size (bytes), version
            (digest in hexadecimal), and others that the form adds.
        modified: time when the file was written, in ns since 1970.
        facts: what else the form has found, as JSON values.
    """

    path: str
    pictures: pa.Table
    modified: int
    facts: Mapping[str, Any]

    def as_found(self, role: str = "") -> pa.Table:
        """Return the pictures with paths below the root, and with the columns modified and split (the role)."""
        table, count = self.pictures.replace_schema_metadata(), len(self.pictures)
        table = table.set_column(0, "path", pc.binary_join_element_wise(self.path, table["path"], ""))
        table = table.append_column("modified", pa.array([self.modified] * count, pa.int64()))
        return table.append_column("split", pa.array([role] * count, pa.string()))


UNLABELED = ["path", "size", "modified", "version"]
"""Columns of `Found.table` without those of labels and splits."""


Scan = Callable[[pa.NativeFile, Callable[[int], None]], tuple[pa.Table, dict[str, Any]]]
"""Reads an archive once, and tells its second argument how many bytes it has read."""


def scanned(paths: Sequence[str], root: str, uri: str, cache: Path, scan: Scan) -> list[Archive]:
    """Read archives side by side, except for unchanged ones that this node has read before.

    Args:
        paths: paths of the archives below `root`.
        root: folder or URI.
        uri: what the user named, for messages.
        cache: the node's cache folder.
        scan: reads one archive.

    Raises:
        UserError: if one can't be read, or `scan` raises it.
    """
    contents, now, read = Contents(root), time.time_ns(), dict.fromkeys(paths, 0)

    def archive(path: str) -> Archive:
        named = f"{root.rstrip('/')}/{path}"
        try:
            with contents.open(path) as source:
                changed, etag = contents.changed(path), storage.etag_of(source)
                state = f"{_FORMAT} {scan.__module__} {source.size()} {etag or changed}"
                table = kept.load(cache, named, state)
                if table is None:
                    table, facts = scan(source, lambda size: read.__setitem__(path, size))
                    table = table.replace_schema_metadata({_FACTS: json.dumps(facts)})
                    if changed < now - kept.UNSETTLED:
                        kept.keep(cache, named, table, state)
        except UserError as error:
            raise UserError(f"--data {redact(uri)}: {path} {error}") from error
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"--data {redact(uri)}: {path} can't be read ({storage.reason(error)})") from error
        return Archive(path, table, changed, json.loads(table.schema.metadata[_FACTS]))

    line = log.ProgressLine(logger, enabled=True)
    with ThreadPoolExecutor(usable_cores() if contents.local else _READERS) as pool:
        futures = [pool.submit(archive, path) for path in paths]
        try:
            while waiting := wait(futures, _PROGRESS_SECONDS, FIRST_EXCEPTION).not_done:
                for future in futures:
                    if future.done():
                        future.result()
                if line.due():
                    megabytes, done = sum(read.values()) / 1e6, len(futures) - len(waiting)
                    line.show(f"reading {len(futures):,} archives once: {done:,} done, {megabytes:,.0f} MB")
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            line.clear()


def roles_of(paths: Sequence[str], uri: str) -> dict[str, str]:
    """Return the split of each archive, by its name or, if that says nothing, by the names of its folders.

    Args:
        paths: paths of the archives.
        uri: what the user named, for messages.

    Returns:
        The roles by path, as `found.role` returns them; all empty if no two of them differ.

    Raises:
        UserError: if only some of the names tell a split.
    """
    roles = {
        path: next((role for part in reversed(path.split("/")) if (role := role_in(part))), "")
        for path in paths
    }
    examples = {role: path for path, role in reversed(roles.items())}
    if len(examples) < 2:
        return dict.fromkeys(paths, "")
    if "" in examples:
        (role, other), *_ = ((role, path) for role, path in examples.items() if role)
        raise UserError(
            f"--data {redact(uri)}: {other} is of the split {role} by its name, and {examples['']} of none: "
            "name those that you mean"
        )
    return roles


def by_splits(table: pa.Table, uri: str) -> Found:
    """Return the labeled pictures of archives, whose names may tell their splits.

    Args:
        table: the columns of `Found.table`; split has the roles that `roles_of` returned.
        uri: what the user named, for messages.

    Raises:
        UserError: if there are several splits and none to train on.
    """
    roles = table.column("split").unique().to_pylist()
    if len(roles) < 2:
        return Found(table, dict.fromkeys(roles, NO_PART) or {"": NO_PART})
    if "train" not in roles:
        raise UserError(f"--data {redact(uri)} has {some(roles)} but no train: name the files of one of them")
    parts = parts_of(roles)
    if "test" in parts:
        logger.info("data       no split valid: validated on test")
    inside = pc.is_in(table.column("split"), value_set=pa.array(list(parts)))
    if left := len(table) - pc.sum(inside).as_py():
        logger.info("data       %s pictures of %s are left out", f"{left:,}", some(set(roles) - set(parts)))
    return Found(table.filter(inside), parts)
