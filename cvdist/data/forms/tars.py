"""Finds pictures in tars: by WebDataset's rule, with labels in files beside them, or in folders of classes.

Files of a sample share their path up to the first dot of the name: `7.jpg` and `7.cls` belong to sample `7`.
If no picture has a label beside it, the folders within the tars say the class, by the rules of `folders`.
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cvdist.data.contents import archive_kind, digest_of
from cvdist.data.formats import format_by_name, is_read, unread_formats
from cvdist.data.forms import folders
from cvdist.data.forms.archives import REPACK, UNLABELED, Archive, by_splits, roles_of, scanned
from cvdist.data.forms.files import is_litter
from cvdist.data.forms.found import Found
from cvdist.errors import UserError
from cvdist.log import redact, some

logger = logging.getLogger(__name__)

# Files that may hold a label. The first one that exists counts, because many `.txt` files are captions.
_SOURCES = ("cls", "json", "txt")
_JSON_KEYS = ("label", "class", "class_name", "classname", "label_name", "cls", "category")
_LONGEST_LABEL = 1 << 20  # bytes of a file with one
_LONGEST_NAME = 200  # characters of a class
_BUFFER = 1 << 23  # bytes of a request
_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("version", pa.string()),
        ("name", pa.string()),
        ("alone", pa.bool_()),
        *((source, pa.string()) for source in _SOURCES),
    ]
)


def look(paths: Sequence[str], root: str, uri: str, cache: Path, max_bad_fraction: float) -> Found:
    """Find the labeled pictures of tars.

    Args:
        paths: paths of the tars below `root`.
        root: folder or URI.
        uri: what the user named, for messages.
        cache: the node's cache folder.
        max_bad_fraction: largest part of the pictures that may be bad; 0: damaged tars are refused.

    Raises:
        UserError: if one can't be read or has no whole picture, or the labels can't be found.
    """
    archives = _read(paths, root, uri, cache, refuse_damage=max_bad_fraction == 0)
    roles = roles_of(paths, uri)
    pictures = pa.concat_tables([archive.as_found(roles[archive.path]) for archive in archives])
    source = next((one for one in _SOURCES if pictures.column(one).null_count < len(pictures)), "")
    shared = pictures.filter(pc.invert(pictures.column("alone"))).column("name")
    if len(shared) == len(pictures) and any(archive.facts["labels"] for archive in archives):
        one, other = shared[:2].to_pylist()
        raise UserError(
            f"--data {redact(uri)}: no picture has a label of its own: files are of one sample whose names are "
            f"the same up to the first dot, as {one} and {other}: pack them with other names"
        )
    if not source:
        return _by_folders(pictures, uri)
    left = Counter[str]()
    for archive in archives:
        left.update({"labels without a picture": archive.facts["orphans"].get(source, 0)})
    label, alone = pictures.column(source), pictures.column("alone")
    left["pictures that share their key with another one"] = pc.sum(pc.invert(alone)).as_py()
    left["pictures without a label"] = pc.sum(pc.and_(alone, pc.is_null(label))).as_py()
    keys = some({key for archive in archives for key in archive.facts["json_keys"]})
    logger.info("data       labels from .%s files%s", source, f" ({keys})" if source == "json" else "")
    if any(left.values()):
        logger.warning(
            "data       left out: %s", ", ".join(f"{what}: {count:,}" for what, count in left.items() if count)
        )
    table = pictures.append_column("label", label).filter(pc.and_(alone, pc.is_valid(label)))
    return by_splits(table.select([*UNLABELED, "label", "split"]), uri)


def look_unlabeled(paths: Sequence[str], root: str, uri: str, cache: Path) -> pa.Table:
    """Find all pictures of tars, with the same arguments and errors as `look`.

    Returns:
        The columns path, size, modified and version of `Found.table`.
    """
    archives = _read(paths, root, uri, cache, refuse_damage=False)
    return pa.concat_tables([archive.as_found().select(UNLABELED) for archive in archives])


def _read(paths: Sequence[str], root: str, uri: str, cache: Path, *, refuse_damage: bool) -> list[Archive]:
    """Read the tars. Log what is wrong with them, or refuse them."""
    archives = scanned(paths, root, uri, cache, _scan)
    where = f"--data {redact(uri)}"
    unread, links = Counter[str](), 0
    for archive in archives:
        facts, whole = archive.facts, len(archive.pictures) - archive.facts["cut"]
        if facts["damage"] and (refuse_damage or not whole):
            why = "it has no whole picture" if not whole else "--max-bad-fraction is 0"
            raise UserError(f"{where}: {archive.path} {facts['damage']}, and {why}: fetch or pack it again")
        if facts["damage"]:
            logger.warning(
                "data       %s %s: its %s whole pictures are used, how many are missing can't be known",
                archive.path,
                facts["damage"],
                f"{whole:,}",
            )
        unread.update(facts["unread"])
        links += facts["links"]
    example = archives[0].facts["example"]
    if not any(len(archive.pictures) for archive in archives):
        if unread:
            raise UserError(f"{where} has no pictures that can be read: {unread_formats(unread)}")
        hint = ": it holds tars, unpack them" if archive_kind(example) else ""
        hint = ": links, which lead out of it; pack what they lead to (tar --dereference)" if links else hint
        raise UserError(
            f"{where} has no pictures{f', only other files, e.g. {example}' if example else ''}{hint}"
        )
    if unread:
        logger.warning("data       left out: %s", unread_formats(unread))
    if links:
        logger.warning("data       left out: %s links within tars (pack with tar --dereference)", f"{links:,}")
    return archives


def _by_folders(pictures: pa.Table, uri: str) -> Found:
    """Return the pictures with their classes and splits, which the folders within the tars tell.

    A tar's own role counts as a folder around its members. Folders that hold all classes are left out.
    """
    names, roles = pictures.column("name").to_pylist(), pictures.column("split").to_pylist()
    if not any("/" in name for name in names):
        raise UserError(
            f"--data {redact(uri)} has no labels: no .cls, .json or .txt file beside a picture such as "
            f"{names[0]}, and no folders for the classes within the tars"
        )
    inside: defaultdict[str, list[str]] = defaultdict(list)
    for name, role in zip(names, roles, strict=True):
        inside[role].append(name)
    around = {role: _around(mine) for role, mine in inside.items()}
    placed = [f"{role}/{name[around[role] :]}".lstrip("/") for name, role in zip(names, roles, strict=True)]
    found = folders.by_folders(pa.table({"path": placed, "row": range(len(placed))}), set(), redact(uri))
    table = pictures.select(UNLABELED).take(found.table.column("row"))
    for name in ("label", "split"):
        table = table.append_column(name, found.table.column(name))
    return Found(table, found.parts, found.hint)


def _around(names: Sequence[str]) -> int:
    """Return the length of the path of the innermost folder that holds all files in folders of their own."""
    shared = posixpath.commonpath([min(names), max(names)])
    while shared and not all("/" in name[len(shared) + 1 :] for name in names):
        shared = shared.rpartition("/")[0]
    return len(shared) + 1 if shared else 0


# ------------------------------------------------------------------------------------------------- one tar


@dataclass
class _Sample:
    """The files of one sample: rows of its pictures, and its labels by the kind of file that holds them."""

    rows: list[int] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)


def _scan(source: pa.NativeFile, advance: Callable[[int], None]) -> tuple[pa.Table, dict[str, Any]]:
    """Read a tar once, from its start to its end (`archives.Scan`)."""
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    samples: defaultdict[str, _Sample] = defaultdict(_Sample)
    facts: dict[str, Any] = {"damage": "", "cut": 0, "links": 0, "example": ""}
    unread, json_keys = Counter[str](), set[str]()
    file, size = BufferedReader(source, _BUFFER), source.size()
    for member in _members(file, facts):
        # A picture is found by its place, so a name that is no UTF-8 need not be exact.
        name = member.name.encode(errors="surrogateescape").decode(errors="replace")
        name = re.sub(r"^(\.\./|/)+", "", posixpath.normpath(name))
        if is_litter(name) or member.isdir():
            continue
        facts["links"] += is_read(name) and (member.issym() or member.islnk())
        facts["example"] = facts["example"] or name
        if not member.isreg() or member.issparse():
            continue
        key, extension = _key(name)
        if is_read(name):
            content = _at(file, member.offset_data, min(member.size, size - member.offset_data))
            facts["cut"] += len(content) < member.size
            samples[key].rows.append(len(columns["name"]))
            columns["path"].append(f"@{member.offset_data}+{member.size}/{name}")
            columns["size"].append(member.size)
            columns["version"].append(digest_of(content).hex())
            columns["name"].append(name)
            advance(member.offset_data + member.size)
        elif extension in _SOURCES and member.size <= _LONGEST_LABEL:
            content = _at(file, member.offset_data, member.size)
            label = _label(content, extension, json_keys) if len(content) == member.size else ""
            if label:
                samples[key].labels[extension] = label
        elif format_by_name(name):
            unread[format_by_name(name)] += 1
    orphans = Counter(one for sample in samples.values() if not sample.rows for one in sample.labels)
    columns["alone"] = [False] * len(columns["name"])
    for name in _SOURCES:
        columns[name] = [None] * len(columns["name"])
    for sample in samples.values():
        rows = sample.rows
        if len(rows) > 1:  # such as 7.jpg, 7.seg.png
            rows = [row for row in rows if "." not in _key(columns["name"][row])[1]]
        for row in rows:
            columns["alone"][row] = len(rows) == 1
            for source_of_label, label in sample.labels.items():
                columns[source_of_label][row] = label
    labels = sum(len(sample.labels) for sample in samples.values())
    facts |= {"unread": unread, "json_keys": sorted(json_keys), "orphans": orphans, "labels": labels}
    return pa.table(columns, _SCHEMA), facts


def _members(file: BufferedReader, facts: dict[str, Any]) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, also behind damaged ones. Notes in `facts` where it is damaged or cut."""
    size, start, end, broken = file.seek(0, 2), _at(file, 0), 0, False
    packed = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), "")
    if packed:
        raise UserError(f"is compressed ({packed}), which can't be read in parts: {REPACK}")
    if len(start) == _BLOCK and start.strip(b"\0") and not _is_header(start):
        raise UserError("is no tar")
    try:
        file.seek(0)
        # It goes on behind blocks that are no headers: after damage, or where tars were put behind one another.
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
            while (member := tar.next()) is not None:
                if member.offset < end or member.size < 0:
                    raise ValueError("a member that begins or ends before its place")
                if member.offset > end and not facts["damage"] and not _is_padding(_at(file, end)):
                    facts["damage"] = f"is damaged at byte {end:,}"
                yield member
                end = tar.offset
                tar.members.clear()  # type: ignore[attr-defined]  # or they would all stay in memory
    except (tarfile.TarError, ValueError, OverflowError):
        broken = True
    ending = _at(file, end)
    if len(ending) < _BLOCK:
        facts["damage"] = f"is cut at byte {size:,}"
    elif broken or not _is_padding(ending):
        facts["damage"] = facts["damage"] or f"is damaged at byte {end:,}"


def _is_padding(block: bytes) -> bool:
    """Return whether a block between members is harmless: zeros, or the global header of `git archive`."""
    return not block.strip(b"\0") or (_is_header(block) and block[156:157] == b"g")


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _at(file: BufferedReader, start: int, size: int = _BLOCK) -> bytes:
    file.seek(start)
    return file.read(max(0, size))


def _key(name: str) -> tuple[str, str]:
    """Return the sample that a file belongs to, and what follows the first dot of its name."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _label(content: bytes, source: str, json_keys: set[str]) -> str:
    """Return the label that a file holds; empty if it holds none."""
    try:
        text = content.decode("utf-8-sig").strip()
        found: object = text
        if source == "json":
            values = json.loads(text)
            named = next((key for key in _JSON_KEYS if _is_label(values.get(key))), "")
            found = values[named] if named else ""
            json_keys |= {named} if named else set()
    except (ValueError, AttributeError, RecursionError):
        return ""
    label = str(found).strip()
    return label if len(label) <= _LONGEST_NAME and len(label.splitlines()) == 1 else ""


def _is_label(value: object) -> bool:
    return (isinstance(value, str) and bool(value.strip())) or (
        isinstance(value, int) and not isinstance(value, bool)
    )
