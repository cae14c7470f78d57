"""The pictures that `--data` of a prediction names: folders, files, patterns, and lists of all of these."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as arrow

from cvdist import storage
from cvdist.config import PathsConfig, PicturesConfig
from cvdist.data.formats import is_read
from cvdist.data.forms import look_unlabeled, root_of, unlabeled_table
from cvdist.data.forms.table import is_table, require_unused
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.storage import Folder

_LISTS = (".txt", ".lst")  # files that name pictures, one a line
_SIGNS = "*?["  # of patterns
_REQUESTS = 32  # at a time
_NAMED = 3  # words that are repeated in full


@dataclass(frozen=True)
class NamedPictures:
    """The pictures of a prediction.

    Attributes:
        root: Folder or URI that their paths are relative to.
        table: One row per picture, sorted by path, as `forms.look_unlabeled` makes it.
        whole: Whether they are all pictures of one folder or table, which the user named.
        words: What the user named, in one line, without credentials.
    """

    root: str
    table: pa.Table
    whole: bool
    words: str


def find_pictures(named: str | Sequence[str], given: PathsConfig | None = None) -> NamedPictures:
    """Find the pictures that the user names.

    Args:
        named: Folders, of which all pictures are taken; files; patterns with `*`, `?`, `[...]` and `**`; lists
            of these, one a line, in a `.txt` file or, as `-`, from standard input; or one table. Paths or
            URIs of one place.
        given: How the table is read, where it isn't found out.

    Raises:
        UserError: If one of them does not exist or can't be read, or they are in several places.
    """
    named, given = [named] if isinstance(named, str) else named, given or PathsConfig()
    typed = [word if word == "-" else storage.absolute(word) for word in named]
    words = list(dict.fromkeys(one for word in typed for one in _lines(word)))
    if tables := [word for word in words if is_table(word)]:
        if len(words) > 1:
            raise UserError(f"--data {redact(tables[0])} is a table of pictures: name it alone")
        root = root_of(PicturesConfig(uri=tables[0], root=given.root))
        return NamedPictures(root, look_unlabeled(tables[0], given), True, _in_one_line(typed))
    require_unused(typed[0], given)
    split = [storage.split(word) for word in words]
    places = {(head, tail): redact(head) or "this machine" for head, _, tail in split}
    if not places:
        raise UserError(f"--data {_in_one_line(typed)}: the list is empty")
    if len(places) > 1:
        raise UserError(f"--data: name the pictures of one place, not of {' and '.join(places.values())}")
    head, _, tail = split[0]
    filesystem, top = storage.locate(f"{head}/{tail}", "--data")
    top = top.rstrip("/")
    found: dict[str, tuple[int, int]] = {}  # size and time of the last change
    try:
        with ThreadPoolExecutor(_REQUESTS) as pool:
            keys = [key for _, key, _ in split]
            infos = list(pool.map(filesystem.get_file_info, [f"{top.rstrip('/')}{key}" for key in keys]))
        if len(words) == 1 and infos[0].type == arrow.FileType.Directory:
            return NamedPictures(words[0], look_unlabeled(words[0]), True, _in_one_line(typed))
        for word, key, info in zip(words, keys, infos, strict=True):
            matches = {info.path: _state(info)}
            if info.type == arrow.FileType.NotFound:
                matches = dict(_matches(filesystem, top, PurePosixPath(key).parts[1:]))
            if not matches:
                raise UserError(
                    f"--data {redact(word)} can't be read (there is no such file, folder or bucket)"
                )
            for whole, state in matches.items():
                path = whole.removeprefix(top)
                if state is not None:
                    found[path] = state
                    continue
                below = look_unlabeled(f"{head}{path}{tail}")
                states = zip(*(below[name].to_pylist() for name in ("path", "size", "modified")), strict=True)
                found |= {f"{path}/{name}": (size, modified) for name, size, modified in states}
    except OSError as error:
        raise UserError(f"--data {redact(words[0])} can't be read ({storage.reason(error)})") from error
    root = os.path.commonpath([str(PurePosixPath(path).parent) for path in found])
    files = {str(PurePosixPath(path).relative_to(root)): state for path, state in found.items()}
    return NamedPictures(f"{head}{root}{tail}", unlabeled_table(files), False, _in_one_line(typed))


def _lines(word: str) -> Iterator[str]:
    """The words of a list, or `word` itself."""
    if word != "-" and PurePosixPath(word).suffix.lower() not in _LISTS:
        yield word
        return
    if word == "-":
        content = sys.stdin.buffer.read()
    else:
        folder, _, name = word.rpartition("/")
        content = Folder.open(folder or "/", "--data").read(name)
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--data {redact(word)} is no list of pictures: its lines are not text") from error
    yield from (storage.absolute(line.strip()) for line in lines if line.strip())


_State = tuple[int, int] | None  # of a file: size, and time of the last change; None of a folder


def _state(info: arrow.FileInfo) -> _State:
    return None if info.type == arrow.FileType.Directory else (info.size or 0, info.mtime_ns or 0)


def _matches(filesystem: arrow.FileSystem, folder: str, parts: Sequence[str]) -> Iterator[tuple[str, _State]]:
    """The folders, and the files with names of pictures, below `folder` that the parts of a pattern match."""
    first, *rest = parts
    if not any(sign in part for part in parts for sign in _SIGNS):
        info = filesystem.get_file_info("/".join([folder, *parts]))
        yield from [(info.path, _state(info))] if info.type != arrow.FileType.NotFound else []
        return
    if not any(sign in first for sign in _SIGNS):
        yield from _matches(filesystem, f"{folder}/{first}", rest)
        return
    if first == "**":
        if filesystem.get_file_info(folder).type == arrow.FileType.Directory:
            for batch in storage.walk(filesystem, folder):
                for one in batch.filter(pc.invert(batch["is_folder"])).to_pylist():
                    path = one["path"].split("/")
                    hidden = any(part.startswith(".") for part in path)
                    if is_read(path[-1]) and not hidden and _lies_in(path, [*parts]):
                        yield f"{folder}/{one['path']}", (one["size"], one["modified"])
        return
    selector = arrow.FileSelector(folder, allow_not_found=True)
    listed = [info for info in filesystem.get_file_info(selector) if not info.base_name.startswith(".")]
    for info in listed:
        if info.type != arrow.FileType.Directory:
            continue
        if fnmatchcase(info.base_name, first):
            yield from _matches(filesystem, info.path, rest) if rest else [(info.path, None)]
    for info in listed if not rest else ():
        if fnmatchcase(info.base_name, first) and is_read(info.base_name):
            yield info.path, _state(info)


def _lies_in(path: list[str], pattern: list[str]) -> bool:
    """Whether a pattern with `**`, which is any number of folders, matches `path` or a folder above it."""
    if not pattern:
        return True
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        return any(_lies_in(path[start:], rest) for start in range(len(path)))
    return bool(path) and fnmatchcase(path[0], first) and _lies_in(path[1:], rest)


def _in_one_line(words: Sequence[str]) -> str:
    """What the user named; of very many words the first one, and a digest that tells the others apart."""
    if len(words) <= _NAMED:
        return redact(" ".join(words))
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
    return redact(f"{words[0]} and {len(words) - 1:,} others ({digest})")
