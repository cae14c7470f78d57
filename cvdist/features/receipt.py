"""Receipts: small files that record a finished work unit, so that a restarted job need not compute it again."""

from __future__ import annotations

import base64
import dataclasses
import json
from dataclasses import dataclass

from cvdist.errors import UserError
from cvdist.features.manifest import ShardEntry
from cvdist.storage import Folder


@dataclass(frozen=True)
class Receipt:
    """The record of a finished work unit.

    Attributes:
        key: key of the work unit.
        shard: the stored shard, or None if no picture can be decoded.
        digests: first 16 bytes of each picture file's SHA-256, of good and bad pictures.
        bad: position in the work unit and reason for each picture that can't be decoded.
    """

    key: str
    shard: ShardEntry | None
    digests: tuple[bytes, ...]
    bad: tuple[tuple[int, str], ...]

    @property
    def pictures(self) -> int:
        """Number of pictures in the work unit."""
        return len(self.digests)


def name_of(key: str) -> str:
    """Return the path of a work unit's receipt below the cache's folder."""
    return f"receipts/{key}.json"


def dump(receipt: Receipt) -> bytes:
    """Write a receipt as JSON."""
    values = {
        "key": receipt.key,
        "shard": dataclasses.asdict(receipt.shard) if receipt.shard else None,
        "pictures": receipt.pictures,
        "digests": base64.b64encode(b"".join(receipt.digests)).decode(),
        "bad": [list(item) for item in receipt.bad],
    }
    return json.dumps(values).encode()


def parse(content: bytes) -> Receipt | None:
    """Parse a receipt that `dump` wrote; None if the content is not a receipt."""
    try:
        values = json.loads(content)
        joined, count = base64.b64decode(values["digests"]), values["pictures"]
        each = len(joined) // count
        return Receipt(
            key=values["key"],
            shard=ShardEntry(**values["shard"]) if values["shard"] else None,
            digests=tuple(joined[i * each : (i + 1) * each] for i in range(count)),
            bad=tuple((int(position), str(why)) for position, why in values["bad"]),
        )
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def find(folder: Folder, key: str) -> Receipt | None:
    """Return the receipt of a work unit whose shard is stored in its full size, or None.

    Raises:
        UserError: if the storage can't be read.
    """
    content = folder.find(name_of(key))
    receipt = parse(content) if content is not None else None
    if receipt is None or receipt.key != key:
        return None
    if receipt.shard is not None and folder.size(receipt.shard.object) != receipt.shard.stored_bytes:
        return None
    return receipt


def require(content: bytes) -> Receipt:
    """Parse a receipt that an extractor has returned.

    Raises:
        UserError: if the content is not a receipt.
    """
    receipt = parse(content)
    if receipt is None:
        raise UserError("an extractor returned something else than a receipt: this is a defect of cvdist")
    return receipt
