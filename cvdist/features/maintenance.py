"""Commands on an existing cache: describe what it holds, verify its files, delete files that it doesn't use."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import load

from cvdist import log
from cvdist.data.forms import TRAIN_PART, VALID_PART
from cvdist.data.labels import class_counts, label_names, labels_of
from cvdist.errors import UserError
from cvdist.features import build, manifest, shard
from cvdist.features.fingerprint import format_value
from cvdist.features.manifest import Manifest, ShardEntry
from cvdist.log import redact
from cvdist.storage import Folder

logger = logging.getLogger(__name__)

_CHECKERS = 4  # shards at a time
_PARTS = {TRAIN_PART: "training", VALID_PART: "validation"}
_SHOWN_CLASSES = 10


def describe(uri: str) -> str:
    """Return a table that describes what a cache holds.

    Raises:
        UserError: if there is no cache at `uri`, or it is damaged.
    """
    folder = Folder.open(uri, "--describe")
    cache = manifest.read(folder)
    table = build.read_index(folder, cache)
    rows = [("cache", redact(uri)), ("made", f"{cache.created} from {cache.source}")]
    rows += _counts(cache, table) + _sizes(cache, table) + _fingerprint(cache)
    rows.append(("sample", _sample(folder, cache, table)))
    width = max(len(name) for name, _ in rows)
    lines = ["", *(f"  {name:{width}}  {value}" for name, value in rows), ""]
    book = cache.fingerprint.model == "vgg16" and len(cache.feature_shape) == 3
    recipe = "dogs-cats-vgg16-features" if book else f"transfer-features --model {cache.fingerprint.model}"
    lines.append(f"next: python jobs/train.py {recipe} --features {redact(uri)} ...")
    return "\n".join(lines)


def check(uri: str) -> str:
    """Read a whole cache and verify all checksums.

    Returns:
        One line that says that the cache is intact.

    Raises:
        UserError: if anything is missing or damaged; the message names it.
    """
    folder = Folder.open(uri, "--check")
    cache = manifest.read(folder)
    table = build.read_index(folder, cache)
    began, line = time.monotonic(), log.ProgressLine(logger, enabled=True)
    damaged: list[str] = []
    with ThreadPoolExecutor(_CHECKERS) as pool:
        found = pool.map(lambda number: _damage(folder, cache, table, number), range(len(cache.shards)))
        for count, why in enumerate(found, start=1):
            damaged += [why] if why else []
            if line.due():
                line.show(f"checked {count}/{len(cache.shards)} shards")
    line.clear()
    if damaged:
        for why in damaged[1:]:
            logger.warning("damaged    %s", why)
        more = f" (and {len(damaged) - 1} more, named above)" if len(damaged) > 1 else ""
        raise UserError(
            f"--check {redact(uri)}: {len(damaged)} of {len(cache.shards)} shards are damaged: "
            f"{damaged[0]}{more}. Delete what is damaged and run jobs/preprocess.py as before: it computes "
            "these shards again"
        )
    return (
        f"{redact(uri)} is whole: {len(cache.shards)}/{len(cache.shards)} shards, {_good(table):,} pictures, "
        f"{_size(cache.stored_bytes)} in {log.duration(time.monotonic() - began)}"
    )


@dataclass(frozen=True)
class Pruned:
    """The number of files that were deleted, and their bytes."""

    files: int
    bytes: int


def prune(uri: str) -> Pruned:
    """Delete shards, receipts and indexes that the manifest does not name.

    Raises:
        UserError: if there is no cache at `uri`, or it can't be written.
    """
    folder = Folder.open(uri, "--prune")
    cache = manifest.read(folder)
    used = {shard.object for shard in cache.shards} | {cache.index.object}
    keys = {shard.object.removeprefix("shards/")[:32] for shard in cache.shards}
    files = size = 0
    for name, stored in folder.sizes().items():
        place, _, file = name.partition("/")
        ours = place in ("shards", "receipts", "index")
        named = name in used or (place == "receipts" and file.removesuffix(".json") in keys)
        if ours and not named:
            folder.delete(name)
            files, size = files + 1, size + stored
    return Pruned(files, size)


def _damage(folder: Folder, cache: Manifest, table: pa.Table, number: int) -> str:
    """Check a shard, and return what is wrong with it; empty if nothing is."""
    entry = cache.shards[number]
    content = folder.find(entry.object)
    if content is None:
        return f"{entry.object} is missing"
    try:
        raw = shard.unpack(content, entry)
    except shard.DamagedError as error:
        return f"{entry.object}: {error}"
    rows = len(shard.read_ids(raw))
    mine = table.filter(pc.equal(table["shard"], number))
    for path, row in zip(mine["path"].to_pylist(), mine["row"].to_pylist(), strict=True):
        if not 0 <= row < rows:
            return f"{entry.object} has {rows} rows, and the index names row {row} of it for {path}"
    return ""


def _good(table: pa.Table) -> int:
    return int((np.asarray(table.column("shard")) >= 0).sum())


def _counts(cache: Manifest, table: pa.Table) -> list[tuple[str, str]]:
    shards, part = (np.asarray(table.column(name)) for name in ("shard", "part"))
    good = shards >= 0
    parts = ", ".join(
        f"{int((part[good] == value).sum()):,} {_PARTS.get(value, 'without a split')}"
        for value in sorted(set(part.tolist()))
    )
    labels = labels_of(table.filter(pa.array(good)), len(cache.classes))
    counts = class_counts(labels, len(cache.classes)).tolist()
    named = [f"{name} {count:,}" for name, count in zip(cache.classes, counts, strict=True)]
    none = f", {int((labels.sum(1) == 0).sum()):,} pictures of none" if cache.multilabel else ""
    several = f", any number a picture{none}" if cache.multilabel else ""
    more = f" and {len(named) - _SHOWN_CLASSES} more" if len(named) > _SHOWN_CLASSES else ""
    bad = f"{len(cache.bad):,}" + (f", e.g. {cache.bad[0].path} ({cache.bad[0].reason})" if cache.bad else "")
    return [
        ("pictures", f"{_good(table):,}: {parts}"),
        ("classes", f"{len(named)}{several}: {', '.join(named[:_SHOWN_CLASSES])}{more}"),
        ("bad pictures", bad),
    ]


def _sizes(cache: Manifest, table: pa.Table) -> list[tuple[str, str]]:
    written = sum(entry.rows for entry in cache.shards)
    values = sum(entry.rows * entry.views for entry in cache.shards) * int(np.prod(cache.feature_shape))
    zeros = sum(entry.zeros for entry in cache.shards)
    pictures = max(_good(table), 1)
    files = int(np.asarray(table.column("size")).sum())
    shape = "x".join(map(str, cache.feature_shape))
    stale = f", {written - _good(table):,} rows of pictures that are gone" if written > _good(table) else ""
    return [
        ("features", f"{shape}, {cache.fingerprint.dtype}, {cache.fingerprint.views} view(s) to learn from"),
        ("shards", f"{len(cache.shards)}{stale}"),
        ("stored", f"{_size(cache.stored_bytes)}, {_size(cache.stored_bytes / pictures)} a picture"),
        ("on a node", f"{_size(cache.raw_bytes)}, {_size(cache.raw_bytes / pictures)} a picture"),
        ("the pictures' files", f"{_size(files)}, {_size(files / max(len(table), 1))} a picture"),
        ("zeros", f"{100 * zeros / max(values, 1):.1f}% of the values"),
    ]


def _fingerprint(cache: Manifest) -> list[tuple[str, str]]:
    mark = cache.fingerprint
    views = f"; views by {format_value(mark.augmentation)}" if mark.augmentation else ""
    normalized = f"mean {_short(mark.mean)}, deviation {_short(mark.std)}"
    return [
        ("model", f"{mark.model} up to {mark.cut}, precision {mark.precision}"),
        ("weights", f"{cache.weights}, frozen layers sha256 {mark.weights[:16]}"),
        ("preprocessing", f"{mark.size}x{mark.size} ({mark.resize}), {normalized}{views}"),
    ]


def _sample(folder: Folder, cache: Manifest, table: pa.Table) -> str:
    """Describe the features of the first good picture."""
    first = table.filter(pc.greater_equal(table["shard"], 0)).slice(0, 1)
    if not len(first):
        return "none"
    (one,), (name,) = first.to_pylist(), label_names(labels_of(first, len(cache.classes)), cache.classes)
    entry: ShardEntry = cache.shards[one["shard"]]
    try:
        raw = shard.unpack(folder.read(entry.object), entry)
    except shard.DamagedError as error:
        raise UserError(f"--describe {redact(folder.uri)}: {entry.object}: {error}") from error
    values = load(raw)["features"][one["row"], 0].to(torch.float32)
    return (
        f"{one['path']} ({name}): mean {values.mean():.3f}, largest {values.max():.2f}, "
        f"{100 * (values == 0).float().mean():.0f}% zeros"
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def _short(values: Sequence[float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)
