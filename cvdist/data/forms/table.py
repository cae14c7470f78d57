"""Finds pictures that a CSV, JSON Lines or Parquet table names, by path, label and, optionally, split.

Fixed rules decide which column is which, and which file a row means. Where they don't decide, an error names
the flag that does.
"""

from __future__ import annotations

import codecs
import csv
import io
import logging
import os
import re
from collections import Counter, defaultdict
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
import pyarrow.json as arrow_json
from pyarrow import parquet

from cvdist import storage
from cvdist.config import PathsConfig, PicturesConfig, TableConfig, dashed, fields_of
from cvdist.data.formats import format_by_name
from cvdist.data.forms.columns import LabelColumns, label_columns, path_column, roles_of, split_column, text_of
from cvdist.data.forms.files import TABLES, list_files, parents_of
from cvdist.data.forms.found import NO_PART, Found, log_count, parts_of, role
from cvdist.data.forms.label_text import classes_in, label_for_people, labels_in, warn_of_several
from cvdist.data.forms.matching import match
from cvdist.errors import UserError
from cvdist.log import redact, some

logger = logging.getLogger(__name__)

_UNREAD = (".xlsx", ".xls", ".ods", ".json")
_SEPARATORS = ",;\t|"


def is_table(uri: str) -> bool:
    """Return whether `--data` names a table, by its suffix."""
    return storage.split(uri)[1].lower().endswith((*TABLES, *_UNREAD))


def root_of(uri: str, root: str) -> str:
    """Return the folder to which the paths in the table are relative; `root`: `--data-root`."""
    return root or storage.parent(uri)


def require_unused(uri: str, given: PathsConfig) -> None:
    """Refuse settings that are only for tables, if `--data` is no table.

    Raises:
        UserError: if there are any.
    """
    for one in fields_of(type(given)):
        if hasattr(TableConfig, one.field) and getattr(given, one.field):
            raise UserError(f"{dashed(one.flag)} is for tables, and --data {redact(uri)} is none: leave it out")


def look(config: PicturesConfig) -> Found:
    """Find the labeled pictures that a table names.

    Raises:
        UserError: if it can't be read, or can be understood in two ways.
    """
    name, table = redact(config.uri), _read(config.uri)
    paths = path_column(name, table, config)
    split = split_column(name, table, config, paths)
    label = label_columns(name, table, config, {paths, split})
    multilabel = label.one_a_class or label.lists or bool(config.label_separator)
    labels = labels_in(name, table, label, config.label_separator)
    rows = pa.table({"name": text_of(name, table, paths), "label": labels})
    parts = {"": NO_PART}
    if split:
        roles = roles_of(name, split, text_of(name, table, split))
        there = roles.unique().to_pylist()
        if "train" not in there:
            raise UserError(f"--data {name}: column {split} has no train: {some(there)}")
        parts, rows = parts_of(there), rows.append_column("split", roles)
        used = pc.is_in(rows["split"], value_set=pa.array(list(parts)))
        log_count(f"rows of other splits in column {split}, left out", len(rows) - pc.sum(used).as_py())
        rows = rows.filter(used)
    rows = _with_labels(name, label, rows, multilabel=multilabel)
    rows, files = _with_files(config.uri, config.root, rows)
    rows = _once_each(name, rows, files, config.max_bad_fraction)
    found = files.take(rows["file"]).append_column("label", rows["label"])
    if split:
        found = found.append_column("split", rows["split"])
    else:
        roles = _roles_of_folders(found["path"])
        if roles is not None:
            parts = parts_of(roles.unique().to_pylist())
        found = found.append_column("split", roles if roles is not None else pa.array([""] * len(found)))
        kept = pc.is_in(found["split"], value_set=pa.array(list(parts)))
        log_count("pictures in folders of other splits, left out", len(found) - pc.sum(kept).as_py())
        found = found.filter(kept)
    hint = f" in {label}; --label-column names another one"
    return Found(found.select(["path", "label", "split", "size", "modified"]), parts, hint, multilabel)


def look_unlabeled(uri: str, given: PathsConfig) -> pa.Table:
    """Find the pictures that a table names, sorted by path.

    Returns:
        A table with the columns path, size and modified of `Found.table`.

    Raises:
        UserError: if it can't be read, or names no pictures that are there.
    """
    name, table = redact(uri), _read(uri)
    rows = pa.table({"name": text_of(name, table, path_column(name, table, given))})
    rows, files = _with_files(uri, given.root, rows)
    return files.take(pc.unique(rows["file"]).sort())


# ------------------------------------------------------------------------------------------------- reading


def _read(uri: str) -> pa.Table:
    """Read a table as it is. Numbers stay numbers, but the values of a CSV file are all text."""
    path = storage.split(uri)[1]
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in _UNREAD:
        raise UserError(
            f"--data {redact(uri)}: tables are read from {', '.join(TABLES)}: save it as one of these"
        )
    try:
        if suffix == ".parquet":
            table = _parquet(uri)
        else:
            content = storage.Folder.open(storage.parent(uri), "--data").read(PurePosixPath(path).name)
            text = _json if suffix in (".jsonl", ".ndjson") else _csv
            table = text(content)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        why = storage.reason(error)
        if isinstance(error, UnicodeDecodeError) or "UTF8" in why:
            why = "it is not text in UTF-8: save it with that encoding, in Excel as CSV UTF-8"
        raise UserError(f"--data {redact(uri)} can't be read: {why}") from error
    if not len(table):
        raise UserError(f"--data {redact(uri)} has no rows")
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise UserError(f"--data {redact(uri)} has several columns named {some(twice)}: rename them")
    return table


def _csv(content: bytes) -> pa.Table:
    """Read a CSV file with all values as text. Its separator is the one that cuts line 1 into most cells."""
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        content = content.decode("utf-16").encode()
    content, separators = content.removeprefix(codecs.BOM_UTF8).lstrip(b"\r\n"), _SEPARATORS
    first, _, rest = content.partition(b"\n")
    if named := re.fullmatch(rb"sep=(.)\r?", first):  # Excel's way
        separators, content = named[1].decode(), rest
    line = next(iter(content[: 1 << 20].decode(errors="ignore").splitlines()), "")
    cells = {one: next(csv.reader([line], delimiter=one), []) for one in separators}
    separator = max(cells, key=lambda one: len(cells[one]))
    names = [cell.strip() for cell in cells[separator]]
    if any(format_by_name(cell) for cell in names):  # without a line of names
        names, skipped = [f"column {number}" for number in range(1, len(names) + 1)], 0
    else:
        skipped = 1
    return arrow_csv.read_csv(
        io.BytesIO(content),
        read_options=arrow_csv.ReadOptions(column_names=names, skip_rows=skipped),
        parse_options=arrow_csv.ParseOptions(delimiter=separator, newlines_in_values=True),
        convert_options=arrow_csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
        ),
    )


def _json(content: bytes) -> pa.Table:
    table = arrow_json.read_json(io.BytesIO(content))
    times = [one.name for one in table.schema if pa.types.is_timestamp(one.type)]  # text that looks like it
    if times:
        text = arrow_json.ParseOptions(explicit_schema=pa.schema([(name, pa.string()) for name in times]))
        table = arrow_json.read_json(io.BytesIO(content), parse_options=text)
    return table


def _parquet(uri: str) -> pa.Table:
    filesystem, path = storage.locate(uri, "--data")
    with filesystem.open_input_file(path) as source:
        file = parquet.ParquetFile(source)
        held = [one.name for one in file.schema_arrow if _holds_bytes(one.type)]
        if held:
            raise UserError(
                f"--data {redact(uri)}: column {held[0]} holds bytes, not paths: if they are pictures, rename "
                "it to image"
            )
        return file.read()


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_holds_bytes(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


# -------------------------------------------------------------------------------------------------- labels


def _with_labels(name: str, columns: LabelColumns, rows: pa.Table, *, multilabel: bool) -> pa.Table:
    """Return the rows that have a label. Log a warning if labels look like one class, or like several."""
    log_count(f"rows without a label in {columns}, left out", rows["label"].null_count)
    rows = rows.filter(pc.is_valid(rows["label"]))
    if not len(rows):
        raise UserError(f"--data {name}: {columns} is empty: name another one with --label-column")
    counts: Counter[str] = Counter()
    for one in rows["label"].value_counts().to_pylist():
        counts.update(dict.fromkeys(classes_in(one["values"], multilabel=multilabel), one["counts"]))
    if not multilabel:
        warn_of_several(columns, counts)
    alike = defaultdict(list)
    for label in counts:
        alike[re.sub(r"[\s_-]+", " ", label).casefold()].append(label)
    several = [
        " and ".join(f"{one} ({counts[one]:,})" for one in sorted(same))
        for same in alike.values()
        if len(same) > 1
    ]
    if several:
        logger.warning(
            "data       labels that differ by case or spaces alone, taken as they are: %s", some(several)
        )
    return rows


# --------------------------------------------------------------------------------------------------- files


def _with_files(uri: str, root: str, rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Find the file that each row names.

    Args:
        uri: path or URI of the table.
        root: `--data-root`.
        rows: table with the column name.

    Returns:
        The rows that name a file, with the file's number in the column file; and all pictures below the root,
        with the columns path (below the root), size and modified, sorted by path.
    """
    name, below, total = redact(uri), root_of(uri, root), len(rows)
    rows = rows.set_column(0, "name", _relative(uri, below, rows["name"]))
    names = rows["name"].combine_chunks()
    folders = parents_of(names.drop_null()).dictionary.to_pylist()
    common = os.path.commonpath(folders) if folders and all(folders) else ""
    if common and not storage.exists(storage.joined(below, common)):
        common = ""
    listed = list_files(storage.joined(below, common))
    files = listed.pictures
    if common:
        paths = pc.binary_join_element_wise(pa.scalar(common), files["path"], "/")
        files = files.set_column(0, "path", paths)
    number = match(names, files["path"].combine_chunks())
    if number.unclear:
        one, *several = number.example
        raise UserError(
            f"--data {name}: rows that may name several files below {redact(below)}: {number.unclear:,}, e.g. "
            f"{one} ({' and '.join(several)}): name the folder that is meant with --data-root"
        )
    there = pc.is_valid(number.files)
    missing = total - pc.sum(there).as_py() if total else 0
    if missing == total:
        example = next(iter(names.drop_null()[:1].to_pylist()), "(empty)")
        others = f"{len(files):,} pictures" if len(files) else "no pictures"
        raise UserError(
            f"--data {name}: none of {total:,} rows names a file, e.g. {example}; {redact(below)} has "
            f"{others}: name the pictures' folder with --data-root, or the column with --path-column"
        )
    if missing:
        lost = names.filter(pc.invert(there)).fill_null("(empty)")[:3].to_pylist()
        logger.warning(
            "data       %s of %s rows named no file below %s, e.g. %s",
            *(f"{missing:,}", f"{total:,}", redact(below), ", ".join(lost)),
        )
    unnamed = np.ones(len(files), bool)
    unnamed[number.files.drop_null()] = False
    if unnamed.any():
        where, example = redact(storage.joined(below, common)), files["path"][int(unnamed.argmax())].as_py()
        log_count(f"pictures below {where} that no row names", int(unnamed.sum()), example)
    return rows.append_column("file", number.files).filter(there), files


def _relative(uri: str, root: str, names: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the names in the rows as paths below the root."""
    place, folder, _ = storage.split(root)
    plain = re.sub(r"://.*@", "://", place)  # credentials are no part of a name
    starts = {f"{place}{folder}", f"{plain}{folder}"}
    if not place:
        starts |= {os.path.realpath(folder)}
        starts |= {f"file://{one}" for one in starts}
    if pc.any(pc.match_substring_regex(names, r"(^|[/\\])\.\.[/\\]")).as_py():
        names = pa.chunked_array(
            [[_resolved(storage.parent(uri), one) for one in names.to_pylist()]], pa.string()
        )
    for start in (one.rstrip("/") for one in starts):
        rest = pc.utf8_ltrim(pc.utf8_slice_codeunits(names, len(start)), "/")
        names = pc.if_else(pc.starts_with(names, f"{start}/"), rest, names)
    names = pc.replace_substring_regex(names, r"^(\.[/\\]+)+", "")
    elsewhere = names.filter(pc.match_substring_regex(names, r"^([/\\]|[A-Za-z]:[/\\]|\w[\w+.-]*://)"))
    if len(elsewhere):
        raise _elsewhere(redact(uri), redact(root), elsewhere)
    return names


def _resolved(folder: str, name: str | None) -> str | None:
    """Return a name that begins with `../` as a whole path, which may lie below `--data-root`."""
    if name is None or not re.search(r"(^|[/\\])\.\.[/\\]", name) or re.match(r"\w[\w+.-]*:", name):
        return name
    place, path, _ = storage.split(folder)
    whole = name if name.startswith("/") else f"{path}/{name}"
    return place + os.path.normpath(whole.replace("\\", "/"))


def _elsewhere(name: str, root: str, names: pa.ChunkedArray) -> UserError:
    one = redact(names[0].as_py())
    start = f"--data {name}: rows that name pictures outside of {root}: {len(names):,}, e.g. {one}"
    if one.startswith(("http://", "https://")):
        return UserError(
            f"{start}: addresses in the web are not read: download the pictures, and give their paths"
        )
    if not one.startswith("/") and "://" not in one:
        return UserError(f"{start}: paths of another system: give paths relative to {root}")
    folders = parents_of(names).dictionary.to_pylist()
    places = {storage.split(folder)[0] for folder in folders}
    if len(places) > 1:
        return UserError(f"{start}, in several places: {some(redact(one) or 'this machine' for one in places)}")
    common = os.path.commonpath([storage.split(folder)[1] for folder in folders])
    return UserError(f"{start}: --data-root {redact(places.pop())}{common} would do")


# -------------------------------------------------------------------------------------------- what is found


def _once_each(name: str, rows: pa.Table, files: pa.Table, fraction: float) -> pa.Table:
    """Return one row for each file, sorted by its number, without files whose rows have different labels."""
    others = [column for column in ("label", "split") if column in rows.column_names]
    asked = [(column, how) for column in others for how in ("first", "count_distinct")]
    groups = rows.group_by("file", use_threads=False).aggregate([*asked, ("label", "count")]).sort_by("file")

    def shown(mask: pa.Array, column: str) -> str:
        found = []
        for file in groups["file"].filter(mask)[:3].to_pylist():
            values = rows[column].filter(pc.equal(rows["file"], file)).unique().to_pylist()
            found.append(f"{files['path'][file].as_py()} ({', '.join(sorted(map(label_for_people, values)))})")
        return "; ".join(found)

    if "split" in others:
        crossing = pc.greater(groups["split_count_distinct"], 1)
        if number := pc.sum(crossing).as_py():
            raise UserError(
                f"--data {name}: pictures in several splits: {number:,}, e.g. {shown(crossing, 'split')}: each "
                "belongs in one"
            )
    unclear = pc.greater(groups["label_count_distinct"], 1)
    if number := pc.sum(unclear).as_py():
        text = f"{number:,} of {len(groups):,} pictures have rows with different labels"
        if number > fraction * len(groups):
            raise UserError(
                f"--data {name}: {text}, e.g. {shown(unclear, 'label')}: keep one label for each, or raise "
                f"--max-bad-fraction {fraction:g}, and they are left out"
            )
        logger.warning("data       %s, and are left out: %s", text, shown(unclear, "label"))
        groups = groups.filter(pc.invert(unclear))
    repeated = pc.sum(groups["label_count"]).as_py() - len(groups)
    log_count("rows that name a picture again, with the same label", repeated)
    return pa.table({"file": groups["file"]} | {column: groups[f"{column}_first"] for column in others})


def _roles_of_folders(paths: pa.ChunkedArray) -> pa.Array | None:
    """Return each picture's split by its folder, such as `train`; None unless all pictures lie in such folders.

    These folders lie directly below the folder that all pictures share.
    """
    parents = parents_of(paths)
    folders = parents.dictionary.to_pylist()
    common = os.path.commonpath(folders) if all(folders) else ""
    roles = [role(one[len(common) :].lstrip("/").split("/")[0]) for one in folders]
    return pa.array(roles, pa.string()).take(parents.indices) if all(roles) and "train" in roles else None
