"""The manifest: the one file that makes a cache valid. It is written last, and replaced whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from cvdist.data.dataset import BadPicture
from cvdist.errors import UserError
from cvdist.features.fingerprint import Fingerprint
from cvdist.log import redact
from cvdist.storage import Folder

NAME = "manifest.json"
FORMAT, VERSION = "cvdist-features", 1


@dataclass(frozen=True)
class ShardEntry:
    """A shard of the cache; sizes in bytes, checksums hexadecimal, as `cvdist.features.shard.Packed`."""

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
    """The table of all pictures, see `cvdist.features.index`."""

    object: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A whole cache.

    feature_shape: of one view of one picture; source, weights: where pictures and weights came from, for
    records; created: UTC, ISO 8601; bad: pictures that can't be decoded.
    """

    classes: tuple[str, ...]
    feature_shape: tuple[int, ...]
    fingerprint: Fingerprint
    source: str
    weights: str
    created: str
    index: IndexEntry
    shards: tuple[ShardEntry, ...]
    bad: tuple[BadPicture, ...]

    @property
    def raw_bytes(self) -> int:
        """Of all shards, uncompressed."""
        return sum(shard.raw_bytes for shard in self.shards)

    @property
    def stored_bytes(self) -> int:
        """Of all shards, as they are stored."""
        return sum(shard.stored_bytes for shard in self.shards)


def dump(manifest: Manifest) -> bytes:
    """As JSON, with a checksum of itself."""
    values = dataclasses.asdict(manifest) | {"format": FORMAT, "version": VERSION}
    values["fingerprint"] = manifest.fingerprint.to_dict()
    return json.dumps({"sha256": _digest(values), **values}, indent=1).encode()


def parse(content: bytes, uri: str, flag: str = "--features") -> Manifest:
    """Inverse of `dump`. `flag`: where `uri` came from.

    Raises:
        UserError: if it is cut short, changed, or of another version.
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
                "features anew, or use the software that made them"
            )
        if stated != _digest(values):
            raise ValueError("its checksum is not that of its contents")
        manifest = Manifest(
            classes=tuple(values["classes"]),
            feature_shape=tuple(values["feature_shape"]),
            fingerprint=Fingerprint.from_dict(values["fingerprint"]),
            source=values["source"],
            weights=values["weights"],
            created=values["created"],
            index=IndexEntry(**values["index"]),
            shards=tuple(ShardEntry(**shard) for shard in values["shards"]),
            bad=tuple(BadPicture(**picture) for picture in values["bad"]),
        )
        _require_harmless(manifest)
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{where} is damaged ({type(error).__name__}): run jobs/preprocess.py again, which keeps the "
            "shards that are finished"
        ) from error


def _require_harmless(manifest: Manifest) -> None:
    """Names stay within the cache's folder and the node's copy, whoever has written the manifest.

    Raises:
        ValueError: if one does not, or a size is none.
    """
    entries: list[ShardEntry | IndexEntry] = [*manifest.shards, manifest.index]
    for entry in entries:
        inside = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", entry.object, re.ASCII)
        if not inside or not re.fullmatch(r"[0-9a-f]{64}", entry.sha256) or int(entry.rows) < 0:
            raise ValueError(f"{entry.object!r} is no entry of a cache")
    for shard in manifest.shards:
        if not re.fullmatch(r"[0-9a-f]{64}", shard.raw_sha256) or not 0 <= int(shard.raw_bytes) < 1 << 48:
            raise ValueError(f"{shard.object!r} is no shard")


def read(folder: Folder) -> Manifest:
    """The manifest of the cache in `folder`.

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


def _digest(values: dict[str, Any]) -> str:
    # Through JSON and back: tuples become lists.
    plain = json.loads(json.dumps(values))
    plain.pop("sha256", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
