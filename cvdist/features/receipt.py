"""What is known of a finished shard, kept beside it, so that a job that goes on need not compute it again."""

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
    """A slice that is done.

    key: of the slice; shard: None if none of its pictures can be decoded; digests: 16 bytes of each picture of
    the slice, good or bad; bad: (position in the slice, reason).
    """

    key: str
    shard: ShardEntry | None
    digests: tuple[bytes, ...]
    bad: tuple[tuple[int, str], ...]

    @property
    def pictures(self) -> int:
        """Of the slice."""
        return len(self.digests)


def name_of(key: str) -> str:
    """Where the receipt of a slice is."""
    return f"receipts/{key}.json"


def dump(receipt: Receipt) -> bytes:
    """As JSON."""
    values = {
        "key": receipt.key,
        "shard": dataclasses.asdict(receipt.shard) if receipt.shard else None,
        "pictures": receipt.pictures,
        "digests": base64.b64encode(b"".join(receipt.digests)).decode(),
        "bad": [list(item) for item in receipt.bad],
    }
    return json.dumps(values).encode()


def parse(content: bytes) -> Receipt | None:
    """Inverse of `dump`; None for what is none."""
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
    """The receipt of a slice whose shard is there in its full size, or None.

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
    """What `dump` has written, from this process or another.

    Raises:
        UserError: if it is not a receipt.
    """
    receipt = parse(content)
    if receipt is None:
        raise UserError("an extractor returned something else than a receipt: this is a defect of cvdist")
    return receipt
