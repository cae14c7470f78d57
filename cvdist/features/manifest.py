"""The manifest, the file that makes a cache valid. It is written last, and replaced atomically."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

from cvdist.data.quarantine import BadPicture
from cvdist.errors import UserError
from cvdist.features.fingerprint import Fingerprint
from cvdist.log import redact
from cvdist.resumable_map import MANIFEST, checksum, with_checksum
from cvdist.storage import Folder

NAME = MANIFEST
FORMAT, VERSION = "cvdist-features", 3


@dataclass(frozen=True)
class ShardEntry:
    """A shard of the cache, with its sizes and checksums.

    Attributes:
        object: path below the cache's folder.
        rows: number of pictures.
        views: number of views of each picture.
        stored_bytes: size in bytes as stored.
        raw_bytes: size in bytes without compression.
        sha256: hexadecimal checksum of the stored file.
        raw_sha256: hexadecimal checksum without compression.
        zeros: number of feature values that are zero.
    """

    object: str
    rows: int
    views: int
    stored_bytes: int
    raw_bytes: int
    sha256: str
    raw_sha256: str
    zeros: int


@dataclass(frozen=True)
class IndexEntry:
    """The index file (`cvdist.features.index`): its path below the cache's folder, rows, bytes and checksum."""

    object: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Description of a complete cache.

    Attributes:
        classes: names of the classes, in the order of their labels.
        feature_shape: shape of one view of one picture.
        fingerprint: everything that features depend on besides the pictures.
        source: where the pictures came from, as the user named it.
        root: folder or URI that the paths in the index are relative to.
        weights: where the weights came from, for records.
        created: time in UTC, ISO 8601.
        index: the index file.
        shards: the shards, in the order of their numbers.
        bad: pictures that can't be decoded.
        multilabel: whether a picture may have several classes, or none.
    """

    classes: tuple[str, ...]
    feature_shape: tuple[int, ...]
    fingerprint: Fingerprint
    source: str
    root: str
    weights: str
    created: str
    index: IndexEntry
    shards: tuple[ShardEntry, ...]
    bad: tuple[BadPicture, ...]
    multilabel: bool = False

    @property
    def raw_bytes(self) -> int:
        """Size of all shards in bytes, uncompressed."""
        return sum(shard.raw_bytes for shard in self.shards)

    @property
    def stored_bytes(self) -> int:
        """Size of all shards in bytes, as stored."""
        return sum(shard.stored_bytes for shard in self.shards)


def dump(manifest: Manifest) -> bytes:
    """Write a manifest as JSON that contains its own checksum."""
    values = dataclasses.asdict(manifest) | {"format": FORMAT, "version": VERSION}
    values["fingerprint"] = manifest.fingerprint.to_dict()
    return with_checksum(values, indent=1)


def parse(content: bytes, uri: str, flag: str = "--features") -> Manifest:
    """Parse a manifest that `dump` wrote.

    Args:
        content: content of the file.
        uri: where the cache is, for messages.
        flag: the command line flag that named the cache, for messages.

    Raises:
        UserError: if the content is truncated, changed, or of another version.
    """
    where = f"{flag} {redact(uri)}: {NAME}"
    try:
        values: dict[str, Any] = json.loads(content)
        stated = values.pop("sha256")
        if values["format"] != FORMAT:
            raise UserError(f"{where} is not that of a feature cache")
        if values["version"] != VERSION:
            raise UserError(
                f"{where} is of version {values['version']}, and this software reads {VERSION}: extract the "
                "features again, or use the software that made them"
            )
        if stated != checksum(values):
            raise ValueError("its checksum is not that of its contents")
        manifest = Manifest(
            classes=tuple(values["classes"]),
            feature_shape=tuple(values["feature_shape"]),
            fingerprint=Fingerprint.from_dict(values["fingerprint"]),
            source=values["source"],
            root=values["root"],
            weights=values["weights"],
            created=values["created"],
            index=IndexEntry(**values["index"]),
            shards=tuple(ShardEntry(**shard) for shard in values["shards"]),
            bad=tuple(BadPicture(**picture) for picture in values["bad"]),
            multilabel=values["multilabel"],
        )
        _require_harmless(manifest)
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{where} is damaged ({type(error).__name__}): run jobs/preprocess.py again, which keeps the "
            "shards that are finished"
        ) from error


def _require_harmless(manifest: Manifest) -> None:
    """Check that no path in a manifest leads out of the cache's folder, in case somebody has forged it."""
    entries: list[ShardEntry | IndexEntry] = [*manifest.shards, manifest.index]
    for entry in entries:
        inside = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", entry.object, re.ASCII)
        if not inside or not re.fullmatch(r"[0-9a-f]{64}", entry.sha256) or int(entry.rows) < 0:
            raise ValueError(f"{entry.object!r} is no entry of a cache")
    for shard in manifest.shards:
        if not re.fullmatch(r"[0-9a-f]{64}", shard.raw_sha256) or not 0 <= int(shard.raw_bytes) < 1 << 48:
            raise ValueError(f"{shard.object!r} is no shard")


def read(folder: Folder) -> Manifest:
    """Read the manifest of the cache in `folder`.

    Raises:
        UserError: if there is none, or it can't be used.
    """
    content = folder.find(NAME)
    if content is None:
        raise UserError(
            f"{folder.flag} {redact(folder.uri)} has no {NAME}, so no finished cache: make it with "
            "python jobs/preprocess.py RECIPE --data PICTURES --features "
            f"{redact(folder.uri)}"
        )
    return parse(content, folder.uri, folder.flag)
