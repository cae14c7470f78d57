"""An extraction from its plan to its manifest. How the shards are computed is up to the caller."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from cvdist import log, models, storage
from cvdist.config import PreprocessConfig
from cvdist.data.images.listing import Listing, list_pictures
from cvdist.data.quarantine import QUARANTINE, BadPicture, quarantine_csv, require_few_bad
from cvdist.errors import UserError
from cvdist.features import fingerprint as fingerprints
from cvdist.features import index, manifest, plan, receipt
from cvdist.features.fingerprint import Fingerprint
from cvdist.features.manifest import IndexEntry, Manifest, ShardEntry
from cvdist.features.plan import Changes, WorkUnit
from cvdist.features.receipt import Receipt
from cvdist.log import redact
from cvdist.storage import Folder

logger = logging.getLogger(__name__)

_READERS = 16  # receipts at a time

Compute = Callable[[Sequence[WorkUnit]], Iterator[Receipt | None]]
"""Makes the shards of slices, in any order; None now and then, while there is nothing new."""


@dataclass(frozen=True)
class ExtractionPlan:
    """The plan of an extraction: which work units exist and which have no receipt yet.

    known: index of the cache that is there, or an empty one; changes: from it to the listing; work: all slices,
    of which `done` has those that an earlier attempt has finished.
    """

    fingerprint: Fingerprint
    listing: Listing
    before: Manifest | None
    known: pa.Table
    changes: Changes
    work: list[WorkUnit]
    done: dict[str, Receipt]

    @property
    def left(self) -> list[WorkUnit]:
        """The work units that have to be computed."""
        return [work for work in self.work if work.key not in self.done]


@dataclass(frozen=True)
class BuiltCache:
    """What an extraction has done. computed: pictures; seconds: that it took to compute them."""

    manifest: Manifest
    computed: int
    seconds: float


def make_plan(config: PreprocessConfig) -> ExtractionPlan:
    """Compare the pictures with the cache at `--features`, and plan what has to be computed.

    Raises:
        UserError: if the pictures can't be read, the cache can't be written, or it holds features that were
            made with other settings.
    """
    folder = Folder.open(config.features.uri, "--features")
    storage.check_writable(folder.uri, "--features")
    asked = fingerprints.for_extraction(config)
    listing = list_pictures(config.data)
    before = _existing(folder, asked, replace=config.features.replace)
    if before is None:
        known = index.SCHEMA.empty_table()
        sizes: dict[str, int] = {}
    else:
        known = read_index(folder, before)
        sizes = folder.sizes()
    changes = plan.find_changes(listing.table, known, plan.digests_of(config.data.uri))
    if before is not None:
        rows = [s.rows if sizes.get(s.object) == s.stored_bytes else 0 for s in before.shards]
        changes = plan.without_sparse_shards(changes, known, rows)
    work = plan.work_units(listing.table, changes.to_compute, asked, config.features.shard_size)
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda slice: receipt.find(folder, slice.key), work)
        done = {slice.key: one for slice, one in zip(work, found, strict=True) if one is not None}
    return ExtractionPlan(asked, listing, before, known, changes, work, done)


def build(config: PreprocessConfig, todo: ExtractionPlan, compute: Compute) -> BuiltCache:
    """Compute the shards that are missing, then write the manifest.

    Args:
        config: configuration of the extraction.
        todo: what has to be done, from `make_plan`.
        compute: computes work units.

    Raises:
        UserError: if `compute` raises it, or too many pictures can't be decoded.
    """
    folder = Folder.open(config.features.uri, "--features", patient=True)
    left, done = todo.left, dict(todo.done)
    total = sum(len(slice.paths) for slice in todo.work)
    _announce(todo, total)
    finished = sum(one.pictures for one in done.values())
    began, already = time.monotonic(), finished
    line = log.ProgressLine(logger, enabled=True)
    paths = {work.key: work.paths for work in todo.work}
    bad = [BadPicture(paths[one.key][i], why) for one in done.values() for i, why in one.bad]
    pictures = len(todo.listing.table)
    for one in compute(left) if left else ():
        if one is not None:
            done[one.key] = one
            finished += one.pictures
            bad += [BadPicture(paths[one.key][i], why) for i, why in one.bad]
            _require_few_bad(config, pictures, bad)
        if line.due():
            rate = (finished - already) / (time.monotonic() - began)
            left_text = f"about {log.duration((total - finished) / rate)} left" if rate else "the first ones"
            line.show(
                f"{finished:,}/{total:,} pictures, {len(done)}/{len(todo.work)} shards, {rate:,.1f} images/s, "
                f"{left_text}"
            )
    line.clear()
    seconds = time.monotonic() - began
    made = _finish(config, folder, todo, [done[slice.key] for slice in todo.work])
    return BuiltCache(made, finished - already, seconds)


def read_index(folder: Folder, cache: Manifest) -> pa.Table:
    """Read the index of a cache and check it.

    Raises:
        UserError: if it is missing or damaged.
    """
    content = folder.read(cache.index.object)
    return parse_index(content, folder, cache)


def parse_index(content: bytes, folder: Folder, cache: Manifest) -> pa.Table:
    """Parse the content of an index file after comparing its checksum with the manifest.

    Raises:
        UserError: if the checksums differ.
    """
    if hashlib.sha256(content).hexdigest() != cache.index.sha256:
        raise UserError(
            f"--features {redact(folder.uri)}: {cache.index.object} is damaged (checksum): delete "
            f"{manifest.NAME} and run jobs/preprocess.py again, which keeps the shards that are finished"
        )
    return index.load(content)


def _existing(folder: Folder, asked: Fingerprint, *, replace: bool) -> Manifest | None:
    """Return the manifest of an existing cache that can be updated, or None.

    Raises:
        UserError: if it holds features that were made with other settings, and `replace` is false.
    """
    content = folder.find(manifest.NAME)
    if content is None:
        return None
    try:
        found = manifest.parse(content, folder.uri)
    except UserError as error:
        logger.warning("features   %s: it is made again", error)
        return None
    differences = found.fingerprint.differences(asked)
    if differences and not replace:
        raise UserError(
            f"--features {redact(folder.uri)} holds features that were made otherwise "
            f"({'; '.join(differences)}): name another place, or replace them with --replace"
        )
    return None if differences else found


def _announce(todo: ExtractionPlan, total: int) -> None:
    if todo.before is not None:
        text = todo.changes.describe(todo.listing.table) or "no picture has changed"
        logger.info("features   %s since the cache was written", text)
    if todo.done:
        logger.info("features   %d of %d shards are there already", len(todo.done), len(todo.work))
    if todo.left:
        views = todo.fingerprint.views
        logger.info(
            "features   %s of %s pictures to compute, in %d shards%s",
            f"{sum(len(slice.paths) for slice in todo.left):,}",
            f"{len(todo.listing.table):,}",
            len(todo.left),
            f", {views} views of those to learn from" if views > 1 else "",
        )


def _require_few_bad(config: PreprocessConfig, pictures: int, bad: Sequence[BadPicture]) -> None:
    require_few_bad(bad, pictures=pictures, fraction=config.data.max_bad_fraction, uri=config.data.uri)


def _finish(
    config: PreprocessConfig, folder: Folder, todo: ExtractionPlan, receipts: Sequence[Receipt]
) -> Manifest:
    """Write index, quarantine and manifest, in this order, so that a manifest names only existing files."""
    table, shards = _table(todo, receipts)
    reasons = _reasons(todo, receipts)
    bad = tuple(BadPicture(path, reasons.get(path, "unknown")) for path in _bad_paths(table))
    _require_few_bad(config, len(table), bad)
    content = index.dump(table)
    sha = hashlib.sha256(content).hexdigest()
    entry = IndexEntry(f"index/{sha[:16]}{index.SUFFIX}", len(table), len(content), sha)
    backbone = models.build_frozen(config.model)
    size = todo.fingerprint.size
    made = Manifest(
        classes=todo.listing.classes,
        feature_shape=backbone.feature_shape(3, size, size),
        fingerprint=todo.fingerprint,
        source=redact(config.data.uri),
        weights=backbone.source,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        index=entry,
        shards=tuple(shards),
        bad=bad,
    )
    before = todo.before
    if before is not None and _same(before, made):
        return before
    folder.write(entry.object, content)
    folder.write(QUARANTINE, quarantine_csv(bad).encode())
    folder.write(manifest.NAME, manifest.dump(made))
    return made


def _table(todo: ExtractionPlan, receipts: Sequence[Receipt]) -> tuple[pa.Table, list[ShardEntry]]:
    """Build the new index and the list of shards that it refers to."""
    changes, known = todo.changes, todo.known
    listed = todo.listing.table.select(index.LISTED)
    old = np.asarray(known.column("shard"))[changes.of]
    used = sorted(set(old[old >= 0].tolist()))
    before = todo.before.shards if todo.before else ()
    shards = [before[number] for number in used]
    renumbered = {number: i for i, number in enumerate(used)} | {-1: -1}
    position = {path: i for i, path in enumerate(listed.column("path").to_pylist())}
    shard = np.full(len(listed), -1, dtype=np.int32)
    row = np.full(len(listed), -1, dtype=np.int32)
    digest = np.zeros((len(listed), index.DIGEST_BYTES), dtype=np.uint8)
    shard[changes.kept] = [renumbered[number] for number in old.tolist()]
    row[changes.kept] = np.asarray(known.column("row"))[changes.of]
    kept_digests = known.column("digest").take(pa.array(changes.of)).to_pylist()
    if kept_digests:
        digest[changes.kept] = np.frombuffer(b"".join(kept_digests), np.uint8).reshape(-1, index.DIGEST_BYTES)
    for work, one in zip(todo.work, receipts, strict=True):
        places = np.array([position[path] for path in work.paths])
        digest[places] = np.frombuffer(b"".join(one.digests), np.uint8).reshape(-1, index.DIGEST_BYTES)
        good = np.ones(len(places), dtype=bool)
        good[[i for i, _ in one.bad]] = False
        if one.shard is not None:
            shard[places[good]] = len(shards)
            row[places[good]] = np.arange(good.sum())
            shards.append(one.shard)
    fixed = pa.Array.from_buffers(
        pa.binary(index.DIGEST_BYTES), len(listed), [None, pa.py_buffer(np.ascontiguousarray(digest))]
    )
    table = listed.append_column("digest", fixed)
    table = table.append_column("shard", pa.array(shard)).append_column("row", pa.array(row))
    return table.cast(index.SCHEMA), shards


def _bad_paths(table: pa.Table) -> list[str]:
    bad = pa.array(np.asarray(table.column("shard")) < 0)
    paths: list[str] = table.column("path").filter(bad).to_pylist()
    return paths


def _reasons(todo: ExtractionPlan, receipts: Sequence[Receipt]) -> dict[str, str]:
    """Return why pictures can't be decoded, by path, from the old manifest and the new receipts."""
    reasons = {picture.path: picture.reason for picture in (todo.before.bad if todo.before else ())}
    for work, one in zip(todo.work, receipts, strict=True):
        reasons |= {work.paths[position]: why for position, why in one.bad}
    return reasons


def _same(before: Manifest, made: Manifest) -> bool:
    """Return whether the new manifest differs from the old one in nothing but its date."""
    mine, theirs = ((found.classes, found.index, found.shards, found.bad) for found in (before, made))
    return mine == theirs
