"""The pictures that `--data` of a prediction names: folders, files, patterns, and lists of all of these."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
from pyarrow import fs as arrow

from cvdist import storage
from cvdist.config import PathsConfig, PicturesConfig
from cvdist.data.contents import file_of
from cvdist.data.formats import is_read
from cvdist.data.forms import archives, look_unlabeled, root_of, unlabeled_table
from cvdist.data.forms.table import is_table, require_unused
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.storage import Folder

_LISTS = (".txt", ".lst")  # files that name pictures, one a line
_REQUESTS = 32  # requests to the storage at a time
_NAMED = 3  # up to this many names are listed in full


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
    if len(words) == 1 and (is_table(words[0]) or archives.are_named(words[0])):
        root = root_of(PicturesConfig(uri=words[0], root=given.root))
        return NamedPictures(root, look_unlabeled(words[0], given), True, _in_one_line(typed))
    if tables := [word for word in words if is_table(word) and not archives.are_named(word)]:
        raise UserError(f"--data {redact(tables[0])} is a table of pictures: name it alone")
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
            infos = list(pool.map(filesystem.get_file_info, [f"{top}{key}" for key in keys]))
        if len(words) == 1 and infos[0].type == arrow.FileType.Directory:
            return NamedPictures(words[0], look_unlabeled(words[0]), True, _in_one_line(typed))
        for word, key, info in zip(words, keys, infos, strict=True):
            if archives.are_named(word):
                found |= _below(word)
                continue
            matches = {info.path: storage.state_of(info)}
            if info.type == arrow.FileType.NotFound:
                matches = dict(storage.match(filesystem, top, PurePosixPath(key).parts[1:], is_read))
            if not matches:
                raise UserError(
                    f"--data {redact(word)} can't be read (there is no such file, folder or bucket)"
                )
            for whole, state in matches.items():
                path = whole.removeprefix(top)
                found |= {path: state} if state is not None else _below(f"{head}{path}{tail}")
    except OSError as error:
        raise UserError(f"--data {redact(words[0])} can't be read ({storage.reason(error)})") from error
    root = os.path.commonpath([str(PurePosixPath(file_of(path)).parent) for path in found])
    files = {str(PurePosixPath(path).relative_to(root)): state for path, state in found.items()}
    return NamedPictures(f"{head}{root}{tail}", unlabeled_table(files), False, _in_one_line(typed))


def _below(uri: str) -> dict[str, tuple[int, int]]:
    """Return size and time of the last change of each picture in a folder or an archive, by absolute path."""
    path = storage.split(root_of(PicturesConfig(uri=uri)))[1].rstrip("/")
    below = look_unlabeled(uri)
    states = zip(*(below[name].to_pylist() for name in ("path", "size", "modified")), strict=True)
    return {f"{path}/{name}": (size, modified) for name, size, modified in states}


def _lines(word: str) -> Iterator[str]:
    """Yield the lines of the list of pictures that `word` names, or `word` itself if it is no list."""
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


def _in_one_line(words: Sequence[str]) -> str:
    """Format what the user named; very many words become the first word and a digest of all."""
    if len(words) <= _NAMED:
        return redact(" ".join(words))
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
    return redact(f"{words[0]} and {len(words) - 1:,} others ({digest})")
