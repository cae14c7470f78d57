"""Carries out an extraction, from its plan to its manifest. The caller decides how shards are computed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from cvdist import models, resumable_map, storage
from cvdist.config import PreprocessConfig, cache_folder
from cvdist.data.forms import VALID_PART, root_of
from cvdist.data.images.listing import Listing, list_pictures
from cvdist.data.images.measures import MEASURES
from cvdist.data.images.versions import by_content, with_versions
from cvdist.data.labels import is_multilabel
from cvdist.data.quarantine import BadPicture
from cvdist.errors import UserError
from cvdist.features import changes as comparing
from cvdist.features import fingerprint as fingerprints
from cvdist.features import index, manifest, shard
from cvdist.features.changes import Changes
from cvdist.features.fingerprint import Fingerprint
from cvdist.features.manifest import IndexEntry, Manifest, ShardEntry
from cvdist.log import redact
from cvdist.resumable_map import Compute, MapPlan, Receipt, ResultStore, WorkUnit
from cvdist.storage import Folder

logger = logging.getLogger(__name__)

_PLACE = ("digest", "shard", "row", *MEASURES)  # columns of the index that the listing does not have


@dataclass(frozen=True)
class ExtractionPlan:
    """The plan of an extraction.

    Attributes:
        fingerprint: fingerprint of the features that are asked for.
        listing: the pictures.
        before: manifest of the existing cache; None if there is none.
        known: index of the existing cache, or an empty one.
        changes: differences between the index and the listing.
        shards: the work units, one per new shard, and which of them earlier attempts have finished.
    """

    fingerprint: Fingerprint
    listing: Listing
    before: Manifest | None
    known: pa.Table
    changes: Changes
    shards: MapPlan


@dataclass(frozen=True)
class BuiltCache:
    """The result of an extraction. `computed`: number of pictures; `seconds`: time to compute them."""

    manifest: Manifest
    computed: int
    seconds: float


def check(config: PreprocessConfig) -> None:
    """Check that the cache at `--features` can be made or updated, without looking at the pictures.

    Raises:
        UserError: if it can't be written, or holds features that were made with other settings.
    """
    folder = Folder.open(config.features.uri, "--features")
    storage.check_writable(folder.uri, "--features")
    _existing(folder, fingerprints.for_extraction(config), replace=config.features.replace)


def make_plan(config: PreprocessConfig) -> ExtractionPlan:
    """Compare the pictures with the cache at `--features`, and plan what has to be computed.

    Raises:
        UserError: if the pictures can't be read, the cache can't be written, or it holds features that were
            made with other settings.
    """
    store = ResultStore.open(config.features.uri, "--features", "shards", shard.SUFFIX)
    storage.check_writable(store.folder.uri, "--features")
    listing = list_pictures(config.data)  # first: the fingerprint may download weights
    listing = replace(listing, table=with_versions(listing.table, root_of(config.data), cache_folder("")))
    asked = fingerprints.for_extraction(config)
    before = _existing(store.folder, asked, replace=config.features.replace)
    known = index.SCHEMA.empty_table()
    if before is not None:
        known = comparing.with_labels_as_in(listing, read_index(store.folder, before), before.classes)
    changes = comparing.find_changes(listing.table, known, root_of(config.data))
    files = store.folder.sizes()
    if before is not None:
        rows = [s.rows if files.get(s.object) == s.stored_bytes else 0 for s in before.shards]
        changes = comparing.without_sparse_shards(changes, known, rows)
    units = _work_units(listing.table, changes.to_compute, asked, config.features.shard_size)
    return ExtractionPlan(asked, listing, before, known, changes, store.plan(units, files))


def _work_units(
    listing: pa.Table, rows: np.ndarray, fingerprint: Fingerprint, shard_size: int
) -> list[WorkUnit]:
    """Cut `rows` of the listing into shards. Validation pictures, which need one view, get their own shards."""
    valid = np.asarray(listing.column("part"))[rows] == VALID_PART
    units = []
    for mine, views in ((rows[~valid], fingerprint.views), (rows[valid], 1)):
        table = listing.select(index.COMPUTED).take(pa.array(mine))
        identity = {"format": manifest.VERSION, "fingerprint": fingerprint.to_dict(), "views": views}
        units += resumable_map.work_units(table, identity, resumable_map.equal_bounds(len(mine), shard_size))
    return units


def build(config: PreprocessConfig, todo: ExtractionPlan, compute: Compute) -> BuiltCache:
    """Compute the shards that are missing, then write the manifest.

    Args:
        config: configuration of the extraction.
        todo: what has to be done, from `make_plan`.
        compute: computes work units.

    Raises:
        UserError: if `compute` raises it, or too many pictures can't be decoded.
    """
    _announce(todo)
    mapped = resumable_map.run(
        todo.shards,
        compute,
        noun="shards",
        data=config.data.uri,
        pictures=len(todo.listing.table),
        max_bad_fraction=config.data.max_bad_fraction,
        known_bad=_known_bad(todo),
    )
    made = _finish(config, todo, mapped.receipts, mapped.bad)
    return BuiltCache(made, mapped.computed, mapped.seconds)


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
    """Return the manifest of an existing cache that can be updated, or None."""
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


def _announce(todo: ExtractionPlan) -> None:
    shards, views = todo.shards, todo.fingerprint.views
    if todo.before is not None:
        text = todo.changes.describe(todo.listing.table) or "no picture has changed"
        logger.info("features   %s since the cache was written", text)
    if shards.done:
        logger.info("features   %d of %d shards are there already", len(shards.done), len(shards.units))
    if shards.left:
        logger.info(
            "features   %s of %s pictures to compute, in %d shards%s",
            f"{sum(len(unit.paths) for unit in shards.left):,}",
            f"{len(todo.listing.table):,}",
            len(shards.left),
            f", {views} views of those to learn from" if views > 1 else "",
        )


def _known_bad(todo: ExtractionPlan) -> list[BadPicture]:
    """Return the pictures that could not be decoded when the cache was written, and have not changed."""
    if todo.before is None:
        return []
    now = todo.listing.table.column("path").take(pa.array(todo.changes.kept)).to_pylist()
    then = todo.known.column("path").take(pa.array(todo.changes.index_rows)).to_pylist()
    path = dict(zip(then, now, strict=True))
    return [BadPicture(path[one.path], one.reason) for one in todo.before.bad if one.path in path]


def _finish(
    config: PreprocessConfig, todo: ExtractionPlan, receipts: Sequence[Receipt], bad: tuple[BadPicture, ...]
) -> Manifest:
    """Write index, quarantine and manifest, in this order, so that a manifest names only existing files."""
    table, shards = _table(todo, receipts)
    content = index.dump(table)
    sha = hashlib.sha256(content).hexdigest()
    entry = IndexEntry(f"index/{sha[:16]}{index.SUFFIX}", len(table), len(content), sha)
    backbone = models.build_frozen(config.model, todo.fingerprint.size)
    size = todo.fingerprint.size
    made = Manifest(
        classes=todo.listing.classes,
        multilabel=is_multilabel(todo.listing.table),
        feature_shape=backbone.feature_shape(3, size, size),
        fingerprint=todo.fingerprint,
        source=redact(config.data.uri),
        root=redact(root_of(config.data)),
        weights=backbone.source,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        index=entry,
        shards=tuple(shards),
        bad=bad,
    )
    before = todo.before
    if before is not None and _same(before, made):
        return before
    todo.shards.store.folder.write(entry.object, content)
    todo.shards.store.publish(manifest.dump(made), bad)
    return made


def _table(todo: ExtractionPlan, receipts: Sequence[Receipt]) -> tuple[pa.Table, list[ShardEntry]]:
    """Build the new index and the list of shards that it refers to."""
    kept = todo.known.select(_PLACE).take(pa.array(todo.changes.index_rows)).to_pydict()
    kept["path"] = todo.listing.table.column("path").take(pa.array(todo.changes.kept)).to_pylist()
    used = sorted(set(kept["shard"]) - {-1})
    shards = [todo.before.shards[number] for number in used] if todo.before else []
    renumbered = {number: i for i, number in enumerate(used)} | {-1: -1}
    found: dict[str, tuple[object, ...]] = {}  # what `_PLACE` names, by path
    for path, digest, number, *rest in zip(*(kept[name] for name in ("path", *_PLACE)), strict=True):
        found[path] = digest, renumbered[number], *rest
    nothing = [0.0] * len(MEASURES)
    for unit, receipt in zip(todo.shards.units, receipts, strict=True):
        bad = {picture.path for picture in receipt.bad}
        row = 0
        for path, digest in zip(unit.paths, receipt.values["digests"], strict=True):
            place = (-1, -1, *nothing) if path in bad else (len(shards), row, *receipt.values["measures"][row])
            found[path] = bytes.fromhex(digest), *place
            row += path not in bad
        if receipt.object:
            shards.append(ShardEntry(receipt.object, stored_bytes=receipt.size, **receipt.values["shard"]))
    table, schema = todo.listing.table, index.schema_of(todo.listing.table)
    columns = zip(*(found[path] for path in table.column("path").to_pylist()), strict=True)
    for name, column in zip(_PLACE, columns, strict=True):
        table = table.append_column(name, pa.array(column, index.SCHEMA.field(name).type))
    return by_content(table.select(schema.names).cast(schema)), shards


def _same(before: Manifest, made: Manifest) -> bool:
    """Return whether the new manifest differs from the old one in nothing but its date."""
    mine, theirs = ((found.classes, found.index, found.shards, found.bad) for found in (before, made))
    return mine == theirs
