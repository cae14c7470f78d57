"""Lists the pictures below a folder, at any depth, without what systems, tools and jobs leave there.

There may be millions of files, so they are columns, and decisions are made once for each folder and suffix.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from cvdist import log, storage
from cvdist.data.formats import format_by_name, is_read, unread_formats
from cvdist.errors import UserError
from cvdist.log import redact, some

logger = logging.getLogger(__name__)

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")  # suffixes of files that may name pictures
ARCHIVES = r"(?i)\.(tar|parquet|tar\.\w+|tgz|tbz2?|txz|tzst)$"
"""Names of tars, compressed or not, and Parquet files, which may hold pictures."""
# What systems and tools leave behind, besides hidden files.
_LITTER = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
_LITTER_FILES = ["thumbs.db", "desktop.ini"]
_RESULTS = "manifest.json"  # of a feature cache or of predictions
_PICTURES = pa.schema([("path", pa.string()), ("size", pa.int64()), ("modified", pa.int64())])


@dataclass
class Files:
    """The content of a folder. All paths are relative to the folder.

    Attributes:
        pictures: sorted by path, with the columns path, size (bytes) and modified (ns since 1970).
        folders: paths of the folders, also of empty ones where the storage has such.
        others: number of files that are no pictures by their names.
        example: path of one of these files.
        tables: paths of those files that may be tables of pictures.
        archives: paths of those files that may hold pictures, or are compressed tars.
    """

    pictures: pa.Table
    folders: set[str] = field(default_factory=set)
    others: int = 0
    example: str = ""
    tables: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)


def parents_of(paths: pa.Array | pa.ChunkedArray) -> pa.DictionaryArray:
    """Return the folder of each file; empty for the folder that was listed."""
    parents = pc.replace_substring_regex(paths, "(?s)/?[^/]*$", "")
    return (parents.combine_chunks() if isinstance(parents, pa.ChunkedArray) else parents).dictionary_encode()


def list_files(uri: str) -> Files:
    """List what lies below the folder `uri`.

    Raises:
        UserError: if the folder can't be read, or all pictures have formats that are not read here.
    """
    found = Files(_PICTURES.empty_table())
    pictures, others = [], []
    unread: Counter[str] = Counter()
    line, began, seen = log.ProgressLine(logger, enabled=True), time.monotonic(), 0
    for batch in storage.list_entries(uri, "--data"):
        seen += len(batch)
        if line.due():
            line.show(f"listing {redact(uri)}: {seen:,} files, {log.duration(time.monotonic() - began)}")
        is_folder = batch["is_folder"]
        found.folders |= {path for path in batch["path"].filter(is_folder).to_pylist() if not _is_litter(path)}
        files = batch.filter(pc.invert(is_folder)).drop_columns(["is_folder"])
        files = files.filter(_is_kept(files["path"]))
        suffix = pc.extract_regex(files["path"], r"(?s)(?P<suffix>\.[^./]*)?$").field(0).dictionary_encode()
        names = [f"x{one}" for one in suffix.dictionary.to_pylist()]
        readable = pa.array([is_read(name) for name in names], pa.bool_()).take(suffix.indices)
        pictures.append(files.filter(readable))
        formats = pa.array([format_by_name(name) for name in names], pa.string()).take(suffix.indices)
        rest = pc.invert(readable)
        for one in formats.filter(pc.and_(rest, pc.not_equal(formats, ""))).value_counts().to_pylist():
            unread[one["values"]] += one["counts"]
        others.append(files["path"].filter(pc.and_(rest, pc.equal(formats, ""))))
    line.clear()
    found.pictures = pa.Table.from_batches(pictures, _PICTURES).sort_by("path")
    if unread and not len(found.pictures):
        raise UserError(f"--data {redact(uri)} has no pictures that can be read: {unread_formats(unread)}")
    if unread:
        logger.warning("data       left out: %s", unread_formats(unread))
    _sort_out(uri, found, pa.chunked_array(others, pa.string()))
    return found


def is_litter(path: str) -> bool:
    """Return whether a file, or a folder that it lies in, is hidden or left behind by systems and tools."""
    folder, _, name = path.rpartition("/")
    return _is_litter(folder) or name.startswith(".") or name.lower() in _LITTER_FILES


def _is_litter(folder: str) -> bool:
    return any(part in _LITTER or part.startswith(".") for part in folder.split("/")) if folder else False


def _is_kept(paths: pa.Array) -> pa.Array:
    """Return which files are neither hidden nor left behind by systems and tools."""
    parents = parents_of(paths)
    inside = pa.array([not _is_litter(one) for one in parents.dictionary.to_pylist()], pa.bool_())
    names = pc.ascii_lower(pc.extract_regex(paths, r"(?s)(?P<name>[^/]*)$").field(0))
    litter = pc.or_(pc.starts_with(names, "."), pc.is_in(names, value_set=pa.array(_LITTER_FILES)))
    return pc.and_(inside.take(parents.indices), pc.invert(litter))


def _sort_out(uri: str, found: Files, others: pa.ChunkedArray) -> None:
    """Note what the other files are, which are no pictures, and leave out the results of jobs."""
    manifests = others.filter(pc.match_substring_regex(others, rf"(?s)(^|/){_RESULTS}$")).to_pylist()
    results = _results_of_jobs(uri, manifests, found)
    if results:
        logger.info("data       passed over: %s", some(results))
        found.folders -= results
        parents = parents_of(others)
        inside = pa.array([one in results for one in parents.dictionary.to_pylist()], pa.bool_())
        others = others.filter(pc.invert(inside.take(parents.indices)))
    found.others, found.example = len(others), others[0].as_py() if len(others) else ""
    suffixes = "|".join(TABLES).replace(".", r"\.")
    found.archives = others.filter(pc.match_substring_regex(others, ARCHIVES)).to_pylist()
    found.tables = others.filter(pc.match_substring_regex(others, f"(?i)({suffixes})$")).to_pylist()


def _results_of_jobs(uri: str, manifests: list[str], found: Files) -> set[str]:
    """Return the folders without pictures that lie beside a manifest of this program."""
    results: set[str] = set()
    filesystem, root = storage.locate(uri, "--data")
    bases = [
        base
        for base in (path.removesuffix(_RESULTS) for path in manifests)
        if f"{base}receipts" in found.folders
    ]
    folders = parents_of(found.pictures["path"]).dictionary.to_pylist() if bases else []
    above = {str(one) for path in folders for one in (PurePosixPath(path), *PurePosixPath(path).parents)}
    for base in bases:
        try:
            kind = json.loads(storage.read(filesystem, f"{root}/{base}{_RESULTS}"))["format"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if str(kind).startswith("cvdist-"):
            results |= {one for one in found.folders if f"{one}/".startswith(base) and one not in above}
    return results


def look_unlabeled(found: Files, uri: str) -> pa.Table:
    """Return all pictures below the folder `uri`, sorted by path.

    Returns:
        A table with the columns path, size and modified of `Found.table`.

    Raises:
        UserError: if there are none.
    """
    if not len(found.pictures):
        others = f", only other files, e.g. {found.example}" if found.others else ""
        raise UserError(f"--data {redact(uri)} has no pictures{others}")
    return found.pictures


def unlabeled_table(files: Mapping[str, tuple[int, int]]) -> pa.Table:
    """Return a table as `look_unlabeled` does, from the size and time of change of each file by path."""
    rows = [dict(zip(_PICTURES.names, (path, *state), strict=True)) for path, state in sorted(files.items())]
    return pa.Table.from_pylist(rows, _PICTURES)
